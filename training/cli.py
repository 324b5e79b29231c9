"""`sotto train | pretrain | distil | finetune | export | compact | quantise | calibrate | evaluate | study | ...`."""

from __future__ import annotations

import importlib.util
import json
import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from model_store import Bundle, LocalStore, builtin_store_path
from model_store.store import MANIFEST, open_bundle
from training.corpus_cli import corpus
from training.errors import ExportError, MeasurementError
from training.memory import keep_freed_memory
from training.terminal import command_line, console, failed, say, told

if importlib.util.find_spec("torch") is None:
    # Told at import, so that `sotto` can say which extra is missing before anything starts.
    raise ModuleNotFoundError("torch", name="torch")

app = typer.Typer(help="Training.")
app.add_typer(corpus, name="corpus")
RESULTS = Path("docs/results")

DataRoot = Annotated[Path | None, typer.Option("--data", help="Folder with manifest.csv; default: the recipe's.")]
RunFolder = Annotated[Path | None, typer.Option("--run", help="Run folder; default runs/NAME.")]
CacheFolder = Annotated[Path, typer.Option("--cache", help="Decoded audio is kept here.")]
Only = Annotated[list[str] | None, typer.Option(help="Only these rows, and those they begin with or stand against.")]
TeacherFolder = Annotated[
    Path | None, typer.Option("--teacher", help="A folder that `sotto pretrain` made, instead of making one.")
]
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
    keep_freed_memory()
    with told():
        loaded = load_recipe(recipe)
        if data is not None:
            loaded = loaded.at(data)
        folder = run_training(loaded, run or Path("runs") / loaded.name, cache, stop_after=stop_after)
    console.print(f"run folder: {folder}")


@app.command()
def pretrain(
    recipe: Path,
    run: RunFolder = None,
    cache: CacheFolder = Path(".cache"),
    stop_after: StopAfter = None,
    data: DataRoot = None,
    publish: Annotated[
        Path | None, typer.Option(help="Also put it here in half precision, with a file that says how it was made.")
    ] = None,
) -> None:
    """Make a teacher from audio without labels, by masked prediction as RECIPE says (HuBERT)."""
    from training.pretrain import PretrainRecipe, publish_teacher
    from training.pretrain import pretrain as run_pretraining
    from training.recipe import read_recipe

    keep_freed_memory()
    with told():
        loaded = read_recipe(recipe, PretrainRecipe)
        loaded = loaded.model_copy(update={"data": data or loaded.data})
        folder = run_pretraining(loaded, run or Path("runs") / loaded.name, cache, stop_after=stop_after)
        if publish is not None and stop_after is None:
            publish_teacher(folder, publish)
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

    keep_freed_memory()
    with told():
        loaded = read_recipe(recipe, DistilRecipe)
        loaded = loaded.model_copy(update={"data": data or loaded.data})
        folder = run_distillation(
            loaded, run or Path("runs") / loaded.name, cache, teacher=teacher, stop_after=stop_after
        )
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

    keep_freed_memory()
    with told():
        loaded = read_recipe(recipe, FinetuneRecipe)
        loaded = loaded.model_copy(update={"data": data or loaded.data})
        folder = run_finetuning(loaded, run or Path("runs") / loaded.name, cache, init=init, stop_after=stop_after)
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

    with told():
        manifest = export_run(run, out or run / "bundle", name=name, data_root=data)
    console.print(f"{out or run / 'bundle'}: {manifest.graph.parameters} parameters")


@app.command()
def compact(draft: Path) -> None:
    """Keep the weights of DRAFT in eight bits: a quarter of the size, as fast. Calibrate and evaluate it afterwards."""
    from training.compact import compact as make_smaller

    with told():
        manifest = make_smaller(draft)
    console.print(f"{draft}: {manifest.files[manifest.graph.file].size / 1e6:.2f} MB")


@app.command()
def quantise(draft: Path, data: DataRoot = None) -> None:
    """Compute DRAFT's clips in eight bits, with scales from recordings of train. Then calibrate and evaluate it."""
    from training.quantise import quantise as make_faster

    with told():
        manifest = make_faster(draft, data_root=data)
    console.print(f"{draft}: {manifest.files[manifest.graph.file].size / 1e6:.2f} MB")


@app.command()
def profile(run: Path, data: DataRoot = None) -> None:
    """Where the time of a second of audio goes in the graph of a finished RUN: as torch writes it, as it ships, and in
    eight bits. A Markdown table."""
    from training.quantise import compare_forms

    with told():
        lines = compare_forms(run, data_root=data)
    console.print("\n".join(lines), soft_wrap=True)


@app.command()
def calibrate(draft: Path, data: DataRoot = None) -> None:
    """Fit thresholds and score calibration of DRAFT on the set-aside training speakers, never on dev."""
    from training.calibrate import calibrate as fit

    with told():
        fit(draft, data_root=data, say=console.print)


@app.command()
def study(
    recipe: Path,
    run: RunFolder = None,
    page: Annotated[
        Path | None, typer.Option(help="Where to write it; default docs/results/NAME.md, with --only RUN/some.md.")
    ] = None,
    cache: CacheFolder = Path(".cache"),
    data: DataRoot = None,
    split: Annotated[str, typer.Option(help="Split to report on.")] = "dev",
    only: Only = None,
    teacher: TeacherFolder = None,
) -> None:
    """Make a teacher, students from it in the ways that RECIPE lists, measure them all, and write a page."""
    from training.evaluation.page import write_page
    from training.plan import load_study, only_rows
    from training.rows import Setting
    from training.study import run_study

    keep_freed_memory()
    with told():
        loaded = load_study(recipe)
        if only:
            loaded, _ = only_rows(loaded, [], only)
        folder = run or Path("runs") / loaded.name
        setting = Setting(folder, cache, split, command_line(), say, data, part=bool(only), teacher=teacher)
        out = page or (folder / "some.md" if only else RESULTS / f"{loaded.name}.md")
        write_page(run_study(loaded, setting), out)
    console.print(f"page: {out}")


@app.command()
def compare(
    recipes: list[Path],
    budget: Annotated[str, typer.Option(help="Steps of distillation and of fine-tuning for each.")] = "800+1600",
    run: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/papers"),
    page: Annotated[
        Path | None, typer.Option(help="Where to write it; default docs/results/papers.md, with --only RUN/some.md.")
    ] = None,
    cache: CacheFolder = Path(".cache"),
    data: DataRoot = None,
    split: Annotated[str, typer.Option(help="Split to report on.")] = "dev",
    only: Only = None,
    teacher: TeacherFolder = None,
    kept: Annotated[
        Path | None, typer.Option(help="Figures of each row stay in this folder, and are not made again elsewhere.")
    ] = None,
) -> None:
    """Train several studies of one teacher under one budget, measure them side by side, and write a page."""
    from training.evaluation.page import write_page
    from training.plan import Budget, join_studies, load_study, only_rows, under
    from training.rows import Setting
    from training.study import run_study

    with told():
        joined, sections = join_studies([load_study(recipe) for recipe in recipes])
        if only:
            joined, sections = only_rows(joined, sections, only)
        steps = Budget.parse(budget)
        setting = Setting(
            run, cache, split, command_line(), say, data, steps, noisy=True, part=bool(only), teacher=teacher, kept=kept
        )
        out = page or (run / "some.md" if only else RESULTS / "papers.md")
        write_page(run_study(under(steps, joined), setting, sections), out)
    console.print(f"page: {out}")


@app.command()
def report(
    run: Path,
    page: Annotated[Path | None, typer.Option(help="Where to write it; default docs/results/NAME.md.")] = None,
) -> None:
    """Write the page of a finished study in RUN again: tables and plots from the stored figures."""
    from training.evaluation.page import write_page
    from training.outcome import Outcome

    with told():
        outcome = Outcome.read(run)
    out = page or RESULTS / f"{run.name}.md"
    write_page(outcome, out)
    console.print(f"page: {out}")


@app.command()
def evaluate(
    bundle: Annotated[str | None, typer.Argument(help="Bundle or run folder, ONNX file, or a built-in's name.")] = None,
    url: Annotated[str | None, typer.Option(help="Measure the service that runs here.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with manifest.csv.")] = Path("../shared/data"),
    split: Annotated[str, typer.Option(help="Split to report on.")] = "dev",
    row: Annotated[
        list[str] | None,
        typer.Option(help="asc, commands, wake, spot, sv, cost; default all. Or keywords, base, trials."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SOTTO_EVALUATE_KEY")] = None,
    peers: Annotated[Path, typer.Option(help="Python with the peers (make peers).")] = Path(".venv-peers/bin/python"),
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    enrolled_by: Annotated[
        str | None, typer.Option(help="Published version that enrols the speakers, NAME@3: do its profiles serve?")
    ] = None,
    record: Annotated[bool, typer.Option(help="Write figures and model card into the draft BUNDLE.")] = False,
    robust: Annotated[
        bool, typer.Option(help="Instead of the rows: asc and sv over unseen noise and rooms, as table and heat map.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(help="Where --robust writes; default docs/results/robust-MODEL.md.")
    ] = None,
    about: Annotated[
        Path | None, typer.Option(help="Markdown for the card: intended use, people, limits.", exists=True)
    ] = None,
) -> None:
    """Measure BUNDLE (served for the occasion) or the service at --url, through HTTP.

    BUNDLE may also be a finished run, which is exported and calibrated first, or a bundle's ONNX file.
    """
    from training.evaluation.client import ServiceClient, served
    from training.evaluation.report import default_rows
    from training.evaluation.report import evaluate as measure
    from training.evaluation.robust import evaluate_robustness, write_robustness_page
    from training.manifest import read_data

    if robust and (row or record):
        raise failed(MeasurementError("--robust has rows of its own and records nothing: leave out --row and --record"))
    if enrolled_by and record:
        raise failed(MeasurementError("--enrolled-by is for a look; what is recorded is of one model"))
    with told():
        found = _find(bundle, data)
        if record and found.manifest.version:
            raise MeasurementError(
                f"{found.manifest.name}@{found.manifest.version} is published, and a version never changes: --record "
                "is for drafts"
            )
        other = None if enrolled_by is None or url is not None else _find(enrolled_by, data)
        running = None if url is None else ServiceClient(url, api_key, enrolled_by)
        context = served(found.path, other) if running is None else nullcontext(running)
        with context as client:
            tables = read_data(data)
            if robust:
                tasks = ("keywords", "speakers") if client.tells_speakers() else ("keywords",)
                report = evaluate_robustness(client, tables, split=split, command=command_line(), say=say, tasks=tasks)
            else:
                report = measure(
                    client,
                    tables,
                    split=split,
                    rows=row or default_rows(tables, speakers=client.tells_speakers()),
                    bundle=found,
                    peers_python=peers,
                    command=command_line(),
                    say=say,
                )
        if robust:
            out = page or RESULTS / f"robust-{report.model.split('@')[0]}.md"
            write_robustness_page(report, out)
            console.print(f"page: {out}")
        elif record:
            from training.card import record_figures
            from training.finished import origin

            source = origin(found.manifest.lineage.recipe)
            text = about.read_text(encoding="utf-8") if about else ""
            record_figures(found.path, report, source.read(data), data_name=f"{split} split of {data.name}", about=text)
    console.print(report.table())
    if json_out is not None:
        json_out.write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False))


def _find(bundle: str | None, data: Path) -> Bundle:
    folder = Path(bundle or "")
    if folder.suffix == ".onnx":
        folder = folder.parent
        if not (folder / MANIFEST).is_file():
            raise ExportError(
                f"{bundle}: there is no {MANIFEST} beside it, so nothing says what its outputs mean; "
                "`sotto export` writes both"
            )
    if bundle is not None and (folder / MANIFEST).is_file():
        return open_bundle(folder)
    if (folder / "run.json").is_file():
        from training.calibrate import bundle_of

        return bundle_of(folder, data, say=say)
    return LocalStore(builtin_store_path()).resolve(bundle or "sotto-edge")
