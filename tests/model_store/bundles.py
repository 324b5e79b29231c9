"""Bundles to publish, and to spoil before they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model_store import (
    AudioLimits,
    Bundle,
    Calibration,
    EmbeddingInfo,
    GraphInfo,
    Keyword,
    KeywordInfo,
    Lineage,
    Manifest,
    SpeakerInfo,
)
from model_store.files import describe
from model_store.golden import pack
from model_store.graph import OUTPUTS
from model_store.inference import open_session
from model_store.store import MANIFEST, open_bundle
from tests.model_store.graphs import DIM, HOP, OPSET

CREATED_AT = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
FILES = ("MODEL_CARD.md", "cohort.f32", "golden.npz", "model.onnx")

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a publisher holds before the store has given it a version."""

    manifest: Manifest
    files: Mapping[str, bytes]

    def with_file(self, name: str, data: bytes) -> Draft:
        """The file replaced, or added, and the manifest's list put right."""
        files = {**self.files, name: data}
        return Draft(self.manifest.model_copy(update={"files": listed(files)}), files)

    def changed(self, section: str, **values: object) -> Draft:
        """Values of one section of the manifest replaced, unchecked."""
        part = getattr(self.manifest, section).model_copy(update=values)
        return replace(self, manifest=self.manifest.model_copy(update={section: part}))

    def named(self, name: str) -> Draft:
        return replace(self, manifest=self.manifest.model_copy(update={"name": name}))

    def write(self, folder: Path) -> Bundle:
        """The bundle in `folder`, which appears here."""
        folder.mkdir(parents=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        (folder / MANIFEST).write_text(self.manifest.to_json(), encoding="utf-8")
        return open_bundle(folder)

    def fields(self) -> dict[str, Any]:
        """The manifest as JSON has it."""
        fields: dict[str, Any] = self.manifest.model_dump(mode="json")
        return fields


def listed(files: Mapping[str, bytes]) -> dict[str, Any]:
    return {name: describe(data) for name, data in sorted(files.items())}


def draft_of(graph: bytes) -> Draft:
    """A bundle around `graph`, with the golden outputs that it gives."""
    clip = golden_clip()
    files = {
        "model.onnx": graph,
        "golden.npz": pack(clip, run(graph, clip)),
        "cohort.f32": unit_vectors(5).tobytes(),
        "MODEL_CARD.md": b"# tiny\n\nMade for tests.\n",
    }
    return Draft(manifest_for(files), files)


def manifest_for(files: Mapping[str, bytes]) -> Manifest:
    hop_s = HOP / 16_000
    return Manifest(
        name="tiny",
        version=0,
        created_at=CREATED_AT,
        licence="Apache-2.0",
        files=listed(files),
        graph=GraphInfo(file="model.onnx", opset=OPSET, parameters=12 * HOP),
        audio=AudioLimits(shortest_s=0.1, longest_s=20.0),
        keywords=KeywordInfo(
            labels=tuple(
                Keyword(label=label, threshold=0.5, typical_s=0.6) for label in ("en:computer", "zh:小小", "en:zoom in")
            ),
            frame_hop_s=hop_s,
            window_s=1.0,
            refractory_s=0.8,
            thresholds_from="nothing",
        ),
        speaker=SpeakerInfo(
            dim=DIM,
            calibration=Calibration(scale=2.0, offset=-1.0, fitted_on="nothing"),
            threshold=0.0,
            cohort_file="cohort.f32",
        ),
        embedding=EmbeddingInfo(dim=DIM, frame_hop_s=hop_s, layers="the only one"),
        golden_file="golden.npz",
        lineage=Lineage(recipe={}, recipe_digest="0" * 64, data={}, git_revision="none", seed=0),
    )


def golden_clip() -> Array:
    """Ten whole frames of a tone that swells."""
    time_s = np.arange(10 * HOP) / 16_000
    return (0.3 * time_s / time_s[-1] * np.sin(2 * np.pi * 180 * time_s)).astype(np.float32)


def run(graph: bytes, clip: Array) -> dict[str, Array]:
    """What the graph gives for the clip alone, without the batch axis."""
    values = open_session(graph, threads=1).run(
        list(OUTPUTS), {"waveform": clip[None], "lengths": np.array([len(clip)], np.int64)}
    )
    return {name: value[0] for name, value in zip(OUTPUTS, values, strict=True)}


def unit_vectors(count: int) -> Array:
    rows = np.random.default_rng(5).standard_normal((count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("<f4")
