"""`sotto corpus`: tables of public corpora, in the form that recipes read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from training.errors import ManifestError
from training.terminal import console, failed, told

corpus = typer.Typer(help="Write the tables of a public corpus that was downloaded.", no_args_is_help=True)

CorpusOut = Annotated[Path, typer.Option("--out", help="Folder for the tables.")]


@corpus.command("speech-commands")
def corpus_speech_commands(
    root: Path,
    out: CorpusOut,
    version: Annotated[str, typer.Option(help="1 for v0.01, 2 for v0.02.")] = "2",
    classes: Annotated[int, typer.Option(help="35 (every word) or 12 (ten words, unknown, silence).")] = 35,
) -> None:
    """Google Speech Commands: both archives of a version, unpacked below ROOT."""
    from training.corpora import speech_commands

    if version not in {"1", "2"} or classes not in {12, 35}:
        raise failed(ManifestError("the version is 1 or 2, the classes are 12 or 35"))
    _tables(out, lambda: speech_commands(root, out, version=version, classes=classes))  # type: ignore[arg-type]  # checked above


@corpus.command("voxceleb")
def corpus_voxceleb(
    out: CorpusOut,
    first: Annotated[Path | None, typer.Option("--vox1", help="Folder of VoxCeleb1.")] = None,
    second: Annotated[Path | None, typer.Option("--vox2", help="Folder of VoxCeleb2.")] = None,
    trials: Annotated[Path | None, typer.Option(help="Official list of trials, as veri_test2.txt.")] = None,
) -> None:
    """VoxCeleb1, VoxCeleb2, or both."""
    from training.corpora import voxceleb

    _tables(out, lambda: voxceleb(out, first=first, second=second, trials=trials))


@corpus.command("shar")
def corpus_shar(
    root: Path,
    out: CorpusOut,
    split: Annotated[str, typer.Option(help="Of manifest.csv.")] = "train",
    shard_size: Annotated[int, typer.Option(min=1, help="Recordings to a shard.")] = 1000,
) -> None:
    """The recordings of ROOT/manifest.csv as lhotse shards, for `shar` in a recipe of `pretrain` or `distil`.

    In no particular order, as FLAC at 16 kHz. Shards can be spread over several folders and disks.
    """
    import random

    from training.cuts import write_shar
    from training.manifest import read_data

    with told():
        clips = read_data(root).split(split)
        random.Random(0).shuffle(clips)
        count = write_shar(clips, out, shard_size=shard_size)
    console.print(f"{count} recordings in {out}")


@corpus.command("librispeech")
def corpus_librispeech(root: Path, out: CorpusOut) -> None:
    """The parts of LibriSpeech below ROOT."""
    from training.corpora import librispeech

    _tables(out, lambda: librispeech(root, out))


@corpus.command("musan")
def corpus_musan(
    root: Path, out: CorpusOut, kind: Annotated[list[str] | None, typer.Option(help="noise, music, speech.")] = None
) -> None:
    """MUSAN, as noises: writes noise.csv, to be put beside another corpus' manifest.csv."""
    from training.corpora import MUSAN_KINDS, musan

    _tables(out, lambda: musan(root, out, kinds=kind or MUSAN_KINDS))


def _tables(out: Path, write: Callable[[], int]) -> None:
    with told():
        written = write()
    console.print(f"{written} recordings in {out}")
