"""The `sotto` command is put together from the packages that are installed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import typer
from typer.testing import CliRunner

from model_store import cli, command

OFFERED = ["models", "serve", "keys", "train", "evaluate", "export", "calibrate"]


@dataclass(frozen=True)
class Entry:
    """An entry point of a package that is installed, or of one that lacks `missing`."""

    name: str
    missing: str | None = None

    def load(self) -> typer.Typer:
        if self.missing is not None:
            raise ModuleNotFoundError(f"No module named {self.missing!r}", name=self.missing)
        return cli.app


def installed(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> typer.Typer:
    monkeypatch.setattr(command, "entry_points", lambda *, group: entries if group == "sotto.commands" else ())
    return command.build()


def test_the_command_offers_what_every_package_adds() -> None:
    assert set(OFFERED) <= set(typer.main.get_command(command.build()).commands)


@pytest.mark.parametrize("name", OFFERED)
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(command.build(), [name, "--help"])
    assert result.exit_code == 0
    assert f"Usage: root {name}" in result.stdout


def test_the_command_alone_shows_its_help() -> None:
    result = CliRunner().invoke(command.build(), [])
    assert result.exit_code == 2
    assert "Usage: root" in result.output


def test_a_package_that_cannot_be_imported_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    root = installed(monkeypatch, Entry("models"), Entry("train", missing="torch"))
    result = CliRunner().invoke(root, ["train", "recipe.yaml", "--stop-after", "3"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: `sotto train` needs torch; install the extra: pip install 'sotto[train]'\n"


def test_a_package_that_cannot_be_imported_leaves_the_others_be(monkeypatch: pytest.MonkeyPatch) -> None:
    root = installed(monkeypatch, Entry("models"), Entry("train", missing="torch"))
    assert CliRunner().invoke(root, ["models", "list", "--help"]).exit_code == 0
