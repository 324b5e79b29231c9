"""Hints (Romero et al. 2015): a frozen network's vectors, which the student's frames learn to predict.

The network is Whisper's encoder (`training/whisper.py`), a bundle that was published before, or Google's speech
embedding (Lin et al. 2020, "Training keyword spotters with limited and synthesized speech data"): 96 numbers for each
775 ms of speech, trained to tell 5,000 keywords apart on 200 million clips; its weights (Apache-2.0) come with the
package openwakeword 0.5.1. It hears every recording once, as it was recorded, and is never part of a bundle; students
hear the corrupted recording.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model_store.graph import part_of
from model_store.inference import open_session
from training.audio_cache import AudioCache, Waveform
from training.errors import TeacherError
from training.files import cache_key
from training.objectives.soft_targets import teaching_bundle
from training.whisper import FOLDER as WHISPER_FOLDER
from training.whisper import WhisperEncoder

NETWORKS = ("speech-embedding", "whisper-base")

WIDTH = 96
MELS = 32
WINDOW_FRAMES = 76  # mel frames of 10 ms in one window
STRIDE_FRAMES = 8
MEL_HOP = 160
STRIDE = STRIDE_FRAMES * MEL_HOP
# Silence around the recording, so that a window is centred on each of its ends.
MARGIN = WINDOW_FRAMES * MEL_HOP // 2
GRAPHS = ("melspectrogram.onnx", "embedding_model.onnx")
# Where `make teachers` puts their files.
FOLDERS = {
    "speech-embedding": Path(".teachers/openwakeword/resources/models"),
    "whisper-base": WHISPER_FOLDER,
}


class HintTeacher(Protocol):
    """[N] samples in [-1, 1] -> [n, width] vectors, of which number k is centred on sample k * stride."""

    digest: str
    width: int
    stride: int

    def __call__(self, waveform: Waveform) -> npt.NDArray[np.float32]: ...


def open_hint_teacher(network: str, folder: Path | None, *, threads: int = 1) -> HintTeacher:
    """One of NETWORKS, whose files are in `folder`, or a bundle of the built-in store, NAME@VERSION. Raises
    TeacherError where it is not there."""
    if network not in NETWORKS:
        return BundleFrames(network, threads=threads)
    folder = folder or FOLDERS[network]
    return WhisperEncoder(folder) if network == "whisper-base" else SpeechEmbedding(folder, threads=threads)


class SpeechEmbedding:
    """The two graphs in `folder`. Raises TeacherError where they are not."""

    width = WIDTH
    stride = STRIDE

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        import onnx
        import onnxruntime
        from onnx import numpy_helper

        missing = [name for name in GRAPHS if not (folder / name).is_file()]
        if missing:
            raise TeacherError(
                f"{folder} has no {missing[0]}; `pip download openwakeword==0.5.1 --no-deps` and unpack it: "
                "the folder is openwakeword/resources/models"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # the last node took its constant with it
        mel, embed = ((folder / name).read_bytes() for name in GRAPHS)
        self.digest = hashlib.sha256(mel + embed).hexdigest()
        # The graph is made for one window, but nothing in it pads over time: with its first node's shape
        # freed it gives all windows of a recording at once, and computes what they share once.
        whole = onnx.load_from_string(embed)
        shape = next(item for item in whole.graph.initializer if item.name == whole.graph.node[0].input[1])
        shape.CopyFrom(numpy_helper.from_array(np.array([1, 1, -1, MELS], dtype=np.int64), shape.name))
        # The last node lays out one window's channels; what goes into it is [1, 96, windows, 1].
        last = whole.graph.node.pop()
        whole.graph.output[0].CopyFrom(onnx.helper.make_empty_tensor_value_info(last.input[0]))
        whole.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "frames"
        self._mel, self._embed = (
            onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            for graph in (mel, whole.SerializeToString())
        )

    def __call__(self, waveform: Waveform) -> npt.NDArray[np.float32]:
        """[N] in [-1, 1] -> [ceil(N / STRIDE) + 1, 96]; vector k is centred on sample k * STRIDE."""
        windows = -(-len(waveform) // STRIDE) + 1
        padded = np.zeros(MARGIN * 2 + (windows + 1) * STRIDE, dtype=np.float32)
        padded[MARGIN : MARGIN + len(waveform)] = waveform
        mel = self._run(self._mel, padded[None] * np.float32(32767)).reshape(-1, MELS) / np.float32(10) + np.float32(2)
        return self._run(self._embed, mel[None, :, :, None])[0, :, :windows, 0].T

    @staticmethod
    def _run(session: Any, value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: value})[0]
        return found


class BundleFrames:
    """The frames of a bundle's last keyword block. Raises TeacherError where the built-in store has no such bundle."""

    def __init__(self, reference: str, *, threads: int = 1) -> None:
        bundle = teaching_bundle(reference)
        manifest = bundle.manifest
        self.digest = bundle.digest
        # Those of the speaker branch come after them.
        self.width = manifest.embedding.dim // (1 if manifest.speaker is None else 2)
        self.stride = round(manifest.embedding.frame_hop_s * manifest.audio.sample_rate_hz)
        self._session = open_session(part_of(bundle.read(manifest.graph.file), ["frames"]), threads=threads)

    def __call__(self, waveform: Waveform) -> npt.NDArray[np.float32]:
        """[N] -> [ceil(N / stride), width]; vector k is centred on sample k * stride."""
        given: dict[str, npt.NDArray[Any]] = {"waveform": waveform[None], "lengths": np.array([len(waveform)])}
        found: npt.NDArray[np.float32] = self._session.run(["frames"], given)[0][0, :, : self.width]
        return found


class HintCache:
    """What the teacher said about each recording, standardised over all; build with `HintCache.build`."""

    def __init__(
        self,
        vectors: npt.NDArray[np.float16],
        index: dict[str, tuple[int, int, int]],
        stride: int = STRIDE,
        teacher: str = "",
    ) -> None:
        self.teacher = teacher  # its digest
        self.width = vectors.shape[1]
        self._vectors = vectors
        self._index = index
        self._stride = stride

    @classmethod
    def build(cls, folder: Path, teacher: HintTeacher, paths: Sequence[Path], audio: AudioCache) -> HintCache:
        """Of exactly these recordings, each judged once and kept in `folder`; some 30 ms for a second."""
        stem = folder / f"hints-{teacher.digest[:12]}-{cache_key(paths)}"
        data, table = stem.with_suffix(".npy"), stem.with_suffix(".json")
        if not table.is_file():
            index, parts, position = {}, [], 0
            for path in paths:
                found = teacher(audio.read(path))
                index[str(path)] = (position, position + len(found), audio.length(path))
                parts.append(found)
                position += len(found)
            everything = np.concatenate(parts)
            scaled = (everything - everything.mean(axis=0)) / (everything.std(axis=0) + 1e-6)
            partial = stem.with_suffix(".partial.npy")
            np.save(partial, scaled.astype(np.float16))
            partial.replace(data)
            table.write_text(json.dumps(index))
        stored = {name: (int(a), int(b), int(n)) for name, (a, b, n) in json.loads(table.read_text()).items()}
        return cls(np.load(data, mmap_mode="r"), stored, teacher.stride, teacher.digest)

    def at(self, path: Path, samples: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Vectors [T, width] at the recording's sample positions [T] (linear between windows), and where the
        position lies within a recording that the teacher heard."""
        if str(path) not in self._index:
            return np.zeros((len(samples), self.width), dtype=np.float32), np.zeros(len(samples), dtype=np.bool_)
        first, last, length = self._index[str(path)]
        own = self._vectors[first:last].astype(np.float32)
        place = np.clip(samples / self._stride, 0, len(own) - 1)
        low = np.minimum(place.astype(np.int64), max(0, len(own) - 2))
        share = (place - low).astype(np.float32)[:, None]
        high = np.minimum(low + 1, len(own) - 1)
        vectors = own[low] * (1 - share) + own[high] * share
        return vectors, (samples >= 0) & (samples < length)


class HintHead(nn.Module):
    """Predicts the teacher's vectors from the student's frames [B, T, C]; not part of the student."""

    def __init__(self, width: int, told: int = WIDTH) -> None:
        super().__init__()
        self.predict = nn.Linear(width, told)

    def loss(self, frames: Tensor, hint: Tensor, known: Tensor) -> Tensor:
        """Mean squared error over the frames of which something is known."""
        if not bool(known.any()):
            return frames.sum() * 0.0
        return torch.mean((self.predict(frames[known]) - hint[known]) ** 2)
