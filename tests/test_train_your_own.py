"""README's "Train your own", with a teacher of a few thousand weights and made-up voices in place of recordings."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import REPOSITORY, start_service, stop_service
from tests.training.chain import distil_recipe, pretrain_recipe, tune_recipe
from tests.training.made_data import write_data

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SECTION = README.split("### Train your own")[1]
BLOCK = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)[0]


def test_the_commands_end_in_a_service_that_knows_the_words(tmp_path: Path) -> None:
    data = write_data(tmp_path / "recordings")
    for name, small in (("distil", distil_recipe(data)), ("finetune", tune_recipe(data))):
        assert (REPOSITORY / f"training/recipes/{name}.yaml").is_file()
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(small.model_dump(mode="json")))
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(pretrain_recipe(data).model_dump(mode="json")))
    sotto = Path(sys.executable).with_name("sotto")
    run(tmp_path, f"{sotto} pretrain pretrain.yaml --run runs/teacher")
    *commands, serve = [line for line in BLOCK.splitlines() if line]
    for line in commands:
        said = line.replace(".venv-dev/bin/sotto", str(sotto)).replace("training/recipes/", "")
        said = said.replace("microsoft/wavlm-base-plus", "runs/teacher/pass-2/model")
        # The made data has two people in dev, and a trial needs four.
        said = said.replace("../recordings", "recordings").replace(" --row sv", "")
        run(tmp_path, said)
    named = dict(word.removeprefix("SOTTO_").lower().split("=", 1) for word in shlex.split(serve) if "=" in word)
    named["models_dir"] = str(tmp_path / named["models_dir"])
    running = start_service(tmp_path / "service", **named)
    try:
        answer = running.get("/v1/models").json()
        assert [model["name"] for model in answer["models"]] == ["mine"]
    finally:
        stop_service(running)


def run(folder: Path, line: str) -> None:
    done = subprocess.run(["bash", "-ec", line], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
