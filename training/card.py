"""MODEL_CARD.md: what a bundle is for, what it was made of, what was measured, and where it fails."""

from __future__ import annotations

from pathlib import Path

from model_store import Manifest
from model_store.files import describe
from model_store.store import open_bundle
from training.evaluation.report import Report
from training.export import write_draft

CARD = "MODEL_CARD.md"


def record_figures(draft: Path, report: Report, *, data_name: str) -> Manifest:
    """Put the report's figures into the draft's manifest, and write its card from `CARD_TEXT`."""
    bundle = open_bundle(draft)
    text = card(bundle.manifest, report).encode()
    files = {**bundle.manifest.files, CARD: describe(text)}
    manifest = bundle.manifest.model_copy(update={"metrics": report.metrics(data_name), "files": files})
    write_draft(draft, manifest, {CARD: text})
    return manifest


def card(manifest: Manifest, report: Report) -> str:
    """The whole card as Markdown."""
    rows = "\n".join(
        f"| {figure.name} | {figure.value:.2f} {figure.unit} | {figure.detail} |" for figure in report.figures
    )
    lineage = manifest.lineage
    return CARD_TEXT.format(
        name=manifest.name,
        labels=len(manifest.keywords.labels),
        dim=manifest.speaker.dim,
        parameters=manifest.graph.parameters / 1e6,
        licence=manifest.licence,
        rows=rows,
        command=report.command,
        split=report.split,
        thresholds=manifest.keywords.thresholds_from,
        calibration=manifest.speaker.calibration.fitted_on,
        recipe=lineage.recipe["name"],
        recipe_digest=lineage.recipe_digest,
        revision=lineage.git_revision,
        seed=lineage.seed,
        manifest_digest=lineage.data.get("manifest.csv", "unknown"),
        audio_digest=lineage.data.get("audio", "unknown"),
    )


CARD_TEXT = """# {name}

One {parameters:.2f} M parameter network, trained from scratch on real speech: {labels} keywords in Arabic, English,
Mandarin and Spanish with times, a {dim}-dimensional speaker embedding, and a general speech embedding.

## Intended use

Spotting the listed words in recordings and calls; checking that a voice is the enrolled one, as one signal among
others; features for small classifiers. Not for identifying people without their consent, not as the only lock on
anything valuable (replayed and synthetic voices are not detected), not for transcription.

## Figures

Measured through HTTP on the {split} split, whose labelled speakers the model never heard, by

    {command}

No weight, checkpoint or threshold was fitted or selected on that split. Figures of earlier models on it did decide that
there should be another one, so expect slightly worse on people whom nobody has measured yet.

| what | figure | detail |
| --- | --- | --- |
{rows}

Keyword thresholds: {thresholds}.
Score calibration: {calibration}. A score of 0 is the point of equal costs at even priors.

## Trained on

About 10 hours, some 300 people: Arabic Speech Commands (18 people), DSPSpeech-20 (Mandarin and English, 20 students of
one course), Free Spoken Digits (4 people), a small part of Google Speech Commands (its canonical test clips, so never
quote a Speech Commands test accuracy for this model), Mycroft's community wake words, Picovoice's wake words and coffee
orders, WUW Corpus II (American telephone calls of 2001-2002), a few AN4 clips; espeak-ng voices for the English
words (keyword task only). Noise: ESC-10, Berlin noise, and the noises of the speech corpora; rooms: OpenAIR, Surrey,
one clap.

## Limits

* Few people for most words: 18 for Arabic, one or two for several Mycroft words. Other dialects of Arabic and other
  accents than those in the data are untested. Children and elderly speakers are rare.
* Speaker checks work best with six or more clips on the same kind of microphone; across telephone and close microphones
  nothing is claimed. The telephone corpus has the highest error (see its row).
* Everyday short words (`on`, `off`, `no`, `go`, `up`) resemble pieces of other words: in running speech they raise more
  false alarms than the wake words do, in spite of their own thresholds.
* Digits and commands are trained as single words with pauses around them, not as connected speech.

## Licences

This bundle: {licence}, the strictest share-alike terms among its data. Data: AN4 (BSD-style); Arabic Speech
Commands, Google Speech Commands, Berlin noise: CC BY 4.0; DSPSpeech-20, Surrey rooms: MIT; Free Spoken Digits, WUW
Corpus II: CC BY-SA 4.0; Picovoice benchmarks: Apache-2.0; Mycroft precise: public domain; ESC-10: CC0 and CC BY 3.0;
OpenAIR rooms: CC BY 3.0/4.0, CC BY-SA 3.0; clap: CC0. Attributions travel with the data (`README.md` and `LICENSES/`
there).

## How to rebuild

    make train RECIPE=training/recipes/{recipe}.yaml
    .venv-dev/bin/sotto export runs/{recipe} --name {name}
    .venv-dev/bin/sotto calibrate runs/{recipe}/bundle
    .venv-dev/bin/sotto evaluate runs/{recipe}/bundle --record

Seed {seed}, code at {revision}, recipe {recipe_digest}, manifest.csv {manifest_digest}, audio {audio_digest}.
"""
