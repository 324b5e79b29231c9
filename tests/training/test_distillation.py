"""Checklist 1(e) and DistilHuBERT's: the student cut from its teacher, its heads, and the loss."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import HubertConfig, HubertModel

from tests.training.test_teachers import CLASSES, SHAPE, noise
from training.errors import TeacherError
from training.objectives.distillation import distillation_loss, layer_loss
from training.students.distil import PredictionHeads, student_of
from training.teachers import Teacher

MASK = torch.ones(2, 7, dtype=torch.bool)


@pytest.fixture(params=sorted(CLASSES))
def teacher(request: pytest.FixtureRequest) -> Teacher:
    torch.manual_seed(0)
    config_class, model_class = CLASSES[request.param]
    return Teacher(model_class(config_class(**SHAPE)), normalise=True)


def test_the_copied_weights_are_the_teacher_s(teacher: Teacher) -> None:
    student = student_of(teacher, layers=2)
    own, original = student.model.state_dict(), teacher.model.state_dict()
    assert {name for name in original if name not in own} == {
        name for name in original if name.startswith("encoder.layers.2.")
    }
    assert all(torch.equal(value, original[name]) for name, value in own.items())


def test_the_student_s_first_layers_compute_what_the_teacher_s_do(teacher: Teacher) -> None:
    student = student_of(teacher, layers=2).eval()
    batch, lengths = noise(8000, 4000)
    found, wanted = student(batch, lengths), teacher(batch, lengths)
    assert len(found.hidden) == 3
    for one, other in zip(found.hidden[:2], wanted.hidden[:2], strict=True):
        assert (one[0] - other[0]).abs().max() < 1e-4


def test_changing_the_student_leaves_the_teacher_alone(teacher: Teacher) -> None:
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    student = student_of(teacher)
    for parameter in student.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


def test_every_parameter_of_the_student_receives_gradient(teacher: Teacher) -> None:
    """The CNN included. Only the stand-in for masked frames, which is never used, has none."""
    student = student_of(teacher)
    heads = PredictionHeads(student.width, (1, 2, 3), teacher.width)
    batch, lengths = noise(8000, 4000)
    wanted = teacher(batch, lengths)
    loss = distillation_loss(heads(student(batch, lengths).hidden[-1]), wanted.hidden, heads.targets, wanted.mask)
    loss.backward()
    without = [
        name for name, parameter in (*student.named_parameters(), *heads.named_parameters()) if parameter.grad is None
    ]
    assert without == ["model.masked_spec_embed"]


def test_a_student_deeper_than_its_teacher_is_refused(teacher: Teacher) -> None:
    with pytest.raises(TeacherError, match="has 3 layers; a student of 4"):
        student_of(teacher, layers=4)


def test_base_student_has_the_published_size_with_and_without_heads() -> None:
    with torch.device("meta"):
        model = HubertModel(HubertConfig(num_hidden_layers=2))
        heads = PredictionHeads(768, (4, 8, 12), 768)
    trunk = sum(parameter.numel() for parameter in model.parameters())
    # The published count leaves the stand-in for masked frames out.
    assert trunk - 768 == 23_492_224
    assert trunk + sum(parameter.numel() for parameter in heads.parameters()) == pytest.approx(27.04e6, rel=1e-3)


def test_identical_frames_cost_minus_log_sigmoid_of_one() -> None:
    frames = torch.randn(2, 7, 5)
    assert float(layer_loss(frames, frames, MASK)) == pytest.approx(0.3133, abs=1e-4)


def test_opposite_frames_cost_their_distance_and_minus_log_sigmoid_of_minus_one() -> None:
    frames = torch.full((2, 7, 4), 2.0)
    assert float(layer_loss(-frames, frames, MASK)) == pytest.approx(4.0 + math.log(1 + math.e), abs=1e-5)


def test_padding_costs_nothing() -> None:
    frames, target = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    mask = torch.arange(7)[None, :] < torch.tensor([[3], [7]])
    spoilt = torch.where(mask[:, :, None], frames, torch.tensor(1e6))
    assert torch.equal(layer_loss(spoilt, target, mask), layer_loss(frames, target, mask))


def test_layers_add_up_and_are_taken_by_number() -> None:
    hidden = [torch.randn(2, 7, 5) for _ in range(4)]
    predictions = [torch.randn(2, 7, 5) for _ in range(2)]
    wanted = layer_loss(predictions[0], hidden[1], MASK) + layer_loss(predictions[1], hidden[3], MASK)
    assert torch.allclose(distillation_loss(predictions, hidden, (1, 3), MASK), wanted)
