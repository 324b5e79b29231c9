"""Public corpora as `manifest.csv`: Speech Commands, VoxCeleb, LibriSpeech, MUSAN, read by lhotse's recipes.

A corpus that was downloaded and unpacked as its authors give it becomes a folder of tables beside it; audio
is neither copied nor changed. `train` is what the corpus trains on, `dev` what it reports on; its own
validation part is left out of both, since our calibration fold comes out of `train`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lhotse import RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.recipes import prepare_librispeech, prepare_musan
from lhotse.recipes.speechcommands import prepare_speechcommands
from lhotse.recipes.voxceleb import _prepare_voxceleb_v1, _prepare_voxceleb_v2

from training.errors import ManifestError
from training.manifest import COLUMNS, RECORDING_COLUMNS, TRIAL_COLUMNS, TRIALS

# The ten words of the twelve-class protocol (Warden 2018); the other two classes are unknown and silence.
TEN_WORDS = frozenset(("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes"))
UNKNOWN = "unknown"
MUSAN_KINDS = ("noise", "music", "speech")
# Every eighth recording, by name, is for measuring with.
DEV_EVERY = 8


@dataclass(frozen=True, slots=True)
class Row:
    """A line of `manifest.csv`."""

    path: Path
    corpus: str
    split: str
    speaker: str
    keyword: str
    transcript: str
    language: str
    duration_s: float
    licence: str


def speech_commands(root: Path, out: Path, *, version: Literal["1", "2"] = "2", classes: Literal[12, 35] = 35) -> int:
    """Both archives of one version, unpacked below `root` as lhotse's download does. Returns the rows written.

    With 35 classes (30 in version 1) every word is a keyword and `dev` is the corpus' test list. With 12, ten
    words are keywords, all others are "unknown", `dev` is the separate test archive, which has a fixed share
    of unknown words and of silence. A version is part of the corpus' name: figures of different versions
    must not be mixed (recipes.md, section 8). Raises ManifestError.
    """
    listed = root / f"speech_commands_v0.0{version}"
    if not (listed / "testing_list.txt").is_file():
        raise ManifestError(f"{listed} has no testing_list.txt; unpack speech_commands_v0.0{version}.tar.gz there")
    corpus = f"speech-commands-v0.0{version}-{classes}"
    found = _prepared(lambda: prepare_speechcommands(version, root), root)
    rows = [_command(*item, corpus, "train", classes) for item in _segments(found["train"])]
    if classes == 12:
        rows += [_command(*item, corpus, "dev", classes) for item in _segments(found["test"])]
    else:
        wanted = set((listed / "testing_list.txt").read_text(encoding="utf-8").split())
        rows += [_listed_command(listed, name, corpus) for name in sorted(wanted)]
    return _write(out, _without_shared_speakers(rows))


def voxceleb(out: Path, *, first: Path | None = None, second: Path | None = None, trials: Path | None = None) -> int:
    """VoxCeleb1 and 2 in Kaldi's split: all of 2 and the dev part of 1 train, the test part of 1 is `dev`.

    `trials` is one of the official lists (`veri_test2.txt`: 0 or 1, two files); it becomes `trials.csv`.
    Returns the rows written. Raises ManifestError.
    """
    if first is None and second is None:
        raise ManifestError("give the folder of VoxCeleb1, of VoxCeleb2, or both")
    rows: list[Row] = []
    if first is not None:
        parts = _prepared(lambda: _prepare_voxceleb_v1(first, 1), first)
        for split, name in (("train", "train"), ("dev", "test")):
            rows += [_speaker_row(*item, "voxceleb1", split) for item in _segments(parts[name])]
    if second is not None:
        part = _prepared(lambda: _prepare_voxceleb_v2(second, 1), second)
        rows += [_speaker_row(*item, "voxceleb2", "train") for item in _segments(part)]
    written = _write(out, rows)
    if trials is not None:
        if first is None:
            raise ManifestError("trials are between recordings of VoxCeleb1; give its folder as well")
        _write_trials(out, trials, first / "wav")
    return written


def librispeech(root: Path, out: Path) -> int:
    """The parts that lie below `root`; `train-*` trains, `dev-clean` is `dev`, the others are left out.

    Returns the rows written. Raises ManifestError.
    """
    parts = _prepared(lambda: prepare_librispeech(root), root)
    rows = []
    for name in sorted(parts):
        split = "train" if name.startswith("train") else "dev" if name == "dev-clean" else ""
        if split:
            for path, segment, duration_s in _segments(parts[name]):
                text = (segment.text or "").lower()
                speaker = f"librispeech-{segment.speaker}"
                rows.append(Row(path, "librispeech", split, speaker, "", text, "en", duration_s, "CC BY 4.0"))
    return _write(out, rows)


def musan(root: Path, out: Path, *, kinds: Sequence[str] = MUSAN_KINDS) -> int:
    """`noise.csv` of MUSAN's parts; every eighth recording is `dev`. Returns the rows written. Raises ManifestError."""
    wrong = sorted(set(kinds) - set(MUSAN_KINDS))
    if wrong or not kinds:
        raise ManifestError(f"MUSAN has {', '.join(MUSAN_KINDS)}; asked for {', '.join(kinds) or 'nothing'}")
    parts = _prepared(lambda: prepare_musan(root, parts=list(kinds)), root)
    lines = []
    for kind in kinds:
        recordings = sorted(parts[kind]["recordings"], key=lambda recording: recording.id)
        for number, recording in enumerate(recordings):
            split = "dev" if number % DEV_EVERY == DEV_EVERY - 1 else "train"
            path = _relative(Path(recording.sources[0].source), out)
            lines.append((path, "musan", split, kind, f"{recording.duration:.3f}", "CC BY 4.0"))
    _write_table(out / "noise.csv", RECORDING_COLUMNS, lines)
    return len(lines)


def _segments(part: dict[str, Any]) -> Iterable[tuple[Path, SupervisionSegment, float]]:
    recordings: RecordingSet = part["recordings"]
    supervisions: SupervisionSet = part["supervisions"]
    by_name = {recording.id: recording for recording in recordings}
    for segment in sorted(supervisions, key=lambda item: item.id):
        recording = by_name[segment.recording_id]
        yield Path(recording.sources[0].source), segment, recording.duration


def _command(path: Path, segment: SupervisionSegment, duration_s: float, corpus: str, split: str, classes: int) -> Row:
    word = segment.text or ""
    keyword = word if classes != 12 or word in TEN_WORDS or not word else UNKNOWN
    # Eight hexadecimal digits tell speakers apart; who spoke in silence is nobody.
    speaker = f"speech-commands-{segment.speaker}" if word and segment.speaker else ""
    return Row(path, corpus, split, speaker, keyword, word, "en", duration_s, "CC BY 4.0")


def _listed_command(folder: Path, name: str, corpus: str) -> Row:
    import soundfile

    path = folder / name
    if not path.is_file():
        raise ManifestError(f"testing_list.txt names {name}, which is not there")
    word, file = name.split("/", 1)
    speaker = f"speech-commands-{file.split('_')[0]}"
    return Row(path, corpus, "dev", speaker, word, word, "en", soundfile.info(path).duration, "CC BY 4.0")


def _without_shared_speakers(rows: list[Row]) -> list[Row]:
    """Training clips whose speaker is also reported on lose their place: the twelve-class test archive has
    unknown words of people who train elsewhere."""
    reported = {row.speaker for row in rows if row.split == "dev" and row.speaker}
    return [row for row in rows if row.split == "dev" or row.speaker not in reported]


def _speaker_row(path: Path, segment: SupervisionSegment, duration_s: float, corpus: str, split: str) -> Row:
    return Row(path, corpus, split, f"{corpus}-{segment.speaker}", "", "", "", duration_s, "CC BY 4.0 (links)")


def _write_trials(out: Path, trials: Path, audio: Path) -> None:
    lines = []
    for number, line in enumerate(trials.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if len(fields) != 3 or fields[0] not in {"0", "1"}:
            raise ManifestError(f"{trials}:{number}: wanted 0 or 1 and two files, got {line!r}")
        for name in fields[1:]:
            if not (audio / name).is_file():
                raise ManifestError(f"{trials}:{number}: {name} is not below {audio}")
        lines.append((fields[0], *(_relative(audio / name, out) for name in fields[1:])))
    _write_table(out / TRIALS, TRIAL_COLUMNS, lines)


def _prepared(prepare: Callable[[], Any], root: Path) -> Any:
    if not root.is_dir():
        raise ManifestError(f"there is no folder {root}")
    try:
        return prepare()
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise ManifestError(f"{root} is not laid out as its corpus is: {type(error).__name__}: {error}") from error


def _write(out: Path, rows: Sequence[Row]) -> int:
    if not rows:
        raise ManifestError("no recording was found")
    lines = [
        (
            _relative(row.path, out), row.corpus, row.split, row.speaker, row.keyword, row.transcript,
            row.language, f"{row.duration_s:.3f}", row.licence,
        )
        for row in sorted(rows, key=lambda row: str(row.path))
    ]  # fmt: skip
    _write_table(out / "manifest.csv", COLUMNS, lines)
    return len(lines)


def _write_table(path: Path, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(lines)
    partial.replace(path)


def _relative(path: Path, out: Path) -> str:
    return os.path.relpath(path.resolve(), out.resolve())
