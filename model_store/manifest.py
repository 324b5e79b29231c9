"""`manifest.json`: all that a service needs to know about a bundle.

Strict: unknown keys and wrong types are refused, so a typo can never silently switch a default on.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
VERSION_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}@[1-9][0-9]{0,8}$"
# One path component: no slash, no leading dot, nothing a shell or a URL would read otherwise.
FILE_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"
LABEL_PATTERN = r"^[a-z]{2,3}(-[A-Za-z0-9]{2,8})*:\S(.{0,62}\S)?$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
FileName = Annotated[str, Field(pattern=FILE_PATTERN)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """One file of the bundle, checked byte for byte before use."""

    sha256: str = Field(pattern=SHA256_PATTERN)
    size: int = Field(ge=0, le=2**31)


class AudioLimits(_Strict):
    """What the graph accepts."""

    sample_rate_hz: Literal[16_000] = 16_000
    shortest_s: Finite = Field(gt=0)
    longest_s: Finite = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> AudioLimits:
        if self.shortest_s >= self.longest_s:
            raise ValueError("shortest_s must be below longest_s")
        return self


class GraphInfo(_Strict):
    """The ONNX file that maps clips to outputs."""

    file: FileName
    opset: int = Field(ge=13, le=30)
    parameters: int = Field(gt=0)
    # How the file keeps most kernels and matrices, and in what most of a clip is computed; streams are in float32.
    weights: Literal["float32", "int8"] = "float32"
    arithmetic: Literal["float32", "int8"] = "float32"


class StreamInfo(_Strict):
    """The ONNX file that gives the keyword logits of audio that is still coming (model_store/streaming.py)."""

    file: FileName
    # A frame's logits are there once so many frames more were heard.
    delay_frames: int = Field(ge=0, le=1000)
    # float32 values that a stream keeps between two calls.
    state_size: int = Field(gt=0, le=2**20)


class Keyword(_Strict):
    """One label, `language:word`, and the score from which it counts as detected."""

    label: str = Field(pattern=LABEL_PATTERN)
    threshold: Finite = Field(ge=0, le=1)
    # How long the word lasts in training; bounds how far a detection's edges may lie apart.
    typical_s: Finite = Field(gt=0)


class KeywordInfo(_Strict):
    """Class i + 1 of `keyword_logits` is `labels[i]`; class 0 is background."""

    labels: tuple[Keyword, ...] = Field(min_length=1)
    frame_hop_s: Finite = Field(gt=0, le=1)
    # Scores are summed over this much time (see service/keywords.py).
    window_s: Finite = Field(gt=0, le=60)
    # After a detection the same keyword is not reported again for this long.
    refractory_s: Finite = Field(ge=0)
    thresholds_from: str

    @model_validator(mode="after")
    def _distinct(self) -> KeywordInfo:
        names = [keyword.label for keyword in self.labels]
        if len(set(names)) != len(names):
            raise ValueError("labels repeat")
        return self


class Calibration(_Strict):
    """Log-likelihood ratio (natural log) = scale * score + offset, fitted where `fitted_on` says."""

    scale: Finite = Field(gt=0)
    offset: Finite
    fitted_on: str


class OperatingPoint(_Strict):
    """A stricter decision: of strangers' claims, `false_accept_rate` reach `threshold`."""

    false_accept_rate: Finite = Field(gt=0, lt=1)
    threshold: Finite


class SpeakerInfo(_Strict):
    """How two speaker embeddings become a score and a decision."""

    dim: int = Field(gt=0)
    calibration: Calibration
    # Log-likelihood ratio from which a claim is accepted.
    threshold: Finite
    # Where false accepts cost more; fitted where the calibration was.
    operating_points: tuple[OperatingPoint, ...] = ()
    cohort_file: FileName | None = None
    cohort_top: int = Field(default=100, gt=1)
    # The version whose embeddings these are, where only arithmetic or layout differ: they share profiles. None: itself.
    space: str | None = Field(default=None, pattern=VERSION_PATTERN)


class EmbeddingInfo(_Strict):
    """The general-purpose speech embedding."""

    dim: int = Field(gt=0)
    frame_hop_s: Finite = Field(gt=0)
    layers: str


class Metric(_Strict):
    """One measured figure and how to get it again."""

    name: str
    value: Finite
    unit: str
    data: str
    command: str


class Lineage(_Strict):
    """Where the bundle came from."""

    recipe: dict[str, Any]
    recipe_digest: str
    teacher: str | None = None
    data: dict[str, str]
    git_revision: str
    seed: int


class Manifest(_Strict):
    """The whole of `manifest.json`. `version` is assigned by the store; 0 means not yet published."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=0)
    created_at: datetime
    licence: str = Field(min_length=1)
    files: dict[FileName, FileEntry]
    graph: GraphInfo
    # None: streams are heard by the clip graph over sliding windows.
    stream: StreamInfo | None = None
    audio: AudioLimits
    keywords: KeywordInfo
    # None: the graph has no `speaker_embedding`, so nobody can be enrolled with it.
    speaker: SpeakerInfo | None = None
    embedding: EmbeddingInfo
    golden_file: FileName
    metrics: tuple[Metric, ...] = ()
    lineage: Lineage

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        needed = {self.graph.file, self.golden_file, "MODEL_CARD.md"}
        if self.speaker is not None and self.speaker.cohort_file is not None:
            needed.add(self.speaker.cohort_file)
        if self.stream is not None:
            needed.add(self.stream.file)
        absent = sorted(needed - set(self.files))
        if absent:
            raise ValueError(f"files does not list {', '.join(absent)}")
        if "manifest.json" in self.files:
            raise ValueError("files must not list manifest.json itself")
        return self

    @property
    def speaker_space(self) -> str:
        """The version whose speaker embeddings this one's can be compared with, its own unless it says so."""
        own = f"{self.name}@{self.version}"
        return own if self.speaker is None or self.speaker.space is None else self.speaker.space

    def to_json(self) -> str:
        """The text written to disk: stable order, readable, one trailing newline."""
        return self.model_dump_json(indent=1) + "\n"
