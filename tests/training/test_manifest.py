"""The data tables: what is read from them, and what is refused with which words."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.training.made_data import write_table, write_wav
from training.errors import ManifestError
from training.manifest import COLUMNS, PEOPLE_COLUMNS, RECORDING_COLUMNS, digest_data, labels_of, read_data, read_groups

SPOKEN = {"corpus": "c", "split": "train", "language": "en", "duration_s": "0.1", "licence": "CC0"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three clips: a keyword, a sentence, and somebody else's keyword in dev."""
    write_rows(
        tmp_path,
        {"path": "c/a.wav", "speaker": "ann", "keyword": "yes"},
        {"path": "c/b.wav", "speaker": "ann", "transcript": "well, no", "language": "en"},
        {"path": "c/d.wav", "speaker": "dan", "keyword": "no", "split": "dev", "language": "ar"},
    )
    return tmp_path


def write_rows(root: Path, *rows: dict[str, str]) -> None:
    """A manifest with these rows over SPOKEN, and a short file for each."""
    write_table(
        root / "manifest.csv", COLUMNS, [tuple({**SPOKEN, **row}.get(name, "") for name in COLUMNS) for row in rows]
    )
    for row in rows:
        write_wav(root / row["path"], np.zeros(1600, dtype=np.float32))


def refused(root: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        read_data(root)
    return str(caught.value)


def test_every_column_is_read(root: Path) -> None:
    clip = read_data(root).clips[1]
    assert (clip.path, clip.key, clip.corpus, clip.split) == (root / "c/b.wav", "c/b.wav", "c", "train")
    assert (clip.speaker, clip.keyword, clip.transcript) == ("ann", "", "well, no")
    assert (clip.language, clip.duration_s) == ("en", 0.1)


def test_labels_are_language_and_keyword_in_order(root: Path) -> None:
    assert labels_of(read_data(root).clips) == ["ar:no", "en:yes"]


def test_splits_are_kept_apart(root: Path) -> None:
    data = read_data(root)
    assert [clip.key for clip in data.split("dev")] == ["c/d.wav"]
    assert len(data.split("train")) == 2


def test_alignments_are_read_where_there_are_any(root: Path) -> None:
    write_table(
        root / "c/alignments.csv", ("path", "keyword", "start_s", "end_s"), [("c/a.wav", "yes", "0.02", "0.07")]
    )
    first, second, _ = read_data(root).clips
    assert (first.word_start_s, first.word_end_s) == (0.02, 0.07)
    assert (second.word_start_s, second.word_end_s) == (None, None)


def test_noises_and_rooms_are_read_where_there_are_any(root: Path) -> None:
    write_wav(root / "noise/n.wav", np.zeros(1600, dtype=np.float32))
    write_table(root / "noise.csv", RECORDING_COLUMNS, [("noise/n.wav", "n", "dev", "rain", "0.1", "CC0")])
    data = read_data(root)
    assert [(noise.key, noise.split, noise.kind, noise.duration_s) for noise in data.noises] == [
        ("noise/n.wav", "dev", "rain", 0.1)
    ]
    assert data.rooms == ()


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    assert re.search(r"manifest\.csv does not exist.*path,corpus,split", refused(tmp_path))


def test_empty_manifest_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path)
    assert "manifest.csv has no rows" in refused(tmp_path)


def test_missing_file_is_named_with_its_line(root: Path) -> None:
    (root / "c/b.wav").unlink()
    assert re.search(r"manifest\.csv:3: c/b\.wav does not exist", refused(root))


def test_unknown_column_is_named(root: Path) -> None:
    table = root / "manifest.csv"
    table.write_text(table.read_text().replace("licence", "license", 1))
    message = refused(root)
    assert "unknown columns ['license']" in message
    assert "missing columns ['licence']" in message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "test"}, r"manifest\.csv:2: split is 'test', wanted one of train, dev"),
        ({"duration_s": "long"}, r"manifest\.csv:2: 'long' is not a number of seconds"),
        ({"duration_s": "-1"}, r"manifest\.csv:2: '-1' is not a number of seconds"),
        ({"duration_s": "nan"}, r"manifest\.csv:2: 'nan' is not a number of seconds"),
        ({"keyword": "yes", "language": ""}, r"manifest\.csv:2: keyword 'yes' has no language"),
    ],
)
def test_wrong_field_is_named_with_its_line(tmp_path: Path, wrong: dict[str, str], message: str) -> None:
    write_rows(tmp_path, {"path": "c/a.wav", **wrong})
    assert re.search(message, refused(tmp_path))


@pytest.mark.parametrize("line", ["c/e.wav,c,train", "c/e.wav,c,train,ann,yes,yes, no,en,0.1,CC0"])
def test_row_with_too_few_or_many_fields_is_named_with_its_line(root: Path, line: str) -> None:
    with (root / "manifest.csv").open("a") as stream:
        stream.write(line + "\n")
    assert re.search(r"manifest\.csv:5: 9 fields wanted", refused(root))


def test_wrong_number_in_an_alignment_is_named_with_its_line(root: Path) -> None:
    write_table(root / "c/alignments.csv", ("path", "keyword", "start_s", "end_s"), [("c/a.wav", "yes", "?", "0.07")])
    assert re.search(r"alignments\.csv:2: '\?' is not a number", refused(root))


def test_missing_noise_is_named_with_its_line(root: Path) -> None:
    write_table(root / "noise.csv", RECORDING_COLUMNS, [("noise/n.wav", "n", "dev", "rain", "0.1", "CC0")])
    assert re.search(r"noise\.csv:2: noise/n\.wav does not exist", refused(root))


def test_speaker_in_two_splits_is_named(root: Path) -> None:
    table = root / "manifest.csv"
    table.write_text(table.read_text().replace("dan", "ann"))
    assert re.search(r"1 speakers are in two splits.*ann", refused(root))


def test_same_data_has_the_same_digests(root: Path) -> None:
    assert digest_data(read_data(root)) == digest_data(read_data(root))


def test_one_byte_of_audio_changes_the_audio_digest_only(root: Path) -> None:
    before = digest_data(read_data(root))
    content = bytearray((root / "c/a.wav").read_bytes())
    content[-1] ^= 1
    (root / "c/a.wav").write_bytes(content)
    after = digest_data(read_data(root))
    assert after["audio"] != before["audio"]
    assert after["manifest.csv"] == before["manifest.csv"]


def test_another_word_in_the_table_changes_the_table_digest_only(root: Path) -> None:
    before = digest_data(read_data(root))
    table = root / "manifest.csv"
    table.write_text(table.read_text().replace("yes", "yep"))
    after = digest_data(read_data(root))
    assert after["manifest.csv"] != before["manifest.csv"]
    assert after["audio"] == before["audio"]


def test_shared_recordings_read_whole(shared_data: Path) -> None:
    data = read_data(shared_data)
    assert len(data.clips) > 20_000
    assert len(labels_of(data.clips)) == 112


def test_groups_of_people_are_those_that_the_table_names_alone(root: Path) -> None:
    assert read_groups(root) == {}
    rows = [
        ("ann", "c", "train", "2", "0.2", "female", "native", ""),
        ("dan", "c", "dev", "1", "0.1", "male", "native+nonNative", "cellphone"),
    ]
    write_table(root / "speakers.csv", PEOPLE_COLUMNS, rows)
    assert read_groups(root) == {
        "ann": {"gender": "female", "accent": "native"},
        "dan": {"gender": "male", "device": "cellphone"},
    }
