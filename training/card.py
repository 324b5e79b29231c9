"""MODEL_CARD.md: what a bundle is for, what it was made of, what was measured, and how to make it again.

What only a person can say (intended use, who is missing from the data, limits) comes from a file of theirs;
everything else is read from the manifest, the tables and the report.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from model_store import GraphInfo, Manifest
from model_store.files import describe
from model_store.store import open_bundle
from training.evaluation.report import Report
from training.export import write_draft
from training.finished import origin
from training.hints import NETWORKS
from training.manifest import Clip, Data

CARD = "MODEL_CARD.md"
ABOUT = Path(__file__).parent / "about"
UNSAID = "Nobody has written down what this model is for and where it fails (`sotto evaluate --about FILE`)."


def record_figures(draft: Path, report: Report, data: Data, *, data_name: str, about: str = "") -> Manifest:
    """Put the report's figures into the draft's manifest, and write its card. `about` is Markdown, its headings
    of the second level."""
    bundle = open_bundle(draft)
    text = card(bundle.manifest, report, data, about).encode()
    files = {**bundle.manifest.files, CARD: describe(text)}
    manifest = bundle.manifest.model_copy(update={"metrics": report.metrics(data_name), "files": files})
    write_draft(draft, manifest, {CARD: text})
    return manifest


def card(manifest: Manifest, report: Report, data: Data, about: str = "") -> str:
    """The whole card as Markdown."""
    rows = "\n".join(
        f"| {figure.name} | {figure.value:.2f} {figure.unit} | {figure.detail} |" for figure in report.figures
    )
    lineage = manifest.lineage
    trained_on = origin(lineage.recipe).choose(data.split("train"))
    return CARD_TEXT.format(
        name=manifest.name,
        labels=len(manifest.keywords.labels),
        languages=", ".join(sorted({entry.label.split(":")[0] for entry in manifest.keywords.labels})),
        gives=_gives(manifest),
        arithmetic=IN_EIGHT_BITS if manifest.graph.arithmetic == "int8" else "",
        parameters=manifest.graph.parameters / 1e6,
        licence=manifest.licence,
        about=about.strip() or UNSAID,
        rows=rows,
        command=report.command,
        split=report.split,
        thresholds=manifest.keywords.thresholds_from,
        calibration=_calibration(manifest),
        data="\n".join(_corpora(trained_on)),
        rebuild="\n".join(f"    {line}" for line in rebuild(manifest.name, lineage.recipe, manifest.graph)),
        recipe_digest=lineage.recipe_digest,
        revision=lineage.git_revision,
        seed=lineage.seed,
        manifest_digest=lineage.data.get("manifest.csv", "unknown"),
        audio_digest=lineage.data.get("audio", "unknown"),
    )


def _gives(manifest: Manifest) -> str:
    voices = "" if manifest.speaker is None else f"a {manifest.speaker.dim}-dimensional speaker embedding, "
    return f"{voices}and a general speech embedding of {manifest.embedding.dim} dimensions"


def _calibration(manifest: Manifest) -> str:
    if manifest.speaker is None:
        return "It does not tell speakers apart."
    fitted_on = manifest.speaker.calibration.fitted_on
    return f"Score calibration: {fitted_on}. A score of 0 is the point of equal costs at even priors."


def rebuild(name: str, recipe: dict[str, Any], graph: GraphInfo) -> list[str]:
    """The commands from recordings to this card, for the kind of run that the recipe is of."""
    own = recipe["name"]
    if isinstance(recipe["data"], dict):
        made = f"make train RECIPE=training/recipes/{own}.yaml"
    else:
        made = f".venv-dev/bin/sotto finetune training/recipes/{own}.yaml --init {recipe['init']} --run runs/{own}"
    stages = [recipe]
    while before := stages[-1].get("after"):
        stages.append(before)
    # Those that are bundles are in the repository.
    hints = any(stage["hints"].get("network") in (None, *NETWORKS) for stage in stages if stage.get("hints"))
    trunk = recipe.get("shape", {}).get("trunk") is not None
    needed = {"teachers": hints or trunk, "peers": any(stage.get("voices") for stage in stages)}
    teachers = [target for target, wanted in needed.items() if wanted]
    rounded = [f".venv-dev/bin/sotto compact runs/{own}/bundle"] if graph.weights == "int8" else []
    if graph.arithmetic == "int8":
        rounded = [f".venv-dev/bin/sotto quantise runs/{own}/bundle"]
    return [
        *([f"make {' '.join(teachers)}"] if teachers else []),
        made,
        f".venv-dev/bin/sotto export runs/{own} --name {name}",
        *rounded,
        f".venv-dev/bin/sotto calibrate runs/{own}/bundle",
        f".venv-dev/bin/sotto evaluate runs/{own}/bundle --record{_about(name)}",
    ]


def _about(name: str) -> str:
    """What a person has written of the model, where the repository has it."""
    file = ABOUT / f"{name.removeprefix('sotto-')}.md"
    return f" --about training/about/{file.name}" if file.is_file() else ""


def _corpora(clips: list[Clip]) -> list[str]:
    by_corpus: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_corpus[clip.corpus].append(clip)
    lines = []
    for corpus, own in sorted(by_corpus.items()):
        hours = sum(clip.duration_s for clip in own) / 3600
        people = len({clip.speaker for clip in own if clip.speaker})
        languages = ", ".join(sorted({clip.language for clip in own if clip.language})) or "-"
        licences = ", ".join(sorted({clip.licence for clip in own if clip.licence})) or "-"
        lines.append(f"| {corpus} | {len(own)} | {hours:.2f} | {people} | {languages} | {licences} |")
    return lines


IN_EIGHT_BITS = " Clips are computed in eight bits, streams in float."
CARD_TEXT = """# {name}

{parameters:.2f} M parameters: {labels} keywords ({languages}) with times, {gives}.{arithmetic}

{about}

## Figures

Measured through HTTP on the {split} split, whose labelled speakers the model never heard, by

    {command}

No weight, checkpoint or threshold was fitted or selected on that split. Figures of earlier models on it may have
decided that there should be another one, so expect slightly worse on people whom nobody has measured yet.

| what | figure | detail |
| --- | --- | --- |
{rows}

Keyword thresholds: {thresholds}.
{calibration}

## Trained on

Speakers are counted where they are told apart.

| corpus | clips | hours | speakers | languages | licence |
| --- | ---: | ---: | ---: | --- | --- |
{data}

This bundle: {licence}.

## How to rebuild

{rebuild}

Seed {seed}, code at {revision}, recipe {recipe_digest}, manifest.csv {manifest_digest}, audio {audio_digest}.
"""
