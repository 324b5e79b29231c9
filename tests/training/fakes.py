"""A service that answers from a table, and clips whose file holds nothing but their name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from training.evaluation.client import Upload
from training.manifest import Clip

T = TypeVar("T")
R = TypeVar("R")


def make_clip(folder: Path, key: str, **fields: Any) -> Clip:
    """A clip of one second in corpus `made`, split dev, unless `fields` say otherwise."""
    path = folder / f"{key.replace('/', '_')}.wav"
    path.write_text(key)
    base = {
        "corpus": "made", "split": "dev", "speaker": "", "keyword": "", "transcript": "", "language": "en",
        "duration_s": 1.0,
    }  # fmt: skip
    return Clip(path=path, key=key, **{**base, **fields})


class FakeClient:
    """Stands in for ServiceClient: `answers` maps a clip's key to the body of its detection."""

    def __init__(self, answers: Mapping[str, dict[str, Any]] | None = None, labels: Sequence[str] = ()) -> None:
        self.answers = dict(answers or {})
        self.labels = list(labels)
        self.queries: list[dict[str, Any]] = []
        self.profiles: dict[str, list[str]] = {}
        # (score, cosine) of an enrolled id and a clip's key; None where no speech is heard.
        self.score: Callable[[str, str], tuple[float, float] | None] = lambda _id, _key: (0.0, 0.0)
        # By the bytes of the clip; None where no speech is heard.
        self.embedding: Callable[[bytes], list[float] | None] = lambda _data: [1.0, 0.0]
        self.status = "enrolled"
        self.refused: set[str] = set()

    def model(self) -> dict[str, Any]:
        return {"name": "made", "version": 1}

    def keywords(self) -> list[str]:
        return self.labels

    def thresholds(self) -> dict[str, float]:
        return {"en:alexa": 0.6} | dict.fromkeys(self.labels, 0.6)

    def detect(self, upload: Upload, **query: Any) -> dict[str, Any]:
        self.queries.append(query)
        return self.answers.get(upload.data.decode(), {"detections": [], "top": [{"keyword": "none", "score": 0.0}]})

    def enrol(self, speaker_id: str, uploads: Sequence[Upload]) -> dict[str, Any]:
        keys = [upload.data.decode() for upload in uploads]
        self.profiles[speaker_id] = keys
        return {"status": self.status, "clips": [{"accepted": key not in self.refused} for key in keys]}

    def compare(self, upload: Upload, speaker_ids: Sequence[str]) -> dict[str, dict[str, Any]] | None:
        found = {speaker_id: self.score(speaker_id, upload.data.decode()) for speaker_id in speaker_ids}
        heard = {name: {"score": one[0], "cosine": one[1]} for name, one in found.items() if one is not None}
        return heard or None

    def speaker_embedding(self, upload: Upload) -> list[float] | None:
        return self.embedding(upload.data)

    def delete(self, speaker_id: str) -> None:
        self.profiles.pop(speaker_id, None)

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        return [work(item) for item in items]
