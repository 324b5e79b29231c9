"""RobustDistiller's enhancement head. Numbers in brackets are those of the checklist in the design (recipes.md, 3(e));
corruption is tested in test_cuts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.chain import tiny_hubert
from training.cuts import Waves
from training.distil import DistilRecipe, build, distil
from training.errors import TeacherError
from training.objectives.distillation import Distillation, EdgeDistillation
from training.objectives.robust import Enhancement, EnhancementRecipe, magnitudes
from training.pretrain import save_teacher
from training.teachers import HiddenStates, SelfSupervised, Teacher, load_teacher

HEAD = {"hidden": 8, "layers": 1, "dropout": 0.0}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(tiny_hubert(), normalise=True)


def recipe(data: Path, **changes: object) -> DistilRecipe:
    settings = {
        "name": "robust", "data": data, "layers": 1, "targets": (1, 2), "batch_s": 8.0, "fold": 0.1,
        "corruption": {}, "enhancement": HEAD,
        "schedule": {"steps": 3, "workers": 0, "watch_every": 3, "checkpoint_every": 3},
    }  # fmt: skip
    return DistilRecipe.model_validate({**settings, **changes})


def corrupted(*seconds: float) -> Waves:
    generator = torch.Generator().manual_seed(2)
    clean = [0.1 * torch.randn(int(16_000 * length), generator=generator) for length in seconds]
    heard = [one + 0.05 * torch.randn(len(one), generator=generator) for one in clean]
    padded = [nn.utils.rnn.pad_sequence(one, batch_first=True) for one in (heard, clean)]
    return Waves(padded[0], torch.tensor([len(one) for one in clean]), clean=padded[1])


def test_the_head_is_the_paper_s() -> None:
    """[3] Three bidirectional layers of 256 and a mask of 257 bins, weight 2: 4.86 M on the CNN's 512 channels."""
    published = EnhancementRecipe()
    assert published.weight == 2.0
    assert published.source == "last"
    sizes = [
        sum(parameter.numel() for parameter in Enhancement(width, 320, published).parameters()) for width in (512, 768)
    ]
    assert sizes == [4_862_721, 5_387_009]


EDGE = {"mels": 32, "stem_channels": 8, "early_width": 16, "shared_width": 24, "task_width": 32, "speaker_dim": 16}
CNN = ((8, 10, 5), (8, 1, 1), *((8, 3, 2),) * 4, (16, 1, 1), *((16, 2, 2),) * 2)
THIN = {"hidden_size": 16, "feed_forward": 24, "heads": 2, "layers": 2, "cnn": CNN, "dropout": 0.0}
EDGE_LAYERS = [[1, "early.1"], [2, "keyword.3"]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shape": "edge", "edge": EDGE},
        {"shape": "thin", "thin": THIN},
        {"shape": "edge", "edge": EDGE, "relations": {"edge_layers": EDGE_LAYERS}},
    ],
)
def test_the_teacher_hears_the_recording_and_the_student_what_became_of_it(
    teacher: Teacher, changes: dict[str, object]
) -> None:
    """[1] Whatever the student and the objective."""
    told: list[torch.Tensor] = []
    heard: list[torch.Tensor] = []

    def judge(batch: Waves) -> HiddenStates:
        told.append(batch.waveform)
        return teacher(batch.waveform, batch.lengths)

    related = "thin" in changes or "relations" in changes
    objective = {"objective": "relations", "enhancement": None} if related else {}
    stage = build(recipe(Path("x"), **changes, **objective), teacher, judge)
    stage.student.register_forward_pre_hook(lambda _module, given: heard.append(given[0]))
    batch = corrupted(0.5, 0.8)
    stage(batch, 0)
    assert batch.clean is not None
    assert [torch.equal(one, batch.clean) for one in told] == [True]
    assert [torch.equal(one, batch.waveform) for one in heard] == [True]


def test_a_perfect_mask_costs_nothing_and_an_empty_one_the_recording() -> None:
    """[3] The target is the recording's own magnitude."""
    batch = Waves(torch.full((1, 16_000), 0.1).cumsum(1).sin(), torch.tensor([16_000]))
    head = Enhancement(4, 320, EnhancementRecipe.model_validate(HEAD))
    nn.init.zeros_(head.mask.weight)
    frames, inside = torch.zeros(1, 49, 4), torch.ones(1, 49, dtype=torch.bool)
    nn.init.constant_(head.mask.bias, 30.0)
    assert float(head(frames, inside, batch).detach()) < 1e-5
    nn.init.constant_(head.mask.bias, -30.0)
    level = batch.waveform.square().mean().sqrt()
    expected = (magnitudes(batch.waveform)[:, 1:99] / level).mean()
    assert float(head(frames, inside, batch).detach()) == pytest.approx(float(expected), rel=1e-4)


def test_loud_and_quiet_recordings_count_alike() -> None:
    batch = corrupted(0.5)
    assert batch.clean is not None
    quiet = Waves(batch.waveform / 50, batch.lengths, clean=batch.clean / 50)
    torch.manual_seed(0)
    head = Enhancement(4, 320, EnhancementRecipe.model_validate(HEAD))
    frames, inside = torch.randn(1, 24, 4), torch.ones(1, 24, dtype=torch.bool)
    assert float(head(frames, inside, quiet).detach()) == pytest.approx(
        float(head(frames, inside, batch).detach()), rel=1e-3
    )


def test_padding_costs_nothing() -> None:
    batch = corrupted(0.4, 0.9)
    assert batch.clean is not None
    torch.manual_seed(0)
    head = Enhancement(4, 320, EnhancementRecipe.model_validate(HEAD)).eval()
    frames = torch.randn(2, 44, 4)
    inside = torch.zeros(2, 44, dtype=torch.bool)
    inside[0, :19], inside[1] = True, True
    count = int(batch.lengths[0])
    alone = Waves(batch.waveform[:1, :count], batch.lengths[:1], clean=batch.clean[:1, :count])
    padded = Waves(batch.waveform[:1], batch.lengths[:1], clean=batch.clean[:1])
    with torch.no_grad():
        expected = float(head(frames[:1, :19], inside[:1, :19], alone))
        assert float(head(frames[:1], inside[:1], padded)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("source", "reached"), [("last", True), ("cnn", False)])
def test_the_enhancement_gradient_reaches_the_layers_that_it_is_said_to(
    teacher: Teacher, source: str, reached: bool
) -> None:
    """[4]"""
    stage = build(recipe(Path("x"), enhancement={**HEAD, "source": source}), teacher)
    assert isinstance(stage, Distillation)
    stage(corrupted(0.5, 0.4), 0)["enhancement"].backward()
    moved = {name for name, one in stage.student.named_parameters() if one.grad is not None and one.grad.any()}
    assert any("conv_layers.0" in name for name in moved)
    assert any("encoder.layers.0" in name for name in moved) is reached


def test_the_total_weighs_the_head_twice(teacher: Teacher) -> None:
    """[3]"""
    stage = build(recipe(Path("x")), teacher)
    terms = {name: float(value.detach()) for name, value in stage(corrupted(0.5), 0).items()}
    assert terms["total"] == pytest.approx(terms["distillation"] + 2 * terms["enhancement"], rel=1e-5)
    assert terms["enhancement"] > 0


def test_the_head_is_dropped(made_data: Path, teacher: Teacher, tmp_path: Path) -> None:
    """[3]"""
    save_teacher(teacher, tmp_path / "teacher")
    folder = distil(recipe(made_data), tmp_path / "run", tmp_path / "cache", teacher=str(tmp_path / "teacher"))
    student = load_teacher(str(folder / "model"))
    assert not any("lstm" in name or "heads" in name for name in student.state_dict())
    state = torch.load(folder / "last.pt", weights_only=True)["stage"]
    assert any(name.startswith("enhance.lstm") for name in state)
    plain = SelfSupervised(type(teacher.model)(student.model.config), normalise=True)
    assert student.state_dict().keys() == plain.state_dict().keys()


def test_the_edge_student_is_made_robust_too(teacher: Teacher) -> None:
    stage = build(recipe(Path("x"), shape="edge", edge=EDGE), teacher)
    assert isinstance(stage, EdgeDistillation)
    terms = stage(corrupted(0.5, 0.8), 0)
    terms["enhancement"].backward()
    assert any(one.grad is not None and one.grad.any() for one in stage.student.stem.parameters())
    with pytest.raises(TeacherError, match="CNN throughout"):
        build(recipe(Path("x"), shape="edge", edge=EDGE, enhancement={**HEAD, "source": "cnn"}), teacher)


def test_relations_have_no_enhancement_head(teacher: Teacher) -> None:
    with pytest.raises(TeacherError, match="objective: layers"):
        build(recipe(Path("x"), objective="relations"), teacher)
