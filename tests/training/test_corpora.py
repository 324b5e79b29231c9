"""Public corpora in miniature: folders laid out as their authors give them, of tones instead of speech."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile

from training.corpora import librispeech, musan, speech_commands, voxceleb
from training.errors import ManifestError
from training.manifest import read_data


def tone(path: Path, seconds: float = 0.2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * 16_000)) / 16_000
    soundfile.write(path, 0.1 * np.sin(2 * np.pi * 300 * time), 16_000)


def commands(root: Path, version: str = "2") -> Path:
    """Four words of three speakers, one of them listed for testing, one for validation."""
    listed = root / f"speech_commands_v0.0{version}"
    for word in ("yes", "no", "bed", "cat"):
        for speaker in ("aaaaaaaa", "bbbbbbbb", "cccccccc"):
            tone(listed / word / f"{speaker}_nohash_0.wav")
    tone(listed / "_background_noise_/running_tap.wav", 1.0)
    tone(listed / "_background_noise_/pink_noise.wav", 1.0)
    words = ("yes", "no", "bed", "cat")
    (listed / "testing_list.txt").write_text("".join(f"{word}/bbbbbbbb_nohash_0.wav\n" for word in words))
    (listed / "validation_list.txt").write_text("".join(f"{word}/cccccccc_nohash_0.wav\n" for word in words))
    test = root / f"speech_commands_test_set_v0.0{version}"
    for word in ("yes", "no"):
        tone(test / word / "bbbbbbbb_nohash_0.wav")
    tone(test / "_unknown_/bed_bbbbbbbb_nohash_0.wav")
    tone(test / "_silence_/0.wav")
    return root


def rows(out: Path, table: str = "manifest.csv") -> list[dict[str, str]]:
    with (out / table).open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("version", ["1", "2"])
def test_every_word_is_a_class_of_the_35_and_the_list_is_what_is_reported(tmp_path: Path, version: str) -> None:
    root = commands(tmp_path / "corpus", version)
    assert speech_commands(root, tmp_path / "out", version=version, classes=35) == 9
    data = read_data(tmp_path / "out")
    assert {clip.label for clip in data.split("dev")} == {"en:yes", "en:no", "en:bed", "en:cat"}
    assert {clip.speaker for clip in data.split("dev")} == {"speech-commands-bbbbbbbb"}
    assert {clip.speaker for clip in data.split("train")} == {"speech-commands-aaaaaaaa", ""}
    assert {clip.corpus for clip in data.clips} == {f"speech-commands-v0.0{version}-35"}


def test_the_twelve_are_ten_words_unknown_and_silence_and_the_test_archive(tmp_path: Path) -> None:
    speech_commands(commands(tmp_path / "corpus"), tmp_path / "out", classes=12)
    data = read_data(tmp_path / "out")
    dev = {clip.path.parent.name: clip.label for clip in data.split("dev")}
    assert dev == {"yes": "en:yes", "no": "en:no", "_unknown_": "en:unknown", "_silence_": ""}
    train = {clip.path.parent.name: clip.label for clip in data.split("train")}
    assert train["bed"] == train["cat"] == "en:unknown"
    assert train["_background_noise_"] == ""
    assert not any(clip.speaker == "speech-commands-cccccccc" for clip in data.clips)


def test_an_archive_that_is_not_unpacked_is_named(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ManifestError, match=r"speech_commands_v0\.02\.tar\.gz"):
        speech_commands(tmp_path / "corpus", tmp_path / "out")


@pytest.fixture
def vox(tmp_path: Path) -> Path:
    root = tmp_path / "vox1"
    for speaker in ("id10001", "id10270"):
        for number in (1, 2):
            tone(root / f"wav/{speaker}/abc/0000{number}.wav")
    lines = [
        "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet",
        "id10001\tA\tm\tIreland\tdev",
        "id10270\tB\tf\tUK\ttest",
    ]
    (root / "vox1_meta.csv").write_text("\n".join(lines) + "\n")
    return root


def test_voxceleb1_trains_on_its_dev_part_and_reports_on_its_test_part(vox: Path, tmp_path: Path) -> None:
    trials = tmp_path / "veri_test2.txt"
    trials.write_text("1 id10270/abc/00001.wav id10270/abc/00002.wav\n0 id10270/abc/00001.wav id10001/abc/00001.wav\n")
    assert voxceleb(tmp_path / "out", first=vox, trials=trials) == 4
    data = read_data(tmp_path / "out")
    assert {clip.speaker for clip in data.split("train")} == {"voxceleb1-id10001"}
    assert {clip.speaker for clip in data.split("dev")} == {"voxceleb1-id10270"}
    assert [row["target"] for row in rows(tmp_path / "out", "trials.csv")] == ["1", "0"]
    first = rows(tmp_path / "out", "trials.csv")[0]
    assert (tmp_path / "out" / first["test"]).resolve() == vox / "wav/id10270/abc/00002.wav"


@pytest.mark.parametrize(
    ("line", "message"),
    [("2 a.wav b.wav", "wanted 0 or 1"), ("1 a.wav", "wanted 0 or 1"), ("1 a.wav b.wav", "a.wav is not below")],
)
def test_a_wrong_trial_is_refused_with_its_line(vox: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "trials.txt").write_text(line + "\n")
    with pytest.raises(ManifestError, match=rf"trials\.txt:1: .*{message}"):
        voxceleb(tmp_path / "out", first=vox, trials=tmp_path / "trials.txt")


def test_voxceleb_without_any_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="or both"):
        voxceleb(tmp_path / "out")


def test_a_folder_that_is_no_voxceleb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vox").mkdir()
    with pytest.raises(ManifestError, match="not laid out"):
        voxceleb(tmp_path / "out", first=tmp_path / "vox")


def test_librispeech_has_speakers_and_transcripts(tmp_path: Path) -> None:
    root = tmp_path / "LibriSpeech"
    for part, speaker in (("train-clean-100", "19"), ("dev-clean", "84"), ("test-other", "367")):
        tone(root / f"{part}/{speaker}/198/{speaker}-198-0000.flac")
        (root / f"{part}/{speaker}/198/{speaker}-198.trans.txt").write_text(f"{speaker}-198-0000 HELLO WORLD\n")
    assert librispeech(root, tmp_path / "out") == 2
    data = read_data(tmp_path / "out")
    assert [(clip.speaker, clip.transcript) for clip in data.split("train")] == [("librispeech-19", "hello world")]
    assert [clip.speaker for clip in data.split("dev")] == ["librispeech-84"]


def test_musan_becomes_noises_of_both_splits(tmp_path: Path) -> None:
    root = tmp_path / "musan"
    for number in range(9):
        tone(root / f"noise/free-sound/noise-{number}.wav")
    tone(root / "music/fma/music-0.wav")
    (root / "music/fma/ANNOTATIONS").write_text("music-0 classical N somebody\n")
    assert musan(root, tmp_path / "out", kinds=["noise", "music"]) == 10
    table = rows(tmp_path / "out", "noise.csv")
    assert [row["split"] for row in table if row["kind"] == "noise"] == ["train"] * 7 + ["dev", "train"]
    with pytest.raises(ManifestError, match="asked for hum"):
        musan(root, tmp_path / "out", kinds=["hum"])
