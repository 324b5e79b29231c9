"""Calibration and evaluation through HTTP on made-up voices, and the threshold rule on its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_store import Manifest
from model_store.store import open_bundle
from tests.training.conftest import TinyRun, train_tiny
from tests.training.fakes import FakeClient, make_clip
from tests.training.made_data import tiny_recipe
from training import calibrate as calibrate_module
from training.calibrate import HIGHEST_THRESHOLD, LOWEST_THRESHOLD, calibrate
from training.errors import TrainingError
from training.evaluation.client import served
from training.evaluation.report import Report, evaluate
from training.export import export
from training.manifest import Data, read_data
from training.recipe import Recipe

Measured = tuple[Path, Manifest, Report]


@pytest.fixture(scope="module")
def calibrated(made_run: TinyRun, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A draft after `calibrate`, and its figures on dev. Thirty steps would not do: these are 150 in little
    noise, and a third of the speakers are set aside."""
    work = tmp_path_factory.mktemp("calibrated")
    recipe = tiny_recipe(made_data, steps=150).model_dump(mode="json")
    recipe["data"]["calibration_fraction"] = 0.34
    recipe["augment"] |= {"p_noise": 0.3, "p_room": 0.1, "p_narrowband": 0.0, "p_telephone": 0.0}
    recipe["loss"]["speaker"] = 0.6
    recipe["seed"] = 2
    run = train_tiny(Recipe.model_validate(recipe), work / "run", made_run.cache)
    draft = work / "draft"
    export(run.folder, draft, name="tiny")
    manifest = calibrate(draft, data_root=None, say=lambda _: None)
    with served(draft) as client:
        report = evaluate(
            client,
            read_data(made_data),
            split="dev",
            rows=["asc", "commands"],
            bundle=open_bundle(draft),
            peers_python=Path("none"),
            command="test",
            say=lambda _: None,
        )
    return draft, manifest, report


def test_calibration_is_fitted_on_the_fold_only(calibrated: Measured) -> None:
    # Three of nine speakers in each of two corpora, ten clips each.
    assert "6 training speakers set aside (fold 'calibration', seed 2), 60 clips" in (
        calibrated[1].speaker.calibration.fitted_on
    )


def test_calibrated_manifest_is_what_the_draft_holds(calibrated: Measured) -> None:
    assert open_bundle(calibrated[0]).manifest == calibrated[1]


def test_thresholds_stay_within_their_bounds(calibrated: Measured) -> None:
    assert all(0.3 <= entry.threshold <= 0.9 for entry in calibrated[1].keywords.labels)


def test_calibrated_scores_say_more_than_nothing(calibrated: Measured) -> None:
    cost = float(calibrated[1].speaker.calibration.fitted_on.rsplit("Cllr ", 1)[1])
    assert cost < 1.0


def test_trained_words_are_recognised_for_new_people(calibrated: Measured) -> None:
    figures = {figure.name: figure.value for figure in calibrated[2].figures}
    # Two words in each corpus, four labels: a guess is right a quarter of the time.
    assert figures["asc top-1"] + figures["commands top-1"] > 100


def test_report_names_the_model(calibrated: Measured) -> None:
    assert calibrated[2].model == "tiny@1"


def test_recipe_without_a_fold_cannot_be_calibrated(made_draft: tuple[Path, Manifest], tmp_path: Path) -> None:
    manifest = made_draft[1]
    recipe = {**manifest.lineage.recipe, "data": {**manifest.lineage.recipe["data"], "calibration_fraction": 0.0}}
    lineage = manifest.lineage.model_copy(update={"recipe": recipe})
    (tmp_path / "manifest.json").write_text(manifest.model_copy(update={"lineage": lineage}).to_json())
    with pytest.raises(TrainingError, match="sets no speakers aside"):
        calibrate(tmp_path, data_root=None, say=lambda _: None)


Thresholds = Callable[[Sequence[float], Sequence[float], float], dict[str, float]]


@pytest.fixture
def thresholds(made_draft: tuple[Path, Manifest], tmp_path: Path) -> Thresholds:
    """Thresholds for a fold of one clip of ar:low and one of other speech that lasts `hours`; the service
    hears ar:low in both, with these scores."""

    def found(own: Sequence[float], other: Sequence[float], hours: float) -> dict[str, float]:
        answers: dict[str, Any] = {
            key: {"detections": [{"keyword": "ar:low", "score": score} for score in scores]}
            for key, scores in (("own", own), ("other", other))
        }
        clips = [
            make_clip(tmp_path, "own", keyword="low", language="ar"),
            make_clip(tmp_path, "other", transcript="something else", language="ar", duration_s=hours * 3600),
        ]
        client: Any = FakeClient(answers)
        data = Data(tmp_path, tuple(clips), (), ())
        return calibrate_module._thresholds(client, made_draft[1], data, clips, lambda _: None)[0]

    return found


def test_a_word_of_another_language_with_the_same_label_is_a_false_alarm(
    made_draft: tuple[Path, Manifest], tmp_path: Path
) -> None:
    clip = make_clip(tmp_path, "arabic", keyword="high", language="ar", duration_s=1800.0)
    for language, least in (("ar", LOWEST_THRESHOLD), ("en", 0.7)):
        answers: dict[str, Any] = {"arabic": {"detections": [{"keyword": f"{language}:high", "score": 0.7}]}}
        client: Any = FakeClient(answers)
        data = Data(tmp_path, (clip,), (), ())
        found, capped = calibrate_module._thresholds(client, made_draft[1], data, [clip], lambda _: None)
        assert found.get(f"{language}:high", LOWEST_THRESHOLD) >= least
        assert not capped


def test_a_word_that_its_upper_bound_keeps_from_the_budget_is_named(
    made_draft: tuple[Path, Manifest], tmp_path: Path
) -> None:
    clip = make_clip(tmp_path, "other", transcript="something else", language="en", duration_s=1800.0)
    client: Any = FakeClient({"other": {"detections": [{"keyword": "en:high", "score": 0.99}]}})
    data = Data(tmp_path, (clip,), (), ())
    found, capped = calibrate_module._thresholds(client, made_draft[1], data, [clip], lambda _: None)
    assert found["en:high"] == HIGHEST_THRESHOLD
    assert capped == ["en:high"]


def test_threshold_of_a_quiet_keyword_is_the_lowest(thresholds: Thresholds) -> None:
    assert thresholds([0.9], [], 1.0)["ar:low"] == LOWEST_THRESHOLD


def test_keyword_in_its_own_clip_is_no_false_alarm(thresholds: Thresholds) -> None:
    assert thresholds([0.8, 0.8, 0.8], [], 0.5)["ar:low"] == LOWEST_THRESHOLD


def test_threshold_lets_the_allowed_alarm_through(thresholds: Thresholds) -> None:
    # One hour allows one alarm, so the second highest must fall.
    assert thresholds([], [0.7, 0.5, 0.4], 1.0)["ar:low"] == pytest.approx(0.5, abs=0.0011)


def test_alarm_over_budget_stays_below_the_rounded_threshold(thresholds: Thresholds) -> None:
    found = thresholds([], [0.7, 0.5003], 1.0)["ar:low"]
    assert math.isclose(found, 0.501)
    assert found > 0.5003


def test_threshold_never_passes_its_upper_bound(thresholds: Thresholds) -> None:
    assert thresholds([], [0.99, 0.98, 0.97], 1.0)["ar:low"] == 0.9


def test_network_that_tells_nobody_apart_is_refused(tmp_path: Path) -> None:
    clips = [
        make_clip(tmp_path, f"{speaker}/{take}", corpus="c", speaker=speaker) for speaker in "ab" for take in range(8)
    ]
    client: Any = FakeClient()
    # The claimed speaker's own clips score lower than the other's.
    client.score = lambda speaker_id, key: (-1.0, -0.5) if speaker_id.endswith(key[0]) else (1.0, 0.5)
    with pytest.raises(TrainingError, match="nobody apart"):
        calibrate_module._fit_speakers(client, clips, lambda _: None)


def test_cheaper_of_both_scores_is_kept(tmp_path: Path) -> None:
    clips = [
        make_clip(tmp_path, f"{speaker}/{take}", corpus="c", speaker=speaker) for speaker in "ab" for take in range(16)
    ]
    client: Any = FakeClient()
    # The cohort-normalised score says nothing, the cosine all.
    client.score = lambda speaker_id, key: (float(int(key[2:]) % 2), 0.9 if speaker_id.endswith(key[0]) else 0.1)
    assert not calibrate_module._fit_speakers(client, clips, lambda _: None).with_cohort


def test_a_stricter_threshold_lets_in_no_more_strangers_than_it_says() -> None:
    impostors = np.linspace(-10.0, 10.0, 1999)
    points = calibrate_module._operating_points(impostors)
    assert [point.false_accept_rate for point in points] == [0.01, 0.001]
    for point in points:
        accepted = (impostors >= point.threshold).sum()
        # Not one more would be within the share.
        assert accepted == int(point.false_accept_rate * len(impostors))
    # Strangers who all sound strange need no threshold below even odds.
    assert {point.threshold for point in calibrate_module._operating_points(impostors - 30)} == {0.0}
    # Of so few nothing can be said for one in a thousand, or in a hundred.
    few = calibrate_module._operating_points(impostors[:150])
    assert [point.false_accept_rate for point in few] == [0.01]
    assert calibrate_module._operating_points(impostors[:50]) == ()
