"""STaR: relations between frames. Numbers in brackets are those of the checklist in the design (recipes.md, 2(e))."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import HubertModel

from tests.training.chain import tiny_hubert
from training.cuts import Waves
from training.distil import DistilRecipe, build
from training.errors import TeacherError
from training.objectives.distillation import at_once
from training.objectives.star import (
    EdgeStarDistillation,
    StarDistillation,
    StarRecipe,
    attention_distance,
    gram,
    gram_distance,
)
from training.pretrain import TeacherShape, save_teacher
from training.students.edge import Edge, EdgeShape
from training.students.thin import PUBLISHED, ThinShape, thin_student
from training.teachers import OwnHubert, SelfSupervised, Teacher, load_teacher

CNN = ((8, 10, 5), (8, 1, 1), *((8, 3, 2),) * 4, (16, 1, 1), *((16, 2, 2),) * 2)
TINY = ThinShape(hidden_size=16, feed_forward=24, heads=2, layers=3, cnn=CNN, dropout=0.0)
SCHEDULE = {"steps": 4, "workers": 0}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    return Teacher(tiny_hubert(**shape, conv_dim=(12,) * 7), normalise=True)


@pytest.fixture
def student(teacher: Teacher) -> SelfSupervised:
    torch.manual_seed(1)
    return thin_student(TINY, teacher)


def waves(*seconds: float) -> Waves:
    generator = torch.Generator().manual_seed(2)
    parts = [0.1 * torch.randn(int(16_000 * length), generator=generator) for length in seconds]
    lengths = torch.tensor([len(part) for part in parts])
    return Waves(nn.utils.rnn.pad_sequence(parts, batch_first=True), lengths)


ALL = StarRecipe(attention=True, layerwise=True, intra=True)


@pytest.mark.parametrize(
    ("name", "count"), [("star", 22_308_592), ("star-l", 26_630_752), ("star-s", 14_100_000), ("star-xs", 9_390_000)]
)
def test_students_have_the_published_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        model = OwnHubert(PUBLISHED[name].config())
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == count if name in {"star", "star-l"} else abs(found / count - 1) < 1e-3


def test_a_student_of_bands_has_the_frames_of_a_teacher_of_bands() -> None:
    """As our own teacher has them: bands for a CNN, norms first."""
    like = {"layers": 3, "heads": 2, "mel": True, "pre_norm": True}
    wide = Teacher(
        TeacherShape.model_validate({**like, "hidden_size": 32, "feed_forward": 48, "conv_channels": 8})
        .untrained()
        .model,
        normalise=True,
    )
    own = thin_student(ThinShape.model_validate({**like, "hidden_size": 16, "feed_forward": 24}), wide)
    stage = StarDistillation(own, wide, StarRecipe(), at_once(wide))
    terms = stage(waves(0.5, 0.3), 0)
    assert terms.keys() == {"layerwise", "intra", "total"}
    terms["total"].backward()
    assert all(parameter.grad is not None for name, parameter in own.named_parameters() if "first" in name)


def test_the_default_is_layerwise_and_intra_layer() -> None:
    """[1]"""
    assert (StarRecipe().attention, StarRecipe().layerwise, StarRecipe().intra) == (False, True, True)
    with pytest.raises(ValueError, match="none of attention"):
        StarRecipe(layerwise=False, intra=False)


@pytest.mark.parametrize("only", ["attention", "layerwise", "intra"])
def test_each_objective_has_its_switch(teacher: Teacher, student: SelfSupervised, only: str) -> None:
    """[1], [7]"""
    switches = {name: name == only for name in ("attention", "layerwise", "intra")}
    terms = StarDistillation(student, teacher, StarRecipe(**switches), at_once(teacher))(waves(0.5), 0)
    assert set(terms) == {only, "total"}
    assert float(terms["total"].detach()) == float(terms[only].detach()) > 0


def test_no_parameter_is_added(teacher: Teacher, student: SelfSupervised) -> None:
    """[2]"""
    stage = StarDistillation(student, teacher, ALL, at_once(teacher))
    assert {name.removeprefix("student.") for name, _ in stage.named_parameters()} == dict(
        student.named_parameters()
    ).keys()


def test_gram_matrices_are_frames_by_frames_whatever_the_width() -> None:
    """[3]"""
    first, second = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    found = gram(first, second)
    assert found.shape == (2, 7, 7)
    assert float(found[1, 2, 3]) == pytest.approx(float(first[1, 2] @ second[1, 3]), rel=1e-5)
    assert torch.allclose(gram(first, first, "cosine").diagonal(dim1=1, dim2=2), torch.ones(2, 7))
    assert torch.allclose(gram(first, second, "width") * 5, found)


@pytest.mark.parametrize("objectives", [ALL, StarRecipe(scaling="cosine")])
def test_padding_costs_nothing(teacher: Teacher, student: SelfSupervised, objectives: StarRecipe) -> None:
    """[3] A clip costs in a batch with a longer one what it costs alone."""
    stage = StarDistillation(student, teacher, objectives, at_once(teacher)).eval()
    both = waves(0.4, 0.9)
    with torch.no_grad():
        together = stage(both, 0)
        alone = [
            stage(Waves(both.waveform[row : row + 1, : int(both.lengths[row])], both.lengths[row : row + 1]), 0)
            for row in range(2)
        ]
    for name, value in together.items():
        assert float(value) == pytest.approx(float(alone[0][name] + alone[1][name]) / 2, rel=1e-3)


def test_the_intra_layer_term_begins_with_the_encoder_s_input(teacher: Teacher, student: SelfSupervised) -> None:
    """[4]"""
    batch = waves(0.5)
    intra = StarRecipe(layerwise=False)
    stage = StarDistillation(student, teacher, intra, at_once(teacher)).eval()
    with torch.no_grad():
        wanted, found = teacher(batch.waveform, batch.lengths), student.eval()(batch.waveform, batch.lengths)
        expected = sum(
            float(((t0 @ t1.transpose(1, 2)) - (s0 @ s1.transpose(1, 2))).square().mean())
            for t0, t1, s0, s1 in zip(wanted.hidden, wanted.hidden[1:], found.hidden, found.hidden[1:], strict=False)
        )
        assert float(stage(batch, 0)["intra"]) == pytest.approx(expected, rel=1e-4)
    assert len(wanted.hidden) == 4


def test_a_student_that_is_the_teacher_costs_nothing(teacher: Teacher) -> None:
    """[5]"""
    twin = SelfSupervised(HubertModel(teacher.model.config), normalise=True)
    twin.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        terms = StarDistillation(twin, teacher, ALL, at_once(teacher)).eval()(waves(0.5, 0.3), 0)
    assert max(abs(float(value)) for value in terms.values()) < 1e-5


def test_large_frames_stay_finite_in_mixed_precision() -> None:
    """[5] In half precision a sum of 768 products of 30 would be infinite."""
    frames = torch.full((1, 4, 768), 30.0)
    with torch.autocast("cpu", dtype=torch.float16):
        found = gram(frames.half(), frames.half())
    assert float(found[0, 0, 0]) == pytest.approx(768 * 900)
    assert float(gram_distance(found, found * 0, torch.ones(1, 4, dtype=torch.bool))) < float("inf")


def test_attention_maps_are_averaged_over_each_model_s_own_heads() -> None:
    wanted, found = torch.rand(1, 4, 3, 3).softmax(-1), torch.rand(1, 2, 3, 3).softmax(-1)
    mask = torch.ones(1, 3, dtype=torch.bool)
    expected = nn.functional.kl_div(found.mean(1).log(), wanted.mean(1), reduction="none").sum(-1).mean()
    assert float(attention_distance(wanted, found, mask)) == pytest.approx(float(expected), rel=1e-4)
    assert float(attention_distance(wanted, wanted, mask)) == 0.0


def test_a_student_with_other_frames_is_refused(teacher: Teacher) -> None:
    """[6]"""
    slower = TINY.model_copy(update={"cnn": (*CNN[:-1], (16, 4, 4))})
    with pytest.raises(TeacherError, match="relations between frames need the same"):
        thin_student(slower, teacher)


def test_a_student_of_another_depth_is_refused(teacher: Teacher) -> None:
    shallow = thin_student(TINY.model_copy(update={"layers": 2}), teacher)
    with pytest.raises(TeacherError, match="2 layers and the teacher 3"):
        StarDistillation(shallow, teacher, StarRecipe(), at_once(teacher))


@pytest.mark.parametrize(
    ("changes", "message"), [({"hidden_size": 32}, "ends with 16 channels"), ({"heads": 3}, "no multiple of 3 heads")]
)
def test_a_shape_that_does_not_fit_together_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        TINY.model_copy(update=changes).config()


def test_a_thin_student_comes_back_through_the_teachers_door(student: SelfSupervised, tmp_path: Path) -> None:
    save_teacher(student, tmp_path)
    again = load_teacher(str(tmp_path))
    batch = waves(0.5)
    with torch.no_grad():
        expected = student.eval()(batch.waveform, batch.lengths).hidden[-1]
    assert torch.allclose(again(batch.waveform, batch.lengths).hidden[-1], expected, atol=1e-6)
    assert isinstance(again.model, OwnHubert)


def edge_stage(teacher: Teacher, **changes: object) -> EdgeStarDistillation:
    shape = EdgeShape(mels=32, stem_channels=8, early_width=16, shared_width=24, task_width=32, speaker_dim=16)
    relations = StarRecipe(scaling="cosine", edge_layers=((1, "early.1"), (2, "shared.2"), (3, "keyword.3")))
    recipe = DistilRecipe.model_validate(
        {
            "name": "tiny", "data": "x", "shape": "edge", "edge": shape, "objective": "relations",
            "relations": relations.model_copy(update=changes), "schedule": SCHEDULE,
        }
    )  # fmt: skip
    stage = build(recipe, teacher)
    assert isinstance(stage, EdgeStarDistillation)
    return stage


def test_the_edge_student_learns_relations_without_a_projection(teacher: Teacher) -> None:
    stage = edge_stage(teacher)
    assert isinstance(stage.student, Edge)
    assert all(name.startswith("student.") for name, _ in stage.named_parameters())
    stage(waves(0.5, 0.8), 0)["total"].backward()
    moved = {name for name, parameter in stage.student.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("keyword.3") for name in moved)
    assert any(name.startswith("stem") for name in moved)


def test_padding_costs_the_edge_student_nothing(teacher: Teacher) -> None:
    stage = edge_stage(teacher).eval()
    both = waves(0.4, 0.9)
    with torch.no_grad():
        short = stage(Waves(both.waveform[:1, : int(both.lengths[0])], both.lengths[:1]), 0)
        padded = stage(Waves(both.waveform[:1], both.lengths[:1]), 0)
    assert float(short["total"]) == pytest.approx(float(padded["total"]), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": True}, "no attention"),
        ({"edge_layers": ((1, "nowhere"),)}, "no block nowhere"),
        ({"edge_layers": ((4, "shared.2"),)}, "layers 0 to 3"),
    ],
)
def test_wrong_relations_of_the_edge_student_are_refused(
    teacher: Teacher, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        edge_stage(teacher, **changes)
