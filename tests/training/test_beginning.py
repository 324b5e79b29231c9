"""Going on from a published bundle: the same network again, then training of one branch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model_store import LocalStore
from tests.training.conftest import TinyRun
from training.batches import Batch
from training.beginning import begin_with_bundle, check_same_people, meet
from training.compact import compact
from training.errors import RunError
from training.export import export
from training.manifest import digest_tables, labels_of, read_data
from training.objectives import soft_targets
from training.objectives.soft_targets import teaching_bundle
from training.recipe import Recipe, VoicesRecipe
from training.run import load_student, train
from training.students.edge import SPEAKER_PARTS, Edge

PARTED = {"speaker_from": "features"}


@pytest.fixture(scope="module")
def parted(made_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny run with a speaker branch that parts at the features, a few steps of it."""
    work = tmp_path_factory.mktemp("parted")
    schedule = made_run.recipe.schedule.model_copy(update={"steps": 4})
    shape = replace(made_run.recipe.shape, speaker_from="features")
    recipe = made_run.recipe.model_copy(update={"shape": shape, "schedule": schedule})
    return replace(made_run, recipe=recipe, folder=train(recipe, work / "run", made_run.cache))


@pytest.fixture(params=[False, True], ids=["float", "eight bits"])
def published(request: pytest.FixtureRequest, parted: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """It as parted@1 of a store that stands for the built-in one."""
    draft = tmp_path / "draft"
    manifest = export(parted.folder, draft, name="parted")
    if request.param:
        manifest = compact(draft)
    LocalStore(tmp_path / "store").publish(manifest, {name: (draft / name).read_bytes() for name in manifest.files})
    monkeypatch.setattr(soft_targets, "builtin_store_path", lambda: tmp_path / "store")
    return "parted@1"


@pytest.fixture
def noise() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 16_000, generator=generator) * 0.1, torch.tensor([16_000, 9_000, 12_345])


def outputs(student: Edge, noise: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out = student.eval()(*noise)
    return out.keyword_logits * out.mask[:, :, None], out.speaker_embedding


def begun(reference: str, recipe: Recipe) -> Edge:
    labels = labels_of(read_data(recipe.data.root).split("train"))
    student = Edge(1 + len(labels), recipe.shape)
    begin_with_bundle(student, teaching_bundle(reference), labels)
    return student


def test_it_is_the_network_that_was_published(
    published: str, parted: TinyRun, noise: tuple[Tensor, Tensor], request: pytest.FixtureRequest
) -> None:
    found = outputs(begun(published, parted.recipe), noise)
    wanted = outputs(load_student(parted.folder)[0], noise)
    # Eight bits round the weights.
    tolerance = 1e-4 if "float" in request.node.name else 0.1
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance)


def test_meeting_batches_changes_no_output_and_lets_training_go_on_from_there(
    published: str, parted: TinyRun, noise: tuple[Tensor, Tensor]
) -> None:
    student = begun(published, parted.recipe)
    before = outputs(student, noise)
    held = {name: value.clone() for name, value in student.state_dict().items() if name.split(".")[0] in SPEAKER_PARTS}
    nothing = torch.zeros(3, dtype=torch.int64)
    batch = Batch(*noise, nothing, torch.zeros(3, 2), torch.ones(3, 5, dtype=torch.bool), nothing)
    meet(student, [batch, batch], speakers=False)
    for own, other in zip(outputs(student, noise), before, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)
    assert all(torch.equal(student.state_dict()[name], value) for name, value in held.items())
    # In training a norm takes what it meets in the batch: the same as has been written down, so the same outputs.
    student.train()
    student.dropout.eval()
    student.hold_speakers()
    with torch.no_grad():
        trained = student(*noise)
    torch.testing.assert_close(trained.keyword_logits * trained.mask[:, :, None], before[0], rtol=0, atol=1e-2)


def test_where_only_keywords_learn_speakers_stay_bit_for_bit(published: str, parted: TinyRun, tmp_path: Path) -> None:
    recipe = parted.recipe.model_copy(update={"begin": published, "only": "keywords"})
    first = begun(published, recipe).state_dict()
    after, run = load_student(train(recipe, tmp_path / "run", parted.cache))
    assert run["begin"] == teaching_bundle(published).digest
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, first[name])}
    assert {"keyword_head.weight", "stem.first.0.weight", "shared.0.layers.1.running_mean"} <= changed
    assert not any(name.split(".")[0] in SPEAKER_PARTS for name in changed)


def test_where_only_speakers_learn_keywords_stay_bit_for_bit(published: str, parted: TinyRun, tmp_path: Path) -> None:
    recipe = parted.recipe.model_copy(update={"begin": published, "only": "speakers"})
    first = begun(published, recipe).state_dict()
    after, _ = load_student(train(recipe, tmp_path / "run", parted.cache))
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, first[name])}
    assert {"speaker_stem.first.0.weight", "pool.score.2.weight", "speaker.0.layers.1.running_mean"} <= changed
    assert all(name.split(".")[0] in SPEAKER_PARTS for name in changed)


def test_a_speaker_branch_can_begin_anew_and_of_another_shape(published: str, parted: TinyRun, tmp_path: Path) -> None:
    shape = replace(parted.recipe.shape, speaker_stem_channels=4, speaker_early_blocks=0)
    changes = {"begin": published, "only": "speakers", "anew": True, "shape": shape}
    recipe = parted.recipe.model_copy(update=changes)
    first, (after, _) = begun(published, parted.recipe), load_student(train(recipe, tmp_path / "run", parted.cache))
    words = {name: value for name, value in after.state_dict().items() if name.split(".")[0] not in SPEAKER_PARTS}
    assert words
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in words.items())
    assert len(after.speaker_early) == 0
    assert after.speaker_stem.flat == 4 * shape.mels // 4
    # Its norms have met batches, which is what they normalise by.
    assert after.speaker[0].layers[1].running_mean.abs().sum() > 0


def test_a_speaker_branch_is_computed_alone_where_it_shares_nothing(
    parted: TinyRun, made_run: TinyRun, noise: tuple[Tensor, Tensor]
) -> None:
    student = load_student(parted.folder)[0]
    with torch.no_grad():
        alone, both = student(*noise, keywords=False), student(*noise)
    assert torch.equal(alone.speaker_embedding, both.speaker_embedding)
    assert torch.equal(alone.frames, both.frames[:, :, parted.recipe.shape.task_width :])
    assert alone.keyword_logits.shape == (*both.mask.shape, 0)
    for sharing, speakers in ((load_student(made_run.folder)[0], True), (student, False)):
        with pytest.raises(ValueError, match="without keywords"):
            sharing(*noise, keywords=False, speakers=speakers)


def test_keywords_learn_on_after_a_recipe_of_keywords(published: str, parted: TinyRun, tmp_path: Path) -> None:
    before = parted.recipe.model_copy(update={"begin": published, "only": "keywords"})
    content = {**before.model_dump(mode="json"), "begin": None, "draws": 7, "after": before.model_dump(mode="json")}
    folder = train(Recipe.model_validate(content), tmp_path / "run", parted.cache)
    first, after = load_student(folder / "before")[0].state_dict(), load_student(folder)[0].state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, first[name])}
    assert {"keyword_head.weight", "stem.first.0.weight"} <= changed
    assert not any(name.split(".")[0] in SPEAKER_PARTS for name in changed)


def test_a_share_of_the_bundle_can_be_kept(published: str, parted: TinyRun, tmp_path: Path) -> None:
    plain = parted.recipe.model_copy(update={"begin": published, "only": "keywords"})
    first = begun(published, plain).keyword_head.weight
    whole, half = (
        load_student(train(recipe, tmp_path / name, parted.cache))[0].keyword_head.weight
        for name, recipe in (("whole", plain), ("half", plain.model_copy(update={"before_share": 0.5})))
    )
    torch.testing.assert_close(half, (first + whole) / 2)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(published: str, parted: TinyRun, tmp_path: Path) -> None:
    recipe = parted.recipe.model_copy(update={"begin": published, "only": "keywords", "before_share": 0.3})
    whole = train(recipe, tmp_path / "whole", parted.cache)
    train(recipe, tmp_path / "stopped", parted.cache, stop_after=2)
    stopped = train(recipe, tmp_path / "stopped", parted.cache)
    first, second = (load_student(folder)[0].state_dict() for folder in (whole, stopped))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_another_shape_or_other_words_are_refused(published: str, parted: TinyRun) -> None:
    bundle = teaching_bundle(published)
    labels = [keyword.label for keyword in bundle.manifest.keywords.labels]
    for changes in ({"task_width": 40}, {"keyword_blocks": 2}, {"speaker_from": "shared", "early_width": 24}):
        with pytest.raises(RunError, match="parted@1 is a network of another shape"):
            begin_with_bundle(Edge(1 + len(labels), replace(parted.recipe.shape, **changes)), bundle, labels)
    with pytest.raises(RunError, match="which are not the 3"):
        begin_with_bundle(Edge(len(labels), parted.recipe.shape), bundle, labels[1:])


def test_what_cannot_begin_fails_before_a_teacher_is_asked(
    published: str, parted: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = replace(parted.recipe.shape, speaker_stem_channels=4)
    changes = {"begin": published, "only": "speakers", "shape": shape, "voices": VoicesRecipe()}
    recipe = parted.recipe.model_copy(update=changes)
    asked: list[Recipe] = []
    monkeypatch.setattr("training.run.check_beside", lambda *_: None)
    monkeypatch.setattr("training.run._voices", lambda recipe, *_: asked.append(recipe))
    with pytest.raises(RunError, match="parted@1 is a network of another shape"):
        train(recipe, tmp_path / "run", parted.cache)
    assert not asked


def test_the_bundle_has_to_have_set_the_same_people_aside(published: str, parted: TinyRun) -> None:
    bundle = teaching_bundle(published)
    tables = digest_tables(parted.recipe.data.root)
    check_same_people(parted.recipe, bundle, tables)
    with pytest.raises(RunError, match="other speakers aside"):
        check_same_people(parted.recipe.model_copy(update={"seed": 5}), bundle, tables)
    # Who is set aside is drawn from who is in the tables.
    with pytest.raises(RunError, match=r"another manifest\.csv"):
        check_same_people(parted.recipe, bundle, {**tables, "manifest.csv": "0" * 64})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "only keywords can learn where"),
        ({"begin": "parted@1"}, "only keywords can learn where"),
        ({"begin": "parted@1", "shape": PARTED, "voices": {}}, "voices teach speakers"),
        ({"begin": "parted@1", "shape": PARTED, "init": "edge.pt"}, "no two of"),
    ],
)
def test_only_keywords_can_learn_beside_a_branch_that_parts_at_the_features(
    changes: dict[str, object], message: str
) -> None:
    least = {"name": "x", "data": {"root": "data"}, "schedule": {"steps": 10, "batch_size": 4}, "only": "keywords"}
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({**least, **changes})
