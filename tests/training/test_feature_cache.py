"""The teacher's layers on disk: the same numbers, fewer computations, never more than the limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import HubertModel

from tests.training.chain import TEACHER_SHAPE, distil_recipe, pretrain_recipe
from training.cuts import Waves
from training.distil import distil
from training.feature_cache import CachedTeacher
from training.pretrain import TeacherShape, pretrain
from training.teachers import Teacher

PLENTY = 10**9


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(HubertModel(TeacherShape.model_validate(TEACHER_SHAPE).config()), normalise=True)


def batch(*names: str) -> Waves:
    """Each name is a recording of its own noise and length."""
    waves = []
    for name in names:
        code = ord(name)
        waves.append(torch.randn(6000 + 1600 * (code - 97), generator=torch.Generator().manual_seed(code)))
    lengths = torch.tensor([len(wave) for wave in waves])
    return Waves(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths, names, (0,) * len(names))


def test_cached_layers_are_the_teacher_s_in_half_precision(teacher: Teacher, tmp_path: Path) -> None:
    cached = CachedTeacher(teacher, (1, 2), tmp_path, PLENTY)
    wanted = teacher(batch("a", "c").waveform, batch("a", "c").lengths)
    first = cached(batch("a", "c"))
    again = cached(batch("a", "c"))
    assert cached.computed == 2
    for layer in (1, 2):
        near = (first.hidden[layer] - wanted.hidden[layer])[wanted.mask].abs().max()
        assert near < 5e-3
        assert torch.equal(first.hidden[layer], again.hidden[layer])
    assert torch.equal(first.mask, wanted.mask)
    assert first.hidden[0].numel() == 0


def test_only_what_is_missing_is_computed_whoever_it_is_batched_with(teacher: Teacher, tmp_path: Path) -> None:
    cached = CachedTeacher(teacher, (2,), tmp_path, PLENTY)
    alone = cached(batch("a")).hidden[2]
    mixed = cached(batch("d", "a", "b"))
    assert cached.computed == 3
    assert torch.equal(mixed.hidden[2][1, : alone.shape[1]], alone[0])
    another = CachedTeacher(teacher, (2,), tmp_path, PLENTY)
    another(batch("a", "b", "d"))
    assert another.computed == 0


def test_no_more_than_the_limit_is_kept(teacher: Teacher, tmp_path: Path) -> None:
    one = CachedTeacher(teacher, (2,), tmp_path / "one", PLENTY)
    one(batch("a"))
    size = sum(file.stat().st_size for file in (tmp_path / "one").rglob("*.safetensors"))
    cached = CachedTeacher(teacher, (2,), tmp_path / "two", int(2.5 * size))
    for _ in range(2):
        cached(batch("a", "b", "c", "d"))
    kept = list((tmp_path / "two").rglob("*.safetensors"))
    assert 1 <= len(kept) < 4
    assert cached.computed == 8 - len(kept)


def test_another_teacher_or_other_layers_have_a_cache_of_their_own(teacher: Teacher, tmp_path: Path) -> None:
    CachedTeacher(teacher, (2,), tmp_path, PLENTY)(batch("a"))
    other = CachedTeacher(teacher, (1,), tmp_path, PLENTY)
    other(batch("a"))
    assert other.computed == 1
    with torch.no_grad():
        next(teacher.parameters()).add_(0.1)
    changed = CachedTeacher(teacher, (2,), tmp_path, PLENTY)
    changed(batch("a"))
    assert changed.computed == 1


def test_a_damaged_file_is_computed_again(teacher: Teacher, tmp_path: Path) -> None:
    cached = CachedTeacher(teacher, (2,), tmp_path, PLENTY)
    whole = cached(batch("a")).hidden[2]
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(cached(batch("a")).hidden[2], whole)
    assert cached.computed == 2


def test_a_full_disk_costs_time_only(teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.feature_cache.save_file", full)
    cached = CachedTeacher(teacher, (2,), tmp_path, PLENTY)
    for _ in range(2):
        assert cached(batch("a")).hidden[2].shape[0] == 1
    assert cached.computed == 2
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("shape", ["distilhubert", "edge"])
def test_a_distillation_with_a_cache_ends_where_one_without_ends(made_data: Path, tmp_path: Path, shape: str) -> None:
    source = str(pretrain(pretrain_recipe(made_data), tmp_path / "teacher", tmp_path / "cache"))
    losses = []
    for name, gigabytes in (("plain", 0.0), ("cached", 1.0)):
        recipe = distil_recipe(made_data, shape=shape, feature_cache_gb=gigabytes)
        folder = distil(recipe, tmp_path / name, tmp_path / "cache", teacher=source)
        losses.append(torch.load(folder / "last.pt", weights_only=True)["best"])
    assert list((tmp_path / "cache/features").rglob("*.safetensors"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
