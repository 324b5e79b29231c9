"""What a network costs, counted on networks small enough to count by hand."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model_store import Manifest
from model_store.graph import OUTPUTS
from model_store.store import open_bundle
from training.evaluation.cost import latencies_ms, multiply_accumulates, streaming_ms


class Small(nn.Module):
    """4 channels of 8 samples every 4, then 4 -> 3 for every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.hear = nn.Conv1d(1, 4, 8, stride=4)
        self.mix = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.name = nn.Linear(4, 3)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        frames = self.mix(self.hear(waveform[:, None])).transpose(1, 2)
        summary = frames.mean(dim=1) * lengths[:, None]
        return self.name(frames), summary, summary, frames


def small_graph() -> bytes:
    stream = io.BytesIO()
    torch.onnx.export(
        Small().eval(),
        (torch.zeros(1, 16_000), torch.tensor([16_000])),
        stream,
        dynamo=False,
        opset_version=17,
        input_names=["waveform", "lengths"],
        output_names=list(OUTPUTS),
        dynamic_axes={"waveform": {0: "batch", 1: "samples"}, "lengths": {0: "batch"}},
    )
    return stream.getvalue()


@pytest.fixture(scope="module")
def graph() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of its own age
        return small_graph()


def test_multiplications_are_counted_from_the_shapes_that_occur(graph: bytes) -> None:
    frames = (16_000 - 8) // 4 + 1
    assert multiply_accumulates(graph) == frames * (4 * 8 + 4 * 2 * 3 + 4 * 3)


def test_every_graph_is_timed_on_one_thread_and_on_all(graph: bytes) -> None:
    found = latencies_ms({"one": graph, "other": graph}, runs=3)
    assert found.keys() == {"one", "other"}
    assert all(latency.one_thread > 0 and latency.all_threads > 0 for latency in found.values())
    assert {latency.threads for latency in found.values()} == {len(os.sched_getaffinity(0))}


def test_a_second_of_a_stream_is_timed_beside_one_of_a_clip(made_draft: tuple[Path, Manifest]) -> None:
    stream, clip = streaming_ms(open_bundle(made_draft[0]), 2, runs=3)
    assert stream > 0
    assert clip > 0
