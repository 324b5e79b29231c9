"""Whisper's encoder as a trunk: the published network on short clips, local on long ones, and what of it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

from model_store import LocalStore
from model_store.store import open_bundle
from tests.training.conftest import TinyRun
from tests.training.small_whisper import FRAMES, HEADS, HIDDEN, LAYERS, WIDTH, small_encoder, tensors_of, written
from tests.training.test_students import LENGTHS, noise, run
from training import run as run_module
from training import whisper
from training.compact import compact
from training.errors import TeacherError
from training.export import export
from training.objectives import soft_targets
from training.recipe import Recipe
from training.run import load_student, train
from training.spectral import SpectralAugment, SpectralRecipe
from training.students.edge import FRAME_HOP, SPEAKER_PARTS, Edge
from training.students.whisper import BLOCK, HOP, MEL_HOP, NEAR, STRIDE, Features, TrunkShape, WhisperTrunk, augmented
from training.whisper import begin_trunk

SHAPE = TrunkShape(width=WIDTH, layers=LAYERS, heads=HEADS, hidden=HIDDEN)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tensors_of(small_encoder()), tmp_path_factory.mktemp("whisper"))


@pytest.fixture
def trunk(weights: Path) -> WhisperTrunk:
    trunk = WhisperTrunk(SHAPE).eval()
    begin_trunk(trunk, weights, verify=False)
    return trunk


@torch.no_grad()
def encoded(trunk: WhisperTrunk, waveform: Tensor) -> Tensor:
    """[N] -> [N / HOP, width]."""
    heard = torch.ones(1, len(waveform) // MEL_HOP, dtype=torch.bool)
    return trunk.encode(trunk.features(waveform[None]), heard)[0]


def test_features_are_those_of_the_published_extractor() -> None:
    (waveform,) = noise(FRAMES * HOP)
    # The extractor mirrors the samples at the ends, where here is silence.
    waveform[:400], waveform[-400:] = 0.0, 0.0
    wanted = WhisperFeatureExtractor(chunk_length=1)(waveform.numpy(), sampling_rate=16_000)["input_features"][0]
    found = Features()(waveform[None])[0]
    assert np.allclose(found.numpy(), wanted, atol=1e-4)


def test_a_change_that_changes_nothing_loses_nothing() -> None:
    """Quieter than the floor of the features that such changes are made for, too."""
    features = Features()(noise(FRAMES * HOP)[0][None] * 1e-4)
    still = SpectralAugment(SpectralRecipe(frequency_stripes=0, time_stripes=0), 1, torch.Generator().manual_seed(1))
    torch.testing.assert_close(augmented(features, still), features, rtol=0, atol=1e-5)


def test_frames_are_those_of_the_published_encoder(trunk: WhisperTrunk) -> None:
    (waveform,) = noise(FRAMES * HOP)
    with torch.no_grad():
        wanted = small_encoder()(trunk.features(waveform[None])).last_hidden_state[0]
    torch.testing.assert_close(encoded(trunk, waveform), wanted, rtol=0, atol=1e-4)


def test_two_blocks_hear_as_they_do_without_blocks(trunk: WhisperTrunk, monkeypatch: pytest.MonkeyPatch) -> None:
    (waveform,) = noise((2 * BLOCK - 9) * HOP)
    whole = encoded(trunk, waveform)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    torch.testing.assert_close(encoded(trunk, waveform), whole, rtol=0, atol=1e-5)


def test_a_frame_hears_its_block_and_the_ones_beside_it(weights: Path) -> None:
    shallow = WhisperTrunk(replace(SHAPE, layers=1)).eval()
    begin_trunk(shallow, weights, verify=False)
    (waveform,) = noise(5 * BLOCK * HOP)
    before = encoded(shallow, waveform)
    # In the fifth block, and as loud as anything, so that the floor of the features stays.
    waveform[4 * BLOCK * HOP + 800 : 4 * BLOCK * HOP + 4000] = waveform[2000:5200]
    changed = (encoded(shallow, waveform) - before).abs().amax(dim=1) > 1e-6
    assert not bool(changed[: 3 * BLOCK].any())
    assert bool(changed[3 * BLOCK : 4 * BLOCK].any())


def test_vectors_are_means_of_the_frames_around(trunk: WhisperTrunk) -> None:
    (waveform,) = noise(16_000)
    with torch.no_grad():
        vectors = trunk(waveform[None], torch.tensor([16_000]))[0, :, 0].T
    assert STRIDE == FRAME_HOP
    assert vectors.shape == (20, WIDTH)
    frames = encoded(trunk, torch.nn.functional.pad(waveform, (2 * STRIDE, 2 * STRIDE)))
    # Sample 0 is frame 5 with the margin's 100 ms before it; 50 ms lie between frames 7 and 8.
    torch.testing.assert_close(vectors[0], frames[4:7].mean(dim=0), rtol=0, atol=1e-4)
    torch.testing.assert_close(vectors[1], frames[7:9].mean(dim=0), rtol=0, atol=1e-4)
    assert all(sum(row) == pytest.approx(1.0) for row in NEAR)


@pytest.fixture
def network(weights: Path, parted_shape: dict[str, object]) -> Edge:
    torch.manual_seed(3)
    student = Edge(7, Recipe.model_validate(recipe_of(parted_shape)).shape)
    begin_trunk(student.trunk, weights, verify=False)
    return student.eval()


@pytest.fixture
def parted_shape() -> dict[str, object]:
    trunk = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "hidden": HIDDEN}
    return {"mels": 32, "task_width": 32, "keyword_blocks": 1, "speaker_from": "features", "trunk": trunk}


def recipe_of(shape: dict[str, object]) -> dict[str, object]:
    return {"name": "x", "data": {"root": "data"}, "schedule": {"steps": 10, "batch_size": 4}, "shape": shape}


@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_a_clip_among_others_gives_what_it_gives_alone(network: Edge, row: int) -> None:
    clips = noise(*LENGTHS, 60_000)
    clips[-1] *= 9.0  # loud, and longer than two blocks
    together, alone = run(network, clips, filler=0.7), run(network, [clips[row]])
    frames = alone.keyword_logits.shape[1]
    for name in ("keyword_logits", "frames"):
        own = getattr(alone, name)[0]
        torch.testing.assert_close(getattr(together, name)[row, :frames], own, rtol=0, atol=1e-4)
    torch.testing.assert_close(together.embedding[row], alone.embedding[0], rtol=0, atol=1e-5)
    assert int(together.mask[row].sum()) == frames == -(-LENGTHS[row] // STRIDE)


def test_silence_is_heard_as_numbers(network: Edge) -> None:
    assert bool(run(network, [torch.zeros(8000)]).keyword_logits.isfinite().all())


@pytest.fixture
def tried(made_run: TinyRun, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    """A recipe with a trunk, and the speaker branch of a bundle of the built-in store."""
    monkeypatch.setattr(whisper, "DIGEST", whisper.encoder_weights(weights, verify=False)[1])
    shape = replace(made_run.recipe.shape, speaker_from="features")
    schedule = made_run.recipe.schedule.model_copy(update={"steps": 3})
    first = made_run.recipe.model_copy(update={"shape": shape, "schedule": schedule})
    draft = tmp_path / "draft"
    manifest = export(train(first, tmp_path / "first", made_run.cache), draft, name="parted")
    LocalStore(tmp_path / "store").publish(manifest, {name: (draft / name).read_bytes() for name in manifest.files})
    monkeypatch.setattr(soft_targets, "builtin_store_path", lambda: tmp_path / "store")
    content = first.model_dump(mode="json")
    content["shape"]["trunk"] = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "hidden": HIDDEN}
    trunk = {"learning": 1, "rate": 0.5, "weights": str(weights)}
    recipe = Recipe.model_validate({**content, "begin": "parted@1", "only": "keywords", "trunk": trunk})
    return replace(made_run, recipe=recipe, folder=tmp_path / "first")


def test_the_last_layers_learn_and_the_speaker_branch_stays(tried: TinyRun, weights: Path, tmp_path: Path) -> None:
    trained, said = load_student(train(tried.recipe, tmp_path / "run", tried.cache))
    assert said["trunk"] == whisper.DIGEST
    published = WhisperTrunk(SHAPE)
    begin_trunk(published, weights)
    after, before = trained.trunk.state_dict(), published.state_dict()
    changed = {name.rpartition(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert "layers.1.project" in changed
    assert not any(name.startswith(("first", "second", "layers.0.")) for name in changed)
    clip = noise(9000)
    speakers = (run(student, clip).speaker_embedding for student in (trained, load_student(tried.folder)[0]))
    torch.testing.assert_close(*speakers, rtol=0, atol=1e-5)


def test_a_run_goes_on_from_one_before_it(tried: TinyRun, weights: Path, tmp_path: Path) -> None:
    schedule = tried.recipe.schedule.model_copy(update={"steps": 1, "warmup_steps": 1000})
    content = tried.recipe.model_dump(mode="json")
    further = {**content, "begin": None, "after": content, "schedule": schedule.model_dump(), "name": "further"}
    folder = train(Recipe.model_validate(further), tmp_path / "run", tried.cache)
    published = WhisperTrunk(SHAPE)
    begin_trunk(published, weights)
    first, further_on = (load_student(each)[0] for each in (folder / "before", folder))
    learnt = "trunk.layers.1.project.weight"
    moved = (further_on.state_dict()[learnt] - first.state_dict()[learnt]).abs().max()
    apart = (first.state_dict()[learnt] - published.state_dict()[learnt.removeprefix("trunk.")]).abs().max()
    assert moved < apart / 10
    clip = noise(9000)
    speakers = (run(student, clip).speaker_embedding for student in (further_on, load_student(tried.folder)[0]))
    torch.testing.assert_close(*speakers, rtol=0, atol=1e-5)


def test_new_blocks_are_normalised_from_the_first_step_on(tried: TinyRun, tmp_path: Path) -> None:
    schedule = tried.recipe.schedule.model_copy(update={"steps": 1})
    recipe = tried.recipe.model_copy(update={"schedule": schedule})
    begun, _ = load_student(train(recipe, tmp_path / "run", tried.cache))
    norms = [layer for layer in begun.keyword.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        torch.testing.assert_close(norm.weight, torch.ones_like(norm.weight), rtol=0, atol=0.05)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tried: TinyRun, tmp_path: Path) -> None:
    whole = train(tried.recipe, tmp_path / "whole", tried.cache)
    train(tried.recipe, tmp_path / "stopped", tried.cache, stop_after=2)
    stopped = train(tried.recipe, tmp_path / "stopped", tried.cache)
    first, second = (load_student(folder)[0].state_dict() for folder in (whole, stopped))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_bundle_has_a_clip_graph_alone_and_takes_eight_bits(tried: TinyRun, tmp_path: Path) -> None:
    draft = tmp_path / "bundle"
    # Compares the graph with the network: alone, padded and batched, up to five seconds.
    manifest = export(train(tried.recipe, tmp_path / "run", tried.cache), draft, name="x")
    assert manifest.stream is None
    before = len(open_bundle(draft).read("model.onnx"))
    compact(draft)
    assert len(open_bundle(draft).read("model.onnx")) < before


def test_the_trunk_learns_at_its_own_rate(tried: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers: list[torch.optim.AdamW] = []
    made = run_module.optimizer_of

    def noted(recipe: Recipe, student: Edge, heads: nn.Module) -> torch.optim.AdamW:
        optimizers.append(made(recipe, student, heads))
        return optimizers[0]

    monkeypatch.setattr(run_module, "optimizer_of", noted)
    train(tried.recipe, tmp_path / "run", tried.cache, stop_after=1)
    # Of the trunk is what was published: kernels as wide as its layers.
    trunk, others = set(), set()
    for group in optimizers[0].param_groups:
        (trunk if any(p.shape == (3 * WIDTH, WIDTH) for p in group["params"]) else others).add(group["lr"])
    assert len(trunk) == 1
    assert trunk.pop() == pytest.approx(max(others) * 0.5)


def test_weights_of_another_shape_are_refused(weights: Path) -> None:
    for other, message in ((replace(SHAPE, heads=4), "2 heads"), (replace(SHAPE, layers=3), "another shape")):
        with pytest.raises(TeacherError, match=message):
            begin_trunk(WhisperTrunk(other), weights, verify=False)


def test_a_run_tells_at_once_that_the_weights_are_missing(tried: TinyRun, tmp_path: Path) -> None:
    trunk = tried.recipe.trunk.model_copy(update={"weights": tmp_path / "nowhere"})
    with pytest.raises(TeacherError, match="make teachers"):
        train(tried.recipe.model_copy(update={"trunk": trunk}), tmp_path / "run", tried.cache)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk": {"learning": 3}}, "3 layers of the trunk cannot learn, it has 2"),
        ({"shape": {}, "trunk": {"learning": 1}}, "the shape has none"),
        ({"init": "edge.pt"}, "begins with Whisper's weights"),
        ({"begin": "parted@1"}, "only: keywords"),
        ({"begin": "parted@1", "only": "keywords", "before_share": 0.5}, "begins with Whisper's weights"),
    ],
)
def test_what_does_not_go_with_a_trunk_is_refused(
    changes: dict[str, object], message: str, parted_shape: dict[str, object]
) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(recipe_of(parted_shape) | changes)


def test_beside_a_trunk_speakers_have_layers_of_their_own(parted_shape: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="has to part at the features"):
        Recipe.model_validate(recipe_of({**parted_shape, "speaker_from": "early"}))
    with pytest.raises(ValidationError, match="even parts"):
        Recipe.model_validate(recipe_of({**parted_shape, "trunk": {"width": 30, "heads": 4}}))


def test_parts_of_the_speaker_branch_are_not_the_trunk_s(network: Edge) -> None:
    network.hold_speakers()
    held = {name.split(".")[0] for name, value in network.named_parameters() if not value.requires_grad}
    assert held == {name for name in SPEAKER_PARTS if any(True for _ in network.get_submodule(name).parameters())}
