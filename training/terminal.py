"""What the commands share: where they print, and how they say what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from model_store import StoreError
from training.errors import TrainingError

console = Console()


@contextmanager
def told() -> Iterator[None]:
    """What went wrong in one line, and exit code 1."""
    try:
        yield
    except (TrainingError, StoreError) as error:
        raise failed(error) from error


def failed(error: Exception) -> typer.Exit:
    """To be raised."""
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)


def say(line: str) -> None:
    console.print(line, style="dim")


def command_line() -> str:
    """As it was typed."""
    return "sotto " + " ".join(sys.argv[1:])
