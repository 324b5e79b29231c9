"""Teachers of the edge student's two branches: their vectors on disk, in batches, and in the loss."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.training.conftest import TinyRun, train_tiny
from tests.training.made_data import tiny_recipe
from training.audio_cache import AudioCache
from training.augment import AugmentRecipe, change_speed
from training.batches import BatchSource, SamplingRecipe
from training.errors import TeacherError
from training.hints import STRIDE, WIDTH, HintCache, HintHead, SpeechEmbedding, open_hint_teacher
from training.manifest import labels_of, read_data
from training.recipe import Recipe
from training.run import load_student
from training.voices import WIDTH as VOICE_WIDTH
from training.voices import VoiceHead, Voices

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two graphs with the real ones' inputs and outputs: a frame each 10 ms, a vector for 76 frames."""
    folder = tmp_path_factory.mktemp("graphs")
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((32, 1, 400)).astype(np.float32) * 0.001
    mel = helper.make_graph(
        [
            helper.make_node("Unsqueeze", ["input", "axis"], ["channel"]),
            helper.make_node("Conv", ["channel", "filters"], ["bands"], strides=[160]),
            helper.make_node("Abs", ["bands"], ["level"]),
            helper.make_node("Transpose", ["level"], ["frames"], perm=[0, 2, 1]),
            helper.make_node("Unsqueeze", ["frames", "axis"], ["output"]),
        ],
        "mel",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", "samples"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(frames, "filters"), numpy_helper.from_array(np.array([1]), "axis")],
    )
    kernel = rng.standard_normal((WIDTH, 1, 76, 32)).astype(np.float32) * 0.01
    embedding = helper.make_graph(
        [
            helper.make_node("Reshape", ["input_1", "shape"], ["picture"]),
            helper.make_node("Conv", ["picture", "kernel"], ["found"], strides=[8, 1]),
            helper.make_node("Reshape", ["found", "last"], ["out"]),
        ],
        "embedding",
        [helper.make_tensor_value_info("input_1", TensorProto.FLOAT, ["batch", 76, 32, 1])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 1, 1, WIDTH])],
        [
            numpy_helper.from_array(np.array([-1, 1, 76, 32]), "shape"),
            numpy_helper.from_array(kernel, "kernel"),
            numpy_helper.from_array(np.array([-1, 1, 1, WIDTH]), "last"),
        ],
    )
    for name, graph in (("melspectrogram", mel), ("embedding_model", embedding)):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, folder / f"{name}.onnx")
    return folder


def noise(seconds: float) -> Floats:
    return np.random.default_rng(5).standard_normal(round(seconds * 16_000)).astype(np.float32) * np.float32(0.1)


def test_all_windows_at_once_are_the_windows_one_by_one(graphs: Path) -> None:
    wave = noise(1.5)
    found = SpeechEmbedding(graphs)(wave)
    assert found.shape == (-(-len(wave) // STRIDE) + 1, WIDTH)
    plain = onnxruntime.InferenceSession(graphs / "embedding_model.onnx")
    mel = onnxruntime.InferenceSession(graphs / "melspectrogram.onnx")
    margin = np.zeros(76 * 160 // 2, dtype=np.float32)
    padded = np.concatenate([margin, wave, margin, margin])[None] * np.float32(32767)
    frames = mel.run(None, {"input": padded})[0].reshape(-1, 32) / np.float32(10) + np.float32(2)
    for window in (0, 3, len(found) - 1):
        one = frames[window * 8 : window * 8 + 76][None, :, :, None]
        alone = plain.run(None, {"input_1": one})[0].reshape(-1)
        assert np.abs(found[window] - alone).max() < 1e-4


def test_a_folder_without_the_graphs_says_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="openwakeword"):
        SpeechEmbedding(tmp_path)


def test_hints_are_kept_standardised_and_read_between_windows(
    graphs: Path, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [clip.path for clip in read_data(made_data).split("train")][:12]
    audio = AudioCache.build(tmp_path, paths)
    teacher = SpeechEmbedding(graphs)
    cache = HintCache.build(tmp_path, teacher, paths, audio)
    raw = [teacher(audio.read(path)) for path in paths]
    everything = np.concatenate(raw)
    wanted = (raw[3] - everything.mean(axis=0)) / everything.std(axis=0)
    length = audio.length(paths[3])
    at, known = cache.at(paths[3], np.array([-1.0, 0.0, STRIDE, STRIDE * 1.25, length - 1.0, float(length)]))
    assert known.tolist() == [False, True, True, True, True, False]
    assert np.abs(at[1] - wanted[0]).max() < 2e-2
    assert np.abs(at[3] - (0.75 * wanted[1] + 0.25 * wanted[2])).max() < 2e-2
    monkeypatch.setattr(SpeechEmbedding, "__call__", None)
    again = HintCache.build(tmp_path, teacher, paths, audio)
    assert np.array_equal(again.at(paths[3], np.array([0.0]))[0], at[1:2])


class Places:
    """Says of a position what it is."""

    width = 1

    def at(self, path: Path, samples: npt.NDArray[np.float64]) -> tuple[Floats, npt.NDArray[np.bool_]]:  # noqa: ARG002  as HintCache's
        return samples[:, None].astype(np.float32), np.ones(len(samples), dtype=np.bool_)


def test_a_frame_gets_the_hint_of_what_is_heard_there(made_data: Path, tmp_path: Path) -> None:
    """At speed 1 without corruption: the crop around a frame is the recording around the hint's position."""
    data = read_data(made_data)
    clips = data.split("train")[:6]
    audio = AudioCache.build(tmp_path, [clip.path for clip in clips])
    quiet = AugmentRecipe(p_noise=0, p_room=0, p_narrowband=0, p_telephone=0, speeds=(1.0,))
    source = BatchSource(
        data, clips, audio, labels_of(clips), batch_size=24, seed=3, augment=quiet, hints=Places(),
        sampling=SamplingRecipe(crop_s=0.5, p_noise_only=0.0),
    )  # fmt: skip
    batch = source[0]
    assert batch.hint is not None
    assert batch.hinted is not None
    recordings = [audio.read(clip.path) for clip in clips]
    seen = 0
    for row in range(24):
        for frame in torch.nonzero(batch.hinted[row]).flatten().tolist():
            place, centre = int(batch.hint[row, frame, 0]), frame * 800
            heard = batch.waveform[row, max(0, centre - 300) : centre + 300].numpy()
            if centre < 300 or place < 300 or np.abs(heard).max() < 1e-3:
                continue
            likeness = []
            for recording in recordings:
                there = recording[place - 300 : place + 300]
                if len(there) == len(heard) and np.abs(there).max() > 0:
                    likeness.append(float(np.corrcoef(heard, there)[0, 1]))
            if likeness:
                assert max(likeness) > 0.999
                seen += 1
    assert seen > 30


def fake_python(folder: Path, code: str) -> Path:
    """Runs `code` instead of the script that it is given; `jobs` and `out` are the script's arguments."""
    path = folder / "python"
    body = f"import json, sys, numpy as np; jobs = json.load(open(sys.argv[1])); out = sys.argv[2]; {code}"
    path.write_text(f"#!/bin/sh\nshift\nexec {sys.executable} -c '{body}' \"$@\"\n")
    path.chmod(0o755)
    return path


def test_voices_are_computed_once_and_belong_to_their_recordings(made_data: Path, tmp_path: Path) -> None:
    paths = [clip.path for clip in read_data(made_data).split("train")][:5]
    code = "np.save(out, np.arange(len(jobs))[:, None] + np.zeros((1, 256)))"
    voices = Voices.build(tmp_path, paths, fake_python(tmp_path, code))
    assert voices.of(paths[3]).tolist() == [3.0] * VOICE_WIDTH
    assert not voices.of(tmp_path / "another.wav").any()
    again = Voices.build(tmp_path, paths, tmp_path / "no-python-needed")
    assert again.of(paths[4])[0] == 4.0
    assert not again.of(paths[4], 1.1).any()


def test_voices_at_other_speeds_are_other_voices(made_data: Path, tmp_path: Path) -> None:
    """They reach the crops that are played at that speed."""
    clips = [clip for clip in read_data(made_data).split("train") if clip.keyword][:5]
    code = "np.save(out, np.array([[speed] * 256 for path, speed in jobs]))"
    speeds = (0.9, 1.0, 1.1)
    voices = Voices.build(tmp_path, [clip.path for clip in clips], fake_python(tmp_path, code), speeds)
    source = BatchSource(
        read_data(made_data), clips, AudioCache.build(tmp_path, [clip.path for clip in clips]), labels_of(clips),
        batch_size=30, seed=3, voices=voices, sampling=SamplingRecipe(p_noise_only=0.0),
        augment=AugmentRecipe(p_noise=0, p_room=0, speeds=speeds),
    )  # fmt: skip
    batch = source[0]
    assert batch.voice is not None
    of_speaker = {0: np.float32(0.9), 1: np.float32(1.0), 2: np.float32(1.1)}
    wanted = [of_speaker[index % 3] for index in batch.speaker.tolist()]
    assert len(set(wanted)) == 3
    assert batch.voice[:, 0].tolist() == wanted


def test_a_bundle_s_voices_are_its_speaker_embeddings(
    reference: str, made_run: TinyRun, made_data: Path, tmp_path: Path
) -> None:
    paths = [clip.path for clip in read_data(made_data).split("train")][:4]
    audio = AudioCache.build(tmp_path, paths)
    voices = Voices.of_bundle(tmp_path, paths, reference, audio, (1.0, 1.1))
    student, _ = load_student(made_run.folder)
    for speed in (1.0, 1.1):
        waveform = torch.from_numpy(change_speed(audio.read(paths[2]), speed))[None]
        with torch.no_grad():
            own = student(waveform, torch.tensor([waveform.shape[1]])).speaker_embedding[0]
        torch.testing.assert_close(torch.from_numpy(voices.of(paths[2], speed)), own, rtol=0, atol=1e-4)
    with pytest.raises(TeacherError, match="tiny@9"):
        Voices.of_bundle(tmp_path, paths, "tiny@9", audio)


def test_two_teachers_vectors_lie_side_by_side_and_count_the_same(tmp_path: Path) -> None:
    jobs = [(tmp_path / "a.wav", 1.0), (tmp_path / "b.wav", 1.0)]
    first = Voices(np.eye(2, dtype=np.float32), jobs, [2])
    second = Voices(np.eye(3, dtype=np.float32)[:2], jobs, [3])
    both = first.beside(second)
    assert both.of(jobs[1][0]).tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    head = VoiceHead(5, both.widths)
    with torch.no_grad():
        head.predict.weight.copy_(torch.eye(5))
        head.predict.bias.zero_()
    # The first teacher is matched whole, the second is at right angles.
    told = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]])
    voice = torch.from_numpy(both.of(jobs[1][0]))[None]
    assert head.loss(told, voice, torch.tensor([True])).item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="other recordings"):
        first.beside(Voices(np.eye(2, dtype=np.float32), jobs[::-1], [2]))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit(3)", "failed"),
        ("np.save(out, np.zeros((1, 256)))", "wanted 5 vectors"),
        ("np.save(out, np.full((5, 256), np.nan))", "wanted 5 vectors"),
    ],
)
def test_a_speaker_teacher_that_fails_is_said(made_data: Path, tmp_path: Path, code: str, message: str) -> None:
    paths = [clip.path for clip in read_data(made_data).split("train")][:5]
    with pytest.raises(TeacherError, match=message):
        Voices.build(tmp_path, paths, fake_python(tmp_path, code))
    with pytest.raises(TeacherError, match="make peers"):
        Voices.build(tmp_path, paths, tmp_path / "nowhere")


def test_the_voice_loss_is_one_minus_the_cosine_of_those_that_are_known() -> None:
    head = VoiceHead(VOICE_WIDTH)
    with torch.no_grad():
        head.predict.weight.copy_(torch.eye(VOICE_WIDTH))
        head.predict.bias.zero_()
    embedding = torch.nn.functional.normalize(torch.randn(3, VOICE_WIDTH), dim=1)
    voice = torch.stack([embedding[0] * 5, -embedding[1], torch.zeros(VOICE_WIDTH)])
    everybody = torch.ones(3, dtype=torch.bool)
    assert head.loss(embedding, voice, everybody).item() == pytest.approx(1.0)
    assert head.loss(embedding, voice, torch.tensor([True, False, True])).item() == pytest.approx(0.0, abs=1e-5)
    assert head.loss(embedding, voice, torch.tensor([False, False, True])).item() == 0.0


def test_a_bundle_s_frames_are_hints(reference: str, made_run: TinyRun, made_data: Path, tmp_path: Path) -> None:
    path = next(clip.path for clip in read_data(made_data).split("train") if clip.keyword)
    audio = AudioCache.build(tmp_path, [path])
    teacher = open_hint_teacher(reference, None)
    student, _ = load_student(made_run.folder)
    assert (teacher.width, teacher.stride) == (made_run.recipe.shape.task_width, 800)
    waveform = torch.from_numpy(audio.read(path))[None]
    with torch.no_grad():
        frames = student(waveform, torch.tensor([waveform.shape[1]])).frames[0, :, : teacher.width]
    torch.testing.assert_close(torch.from_numpy(teacher(audio.read(path))), frames, rtol=0, atol=1e-4)
    # Frames of a student at the same times are those of its teacher.
    cache = HintCache.build(tmp_path, teacher, [path], audio)
    hint, known = cache.at(path, np.arange(3) * 800.0)
    assert known.all()
    frames = (frames - frames.mean(dim=0)) / frames.std(dim=0, correction=0).clamp(min=1e-6)
    moving = frames.std(dim=0) > 0.1
    torch.testing.assert_close(torch.from_numpy(hint)[:, moving], frames[:3, moving], rtol=0, atol=1e-2)
    with pytest.raises(TeacherError, match="tiny@9"):
        open_hint_teacher("tiny@9", None)


def test_recordings_of_other_corpora_teach_without_hints(made_data: Path) -> None:
    clips = [clip for clip in read_data(made_data).split("train") if clip.keyword]
    heard, unheard = clips[0].path, clips[-1].path
    cache = HintCache(np.ones((21, 4), dtype=np.float16), {str(heard): (0, 21, 16_000)}, 800)
    assert cache.at(heard, np.array([0.0, 800.0]))[1].all()
    vectors, known = cache.at(unheard, np.array([0.0, 800.0]))
    assert vectors.shape == (2, 4)
    assert not known.any()


def test_the_hint_loss_looks_at_known_frames_only() -> None:
    head = HintHead(4)
    frames, hint = torch.randn(2, 3, 4), torch.zeros(2, 3, WIDTH)
    with torch.no_grad():
        head.predict.weight.zero_()
        head.predict.bias.fill_(2.0)
    known = torch.zeros(2, 3, dtype=torch.bool)
    assert head.loss(frames, hint, known).item() == 0.0
    known[0, 1] = True
    hint[1] = 100.0
    assert head.loss(frames, hint, known).item() == pytest.approx(4.0)


def test_a_student_learns_from_both_and_keeps_neither_head(graphs: Path, made_data: Path, tmp_path: Path) -> None:
    code = "np.save(out, np.random.default_rng(0).standard_normal((len(jobs), 256)))"
    plain = tiny_recipe(made_data).model_dump(mode="json")
    recipe = Recipe.model_validate(
        {**plain, "hints": {"teacher": graphs}, "voices": {"python": fake_python(tmp_path, code)}}
    )
    taught = train_tiny(recipe, tmp_path / "run", tmp_path / "cache")
    terms = taught.terms
    assert len(terms) == 30
    assert np.mean([term["hint"] for term in terms[-5:]]) < np.mean([term["hint"] for term in terms[:5]])
    assert all(0 <= term["voice"] <= 2 for term in terms)
    assert any(term["voice"] > 0 for term in terms)
    student = torch.load(taught.folder / "student.pt", weights_only=True)
    assert not any(name.startswith(("hint", "voice")) for name in student)
