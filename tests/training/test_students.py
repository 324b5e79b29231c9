"""The front end against a plain transform; the network's outputs alone and within a batch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from training.students.edge import CLIPS_AT_A_TIME, Depthwise, Edge, EdgeOutputs, EdgeShape
from training.students.frontend import CENTRE, FLOOR, HOP, SPREAD, LogMel, mel_filters

SMALL = EdgeShape(
    mels=32, stem_channels=8, early_width=16, early_blocks=1, early_kernel=3, shared_width=24, shared_blocks=1,
    task_width=32, keyword_blocks=1, speaker_blocks=2, kernel=5, speaker_dim=16,
)  # fmt: skip
LENGTHS = [1600, 1601, 2285, 16_000, 32_077]


def noise(*lengths: int, seed: int = 0, level: float = 0.1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [level * torch.randn(length, generator=generator) for length in lengths]


def reference_log_mel(waveform: Tensor, mels: int) -> Tensor:
    """[N] -> [mels, ceil(N / 200)] by a whole window and torch.fft.rfft."""
    frames = math.ceil(len(waveform) / 200)
    padded = nn.functional.pad(waveform.double(), (200, 400))
    window = torch.hann_window(2 * HOP, periodic=True, dtype=torch.float64)
    stacked = torch.stack([padded[HOP * t : HOP * (t + 2)] * window for t in range(frames)])
    power = torch.fft.rfft(stacked).abs().square() @ mel_filters(mels, HOP + 1, 16_000)
    return ((torch.log(power + FLOOR) - CENTRE) / SPREAD).T.float()


@pytest.mark.parametrize("level", [0.3, 0.01, 1e-4, 0.0])
def test_log_mel_equals_a_whole_transform(level: float) -> None:
    (waveform,) = noise(8000, level=level)
    assert (LogMel(64)(waveform[None])[0] - reference_log_mel(waveform, 64)).abs().max() < 1e-4


def test_log_mel_of_a_tone_peaks_in_its_band() -> None:
    tone = 0.3 * torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 16_000)
    bands = LogMel(64)(tone[None])[0, :, 25]
    filters = mel_filters(64, HOP + 1, 16_000)
    # Bin 25 is 1000 Hz.
    assert int(bands.argmax()) == int(filters[25].argmax())


@pytest.mark.parametrize("samples", [1, 199, 200, 201, 1600, 16_001])
def test_log_mel_has_a_frame_for_each_hop_begun(samples: int) -> None:
    assert LogMel(32)(torch.zeros(2, samples)).shape == (2, 32, math.ceil(samples / 200))


def test_default_network_has_under_two_million_parameters() -> None:
    count = sum(parameter.numel() for parameter in Edge(113).parameters())
    assert count == 1_663_761
    assert count <= 2_000_000


@pytest.fixture(params=["shared", "early", "features"])
def network(request: pytest.FixtureRequest) -> Edge:
    """Random weights, and batch norms as after training: no layer maps zero to zero by accident."""
    torch.manual_seed(3)
    network = Edge(7, replace(SMALL, speaker_from=request.param))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.3, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return network.eval()


@torch.no_grad()
def run(network: Edge, clips: list[Tensor], *, filler: float = 0.0, extra: int = 0) -> EdgeOutputs:
    """The clips as one batch, padded with `filler`."""
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = torch.full((len(clips), int(lengths.max()) + extra), filler)
    for row, clip in enumerate(clips):
        batch[row, : len(clip)] = clip
    found: EdgeOutputs = network(batch, lengths)
    return found


def assert_same(one: EdgeOutputs, row: int, alone: EdgeOutputs) -> None:
    frames = alone.frames.shape[1]
    assert (one.keyword_logits[row, :frames] - alone.keyword_logits[0]).abs().max() < 1e-4
    assert (one.frames[row, :frames] - alone.frames[0]).abs().max() < 1e-4
    assert (one.speaker_embedding[row] - alone.speaker_embedding[0]).abs().max() < 1e-4
    assert (one.embedding[row] - alone.embedding[0]).abs().max() < 1e-4


@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_clip_among_others_gives_what_it_gives_alone(network: Edge, row: int) -> None:
    clips = noise(*LENGTHS)
    assert_same(run(network, clips), row, run(network, [clips[row]]))


@pytest.mark.parametrize("length", LENGTHS)
def test_what_lies_past_the_length_is_ignored(network: Edge, length: int) -> None:
    clips = noise(length)
    assert_same(run(network, clips, filler=0.9, extra=5000), 0, run(network, clips))


def test_loud_and_silent_neighbours_change_nothing(network: Edge) -> None:
    (clip,) = noise(9000)
    neighbours = [*noise(9000, seed=1, level=0.9), torch.zeros(20_000)]
    assert_same(run(network, [clip, *neighbours]), 0, run(network, [clip]))


@pytest.mark.parametrize("length", [1, 800, 801, 16_000])
def test_frames_are_fifty_milliseconds(network: Edge, length: int) -> None:
    out = run(network, noise(length))
    assert out.keyword_logits.shape == (1, math.ceil(length / 800), 7)
    assert out.frames.shape == (1, math.ceil(length / 800), 64)


def test_mask_counts_each_clip_s_frames(network: Edge) -> None:
    assert run(network, noise(*LENGTHS)).mask.sum(dim=1).tolist() == [math.ceil(length / 800) for length in LENGTHS]


def test_frames_past_the_end_are_zero(network: Edge) -> None:
    out = run(network, noise(1600, 16_000))
    assert out.frames[0, 2:].abs().max() == 0
    assert out.frames[0, :2].abs().max() > 0


@pytest.mark.parametrize("level", [0.3, 1e-3, 0.0])
def test_embeddings_have_unit_length(network: Edge, level: float) -> None:
    out = run(network, noise(*LENGTHS, level=level))
    assert out.speaker_embedding.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-4)
    assert out.embedding.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-4)


def test_the_network_hears_changed_features(network: Edge) -> None:
    (clip,) = noise(16_000)
    with torch.no_grad():
        out = network(clip[None], torch.tensor([16_000]), lambda features: -features)
    assert (out.keyword_logits - run(network, [clip]).keyword_logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("parts", "reached"),
    [("shared", {"stem", "early", "down", "shared"}), ("early", {"stem", "early"}), ("features", set())],
)
def test_speakers_teach_the_layers_before_their_branch(
    parts: Literal["shared", "early", "features"], reached: set[str]
) -> None:
    network = Edge(7, replace(SMALL, speaker_from=parts))
    (waveform,) = noise(16_000)
    out = network(waveform[None].repeat(2, 1), torch.tensor([16_000, 9_000]))
    out.speaker_embedding[:, 0].sum().backward()
    found = {name.split(".")[0] for name, value in network.named_parameters() if value.grad is not None}
    own = {"to_speaker", "speaker", "pool", "speaker_head", *(["speaker_stem", "speaker_early"] if not reached else [])}
    assert found == reached | own


@pytest.mark.parametrize("count", [1, CLIPS_AT_A_TIME, CLIPS_AT_A_TIME + 3])
def test_training_hears_the_features_that_serving_does(count: int) -> None:
    torch.manual_seed(3)
    network = Edge(5, EdgeShape(mels=16, stem_channels=9, early_width=8, shared_width=8, task_width=8, speaker_dim=0))
    waveform, heard = torch.randn(count, 4_321) * 0.1, []

    def hear(features: Tensor) -> Tensor:
        heard.append(features)
        return features

    for training in (True, False):
        network.train(training)(waveform, torch.full((count,), 4_321), hear)
    torch.testing.assert_close(*heard, rtol=0, atol=1e-5)


def test_a_depthwise_convolution_computes_in_float32_where_the_rest_does_not() -> None:
    torch.manual_seed(4)
    layer = Depthwise(8, 8, (1, 5), groups=8, bias=False)
    x = torch.randn(3, 8, 1, 20).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    whole = torch.nn.functional.conv2d(x.float(), layer.weight, groups=8)
    assert torch.equal(found, whole.bfloat16())
    # Of bfloat16 gradients there would be 8 bits.
    taps = torch.stack([x.float()[:, :, 0, tap : tap + 16].sum(dim=(0, 2)) for tap in range(5)], dim=1)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad[:, 0, 0], taps, rtol=1e-4, atol=1e-4)
