"""A bundle of the store as a teacher of keywords."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.conftest import TinyRun, train_tiny
from tests.training.made_data import tiny_recipe
from training import run as run_module
from training.errors import TeacherError
from training.objectives.soft_targets import SoftTargets, soft_loss
from training.objectives.spotting import event_log_odds
from training.recipe import Recipe
from training.students.edge import FRAME_HOP


def test_the_teacher_says_of_a_batch_what_the_network_says_of_each_clip_in_the_order_asked_for(
    reference: str, made_run: TinyRun
) -> None:
    student, run = run_module.load_student(made_run.folder)
    labels = run["labels"]
    lengths = torch.tensor([16_000, 9_000])
    waveform = torch.randn(2, 16_000) * 0.1
    waveform[1, 9_000:] = 0
    mask = torch.arange(16_000 // FRAME_HOP) * FRAME_HOP < lengths[:, None]
    found = SoftTargets(reference, labels[::-1])(waveform, lengths, mask)
    for row, length in enumerate(lengths.tolist()):
        with torch.no_grad():
            out = student(waveform[row : row + 1, :length], lengths[row : row + 1])
        wanted = event_log_odds(out.keyword_logits, out.mask)[0]
        torch.testing.assert_close(found[row, 0], wanted[0])
        torch.testing.assert_close(found[row, 1:], wanted[1:].flip(0), rtol=0, atol=1e-3)


def test_a_teacher_that_is_not_there_or_knows_other_words_is_said(reference: str, made_run: TinyRun) -> None:
    labels = run_module.load_student(made_run.folder)[1]["labels"]
    with pytest.raises(TeacherError, match="tiny@7"):
        SoftTargets("tiny@7", labels)
    with pytest.raises(TeacherError, match="keywords"):
        SoftTargets(reference, labels[1:])


def test_the_loss_is_none_for_the_same_probabilities_of_what_is_possible() -> None:
    teacher = torch.tensor([[0.0, 1.0, -2.0, 3.0], [0.0, -1.0, 4.0, 0.5]])
    possible = torch.tensor([[True, True, True, False], [True, True, True, True]])
    same = teacher.clone()
    same[0, 3] = 50.0
    assert float(soft_loss(same + 7.0, teacher, possible, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_the_loss_is_the_divergence_times_the_temperature_squared() -> None:
    teacher, student = np.array([0.0, 2.0, -1.0]), np.array([0.5, 0.0, 1.0])
    wanted, given = (np.exp(x / 2) / np.exp(x / 2).sum() for x in (teacher, student))
    possible = torch.ones(1, 3, dtype=torch.bool)
    found = soft_loss(torch.tensor(student)[None], torch.tensor(teacher)[None], possible, 2.0)
    assert float(found) == pytest.approx(4 * float((wanted * np.log(wanted / given)).sum()))


def test_a_student_learns_from_it(reference: str, made_data: Path, tmp_path: Path) -> None:
    plain = tiny_recipe(made_data).model_dump(mode="json")
    recipe = Recipe.model_validate({**plain, "soft_targets": {"bundle": reference, "temperature": 2.0}})
    terms = train_tiny(recipe, tmp_path / "run", tmp_path / "cache").terms
    assert np.mean([term["soft"] for term in terms[-5:]]) < np.mean([term["soft"] for term in terms[:5]])
