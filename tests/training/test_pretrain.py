"""Masked prediction: units, hidden spans, the loss, and a teacher that comes out of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import HubertModel

from tests.training.chain import TEACHER_SHAPE, pretrain_recipe
from training.audio_cache import AudioCache
from training.cuts import CutBatches, Layout, Waves, cuts_of
from training.errors import ManifestError, RunError
from training.manifest import read_data
from training.objectives.masked import MaskedPrediction, hide_spans
from training.pretrain import TeacherShape, pretrain, publish_teacher
from training.students.distil import student_of
from training.teachers import SelfSupervised, load_teacher
from training.units import Mfcc, Units

LAYOUT = Layout(batch_s=8.0, longest_s=4.0, seed=1)


def batches(data: Path, cache: Path, layout: Layout = LAYOUT) -> CutBatches:
    clips = read_data(data).split("train")
    decoded = AudioCache.build(cache, [clip.path for clip in clips])
    return CutBatches(cuts_of(clips, decoded), decoded, layout)


def test_an_epoch_holds_every_recording_once(made_data: Path, tmp_path: Path) -> None:
    source = batches(made_data, tmp_path)
    clips = read_data(made_data).split("train")
    names: list[str] = []
    number = 0
    while len(names) < len(clips):
        names += source[number].names
        number += 1
    assert sorted(names) == sorted(clip.key for clip in clips)
    assert sorted(names) != names


def test_a_batch_is_a_function_of_its_number(made_data: Path, tmp_path: Path) -> None:
    one, other = batches(made_data, tmp_path), batches(made_data, tmp_path)
    far = [one[number] for number in (40, 3, 0)]
    for first, second in zip(far, [other[number] for number in (40, 3, 0)], strict=True):
        assert first.names == second.names
        assert torch.equal(first.waveform, second.waveform)
    assert batches(made_data, tmp_path, Layout(8.0, 4.0, seed=2))[0].names != far[2].names


def test_batches_hold_at_most_the_asked_seconds_and_long_clips_come_in_windows(made_data: Path, tmp_path: Path) -> None:
    source = batches(made_data, tmp_path, Layout(3.0, 0.4, seed=1))
    batch = source[0]
    assert int(batch.lengths.sum()) <= 3.0 * 16_000 + 8000
    assert int(batch.lengths.max()) <= 0.4 * 16_000
    assert any(batch.starts)


def test_nothing_long_enough_is_said(made_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no recording"):
        batches(made_data, tmp_path, Layout(8.0, 0.05, seed=1))[0]


def test_mfcc_has_a_frame_for_each_of_the_cnn_s() -> None:
    trunk = SelfSupervised(HubertModel(TeacherShape.model_validate(TEACHER_SHAPE).config()), normalise=False)
    for samples in (400, 719, 720, 16_000, 23_456):
        assert Mfcc()(torch.randn(1, samples), torch.tensor([samples])).shape == (1, trunk.frames(samples), 39)


def test_hidden_spans_cover_about_half_of_the_frames_and_stay_inside() -> None:
    torch.manual_seed(0)
    counts = [400] * 50 + [7, 1]
    hidden = hide_spans(counts, 400, span=10, share=0.8)
    assert 0.45 < hidden[:50].float().mean() < 0.65
    assert hidden.any(dim=1).all()
    assert not hidden[50, 7:].any()
    assert not hidden[51, 1:].any()


def test_units_are_the_nearest_centres() -> None:
    batch = Waves(torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)), torch.tensor([8000, 8000]))
    features = Mfcc()(batch.waveform, batch.lengths)
    centres = features[0, :5].numpy()
    assert Units(centres)(batch)[0, :5].tolist() == [0, 1, 2, 3, 4]


def test_only_hidden_frames_are_asked_for_and_what_was_there_is_not_seen() -> None:
    """Changing the audio under a hidden frame alone must not change the model's input there."""
    torch.manual_seed(0)
    trunk = SelfSupervised(HubertModel(TeacherShape.model_validate(TEACHER_SHAPE).config()), normalise=False).eval()
    hidden = torch.zeros(1, 49, dtype=torch.bool)
    hidden[0, 10:20] = True
    wave = torch.randn(1, 16_000)
    found = trunk(wave, torch.tensor([16_000]), hidden).hidden
    plain = trunk(wave, torch.tensor([16_000])).hidden
    assert not torch.allclose(found[-1], plain[-1])
    stand_in = trunk.model.masked_spec_embed
    assert stand_in.requires_grad


def test_the_loss_is_the_paper_s() -> None:
    """All units equal in similarity: the loss is log C. The right one at cosine 1, others at -1: near 0."""
    torch.manual_seed(0)
    trunk = SelfSupervised(HubertModel(TeacherShape.model_validate(TEACHER_SHAPE).config()), normalise=False)
    batch = Waves(torch.randn(2, 16_000), torch.tensor([16_000, 9000]))
    units = Units(np.zeros((1, 39), dtype=np.float32))
    stage = MaskedPrediction(trunk, 4, units, span=10, share=0.8)
    with torch.no_grad():
        stage.embedding.copy_(torch.ones_like(stage.embedding))
    assert stage(batch, 0)["total"].item() == pytest.approx(np.log(4), abs=1e-4)
    with torch.no_grad():
        stage.project.weight.zero_()
        stage.project.bias.fill_(1.0)
        stage.embedding[1:] = -1.0
    terms = stage(batch, 0)
    assert terms["total"].item() == pytest.approx(3 * np.exp(-20), abs=1e-4)
    assert terms["accuracy"].item() == 1.0


def test_units_depend_neither_on_the_level_nor_on_padding() -> None:
    torch.manual_seed(0)
    wave = torch.randn(1, 16_000) * torch.linspace(0.05, 0.3, 16_000)
    alone = Mfcc()(wave, torch.tensor([16_000]))
    padded = Mfcc()(torch.cat([wave, torch.zeros(1, 8000)], dim=1), torch.tensor([16_000]))
    assert torch.allclose(Mfcc()(wave * 0.1, torch.tensor([16_000])), alone, atol=1e-3)
    # The last two frames' slopes look at the padding.
    assert torch.allclose(padded[:, :45], alone[:, :45], atol=1e-4)


def test_visible_frames_weigh_what_the_recipe_says() -> None:
    torch.manual_seed(0)
    trunk = SelfSupervised(HubertModel(TeacherShape.model_validate(TEACHER_SHAPE).config()), normalise=False).eval()
    batch = Waves(torch.randn(2, 16_000), torch.tensor([16_000, 9000]))
    units = Units(np.random.default_rng(0).standard_normal((4, 39)).astype(np.float32))

    def terms(hidden_weight: float) -> dict[str, float]:
        torch.manual_seed(1)
        stage = MaskedPrediction(trunk, 4, units, span=10, share=0.8, hidden_weight=hidden_weight)
        torch.manual_seed(2)
        return {name: float(value.detach()) for name, value in stage(batch, 0).items()}

    paper, half, quarter = terms(1.0), terms(0.5), terms(0.25)
    assert paper["total"] == paper["hidden"]
    assert half["hidden"] == pytest.approx(paper["hidden"])
    visible = 2 * half["total"] - half["hidden"]
    assert quarter["total"] == pytest.approx(0.25 * half["hidden"] + 0.75 * visible, abs=1e-5)


def test_bands_stand_in_for_the_cnn_frame_by_frame() -> None:
    """As many frames as the CNN's, none of which depends on padding."""
    torch.manual_seed(0)
    trunk = TeacherShape.model_validate({**TEACHER_SHAPE, "mel": True, "pre_norm": True}).untrained().eval()
    plain = TeacherShape.model_validate(TEACHER_SHAPE).untrained()
    assert (trunk.reach, trunk.hop) == (plain.reach, plain.hop)
    wave = 0.1 * torch.randn(2, 16_000)
    for count in (400, 719, 720, 9000, 16_000):
        alone = trunk(wave[:1, :count], torch.tensor([count]))
        padded = trunk(wave, torch.tensor([count, 16_000]))
        frames = plain.frames(count)
        assert alone.hidden[-1].shape[1] == frames == int(padded.mask[0].sum())
        assert torch.allclose(alone.hidden[-1][0], padded.hidden[-1][0, :frames], atol=1e-5)


def test_a_teacher_of_bands_comes_back_through_the_teachers_door(made_data: Path, tmp_path: Path) -> None:
    shape = {**TEACHER_SHAPE, "mel": True}
    folder = pretrain(pretrain_recipe(made_data, shape=shape), tmp_path / "run", tmp_path / "cache")
    state = torch.load(tmp_path / "run/pass-2/last.pt", weights_only=True)["stage"]
    trained = TeacherShape.model_validate(shape).untrained().eval()
    trained.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("trunk.")})
    wave, lengths = 0.1 * torch.randn(1, 16_000), torch.tensor([16_000])
    loaded = load_teacher(str(folder))
    assert torch.allclose(loaded(wave, lengths).hidden[-1], trained(wave, lengths).hidden[-1], atol=1e-6)
    student = student_of(loaded, layers=1)
    assert torch.allclose(student.eval()(wave, lengths).hidden[1], trained(wave, lengths).hidden[1], atol=1e-6)

    publish_teacher(folder, tmp_path / "published")
    published = load_teacher(str(tmp_path / "published"))
    assert {value.dtype for value in published.state_dict().values()} == {torch.float32}
    weights, copies = folder / "model.safetensors", tmp_path / "published/model.safetensors"
    assert copies.stat().st_size < 0.6 * weights.stat().st_size
    assert torch.allclose(published(wave, lengths).hidden[-1], loaded(wave, lengths).hidden[-1], atol=0.02)
    assert json.loads((tmp_path / "published/made.json").read_text())["identity"]["recipe"]["shape"]["mel"]
    with pytest.raises(RunError, match="exists"):
        publish_teacher(folder, tmp_path / "published")


def test_a_pass_may_go_on_with_the_weights_of_the_one_before(made_data: Path, tmp_path: Path) -> None:
    schedule = {"steps": 1, "workers": 0, "peak_learning_rate": 1e-6}
    passes = [{"clusters": 6, "schedule": schedule}, {"clusters": 6, "layer": 1, "begin": "on", "schedule": schedule}]
    last = pretrain(pretrain_recipe(made_data, passes=passes), tmp_path / "run", tmp_path / "cache")
    first = load_teacher(str(tmp_path / "run/pass-1/model")).state_dict()
    second = load_teacher(str(last)).state_dict()
    assert all(torch.allclose(value, second[name], atol=1e-4) for name, value in first.items())


def test_two_passes_make_a_teacher_that_loads_like_any_other(made_data: Path, tmp_path: Path) -> None:
    folder = pretrain(pretrain_recipe(made_data), tmp_path / "run", tmp_path / "cache")
    teacher = load_teacher(str(folder))
    assert (teacher.layers, teacher.width, teacher.hop) == (2, 16, 320)
    assert teacher(torch.randn(1, 16_000), torch.tensor([16_000])).hidden[-1].shape == (1, 49, 16)
    first = np.load(tmp_path / "run/pass-1/units.npz")["centres"]
    second = np.load(tmp_path / "run/pass-2/units.npz")["centres"]
    assert (first.shape, second.shape) == ((6, 39), (8, 16))


def test_an_interrupted_pretraining_ends_with_the_same_teacher(made_data: Path, tmp_path: Path) -> None:
    whole = pretrain(pretrain_recipe(made_data), tmp_path / "whole", tmp_path / "cache")
    assert pretrain(pretrain_recipe(made_data), tmp_path / "parts", tmp_path / "cache", stop_after=3).name == "pass-1"
    parts = pretrain(pretrain_recipe(made_data), tmp_path / "parts", tmp_path / "cache")
    one, other = load_teacher(str(whole)).state_dict(), load_teacher(str(parts)).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_clusters_of_a_layer_need_a_pass_before(made_data: Path, tmp_path: Path) -> None:
    only = [{"clusters": 4, "layer": 1, "schedule": {"steps": 1}}]
    with pytest.raises(RunError, match="no model before it"):
        pretrain(pretrain_recipe(made_data, passes=only), tmp_path / "run", tmp_path / "cache")


def test_the_default_shape_is_hubert_base() -> None:
    with torch.device("meta"):
        model = HubertModel(TeacherShape().config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 94_371_712
