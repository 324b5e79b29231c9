"""The data tables: which recordings exist, what is said in them, by whom, and in which split.

`manifest.csv` has the columns of `COLUMNS`, one row a recording; paths are relative to its folder.

    path        audio file, any format libsndfile reads; resampled to 16 kHz mono
    corpus      where it comes from; impostor trials stay inside one corpus
    split       train or dev
    speaker     who speaks; empty when people are not told apart
    keyword     the word spoken, as in "computer"; empty for other speech
    transcript  what is said, if known
    language    BCP-47 tag; a label is "language:keyword"
    duration_s  length in seconds
    licence     under what terms

`noise.csv` and `rir.csv` (optional) hold path, corpus, split, kind, duration_s, licence;
`alignments.csv` inside a corpus folder (optional) holds path, keyword, start_s, end_s;
`trials.csv` (optional) holds target (1 the same speaker, 0 another), enrolment, test: pairs of recordings,
as a corpus' official list of verification trials.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.errors import ManifestError

COLUMNS = (
    "path", "corpus", "split", "speaker", "keyword", "transcript", "language", "duration_s", "licence",
)  # fmt: skip
RECORDING_COLUMNS = ("path", "corpus", "split", "kind", "duration_s", "licence")
GROUPS = ("gender", "accent", "device")
PEOPLE, PEOPLE_COLUMNS = "speakers.csv", ("speaker", "corpus", "split", "clips", "duration_s", *GROUPS)
TRIALS, TRIAL_COLUMNS = "trials.csv", ("target", "enrolment", "test")
SPLITS = ("train", "dev")
CALIBRATION_FOLD = "calibration"


@dataclass(frozen=True, slots=True)
class Clip:
    """One labelled recording. `split` is train, dev, or the name of a fold taken out of train."""

    path: Path
    key: str
    corpus: str
    split: str
    speaker: str
    keyword: str
    transcript: str
    language: str
    duration_s: float
    word_start_s: float | None = None
    word_end_s: float | None = None
    licence: str = ""

    @property
    def label(self) -> str:
        """`language:keyword`, or the empty string for speech that is no keyword."""
        return f"{self.language}:{self.keyword}" if self.keyword else ""


@dataclass(frozen=True, slots=True)
class Recording:
    """A noise or a room impulse response."""

    path: Path
    key: str
    corpus: str
    split: str
    kind: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class Trial:
    """Whether two recordings are of one speaker."""

    target: bool
    enrolment: Path
    test: Path


@dataclass(frozen=True, slots=True)
class Data:
    """Everything one folder of data offers."""

    root: Path
    clips: tuple[Clip, ...]
    noises: tuple[Recording, ...]
    rooms: tuple[Recording, ...]

    def split(self, name: str) -> list[Clip]:
        return [clip for clip in self.clips if clip.split == name]


def labels_of(clips: Iterable[Clip]) -> list[str]:
    """Sorted distinct labels of the clips; index i of this list is class i + 1 (0 is background)."""
    return sorted({clip.label for clip in clips if clip.label})


def read_data(root: Path, *, calibration_fraction: float = 0.0, seed: int = 0) -> Data:
    """Read and check the tables of `root`.

    With `calibration_fraction` > 0, that part of each corpus' training speakers moves to the fold
    `CALIBRATION_FOLD` (see `assign_fold`). Raises ManifestError.
    """
    root = root.resolve()
    rows = _read_table(root / "manifest.csv", COLUMNS)
    alignments = _read_alignments(root, {row["corpus"] for row in rows})
    clips = [_clip(root, number, row, alignments) for number, row in enumerate(rows, start=2)]
    if not clips:
        raise ManifestError(f"{root / 'manifest.csv'} has no rows")
    _check_speakers(clips)
    if calibration_fraction > 0:
        clips = assign_fold(clips, fraction=calibration_fraction, seed=seed)
    return Data(
        root=root,
        clips=tuple(clips),
        noises=tuple(_read_recordings(root, "noise.csv")),
        rooms=tuple(_read_recordings(root, "rir.csv")),
    )


def read_trials(root: Path) -> list[Trial]:
    """The pairs of `trials.csv`. Raises ManifestError."""
    table = root / TRIALS
    trials = []
    for number, row in enumerate(_read_table(table, TRIAL_COLUMNS), start=2):
        where = f"{table}:{number}"
        if row["target"] not in {"0", "1"}:
            raise ManifestError(f"{where}: target is {row['target']!r}, wanted 0 or 1")
        enrolment, test = (_existing(root, row[name], where) for name in ("enrolment", "test"))
        trials.append(Trial(row["target"] == "1", enrolment, test))
    if len({trial.target for trial in trials}) < 2:
        raise ManifestError(f"{table} needs pairs of one speaker and pairs of two")
    return trials


def read_groups(root: Path) -> dict[str, dict[str, str]]:
    """What `speakers.csv` says of a speaker's gender, accent and device, where it says it and it is one; empty without
    the file. Raises ManifestError."""
    table = root / PEOPLE
    if not table.is_file():
        return {}
    return {
        row["speaker"]: {group: row[group] for group in GROUPS if row[group] and "+" not in row[group]}
        for row in _read_table(table, PEOPLE_COLUMNS)
    }


def assign_fold(clips: Sequence[Clip], *, fraction: float, seed: int) -> list[Clip]:
    """Move `fraction` of every corpus' training speakers into the calibration fold.

    Whole speakers move, chosen by a hash of seed and name, so a new speaker changes places with at
    most one of the others. A corpus with fewer than eight training speakers keeps them all: taking one would cost
    training more than it tells. Clips without a speaker move file by file with the same fraction.
    """
    by_corpus: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        if clip.split == "train" and clip.speaker:
            by_corpus[clip.corpus].add(clip.speaker)
    held: set[str] = set()
    for speakers in by_corpus.values():
        if len(speakers) >= 8:
            ranked = sorted(speakers, key=lambda name: _hash_fraction(seed, name))
            held.update(ranked[: max(2, round(fraction * len(ranked)))])

    def fold(clip: Clip) -> str:
        if clip.split != "train":
            return clip.split
        if clip.speaker:
            return CALIBRATION_FOLD if clip.speaker in held else "train"
        return CALIBRATION_FOLD if _hash_fraction(seed, clip.key) < fraction else "train"

    return [clip if clip.split == fold(clip) else _with_split(clip, fold(clip)) for clip in clips]


def digest_data(data: Data) -> dict[str, str]:
    """SHA-256 of the tables, and one over every audio file's path and bytes."""
    digests = digest_tables(data.root)
    audio = hashlib.sha256()
    items: list[Clip | Recording] = [*data.clips, *data.noises, *data.rooms]
    for item in sorted(items, key=lambda entry: entry.key):
        audio.update(item.key.encode())
        audio.update(hashlib.sha256(item.path.read_bytes()).digest())
    digests["audio"] = audio.hexdigest()
    return digests


def digest_tables(root: Path) -> dict[str, str]:
    """SHA-256 of those tables that are there."""
    return {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest()
        for name in ("manifest.csv", "noise.csv", "rir.csv")
        if (root / name).is_file()
    }


def digest_alignments(root: Path) -> dict[str, str]:
    """SHA-256 of the tables of where words are."""
    tables = sorted(root.glob("*/alignments.csv"))
    return {str(table.relative_to(root)): hashlib.sha256(table.read_bytes()).hexdigest() for table in tables}


def _hash_fraction(seed: int, name: str) -> float:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _with_split(clip: Clip, split: str) -> Clip:
    from dataclasses import replace

    return replace(clip, split=split)


def _read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; it must be a CSV with the columns {','.join(columns)}")
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        found = tuple(reader.fieldnames or ())
        unknown = [name for name in found if name not in columns]
        missing = [name for name in columns if name not in found]
        if unknown or missing:
            raise ManifestError(
                f"{path}: unknown columns {unknown}, missing columns {missing}; wanted {','.join(columns)}"
            )
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if None in row or any(value is None for value in row.values()):
            raise ManifestError(f"{path}:{number}: {len(columns)} fields wanted; quote fields that hold commas")
    return rows


def _clip(root: Path, number: int, row: dict[str, str], alignments: dict[str, tuple[float, float]]) -> Clip:
    where = f"{root / 'manifest.csv'}:{number}"
    if row["split"] not in SPLITS:
        raise ManifestError(f"{where}: split is {row['split']!r}, wanted one of {', '.join(SPLITS)}")
    if row["keyword"] and not row["language"]:
        raise ManifestError(f"{where}: keyword {row['keyword']!r} has no language")
    start_s, end_s = alignments.get(row["path"], (None, None))
    return Clip(
        path=_existing(root, row["path"], where),
        key=row["path"],
        corpus=row["corpus"],
        split=row["split"],
        speaker=row["speaker"],
        keyword=row["keyword"],
        transcript=row["transcript"],
        language=row["language"],
        duration_s=_seconds(row["duration_s"], where),
        word_start_s=start_s,
        word_end_s=end_s,
        licence=row["licence"],
    )


def _read_recordings(root: Path, name: str) -> list[Recording]:
    table = root / name
    if not table.is_file():
        return []
    return [
        Recording(
            path=_existing(root, row["path"], f"{table}:{number}"),
            key=row["path"],
            corpus=row["corpus"],
            split=row["split"],
            kind=row["kind"],
            duration_s=_seconds(row["duration_s"], f"{table}:{number}"),
        )
        for number, row in enumerate(_read_table(table, RECORDING_COLUMNS), start=2)
    ]


def _read_alignments(root: Path, corpora: Iterable[str]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for corpus in sorted(corpora):
        table = root / corpus / "alignments.csv"
        if table.is_file():
            for number, row in enumerate(_read_table(table, ("path", "keyword", "start_s", "end_s")), start=2):
                where = f"{table}:{number}"
                found[row["path"]] = (_seconds(row["start_s"], where), _seconds(row["end_s"], where))
    return found


def _existing(root: Path, relative: str, where: str) -> Path:
    path = root / relative
    if not path.is_file():
        raise ManifestError(f"{where}: {relative} does not exist below {root}")
    return path


def _seconds(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ManifestError(f"{where}: {text!r} is not a number of seconds") from error
    if not 0 <= value < float("inf"):
        raise ManifestError(f"{where}: {text!r} is not a number of seconds")
    return value


def _check_speakers(clips: Iterable[Clip]) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        if clip.speaker:
            splits[clip.speaker].add(clip.split)
    shared = sorted(speaker for speaker, names in splits.items() if len(names) > 1)
    if shared:
        raise ManifestError(
            f"{len(shared)} speakers are in two splits, so nothing measured would hold for new people: "
            + ", ".join(shared[:5])
        )
