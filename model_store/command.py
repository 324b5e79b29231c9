"""The `sotto` command: gathers what each installed package offers under the entry point `sotto.commands`.

The packages do not import each other, so none of them can hold the whole command.
"""

from __future__ import annotations

from importlib.metadata import entry_points

import typer

GROUP = "sotto.commands"
# Commands of these packages stand at the top level (`sotto serve`, `sotto train`), not in a group.
TOP_LEVEL = ("serve", "train")


def build() -> typer.Typer:
    """The command with every package that can be imported; `training` needs the extra `train`."""
    root = typer.Typer(no_args_is_help=True, add_completion=False, help="sotto: small speech models, served.")
    for entry in sorted(entry_points(group=GROUP), key=lambda found: found.name):
        try:
            part = entry.load()
        except ModuleNotFoundError as error:
            _explain(root, entry.name, error.name or "a module")
            continue
        root.add_typer(part, name=None if entry.name in TOP_LEVEL else entry.name)
    return root


def main() -> None:
    """Entry point of the console script."""
    build()()


def _explain(root: typer.Typer, name: str, missing: str) -> None:
    """A command that says what to install, in place of one that cannot be imported."""

    @root.command(name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def unavailable() -> None:
        typer.echo(f"error: `sotto {name}` needs {missing}; install the extra: pip install 'sotto[train]'", err=True)
        raise typer.Exit(1)

    unavailable.__doc__ = f"Not installed: needs {missing} (pip install 'sotto[train]')."
