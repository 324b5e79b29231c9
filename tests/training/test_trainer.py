"""The loop behind pre-training, distillation and fine-tuning, on a stage of four weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from training import precision
from training.cuts import AudioRecipe
from training.errors import RunError
from training.trainer import Job, Schedule, Watched, fit, is_finished, losses_of

SCHEDULE = Schedule(steps=12, batch_size=4, checkpoint_every=3, watch_every=4, workers=0, peak_learning_rate=0.05)


@dataclass(frozen=True)
class Pairs:
    x: Tensor
    y: Tensor


class Line:
    """y = 2 x0 - x1, batch n always the same."""

    def __getitem__(self, number: int) -> Pairs:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, 2, generator=generator)
        return Pairs(x, 2 * x[:, :1] - x[:, 1:])


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 1)
        self.dropout = nn.Dropout(0.2)
        self.fail_at = -1

    def forward(self, batch: Pairs, step: int) -> dict[str, Tensor]:
        error = self.head(self.dropout(self.body(batch.x))) - batch.y
        loss = error.square().mean() * (float("nan") if step == self.fail_at else 1.0)
        return {"total": loss}


def job(folder: Path, schedule: Schedule = SCHEDULE) -> Job[Pairs]:
    return Job(Regression(), Line(), schedule, seed=3, folder=folder, identity={"what": "a line"})


def weights(stage: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stage.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("stop", [1, 3, 7, 11])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, stop: int) -> None:
    whole = weights(fit(job(tmp_path / "whole")))
    fit(job(tmp_path / "parts"), stop_after=stop)
    assert not is_finished(tmp_path / "parts")
    assert same(whole, weights(fit(job(tmp_path / "parts"))))
    assert is_finished(tmp_path / "parts")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert len(losses_of(tmp_path / "whole")) == SCHEDULE.steps


def test_losses_of_a_run_that_began_without_noting_them_are_none(tmp_path: Path) -> None:
    fit(job(tmp_path / "run"), stop_after=6)
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert len(state.pop("losses")) == 6
    torch.save(state, tmp_path / "run/last.pt")
    fit(job(tmp_path / "run"))
    assert losses_of(tmp_path / "run") == []


def test_killed_in_the_middle_it_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """kill -9 between two checkpoints: steps since the last one are done again."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.training.test_trainer import Regression, job\n"
        "from training.trainer import fit\n"
        "class Killed(Regression):\n"
        "    def forward(self, batch, step):\n"
        "        if step == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().forward(batch, step)\n"
        "from dataclasses import replace\n"
        "fit(replace(job(Path(sys.argv[1])), stage=Killed()))\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "killed/last.pt", weights_only=True)["step"] == 6
    assert same(weights(fit(job(tmp_path / "whole"))), weights(fit(job(tmp_path / "killed"))))


def test_gradients_of_accumulated_batches_are_averaged(tmp_path: Path) -> None:
    class Doubled:
        def __getitem__(self, number: int) -> Pairs:
            parts = [Line()[2 * number], Line()[2 * number + 1]]
            return Pairs(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))

    class Plain(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.0)

    parts = replace(job(tmp_path / "parts", SCHEDULE.model_copy(update={"accumulate": 2})), stage=Plain())
    whole = replace(job(tmp_path / "whole"), stage=Plain(), source=Doubled())
    one, other = weights(fit(parts)), weights(fit(whole))
    assert all(torch.allclose(value, other[name], atol=1e-5) for name, value in one.items())


TRAINING = """
import sys
from dataclasses import replace
from pathlib import Path
from torch import nn
from tests.training.test_trainer import Regression, job
from training.trainer import fit
stage = Regression(); stage.dropout = nn.Dropout(0.0)
fit(replace(job(Path(sys.argv[1])), stage=stage))
"""


def launch(command: list[str], folder: Path) -> dict[str, Tensor]:
    """Weights of a run of `TRAINING` that `command` starts."""
    script = folder.with_suffix(".py")
    script.write_text(TRAINING)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(script), str(folder)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Tensor] = torch.load(folder / "last.pt", weights_only=True)["stage"]
    return found


def test_two_processes_take_the_batches_that_one_accumulates(tmp_path: Path) -> None:
    two = launch([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"], tmp_path / "two")
    stage = Regression()
    stage.dropout = nn.Dropout(0.0)
    fit(replace(job(tmp_path / "one", SCHEDULE.model_copy(update={"accumulate": 2})), stage=stage))
    assert all(torch.allclose(value, two[name], atol=1e-5) for name, value in weights(stage).items())


def test_accelerate_launch_starts_it(tmp_path: Path) -> None:
    """On CPUs accelerate needs MPI to start more than one; without, it runs one process, as this test shows."""
    launcher = Path(sys.executable).with_name("accelerate")
    found = launch([str(launcher), "launch", "--num_processes", "2", "--cpu"], tmp_path / "launched")
    stage = Regression()
    stage.dropout = nn.Dropout(0.0)
    fit(replace(job(tmp_path / "one"), stage=stage))
    assert all(torch.allclose(value, found[name], atol=1e-5) for name, value in weights(stage).items())


def test_frozen_parameters_stay_and_slow_ones_are_slow(tmp_path: Path) -> None:
    before = weights(Regression())
    after = weights(fit(replace(job(tmp_path / "frozen"), rates=(("body.", 0.0),))))
    assert torch.equal(before["body.weight"], after["body.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])
    slow = weights(fit(replace(job(tmp_path / "slow"), rates=(("body.", 0.01),))))
    moved = (slow["body.weight"] - before["body.weight"]).abs().max()
    assert 0 < moved < 0.1 * (slow["head.weight"] - before["head.weight"]).abs().max()


def test_the_best_look_at_the_fold_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    scores = iter([0.5, 0.9, 0.4, 0.3, 0.8])
    seen: list[dict[str, Tensor]] = []

    def look(stage: nn.Module) -> Watched:
        seen.append(weights(stage))
        return Watched(score := next(scores), {"accuracy": score})

    schedule = SCHEDULE.model_copy(update={"watch_every": 2, "patience": 2})
    after = weights(fit(replace(job(tmp_path / "run", schedule), watch=look)))
    assert len(seen) == 4
    assert same(after, seen[1])
    assert is_finished(tmp_path / "run")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    stage = Regression()
    stage.fail_at = 4
    with pytest.raises(RunError, match="the loss is nan at step 4"):
        fit(replace(job(tmp_path / "run"), stage=stage))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(job(tmp_path / "run"), stop_after=3)
    with pytest.raises(RunError, match="holds a run of something else"):
        fit(replace(job(tmp_path / "run"), identity={"what": "a circle"}))
    with pytest.raises(RunError, match="holds a run of something else"):
        fit(job(tmp_path / "run", SCHEDULE.model_copy(update={"steps": 13})))


def test_a_folder_that_sotto_train_made_is_refused(tmp_path: Path) -> None:
    """Its run.json has no identity."""
    (tmp_path / "run").mkdir()
    begun = recipe(made_data=tmp_path)
    for run in ({"recipe": {}}, {"identity": {}}):
        (tmp_path / "run/run.json").write_text(json.dumps(run))
        with pytest.raises(RunError, match="something else"):
            fit(replace(job(tmp_path / "run"), same_recipe=begun.says_the_same))


def test_a_run_begun_before_a_setting_existed_goes_on(tmp_path: Path) -> None:
    """What is not in its run.json had its default; other defaults or values are another run."""
    begun = recipe(made_data=tmp_path)
    identity = {"recipe": begun.identity()}
    fit(replace(job(tmp_path / "run"), identity=identity, same_recipe=begun.says_the_same), stop_after=3)
    path = tmp_path / "run/run.json"
    run = json.loads(path.read_text())
    del run["identity"]["recipe"]["corruption"], run["identity"]["schedule"]["patience"]
    path.write_text(json.dumps(run))
    fit(replace(job(tmp_path / "run"), identity=identity, same_recipe=begun.says_the_same), stop_after=6)
    for changes in ({"corruption": {}}, {"longest_s": 5.0}):
        other = recipe(made_data=tmp_path, **changes)
        changed = replace(job(tmp_path / "run"), identity={"recipe": other.identity()}, same_recipe=other.says_the_same)
        with pytest.raises(RunError, match="something else"):
            fit(changed)
    longer = job(tmp_path / "run", SCHEDULE.model_copy(update={"steps": 13}))
    with pytest.raises(RunError, match="something else"):
        fit(replace(longer, identity=identity, same_recipe=begun.says_the_same))


def recipe(made_data: Path, **changes: object) -> AudioRecipe:
    return AudioRecipe.model_validate({"name": "tiny", "data": made_data, **changes})


def test_losses_of_alternating_tasks_are_all_written_down(tmp_path: Path) -> None:
    class Alternating(Regression):
        def forward(self, batch: Pairs, step: int) -> dict[str, Tensor]:
            total = super().forward(batch, step)["total"]
            return {"total": total, ("even", "odd")[step % 2]: total}

    fit(replace(job(tmp_path / "run"), stage=Alternating()))
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert {"loss/total", "loss/even", "loss/odd"} <= set(events.Tags()["scalars"])


def test_the_run_folder_says_what_was_run(tmp_path: Path) -> None:
    fit(job(tmp_path / "run"))
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["identity"]["what"] == "a line"
    assert run["identity"]["seed"] == 3
    assert run["identity"]["schedule"]["steps"] == 12
    assert run["parameters"] == 9
    assert list((tmp_path / "run/tensorboard").iterdir())


@pytest.mark.parametrize(("has_it", "told"), [(True, "bf16"), (False, "no")])
def test_bf16_is_not_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_it: bool, told: str) -> None:
    """Where the processor has no such instructions 32 bits are computed, and the run says so."""
    monkeypatch.setattr(precision, "processor_has_bf16", lambda: has_it)
    half = SCHEDULE.model_copy(update={"precision": "bf16"})
    stage = fit(job(tmp_path / "half", half))
    assert json.loads((tmp_path / "half/run.json").read_text())["computed_in"] == told
    assert same(weights(stage), weights(fit(job(tmp_path / "whole")))) is not has_it


def test_a_run_that_goes_on_in_other_arithmetic_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = SCHEDULE.model_copy(update={"precision": "bf16"})
    told = []
    for has_it in (True, False, False):
        monkeypatch.setattr(precision, "processor_has_bf16", lambda has_it=has_it: has_it)
        fit(job(tmp_path / "run", half), stop_after=4)
        told.append(json.loads((tmp_path / "run/run.json").read_text())["computed_in"])
    assert told == ["bf16", "bf16, then no", "bf16, then no"]


@pytest.mark.parametrize(("decay", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_the_learning_rate_rises_then_falls(decay: str, middle: float) -> None:
    schedule = Schedule.model_validate({"steps": 110, "warmup": 10 / 110, "peak_learning_rate": 1.0, "decay": decay})
    rates = [schedule.learning_rate(step) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == 1.0 == max(rates)
    assert rates[60] == pytest.approx(middle)
    assert 0 < rates[-1] < 0.02
