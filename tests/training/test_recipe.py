"""Recipes: what is refused, and what the digest covers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from model_store import LocalStore, builtin_store_path
from tests.conftest import REPOSITORY
from training.distil import DistilRecipe
from training.errors import RecipeError
from training.finetune import FinetuneRecipe
from training.plan import StudyRecipe, load_study, tuning
from training.pretrain import PretrainRecipe
from training.recipe import Recipe, load_recipe, read_recipe

LEAST: dict[str, Any] = {"name": "least", "data": {"root": "here"}, "schedule": {"steps": 10, "batch_size": 4}}


def changed(path: str, value: object) -> dict[str, Any]:
    """LEAST with the value at a dotted path."""
    *sections, key = path.split(".")
    result: dict[str, Any] = {**LEAST}
    here = result
    for section in sections:
        here[section] = {**here.get(section, {})}
        here = here[section]
    here[key] = value
    return result


def refused(folder: Path, content: str | bytes) -> str:
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


def test_defaults_fill_the_rest(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(LEAST))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.schedule.steps, recipe.schedule.peak_learning_rate, recipe.shape.mels) == (10, 0.002, 64)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("oops", 1),
        ("data.oops", 1),
        ("data.synthesis.oops", 1),
        ("shape.oops", 1),
        ("sampling.oops", 1),
        ("augment.oops", 1),
        ("schedule.oops", 1),
        ("loss.oops", 1),
        ("name", "Not A Name"),
        ("student", "teacher"),
        ("data.calibration_fraction", 1.0),
        ("data.most_clips_per_corpus", 0),
        ("schedule.steps", 0),
        ("schedule.steps", "many"),
        ("schedule.batch_size", 1),
        ("schedule.checkpoint_every", 0),
        ("schedule.average_decay", 1.0),
        ("schedule.precision", "float16"),
        ("schedule.workers", -1),
        ("sampling.crop_s", "long"),
        ("sampling.p_alone", 1.1),
        ("sampling.trim_s", -0.1),
        ("shape.mels", 64.5),
        ("shape.kernel", 0),
        ("augment.p_noise", 7),
        ("augment.speeds", []),
        ("augment.speeds.0", [0.0]),
        ("augment.snr_db", [25.0, 0.0]),
        ("augment.snr_db.1", [0.0, float("inf")]),
        ("spectral.warp.0", [-1.0, 1.0]),
        ("spectral.colour_points", 0),
        ("data.synthesis.voices", 0),
        ("schedule.peak_learning_rate", 0),
        ("schedule.weight_decay", float("nan")),
        ("loss.label_smoothing", 1.0),
        ("loss.speaker", -1),
    ],
)
def test_wrong_key_or_value_is_named(tmp_path: Path, path: str, value: object) -> None:
    given = path.removesuffix(".0").removesuffix(".1")
    assert f"\n  {path}: " in refused(tmp_path, yaml.safe_dump(changed(given, value)))


@pytest.mark.parametrize("section", ["name", "data", "schedule"])
def test_missing_section_is_named(tmp_path: Path, section: str) -> None:
    rest = {name: value for name, value in LEAST.items() if name != section}
    assert f"\n  {section}: Field required" in refused(tmp_path, yaml.safe_dump(rest))


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00a"])
def test_file_that_is_no_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "recipe.yaml is not YAML" in refused(tmp_path, content)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    assert "recipe.yaml" in refused(tmp_path, "")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_digest_ignores_where_the_data_lies() -> None:
    assert Recipe.model_validate(changed("data.root", "there")).digest() == Recipe.model_validate(LEAST).digest()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "other"),
        ("seed", 1),
        ("data.calibration_fraction", 0.2),
        ("data.corpora", ["asc"]),
        ("data.most_clips_per_corpus", 5),
        ("data.synthesis", {"voices": 3}),
        ("shape.task_width", 128),
        ("sampling.crop_s", 1.5),
        ("sampling.corpus_weight", {"asc": 2.0}),
        ("augment.p_noise", 0.5),
        ("augment.speeds", [1.0]),
        ("schedule.steps", 11),
        ("schedule.workers", 0),
        ("loss.speaker", 0.5),
    ],
)
def test_digest_changes_with_everything_else(path: str, value: object) -> None:
    assert Recipe.model_validate(changed(path, value)).digest() != Recipe.model_validate(LEAST).digest()


def after(folder: Path, first: dict[str, Any]) -> Path:
    """A recipe that comes after `first`."""
    (folder / "first.yaml").write_text(yaml.safe_dump(first))
    (folder / "second.yaml").write_text(yaml.safe_dump({**LEAST, "after": str(folder / "first.yaml")}))
    return folder / "second.yaml"


def test_digest_covers_what_was_trained_first(tmp_path: Path) -> None:
    digests = {load_recipe(after(tmp_path, first)).digest() for first in (LEAST, changed("schedule.steps", 11))}
    assert len(digests) == 2
    assert load_recipe(after(tmp_path, LEAST)).digest() != Recipe.model_validate(LEAST).digest()


def test_mistakes_in_what_comes_first_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"after\.schedule\.steps: "):
        load_recipe(after(tmp_path, changed("schedule.steps", 0)))
    with pytest.raises(RecipeError, match="comes after itself"):
        load_recipe(after(tmp_path, {**LEAST, "after": str(tmp_path / "second.yaml")}))
    assert "nothing does" in refused(tmp_path, yaml.safe_dump({**LEAST, "before_share": 0.5}))
    assert "no two of" in refused(tmp_path, yaml.safe_dump({**LEAST, "init": "edge.pt", "after": LEAST}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "something comes first"),
        ({"after": LEAST, "hints": {}}, "teach keywords"),
        ({"after": LEAST, "soft_targets": {"bundle": "sotto-edge@3"}}, "teach keywords"),
        ({"after": LEAST, "loss": {"speaker": 0}}, "neither loss"),
        ({"begin": "sotto-edge@9", "shape": {"trunk": {}, "speaker_from": "features"}}, "only: keywords"),
        ({"after": LEAST, "anew": True}, "begins anew beside"),
        ({"begin": "sotto-edge@9"}, "part at the features"),
        ({"begin": "sotto-edge@9", "anew": True, "shape": {"speaker_from": "early"}}, "part at the features"),
        (
            {"begin": "sotto-edge@9", "anew": True, "shape": {"speaker_from": "features"}, "before_share": 0.5},
            "begins anew beside",
        ),
        ({"begin": "sotto-edge@9", "only": None, "anew": True}, "learns alone begins anew"),
        ({"begin": "sotto-edge@9", "shape": {"speaker_stem_channels": 16}}, "parts at the features"),
        ({"begin": "sotto-edge@9", "shape": {"speaker_early_blocks": 0}}, "parts at the features"),
    ],
)
def test_only_speakers_can_learn_where_words_are_known(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({**LEAST, "only": "speakers", **changes})


def test_a_speaker_branch_that_learns_alone_may_part_earlier() -> None:
    earlier = changed("shape.speaker_from", "early")
    assert Recipe.model_validate({**earlier, "after": LEAST, "only": "speakers"}).shape.speaker_from == "early"
    for later in ({}, {**changed("shape.task_width", 128), "only": "speakers"}):
        with pytest.raises(ValidationError, match="the same shape"):
            Recipe.model_validate({**earlier, **later, "after": LEAST})
    with pytest.raises(ValidationError, match="the same shape"):
        Recipe.model_validate({**LEAST, "after": earlier, "only": "speakers"})
    with pytest.raises(ValidationError, match="another shape"):
        Recipe.model_validate({**earlier, "after": LEAST, "only": "speakers", "before_share": 0.3})


@pytest.mark.parametrize(
    ("path", "value"), [("seed", 5), ("data.calibration_fraction", 0.2), ("shape.task_width", 128)]
)
def test_what_comes_first_sets_the_same_people_aside(tmp_path: Path, path: str, value: object) -> None:
    with pytest.raises(RecipeError, match=r"the same (seed and data|shape)"):
        load_recipe(after(tmp_path, changed(path, value)))


@pytest.mark.parametrize(
    ("stored", "same"),
    [
        (LEAST, True),
        (changed("data.root", "there"), True),
        (changed("schedule.steps", 11), False),
        (changed("schedule.oops", 11), False),
    ],
)
def test_an_older_recipe_is_compared_with_defaults_filled_in(stored: dict[str, Any], same: bool) -> None:
    assert Recipe.model_validate(LEAST).says_the_same(stored) is same


def test_recipe_survives_the_run_file() -> None:
    recipe = Recipe.model_validate(changed("augment.speeds", [0.9, 1.0]))
    assert Recipe.model_validate(recipe.model_dump(mode="json")).digest() == recipe.digest()


STORE = LocalStore(builtin_store_path())
KINDS: dict[str, type[BaseModel]] = {
    "edge": Recipe,
    "edge-taught": Recipe,
    "edge-again": Recipe,
    "edge-ahead": Recipe,
    "edge-nearer": Recipe,
    "edge-apart": Recipe,
    "edge-whisper": Recipe,
    "edge-based": Recipe,
    "edge-nearer-base": Recipe,
    "edge-third": Recipe,
    "edge-fourth": Recipe,
    "edge-voices": Recipe,
    "micro-nearer": Recipe,
    "micro-third": Recipe,
    "micro-noisier": Recipe,
    "base": Recipe,
    "micro": Recipe,
    "teacher": PretrainRecipe,
    "teacher-base": PretrainRecipe,
    "distil": DistilRecipe,
    "finetune": FinetuneRecipe,
    "kerpicci": StudyRecipe,
    "full-size": StudyRecipe,
}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "training/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_has_the_name_of_its_file(path: Path) -> None:
    recipe: Any = read_recipe(path, KINDS[path.stem])
    assert recipe.name == path.stem


@pytest.mark.parametrize("name", ["kerpicci", "full-size"])
def test_a_shipped_study_names_recipes_that_load(name: str) -> None:
    """Its paths are taken from the working directory, which is the repository's root for every command in README."""
    study = load_study(REPOSITORY / f"training/recipes/{name}.yaml")
    for path in (study.teacher, study.finetune, *(variant.recipe for variant in study.distil.values())):
        assert (REPOSITORY / path).is_file()
    assert study.student in study.rows


def test_shipped_distillation_is_distilhubert_s() -> None:
    """Two layers that predict three of twelve; the copied CNN learns at a tenth of the rate; warm-up over 7 %
    of the steps (recipes.md, 6.1)."""
    recipe = read_recipe(REPOSITORY / "training/recipes/distil.yaml", DistilRecipe)
    assert (recipe.shape, recipe.layers, recipe.targets) == ("distilhubert", 2, (4, 8, 12))
    assert (recipe.cnn_rate, recipe.schedule.warmup) == (0.1, 0.07)


def test_shipped_study_has_every_row_of_the_paper_s_table() -> None:
    """Full-size reference and student, full and frozen, both tasks and each alone, and the student that was not
    distilled with as many steps (checklist 1(e), 5 and 7)."""
    study = read_recipe(REPOSITORY / "training/recipes/kerpicci.yaml", StudyRecipe)
    rows = {name: tuning(study, name) for name, row in study.rows.items() if row.bundle is None}
    found = {(study.rows[name].init, row.layers, row.mode, row.tasks) for name, row in rows.items()}
    both = ("keywords", "speakers")
    assert found == {
        ("teacher", 0, "full", both),
        ("teacher", 0, "frozen", both),
        ("teacher", 2, "full", both),
        ("distilled", 0, "full", both),
        ("distilled", 0, "frozen", both),
        ("distilled", 0, "full", ("keywords",)),
        ("distilled", 0, "full", ("speakers",)),
        # Ours: once the teacher knows the tasks.
        ("from-reference", 0, "full", both),
        ("taught", 0, "full", both),
    }
    assert len({row.schedule for name, row in rows.items() if name != "longer"}) == 1


@pytest.mark.parametrize("name", STORE.names())
def test_what_ships_was_made_by_a_recipe_that_is_here(name: str) -> None:
    lineage = STORE.resolve(name).manifest.lineage
    recipe = load_recipe(REPOSITORY / f"training/recipes/{lineage.recipe['name']}.yaml")
    assert recipe.says_the_same(lineage.recipe)
    card = STORE.resolve(name).read("MODEL_CARD.md").decode()
    assert f"make train RECIPE=training/recipes/{recipe.name}.yaml" in card


def test_whisper_s_own_encoder_is_not_distilled_into() -> None:
    content = yaml.safe_load((REPOSITORY / "training/recipes/distil.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ValidationError, match="needs no distillation"):
        DistilRecipe.model_validate({**content, "edge": {"speaker_from": "features", "trunk": {"layers": 2}}})
