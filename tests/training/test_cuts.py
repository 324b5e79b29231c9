"""Shards of audio, and noise under it."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet
from pydantic import ValidationError
from typer.testing import CliRunner

from training.audio_cache import AudioCache, decode
from training.cli import app
from training.cuts import (
    AudioRecipe,
    Corruption,
    CorruptionRecipe,
    CutBatches,
    Layout,
    SharBatches,
    Waves,
    digest_shar,
    write_shar,
)
from training.errors import ManifestError
from training.manifest import Recording, read_data

LAYOUT = Layout(batch_s=8.0, longest_s=4.0, seed=1)


@pytest.fixture(scope="module")
def shards(made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training clips, fifty to a shard."""
    out = tmp_path_factory.mktemp("shards")
    done = CliRunner().invoke(app, ["corpus", "shar", str(made_data), "--out", str(out), "--shard-size", "50"])
    assert done.exit_code == 0, done.output
    return out


def test_shards_hold_every_recording_as_it_was(made_data: Path, shards: Path) -> None:
    clips = {clip.key: clip for clip in read_data(made_data).split("train")}
    source = SharBatches([shards], LAYOUT)
    names = []
    for batch in source.epoch():
        names += batch.names
        for row, name in enumerate(batch.names[:2]):
            own = batch.waveform[row, : batch.lengths[row]].numpy()
            assert np.abs(own - decode(clips[name].path)).max() < 1e-4
    assert sorted(names) == sorted(clips)
    assert source.parts_an_epoch == -(-len(clips) // 50)


def test_a_batch_of_shards_is_a_function_of_its_number(shards: Path) -> None:
    one, other = (SharBatches([shards], LAYOUT) for _ in range(2))
    epoch = sum(1 for _ in SharBatches([shards], LAYOUT).epoch())
    numbers = (epoch + 3, 0, 7)
    found = {number: one[number] for number in numbers}
    for number in sorted(numbers):
        assert found[number].names == other[number].names
        assert torch.equal(found[number].waveform, other[number].waveform)
    # The next epoch has another order.
    assert [one[n].names for n in range(3)] != [one[epoch + n].names for n in range(3)]


def test_one_shard_is_open_at_a_time(shards: Path) -> None:
    source = SharBatches([shards], LAYOUT)
    shard_of = {
        cut: number
        for number, path in enumerate(sorted(shards.glob("cuts.*")))
        for cut in (one.id for one in CutSet.from_file(path))
    }
    visited = [{shard_of[name] for name in batch.names} for batch in source.epoch()]
    assert all(len(shards_of_batch) == 1 for shards_of_batch in visited)
    order = [number for number, _ in itertools.groupby(next(iter(one)) for one in visited)]
    assert sorted(order) == list(range(source.parts_an_epoch))


def test_shards_of_several_folders_are_heard(made_data: Path, shards: Path, tmp_path: Path) -> None:
    few = read_data(made_data).split("dev")
    write_shar(few, tmp_path / "more")
    source = SharBatches([shards, tmp_path / "more"], LAYOUT)
    assert {clip.key for clip in few} < {name for batch in source.epoch() for name in batch.names}


def test_long_recordings_come_out_of_shards_in_windows(shards: Path) -> None:
    batch = SharBatches([shards], Layout(4.0, 0.4, seed=1))[0]
    assert int(batch.lengths.max()) <= 0.4 * 16_000
    assert any(batch.starts)


def test_shards_are_not_written_over(made_data: Path, shards: Path) -> None:
    with pytest.raises(ManifestError, match="holds shards already"):
        write_shar(read_data(made_data).split("dev"), shards)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="holds no shards"):
        SharBatches([tmp_path], LAYOUT)


def test_a_missing_archive_is_named(made_data: Path, tmp_path: Path) -> None:
    write_shar(read_data(made_data).split("dev"), tmp_path / "out")
    (tmp_path / "out/recording.000000.tar").unlink()
    with pytest.raises(ManifestError, match=r"recording\.000000\.tar is not there"):
        SharBatches([tmp_path / "out"], LAYOUT)


def test_a_damaged_archive_is_named(made_data: Path, tmp_path: Path) -> None:
    write_shar(read_data(made_data).split("dev"), tmp_path / "out")
    archive = tmp_path / "out/recording.000000.tar"
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(ManifestError, match=r"recording\.000000\.tar is damaged"):
        SharBatches([tmp_path / "out"], LAYOUT)[0]


def test_folders_of_one_name_are_told_apart(shards: Path, made_data: Path, tmp_path: Path) -> None:
    other = tmp_path / shards.name
    write_shar(read_data(made_data).split("dev"), other)
    digests = digest_shar([shards, other])
    assert len(set(digests.values())) == len(digests) == 2
    assert digests != digest_shar([shards, shards])


def recipe(data: Path, **changes: object) -> AudioRecipe:
    return AudioRecipe.model_validate({"name": "tiny", "data": data, "batch_s": 8.0, "fold": 0.1, **changes})


def test_a_recipe_hears_shards_and_watches_its_own_fold(made_data: Path, shards: Path, tmp_path: Path) -> None:
    source, watched, digests = recipe(made_data, shar=(shards,)).sources(tmp_path)
    assert isinstance(source, SharBatches)
    assert isinstance(watched, CutBatches)
    assert len(digests[f"shar/0/{shards.name}"]) == 64
    assert digests != recipe(made_data).sources(tmp_path)[2]


def first(data: Path, cache: Path, **corruption: object) -> Waves:
    return recipe(data, corruption=corruption).sources(cache)[0][0]


def test_simulated_rooms_are_heard_too(made_data: Path, tmp_path: Path) -> None:
    in_a_room: dict[str, Any] = {"corruption": {"p_noise": 0.0, "p_room": 1.0}}
    few, digests = recipe(made_data, **in_a_room).sources(tmp_path)[::2]
    more, same = recipe(made_data, **in_a_room, simulated_rooms=3).sources(tmp_path)[::2]
    assert not torch.equal(few[0].waveform, more[0].waveform)
    assert torch.equal(few[0].as_recorded.waveform, more[0].as_recorded.waveform)
    # They are no part of the data.
    assert same == digests


def test_simulated_rooms_without_corruption_are_refused(made_data: Path) -> None:
    with pytest.raises(ValidationError, match="heard through corruption"):
        recipe(made_data, simulated_rooms=3)


def level_db(samples: torch.Tensor) -> float:
    return 10 * float(torch.log10(samples.square().mean()))


@pytest.mark.parametrize(("snr_db", "p_white"), [(0.0, 0.0), (15.0, 0.0), (5.0, 1.0)])
def test_noise_is_mixed_at_its_level(made_data: Path, tmp_path: Path, snr_db: float, p_white: float) -> None:
    batch = first(made_data, tmp_path, p_noise=1.0, p_room=0.0, snr_db=(snr_db, snr_db), p_white=p_white)
    assert batch.clean is not None
    for row, length in enumerate(batch.lengths.tolist()):
        clean, heard = batch.clean[row, :length], batch.waveform[row, :length]
        assert level_db(clean) - level_db(heard - clean) == pytest.approx(snr_db, abs=0.05)
        assert not batch.waveform[row, length:].any()


def test_a_room_keeps_the_level_and_reverberates(made_data: Path, tmp_path: Path) -> None:
    batch = first(made_data, tmp_path, p_noise=0.0, p_room=1.0)
    assert batch.clean is not None
    for row, length in enumerate(batch.lengths.tolist()):
        clean, heard = batch.clean[row, :length], batch.waveform[row, :length]
        assert level_db(heard) == pytest.approx(level_db(clean), abs=0.05)
        assert not torch.allclose(heard, clean, atol=1e-3)
        # The direct sound stays where it was: no shift matches the recording better than none.
        shifts = [float((heard[400 + k : length - 400 + k] * clean[400 : length - 400]).sum()) for k in (-40, 0, 40)]
        assert max(shifts) == shifts[1]


def test_noise_room_both_and_neither_are_equally_frequent() -> None:
    """RobustDistiller, checklist 3(e) 2: told apart by what each leaves of a click before silence."""
    click = np.zeros(4000, dtype=np.float32)
    click[1000] = 1.0
    room = Recording(Path("room"), "room", "made", "train", "room", 0.1)
    response = np.zeros(1600, dtype=np.int16)
    response[40], response[840] = 30_000, 15_000
    cache = AudioCache(response, {"room": (0, 1600)})
    corrupt = Corruption(CorruptionRecipe(p_white=1.0, snr_db=(20.0, 20.0)), [], [room], cache, seed=1)
    counts: Counter[tuple[bool, bool]] = Counter()
    for number in range(2000):
        heard = corrupt(click, number, 0)
        counts[bool(np.abs(heard[:900]).max() > 1e-6), bool(abs(heard[1800]) > 0.3)] += 1
    assert sum(counts.values()) == 2000
    assert all(abs(counts[noisy, echoing] - 500) < 4 * 19.4 for noisy in (False, True) for echoing in (False, True))


def test_corruption_is_the_same_whenever_a_batch_is_asked_for(made_data: Path, tmp_path: Path) -> None:
    one, other = (recipe(made_data, corruption={}).sources(tmp_path)[0] for _ in range(2))
    late, early = one[5], one[2]
    assert torch.equal(other[2].waveform, early.waveform)
    assert torch.equal(other[5].waveform, late.waveform)
    assert early.clean is not None
    touched = [not torch.equal(clean, heard) for clean, heard in zip(early.clean, early.waveform, strict=True)]
    assert any(touched)
    assert not all(touched)


def test_a_curriculum_begins_with_little_noise_and_no_room(made_data: Path, tmp_path: Path) -> None:
    source = recipe(made_data, corruption={"p_noise": 1.0, "p_room": 0.0, "curriculum_batches": 20}).sources(tmp_path)[
        0
    ]
    lowest = []
    for number in (0, 10, 20):
        batch = source[number]
        assert batch.clean is not None
        lowest.append(
            min(
                level_db(batch.clean[row, :length]) - level_db(batch.waveform[row, :length] - batch.clean[row, :length])
                for row, length in enumerate(batch.lengths.tolist())
            )
        )
    assert lowest[0] == pytest.approx(20.0, abs=0.05)
    assert 9.9 < lowest[1] < 20.0
    assert lowest[2] < 10.0
    rooms = recipe(made_data, corruption={"p_noise": 0.0, "p_room": 1.0, "curriculum_batches": 20}).sources(tmp_path)[0]
    assert rooms[0].clean is not None
    assert torch.equal(rooms[0].waveform, rooms[0].clean)


def test_the_teacher_hears_the_recording_itself(made_data: Path, tmp_path: Path) -> None:
    """RobustDistiller, checklist 3(e) 1."""
    batch, plain = first(made_data, tmp_path), recipe(made_data).sources(tmp_path)[0][0]
    assert torch.equal(batch.as_recorded.waveform, plain.waveform)
    assert not torch.equal(batch.waveform, plain.waveform)
    assert batch.as_recorded.names == plain.names
    assert plain.as_recorded is plain


def test_the_fold_is_watched_without_corruption(made_data: Path, tmp_path: Path) -> None:
    watched = recipe(made_data, corruption={}).sources(tmp_path)[1]
    assert watched is not None
    assert watched[0].clean is None


def test_only_noises_and_rooms_of_the_train_split_are_used(made_data: Path, tmp_path: Path) -> None:
    """RobustDistiller, checklist 3(e) 7."""
    root = tmp_path / "data"
    root.mkdir()
    for name in ("manifest.csv", "noise.csv", "rir.csv"):
        text = (made_data / name).read_text()
        (root / name).write_text(text if name == "manifest.csv" else text.replace(",train,", ",dev,"))
    for name in ("asc", "gsc", "noise", "rir"):
        (root / name).symlink_to(made_data / name)
    with pytest.raises(ManifestError, match=r"noise\.csv"):
        recipe(root, corruption={"p_room": 0.0}).sources(tmp_path)
    with pytest.raises(ManifestError, match=r"rir\.csv"):
        recipe(root, corruption={"p_noise": 0.0}).sources(tmp_path)
