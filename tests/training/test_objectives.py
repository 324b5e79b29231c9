"""The losses against brute force and by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training.objectives.speaker import AamSoftmax
from training.objectives.spotting import clip_loss, event_log_odds, frame_loss

HOP_S = 0.04


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everything(labels: int, clips: int = 1) -> Tensor:
    return torch.ones(clips, labels, dtype=torch.bool)


def test_log_odds_are_those_of_all_paths_with_one_emission() -> None:
    logits = random_logits(1, 4, 3)
    log_p = torch.log_softmax(logits[0], dim=1)
    likelihood = {0: 0.0, 1: 0.0, 2: 0.0}
    for path in itertools.product(range(3), repeat=4):
        emitted = [label for label in path if label]
        if len(emitted) <= 1:
            likelihood[sum(emitted)] += math.exp(sum(float(log_p[t, label]) for t, label in enumerate(path)))
    expected = [math.log(likelihood[label] / likelihood[0]) for label in range(3)]
    assert event_log_odds(logits, torch.ones(1, 4, dtype=torch.bool))[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_masked_frames_do_not_count() -> None:
    logits = random_logits(1, 6, 3)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    short = event_log_odds(logits[:, :4], mask[:, :4])
    assert torch.equal(event_log_odds(logits, mask), short)


def test_clip_loss_without_smoothing_is_the_negative_log_probability() -> None:
    logits, mask = random_logits(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    keyword = torch.tensor([3, 0])
    p = torch.softmax(event_log_odds(logits, mask), dim=1)
    expected = -(math.log(float(p[0, 3])) + math.log(float(p[1, 0]))) / 2
    assert float(clip_loss(logits, mask, keyword, everything(4, 2), 0.0)) == pytest.approx(expected, abs=1e-5)


def test_label_smoothing_mixes_in_the_mean_over_possible_labels() -> None:
    logits, mask = random_logits(1, 5, 4), torch.ones(1, 5, dtype=torch.bool)
    keyword, possible = torch.tensor([1]), torch.tensor([[True, True, False, True]])
    each = [float(clip_loss(logits, mask, torch.tensor([label]), possible, 0.0)) for label in (0, 1, 3)]
    expected = 0.9 * each[1] + 0.1 * sum(each) / 3
    assert float(clip_loss(logits, mask, keyword, possible, 0.1)) == pytest.approx(expected, abs=1e-5)


def test_impossible_labels_get_no_gradient_from_the_clip() -> None:
    logits = random_logits(1, 5, 4).requires_grad_()
    possible = torch.tensor([[True, True, False, True]])
    loss = clip_loss(logits, torch.ones(1, 5, dtype=torch.bool), torch.tensor([1]), possible, 0.05)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, :, 2].abs().max() == 0
    assert gradient[0, :, 3].abs().max() > 0


def test_impossible_labels_get_no_gradient_from_frames() -> None:
    logits = random_logits(1, 30, 4).requires_grad_()
    possible = torch.tensor([[True, True, False, True]])
    loss = frame_loss(
        logits, torch.ones(1, 30, dtype=torch.bool), torch.tensor([1]), torch.tensor([[0.2, 0.6]]), possible, HOP_S
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, :, 2].abs().max() == 0
    assert gradient[0, :, 3].abs().max() > 0


def perfect_frames() -> Tensor:
    """[1, 25, 3]: label 2 where a word from 0.2 to 0.6 s surely is, background where it surely is not, and
    label 1, which is wrong, within 60 ms of its edges."""
    logits = torch.zeros(1, 25, 3)
    for frame in range(25):
        time_s = frame * HOP_S
        label = 2 if 0.26 <= time_s <= 0.54 else 1 if 0.14 <= time_s <= 0.66 else 0
        logits[0, frame, label] = 30.0
    return logits


def loss_of_frames(logits: Tensor, mask: Tensor | None = None) -> float:
    mask = torch.ones(1, 25, dtype=torch.bool) if mask is None else mask
    return float(frame_loss(logits, mask, torch.tensor([2]), torch.tensor([[0.2, 0.6]]), everything(3), HOP_S))


def test_frames_with_the_right_labels_cost_nothing() -> None:
    assert loss_of_frames(perfect_frames()) < 1e-6


@pytest.mark.parametrize("frame", [3, 7, 13, 17])
def test_first_and_last_frame_of_word_and_background_count(frame: int) -> None:
    logits = perfect_frames()
    logits[0, frame] = torch.tensor([0.0, 30.0, 0.0])
    assert loss_of_frames(logits) > 1.0


@pytest.mark.parametrize("frame", [4, 6, 14, 16])
def test_frames_at_the_edges_of_a_word_do_not_count(frame: int) -> None:
    logits = perfect_frames()
    logits[0, frame] = torch.tensor([7.0, -3.0, 2.0])
    assert loss_of_frames(logits) < 1e-6


def test_frames_past_the_clip_do_not_count() -> None:
    logits, mask = perfect_frames(), torch.ones(1, 25, dtype=torch.bool)
    logits[0, 20:] = torch.tensor([0.0, 30.0, 0.0])
    mask[0, 20:] = False
    assert loss_of_frames(logits, mask) < 1e-6


def test_word_and_background_weigh_the_same() -> None:
    # log 3 for each frame, and as much for the seven of the word as for the twelve of the background.
    assert loss_of_frames(torch.zeros(1, 25, 3)) == pytest.approx(2 * math.log(3), abs=1e-5)


def test_background_clip_wants_background_everywhere() -> None:
    mask, word_s = torch.ones(1, 25, dtype=torch.bool), torch.zeros(1, 2)
    logits = torch.zeros(1, 25, 3)
    logits[:, :, 0] = 30.0
    assert float(frame_loss(logits, mask, torch.tensor([0]), word_s, everything(3), HOP_S)) < 1e-6
    logits[0, 0, 1] = 60.0
    assert float(frame_loss(logits, mask, torch.tensor([0]), word_s, everything(3), HOP_S)) > 1.0


@pytest.fixture
def angular() -> AamSoftmax:
    torch.manual_seed(0)
    return AamSoftmax(8, 5, scale=20.0)


@torch.no_grad()
def angular_loss(angular: AamSoftmax, embedding: Tensor, speaker: Tensor, margin: float) -> float:
    return float(angular(embedding, speaker, margin))


@torch.no_grad()
def test_margin_of_zero_is_softmax_of_scaled_cosines(angular: AamSoftmax) -> None:
    embedding, speaker = functional.normalize(random_logits(6, 8)), torch.tensor([0, 1, 2, 3, 4, 0])
    cosine = embedding @ functional.normalize(angular.weight).T
    expected = functional.cross_entropy(20.0 * cosine, speaker)
    assert angular_loss(angular, embedding, speaker, 0.0) == pytest.approx(float(expected), abs=1e-5)


@torch.no_grad()
def test_margin_adds_to_the_angle(angular: AamSoftmax) -> None:
    embedding = functional.normalize(random_logits(1, 8))
    cosine = (embedding @ functional.normalize(angular.weight).T)[0]
    expected = cosine.clone()
    expected[2] = math.cos(math.acos(float(cosine[2])) + 0.3)
    wanted = functional.cross_entropy(20.0 * expected[None], torch.tensor([2]))
    assert angular_loss(angular, embedding, torch.tensor([2]), 0.3) == pytest.approx(float(wanted), abs=1e-4)


def test_margin_raises_the_loss(angular: AamSoftmax) -> None:
    embedding, speaker = functional.normalize(random_logits(6, 8)), torch.tensor([0, 1, 2, 3, 4, 0])
    losses = [angular_loss(angular, embedding, speaker, margin) for margin in (0.0, 0.1, 0.2, 0.4)]
    assert losses == sorted(losses)
    assert losses[1] > losses[0] + 0.1


def test_loss_rises_with_the_angle_all_the_way_to_opposite_vectors() -> None:
    angular = AamSoftmax(2, 2, scale=5.0)
    with torch.no_grad():
        angular.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    # The other class has cosine 0 with everything.
    angles = torch.linspace(0.05, math.pi, 200)
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    losses = [angular_loss(angular, vector[None], torch.tensor([0]), 0.2) for vector in vectors]
    assert all(after > before for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_is_finite_for_identical_and_opposite_vectors(angular: AamSoftmax, sign: float) -> None:
    embedding = (sign * functional.normalize(angular.weight[:1]).detach()).requires_grad_()
    loss = angular(embedding, torch.tensor([0]), 0.2)
    gradients = torch.autograd.grad(loss, [embedding, angular.weight])
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
