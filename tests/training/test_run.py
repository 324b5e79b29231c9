"""Training end to end with a network of a few thousand weights: what a run writes, and that it survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.training.conftest import TinyRun, train_tiny
from tests.training.made_data import tiny_recipe
from training.errors import RunError, TeacherError
from training.rates import learning_rate
from training.recipe import Recipe
from training.run import TrainingHeads, go_on_from, load_student, prepare, train
from training.students.edge import Edge

# Trains as `train` does, and kills itself with SIGKILL at the place named by the fourth argument.
KILLED_RUN = """
import json, os, signal, sys
from pathlib import Path
import torch
from training import run
from training.recipe import Recipe

torch.set_num_threads(1)
recipe, folder, cache, place = sys.argv[1:]
step, save = run._step, torch.save

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def dying_step(recipe, number, *rest):
    return die() if number == 13 else step(recipe, number, *rest)

def dying_save(state, path):
    if state.get("step") != 20:
        return save(state, path)
    save(state, path)
    with open(path, "r+b") as stream:
        stream.truncate(1000)
    die()

if place == "between checkpoints":
    run._step = dying_step
else:
    torch.save = dying_save
run.train(Recipe.model_validate_json(recipe), Path(folder), Path(cache))
"""


def test_the_loss_falls(tiny_run: TinyRun) -> None:
    assert np.mean(tiny_run.losses[-5:]) < 0.9 * np.mean(tiny_run.losses[:3])


def test_run_file_says_what_was_run(tiny_run: TinyRun) -> None:
    run = json.loads((tiny_run.folder / "run.json").read_text())
    assert run["seed"] == 7
    assert run["recipe_digest"] == tiny_run.recipe.digest()
    assert set(run["data"]) == {"manifest.csv", "noise.csv", "rir.csv", "audio"}
    assert all(len(digest) == 64 for digest in run["data"].values())


def test_run_file_has_the_revision_of_the_code(tiny_run: TinyRun) -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("needs a git checkout")
    run = json.loads((tiny_run.folder / "run.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", run["git_revision"])


def test_run_file_counts_what_was_trained_on(made_run: TinyRun) -> None:
    run = json.loads((made_run.folder / "run.json").read_text())
    assert run["labels"] == ["ar:low", "ar:rising", "en:falling", "en:high"]
    # Nine speakers of ten clips in each corpus, of which two speakers are set aside; every clip is kept,
    # since a stride of 70 // 40 is 1.
    assert (run["training_clips"], run["speakers"]) == (140, 14)


def test_most_clips_are_a_stride_over_the_corpus(shared_run: TinyRun) -> None:
    run = json.loads((shared_run.folder / "run.json").read_text())
    assert 80 <= run["training_clips"] <= 84
    assert run["speakers"] > 30


def test_finished_student_is_in_evaluation_mode_and_finite(tiny_run: TinyRun) -> None:
    student, run = load_student(tiny_run.folder)
    with torch.no_grad():
        out = student(torch.randn(1, 16_000) * 0.1, torch.tensor([16_000]))
    assert not student.training
    assert out.keyword_logits.shape == (1, 20, 1 + len(run["labels"]))
    assert torch.isfinite(out.keyword_logits).all()


def test_stopped_and_continued_run_ends_with_the_same_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    # 13 is no multiple of the checkpoint interval.
    train(tiny_run.recipe, tmp_path / "run", tiny_run.cache, stop_after=13)
    assert not (tmp_path / "run" / "student.pt").exists()
    train(tiny_run.recipe, tmp_path / "run", tiny_run.cache)
    assert_same_weights(tiny_run.folder, tmp_path / "run")


@pytest.mark.parametrize("place", ["between checkpoints", "while writing a checkpoint"])
def test_killed_and_continued_run_ends_with_the_same_weights(made_run: TinyRun, tmp_path: Path, place: str) -> None:
    command = [sys.executable, "-c", KILLED_RUN, made_run.recipe.model_dump_json(), tmp_path / "run", made_run.cache]
    killed = subprocess.run([*map(str, command), place], cwd=REPOSITORY, capture_output=True, env=_environment())
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 10
    train(made_run.recipe, tmp_path / "run", made_run.cache)
    assert_same_weights(made_run.folder, tmp_path / "run")


def test_finished_run_started_again_keeps_its_weights(made_run: TinyRun) -> None:
    before = (made_run.folder / "last.pt").read_bytes()
    train(made_run.recipe, made_run.folder, made_run.cache)
    assert (made_run.folder / "last.pt").read_bytes() == before


def test_another_recipe_in_the_same_folder_is_refused(made_run: TinyRun) -> None:
    other = made_run.recipe.model_copy(update={"seed": 8})
    with pytest.raises(RunError, match="another recipe"):
        train(other, made_run.folder, made_run.cache)


def test_other_data_in_the_same_folder_are_refused(made_run: TinyRun, made_data: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made_data, tmp_path / "data"))
    recipe = made_run.recipe.model_copy(update={"data": made_run.recipe.data.model_copy(update={"root": root})})
    train(recipe, tmp_path / "run", tmp_path / "cache", stop_after=1)
    path = next(root.glob("**/*.wav"))
    path.write_bytes(path.read_bytes()[:-2] + b"\x01\x01")
    with pytest.raises(RunError, match="data changed"):
        train(recipe, tmp_path / "run", tmp_path / "cache", stop_after=2)


def test_another_seed_gives_other_weights(made_run: TinyRun, tmp_path: Path) -> None:
    other = made_run.recipe.model_copy(update={"seed": 8})
    train(other, tmp_path / "run", made_run.cache, stop_after=1)
    train(made_run.recipe, tmp_path / "same", made_run.cache, stop_after=1)
    first, second = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["student"]["keyword_head.weight"]
        for name in ("run", "same")
    )
    assert (first - second).abs().max() > 0.01


def test_unfinished_run_does_not_load(made_run: TinyRun, tmp_path: Path) -> None:
    train(made_run.recipe, tmp_path / "run", made_run.cache, stop_after=1)
    with pytest.raises(RunError, match="not finished"):
        load_student(tmp_path / "run")


def test_folder_without_a_run_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.json is missing"):
        load_student(tmp_path)


def test_learning_rate_warms_up_and_decays(made_run: TinyRun) -> None:
    rates = [learning_rate(made_run.recipe, step) for step in range(30)]
    assert rates[0] == pytest.approx(0.002)
    assert max(rates) == rates[4] == rates[5] == pytest.approx(0.01)
    assert sorted(rates[5:], reverse=True) == rates[5:]
    assert learning_rate(made_run.recipe, 30) == pytest.approx(1e-5)


def assert_same_weights(first: Path, second: Path) -> None:
    """Bit for bit."""
    one, two = (torch.load(folder / "student.pt", weights_only=True) for folder in (first, second))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_distilled_student_is_begun_with(made_data: Path, tmp_path: Path) -> None:
    """After one step at a rate of nearly nothing only the keyword head is another one."""
    recipe = tiny_recipe(made_data, steps=1, peak_learning_rate=1e-9, warmup_steps=1, average_decay=0.0)
    torch.manual_seed(99)
    given = Edge(2, recipe.shape).state_dict()
    torch.save(given, tmp_path / "edge.pt")
    begun = recipe.model_copy(update={"init": tmp_path / "edge.pt"})
    train(begun, tmp_path / "run", tmp_path / "cache")
    student, _ = load_student(tmp_path / "run")
    taken = [name for name, _ in student.named_parameters() if not name.startswith("keyword_head.")]
    assert all(torch.allclose(student.state_dict()[name], given[name], atol=1e-5) for name in taken)


@pytest.mark.parametrize("content", [b"nothing", None])
def test_a_student_that_does_not_fit_is_refused(made_data: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        torch.save(Edge(2).state_dict(), tmp_path / "edge.pt")
    else:
        (tmp_path / "edge.pt").write_bytes(content)
    recipe = tiny_recipe(made_data).model_copy(update={"init": tmp_path / "edge.pt"})
    with pytest.raises(RunError, match=r"another shape|does not load"):
        train(recipe, tmp_path / "run", tmp_path / "cache")


def test_a_recipe_goes_on_from_the_one_it_comes_after(made_run: TinyRun, tmp_path: Path) -> None:
    """After one step at a rate of nearly nothing the weights are those of the first run, heads' included."""
    schedule = {"steps": 1, "peak_learning_rate": 1e-9, "warmup_steps": 1, "average_decay": 0.0}
    recipe = made_run.recipe.model_copy(
        update={"after": made_run.recipe, "schedule": made_run.recipe.schedule.model_copy(update=schedule)}
    )
    shutil.copytree(made_run.folder, tmp_path / "run/before")
    train(recipe, tmp_path / "run", made_run.cache)
    first, second = (
        torch.load(folder / "student.pt", weights_only=True) for folder in (made_run.folder, tmp_path / "run")
    )
    learnt = [name for name, _ in load_student(tmp_path / "run")[0].named_parameters()]
    assert any(name.startswith("keyword_head.") for name in learnt)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in learnt)
    centres = [
        torch.load(folder / "last.pt", weights_only=True)["heads"]["angular.weight"]
        for folder in (made_run.folder, tmp_path / "run")
    ]
    assert torch.allclose(*centres, atol=1e-5)


def test_what_a_recipe_comes_after_is_trained_first(made_data: Path, tmp_path: Path) -> None:
    first = tiny_recipe(made_data, steps=2)
    train(first.model_copy(update={"after": first}), tmp_path / "run", tmp_path / "cache")
    before, _ = load_student(tmp_path / "run/before")
    after, run = load_student(tmp_path / "run")
    assert run["recipe"]["after"]["schedule"]["steps"] == 2
    assert run["before"] == hashlib.sha256((tmp_path / "run/before/student.pt").read_bytes()).hexdigest()
    assert any(not torch.equal(before.state_dict()[name], value) for name, value in after.state_dict().items())


def test_where_only_speakers_learn_keywords_stay_bit_for_bit(made_run: TinyRun, tmp_path: Path) -> None:
    changes = {"after": made_run.recipe, "only": "speakers", "before_share": 0.25}
    shutil.copytree(made_run.folder, tmp_path / "run/before")
    train(made_run.recipe.model_copy(update=changes), tmp_path / "run", made_run.cache)
    before, after = (load_student(folder)[0].state_dict() for folder in (made_run.folder, tmp_path / "run"))
    branch = ("to_speaker.", "speaker.", "pool.", "speaker_head.")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(branch) for name in changed)
    assert {name for name in after if name.startswith(branch) and after[name].ndim > 1} <= changed


@pytest.mark.parametrize("parts", ["early", "features"])
def test_a_branch_that_parts_earlier_begins_with_copies_of_the_layers_it_left(
    made_run: TinyRun, tmp_path: Path, parts: str
) -> None:
    schedule = {"steps": 1, "peak_learning_rate": 1e-9, "warmup_steps": 1, "average_decay": 0.0, "weight_decay": 0.0}
    changes = {
        "after": made_run.recipe,
        "only": "speakers",
        "shape": replace(made_run.recipe.shape, speaker_from=parts),
        "schedule": made_run.recipe.schedule.model_copy(update=schedule),
    }
    shutil.copytree(made_run.folder, tmp_path / "run/before")
    train(made_run.recipe.model_copy(update=changes), tmp_path / "run", made_run.cache)
    before = load_student(made_run.folder)[0].state_dict()
    student, run = load_student(tmp_path / "run")
    assert run["recipe"]["shape"]["speaker_from"] == parts
    learnt = {name: value for name, value in student.named_parameters() if not name.startswith("to_speaker.")}
    for name, value in learnt.items():
        stands_for = name.removeprefix("speaker_") if name.startswith(("speaker_stem.", "speaker_early.")) else name
        assert torch.allclose(value, before[stands_for], atol=1e-5), name
    assert any(name.startswith("speaker_stem.") for name in learnt) == (parts == "features")


def test_a_branch_of_its_own_goes_on_from_its_own_layers(made_run: TinyRun, tmp_path: Path) -> None:
    shape = replace(made_run.recipe.shape, speaker_from="features")
    first, second = (Edge(1 + 4, shape) for _ in range(2))
    first_recipe = made_run.recipe.model_copy(update={"shape": shape})
    torch.save(first.state_dict(), tmp_path / "student.pt")
    torch.save({"heads": {}}, tmp_path / "last.pt")
    run = {"recipe": first_recipe.model_dump(mode="json"), "labels": ["a"] * 4}
    (tmp_path / "run.json").write_text(json.dumps(run))
    go_on_from(tmp_path, second, TrainingHeads(first_recipe, 1, None))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    with pytest.raises(RunError, match="another shape"):
        go_on_from(tmp_path, Edge(1 + 5, shape), TrainingHeads(first_recipe, 1, None))


@pytest.mark.parametrize(
    "teacher", [{"hints": {"weight": 1.0, "teacher": "none"}}, {"voices": {"weight": 1.0, "python": "none"}}]
)
def test_a_teacher_that_is_not_there_is_missed_before_hours_of_training(
    made_data: Path, tmp_path: Path, teacher: dict[str, Any]
) -> None:
    recipe = tiny_recipe(made_data)
    later = recipe.model_dump(mode="json") | {"after": recipe.model_dump(mode="json")} | teacher
    with pytest.raises(TeacherError, match="none"):
        train(Recipe.model_validate(later), tmp_path / "run", tmp_path / "cache")
    assert not (tmp_path / "run").exists()


def test_the_final_weights_can_lie_between_both_runs(made_run: TinyRun, tmp_path: Path) -> None:
    weights = {}
    for share in (0.0, 0.25):
        schedule = made_run.recipe.schedule.model_copy(update={"steps": 2})
        changes = {"after": made_run.recipe, "schedule": schedule, "before_share": share}
        folder = tmp_path / f"run-{share}"
        shutil.copytree(made_run.folder, folder / "before")
        train(made_run.recipe.model_copy(update=changes), folder, made_run.cache)
        weights[share] = load_student(folder)[0].state_dict()
    before = load_student(made_run.folder)[0].state_dict()
    name = "keyword_head.weight"
    assert not torch.equal(weights[0.0][name], before[name])
    expected = 0.75 * weights[0.0][name] + 0.25 * before[name]
    assert torch.allclose(weights[0.25][name], expected, atol=1e-6)


def test_other_draws_are_of_the_same_people(made_run: TinyRun, tmp_path: Path) -> None:
    schedule = made_run.recipe.schedule.model_copy(update={"steps": 2})
    once, again, other = (
        train_tiny(
            made_run.recipe.model_copy(update={"draws": draws, "schedule": schedule}),
            tmp_path / f"run-{number}",
            made_run.cache,
        )
        for number, draws in enumerate((None, made_run.recipe.seed, 99))
    )
    assert once.losses == again.losses
    assert once.losses != other.losses
    runs = [json.loads((run.folder / "run.json").read_text()) for run in (once, other)]
    assert runs[0]["training_clips"] == runs[1]["training_clips"]
    people = [prepare(run.recipe, run.cache).training for run in (once, other)]
    assert people[0] == people[1]


def test_a_run_begun_before_a_setting_existed_goes_on(made_run: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(made_run.folder, tmp_path / "run")
    path = tmp_path / "run/run.json"
    run = json.loads(path.read_text())
    del run["recipe"]["after"], run["recipe"]["sampling"]["trim_s"]
    path.write_text(json.dumps({**run, "recipe_digest": "of another form"}))
    assert train(made_run.recipe, tmp_path / "run", made_run.cache) == tmp_path / "run"
