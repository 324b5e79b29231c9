"""Shards of audio, and noise under it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet
from typer.testing import CliRunner

from training.audio_cache import AudioCache, decode
from training.cli import app
from training.cuts import AudioRecipe, CutBatches, MixingRecipe, NoiseMixer, SharBatches, write_shar
from training.errors import ManifestError
from training.manifest import read_data


@pytest.fixture(scope="module")
def shards(made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training clips, fifty to a shard."""
    out = tmp_path_factory.mktemp("shards")
    done = CliRunner().invoke(app, ["corpus", "shar", str(made_data), "--out", str(out), "--shard-size", "50"])
    assert done.exit_code == 0, done.output
    return out


def test_shards_hold_every_recording_as_it_was(made_data: Path, shards: Path) -> None:
    clips = {clip.key: clip for clip in read_data(made_data).split("train")}
    source = SharBatches([shards], batch_s=8.0, longest_s=4.0, seed=1)
    names = []
    for batch in source.epoch():
        names += batch.names
        for row, name in enumerate(batch.names[:2]):
            own = batch.waveform[row, : batch.lengths[row]].numpy()
            assert np.abs(own - decode(clips[name].path)).max() < 1e-4
    assert sorted(names) == sorted(clips)
    assert source.parts_an_epoch == -(-len(clips) // 50)


def test_a_batch_of_shards_is_a_function_of_its_number(shards: Path) -> None:
    one, other = (SharBatches([shards], batch_s=8.0, longest_s=4.0, seed=1) for _ in range(2))
    epoch = sum(1 for _ in SharBatches([shards], batch_s=8.0, longest_s=4.0, seed=1).epoch())
    numbers = (epoch + 3, 0, 7)
    found = {number: one[number] for number in numbers}
    for number in sorted(numbers):
        assert found[number].names == other[number].names
        assert torch.equal(found[number].waveform, other[number].waveform)
    # The next epoch has another order.
    assert [one[n].names for n in range(3)] != [one[epoch + n].names for n in range(3)]


def test_one_shard_is_open_at_a_time(shards: Path) -> None:
    source = SharBatches([shards], batch_s=8.0, longest_s=4.0, seed=1)
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
    source = SharBatches([shards, tmp_path / "more"], batch_s=8.0, longest_s=4.0, seed=1)
    assert {clip.key for clip in few} < {name for batch in source.epoch() for name in batch.names}


def test_long_recordings_come_out_of_shards_in_windows(shards: Path) -> None:
    batch = SharBatches([shards], batch_s=4.0, longest_s=0.4, seed=1)[0]
    assert int(batch.lengths.max()) <= 0.4 * 16_000
    assert any(batch.starts)


def test_shards_are_not_written_over(made_data: Path, shards: Path) -> None:
    with pytest.raises(ManifestError, match="holds shards already"):
        write_shar(read_data(made_data).split("dev"), shards)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="holds no shards"):
        SharBatches([tmp_path], batch_s=8.0, longest_s=4.0, seed=1)


def test_a_missing_archive_is_named(made_data: Path, tmp_path: Path) -> None:
    write_shar(read_data(made_data).split("dev"), tmp_path / "out")
    (tmp_path / "out/recording.000000.tar").unlink()
    with pytest.raises(ManifestError, match=r"recording\.000000\.tar is not there"):
        SharBatches([tmp_path / "out"], batch_s=8.0, longest_s=4.0, seed=1)


def test_a_damaged_archive_is_named(made_data: Path, tmp_path: Path) -> None:
    write_shar(read_data(made_data).split("dev"), tmp_path / "out")
    archive = tmp_path / "out/recording.000000.tar"
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(ManifestError, match=r"recording\.000000\.tar is damaged"):
        SharBatches([tmp_path / "out"], batch_s=8.0, longest_s=4.0, seed=1)[0]


def recipe(data: Path, **changes: object) -> AudioRecipe:
    return AudioRecipe.model_validate({"name": "tiny", "data": data, "batch_s": 8.0, "fold": 0.1, **changes})


def test_a_recipe_hears_shards_and_watches_its_own_fold(made_data: Path, shards: Path, tmp_path: Path) -> None:
    source, watched, digests = recipe(made_data, shar=(shards,)).sources(tmp_path)
    assert isinstance(source, SharBatches)
    assert isinstance(watched, CutBatches)
    assert len(digests[f"shar/{shards.name}"]) == 64
    assert digests != recipe(made_data).sources(tmp_path)[2]


@pytest.mark.parametrize("snr_db", [0.0, 15.0])
def test_noise_is_mixed_at_its_level(made_data: Path, tmp_path: Path, snr_db: float) -> None:
    mixing = {"p": 1.0, "snr_db": (snr_db, snr_db)}
    batch = recipe(made_data, mixing=mixing).sources(tmp_path)[0][0]
    assert batch.clean is not None
    for row, length in enumerate(batch.lengths.tolist()):
        clean, heard = batch.clean[row, :length], batch.waveform[row, :length]
        found_db = 10 * torch.log10(clean.square().mean() / (heard - clean).square().mean())
        assert float(found_db) == pytest.approx(snr_db, abs=0.01)
        assert not batch.waveform[row, length:].any()


def test_noise_is_the_same_whenever_a_batch_is_asked_for_and_differs_between_batches(
    made_data: Path, tmp_path: Path
) -> None:
    one, other = (recipe(made_data, mixing={"p": 0.5}).sources(tmp_path)[0] for _ in range(2))
    late, early = one[5], one[2]
    assert torch.equal(other[2].waveform, early.waveform)
    assert torch.equal(other[5].waveform, late.waveform)
    assert early.clean is not None
    touched = [not torch.equal(clean, heard) for clean, heard in zip(early.clean, early.waveform, strict=True)]
    assert any(touched)
    assert not all(touched)


def test_targets_come_from_the_recording_without_noise(made_data: Path, tmp_path: Path) -> None:
    batch = recipe(made_data, mixing={"p": 1.0}).sources(tmp_path)[0][0]
    plain = recipe(made_data).sources(tmp_path)[0][0]
    assert torch.equal(batch.as_recorded.waveform, plain.waveform)
    assert batch.as_recorded.names == plain.names
    assert plain.as_recorded is plain


def test_the_fold_is_watched_without_noise(made_data: Path, tmp_path: Path) -> None:
    watched = recipe(made_data, mixing={"p": 1.0}).sources(tmp_path)[1]
    assert watched is not None
    assert watched[0].clean is None


def test_mixing_without_noise_of_the_train_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"noise\.csv"):
        NoiseMixer(MixingRecipe(p=1.0), [], AudioCache.build(tmp_path, []), 0)
