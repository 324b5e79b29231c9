"""A small encoder of Whisper with random weights, as transformers has it and as a file of CTranslate2."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Published

from training.whisper import PARTS

WIDTH, LAYERS, HEADS, HIDDEN = 16, 2, 2, 48
FRAMES = 50  # of 20 ms
Floats = npt.NDArray[np.float32]


def small_encoder() -> Published:
    """For one second."""
    torch.manual_seed(3)
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        max_source_positions=FRAMES,
    )
    network = Published(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith("embed_positions"):
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


def written(tensors: dict[str, Floats], folder: Path) -> Path:
    """In two parts, as the packages have it."""
    content = as_file(tensors)
    half = len(content) // 2 + 1
    for name, part in zip(PARTS, (content[:half], content[half:]), strict=True):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(part)
    return folder
