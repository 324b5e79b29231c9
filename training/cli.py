"""`sotto train | pretrain | distil | finetune | export | calibrate | evaluate`."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from model_store import Bundle, LocalStore, StoreError, builtin_store_path
from model_store.store import MANIFEST, open_bundle
from training.errors import TrainingError

if importlib.util.find_spec("torch") is None:
    # Told at import, so that `sotto` can say which extra is missing before anything starts.
    raise ModuleNotFoundError("torch", name="torch")

app = typer.Typer(help="Training.")
console = Console()

DataRoot = Annotated[Path | None, typer.Option("--data", help="Folder with manifest.csv; default: the recipe's.")]
RunFolder = Annotated[Path | None, typer.Option("--run", help="Run folder; default runs/NAME.")]
CacheFolder = Annotated[Path, typer.Option("--cache", help="Decoded audio is kept here.")]
StopAfter = Annotated[int | None, typer.Option(help="Stop at this step; the same command goes on.")]


@app.command()
def train(
    recipe: Path,
    run: RunFolder = None,
    cache: CacheFolder = Path(".cache"),
    stop_after: StopAfter = None,
    data: DataRoot = None,
) -> None:
    """Train RECIPE, or go on with an interrupted run of it."""
    import torch

    from training.recipe import load_recipe
    from training.run import train as run_training

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        loaded = load_recipe(recipe)
        if data is not None:
            loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"root": data})})
        folder = run_training(loaded, run or Path("runs") / loaded.name, cache, stop_after=stop_after)
    except TrainingError as error:
        raise _failed(error) from error
    console.print(f"run folder: {folder}")


@app.command()
def pretrain(
    recipe: Path,
    run: RunFolder = None,
    cache: CacheFolder = Path(".cache"),
    stop_after: StopAfter = None,
    data: DataRoot = None,
) -> None:
    """Make a teacher from audio without labels, by masked prediction as RECIPE says (HuBERT)."""
    from training.pretrain import PretrainRecipe
    from training.pretrain import pretrain as run_pretraining
    from training.recipe import read_recipe

    try:
        loaded = read_recipe(recipe, PretrainRecipe)
        loaded = loaded.model_copy(update={"data": data or loaded.data})
        folder = run_pretraining(loaded, run or Path("runs") / loaded.name, cache, stop_after=stop_after)
    except TrainingError as error:
        raise _failed(error) from error
    console.print(f"teacher: {folder}")


@app.command()
def distil(
    recipe: Path,
    teacher: Annotated[str | None, typer.Option(help="Hub name or folder; default: the recipe's.")] = None,
    run: RunFolder = None,
    cache: CacheFolder = Path(".cache"),
    stop_after: StopAfter = None,
    data: DataRoot = None,
) -> None:
    """Teach a small student to predict a large model's layers, as RECIPE says; labels are not used."""
    from training.distil import DistilRecipe
    from training.distil import distil as run_distillation
    from training.recipe import read_recipe

    try:
        loaded = read_recipe(recipe, DistilRecipe)
        loaded = loaded.model_copy(update={"data": data or loaded.data})
        folder = run_distillation(
            loaded, run or Path("runs") / loaded.name, cache, teacher=teacher, stop_after=stop_after
        )
    except TrainingError as error:
        raise _failed(error) from error
    console.print(f"run folder: {folder}")


@app.command()
def finetune(
    recipe: Path,
    init: Annotated[str | None, typer.Option(help="Hub name or folder to begin with; default: the recipe's.")] = None,
    run: RunFolder = None,
    cache: CacheFolder = Path(".cache"),
    stop_after: StopAfter = None,
    data: DataRoot = None,
) -> None:
    """Fine-tune a model for keywords and speakers, as RECIPE says."""
    from training.finetune import FinetuneRecipe
    from training.finetune import finetune as run_finetuning
    from training.recipe import read_recipe

    try:
        loaded = read_recipe(recipe, FinetuneRecipe)
        loaded = loaded.model_copy(update={"data": data or loaded.data})
        folder = run_finetuning(loaded, run or Path("runs") / loaded.name, cache, init=init, stop_after=stop_after)
    except TrainingError as error:
        raise _failed(error) from error
    console.print(f"run folder: {folder}")


@app.command()
def export(
    run: Path,
    out: Annotated[Path | None, typer.Option(help="Draft bundle; default RUN/bundle.")] = None,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "sotto-edge",
    data: DataRoot = None,
) -> None:
    """Turn a finished RUN into a draft bundle, after checking the graph against the network."""
    from training.export import export as export_run

    try:
        manifest = export_run(run, out or run / "bundle", name=name, data_root=data)
    except TrainingError as error:
        raise _failed(error) from error
    console.print(f"{out or run / 'bundle'}: {manifest.graph.parameters} parameters")


@app.command()
def calibrate(draft: Path, data: DataRoot = None) -> None:
    """Fit thresholds and score calibration of DRAFT on the set-aside training speakers, never on dev."""
    from training.calibrate import calibrate as fit

    try:
        fit(draft, data_root=data, say=console.print)
    except (TrainingError, StoreError) as error:
        raise _failed(error) from error


@app.command()
def evaluate(
    bundle: Annotated[str | None, typer.Argument(help="Folder of a bundle, or a name in the built-in store.")] = None,
    url: Annotated[str | None, typer.Option(help="Measure the service that runs here.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with manifest.csv.")] = Path("../shared/data"),
    split: Annotated[str, typer.Option(help="Split to report on.")] = "dev",
    row: Annotated[list[str] | None, typer.Option(help="asc, commands, wake, spot, sv, latency; default all.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SOTTO_EVALUATE_KEY")] = None,
    peers: Annotated[Path, typer.Option(help="Python with the peers (make peers).")] = Path(".venv-peers/bin/python"),
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    record: Annotated[bool, typer.Option(help="Write figures and model card into the draft BUNDLE.")] = False,
) -> None:
    """Measure BUNDLE (served for the occasion) or the service at --url, through HTTP."""
    from training.evaluation.client import ServiceClient, served
    from training.evaluation.report import ROWS
    from training.evaluation.report import evaluate as measure
    from training.manifest import read_data

    try:
        found = _find(bundle)
        context = served(found.path) if url is None else nullcontext(ServiceClient(url, api_key))
        with context as client:
            report = measure(
                client,
                read_data(data),
                split=split,
                rows=row or ROWS,
                bundle=found,
                peers_python=peers,
                command="sotto " + " ".join(sys.argv[1:]),
                say=lambda line: console.print(line, style="dim"),
            )
        if record:
            from training.card import record_figures

            record_figures(found.path, report, data_name=f"{split} split of shared/data")
    except (TrainingError, StoreError) as error:
        raise _failed(error) from error
    console.print(report.table())
    if json_out is not None:
        json_out.write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False))


def _find(bundle: str | None) -> Bundle:
    folder = Path(bundle or "")
    if bundle is not None and (folder / MANIFEST).is_file():
        return open_bundle(folder)
    return LocalStore(builtin_store_path()).resolve(bundle or "sotto-edge")


def _failed(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
