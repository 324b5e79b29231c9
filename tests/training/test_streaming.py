"""The streaming graph gives the clip graph's logits, whatever the chunks and whoever else is in the call."""

from __future__ import annotations

import itertools

import pytest
import torch

from training.students.edge import FRAME_HOP, Edge, EdgeShape
from training.students.streaming import StreamingEdge

LABELS = 5
SMALL = EdgeShape(
    mels=16, stem_channels=6, early_width=8, shared_width=10, shared_blocks=2, task_width=12, keyword_blocks=2, kernel=5
)
SHAPES = {
    "symmetric": {},
    "ahead": {"ahead": 1},
    "causal": {"ahead": 0},
    "odd": {"early_blocks": 1, "early_kernel": 3},
    "keywords alone": {"ahead": 1, "speaker_dim": 0},
    "speakers from the features": {"ahead": 1, "speaker_from": "features"},
}


def network(changes: dict[str, int]) -> Edge:
    torch.manual_seed(0)
    student = Edge(1 + LABELS, EdgeShape(**{**vars_of(SMALL), **changes}))
    # As trained ones: norms that have seen something, and zero is not what a layer gives for zeros.
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return student.eval()


def vars_of(shape: EdgeShape) -> dict[str, int]:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


@torch.no_grad()
def streamed(stream: StreamingEdge, clips: list[torch.Tensor], frames: list[int]) -> list[torch.Tensor]:
    """The logits of clips in one call each time, in chunks of so many frames, the last again and again."""
    counts = [-(-len(clip) // FRAME_HOP) for clip in clips]
    state = torch.zeros(len(clips), stream.state_size)
    position, found = 0, []
    while position - stream.delay < max(counts):
        chunk = frames[min(len(found), len(frames) - 1)]
        begin = position * FRAME_HOP
        samples = torch.full((len(clips), chunk * FRAME_HOP), 0.7)  # what lies past the end is not heard
        lengths = []
        for row, clip in enumerate(clips):
            own = clip[begin : begin + chunk * FRAME_HOP]
            samples[row, : len(own)] = own
            ended = begin + chunk * FRAME_HOP >= len(clip)
            lengths.append(len(clip) if ended else 2**40)
        where = torch.full((len(clips),), position)
        logits, state = stream(samples, where, torch.tensor(lengths), state)
        found.append(logits)
        position += chunk
    whole = torch.cat(found, dim=1)[:, stream.delay :]
    return [whole[row, :count] for row, count in enumerate(counts)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("frames", [[1], [2], [1, 3, 2, 7]])
def test_the_logits_are_those_of_the_whole_clip(name: str, frames: list[int]) -> None:
    student = network(SHAPES[name])
    stream = StreamingEdge(student)
    clips = [torch.randn(length) * 0.2 for length in (31_999, 20_000, 24_000, 1, 17_655)]
    found = streamed(stream, clips, frames)
    for clip, logits in zip(clips, found, strict=True):
        with torch.no_grad():
            wanted = student(clip[None], torch.tensor([len(clip)])).keyword_logits[0]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5)


def test_less_look_ahead_is_less_delay() -> None:
    delays = [StreamingEdge(network({"ahead": ahead})).delay for ahead in (0, 1, 2)]
    # Four blocks of one frame each.
    assert [later - earlier for earlier, later in itertools.pairwise(delays)] == [4, 4]
    assert StreamingEdge(network({})).delay == delays[2]


def test_frames_within_the_delay_do_not_hear_what_comes_later() -> None:
    student = network({"ahead": 1})
    delay = StreamingEdge(student).delay
    clip = torch.randn(1, 32_000) * 0.2
    other = clip.clone()
    other[:, 20 * FRAME_HOP :] = 0.5
    with torch.no_grad():
        first, second = (student(one, torch.tensor([32_000])).keyword_logits for one in (clip, other))
    heard = 20 - delay
    torch.testing.assert_close(first[:, :heard], second[:, :heard], rtol=0, atol=1e-6)
    assert float((first[:, heard:] - second[:, heard:]).abs().max()) > 1e-3


def test_look_ahead_beyond_the_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="ahead"):
        EdgeShape(kernel=5, ahead=5)
