"""Scoring, enrolment's verdicts, and the profile store."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from model_store import Calibration, SpeakerInfo
from service.errors import StorageUnavailableError
from service.speakers import connections, turns
from service.speakers.enrolment import Candidate, Refusal, judge
from service.speakers.scoring import probability, profile_vector, score, scores
from service.speakers.store import Enrolment, Profile, ProfileStore
from service.speech import SpeechQuality

DIM = 8
INFO = SpeakerInfo(
    dim=DIM, calibration=Calibration(scale=10.0, offset=-5.0, fitted_on="these tests"), threshold=0.0, cohort_top=3
)
GOOD = SpeechQuality(speech_s=1.0, snr_db=20.0, clipped_ratio=0.0)


def unit(*values: float) -> np.ndarray:
    vector = np.zeros(DIM, dtype=np.float32)
    vector[: len(values)] = values
    return vector / np.linalg.norm(vector)


def enrolment(*values: float, speech_s: float = 1.0) -> Enrolment:
    return Enrolment("sotto-edge", 1, unit(*values), speech_s, 20.0)


def test_the_score_is_the_calibrated_cosine() -> None:
    result = score(unit(1), unit(1, 1), INFO, None)
    assert result.cosine == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert result.llr == pytest.approx(10 * math.sqrt(0.5) - 5, abs=1e-5)


def test_cohort_normalisation_by_hand() -> None:
    cohort = np.stack([unit(1, 1), unit(1, 0, 1), unit(1, 0, 0, 2), unit(0, 0, 0, 0, 1)])
    sides = []
    for side in (unit(1), unit(1, 0.2)):
        top = np.sort(cohort @ side)[-3:]
        sides.append((float(unit(1) @ unit(1, 0.2)) - top.mean()) / top.std())
    result = score(unit(1), unit(1, 0.2), INFO, cohort)
    assert result.llr == pytest.approx(10 * np.mean(sides) - 5, rel=1e-4)


@pytest.mark.parametrize("cohort", [None, np.stack([unit(1, 1), unit(1, 0, 1), unit(1, 0, 0, 2), unit(0, 1, 1)])])
def test_many_profiles_score_as_each_does_alone(cohort: np.ndarray | None) -> None:
    profiles, test = np.stack([unit(1), unit(0, 1), unit(1, 2, 3)]), unit(1, 0.2)
    together = scores(profiles, test, INFO, cohort)
    alone = [score(profile, test, INFO, cohort) for profile in profiles]
    assert [one.llr for one in together] == pytest.approx([one.llr for one in alone], abs=1e-4)
    assert [one.cosine for one in together] == pytest.approx([one.cosine for one in alone], abs=1e-6)


def test_the_profile_is_the_unit_mean() -> None:
    assert profile_vector(np.stack([unit(1), unit(0, 1)])) == pytest.approx(unit(1, 1), abs=1e-6)


@pytest.mark.parametrize(
    ("llr", "prior", "expected"), [(0.0, 0.5, 0.5), (0.0, 0.01, 0.01), (800.0, 0.5, 1.0), (-800.0, 0.5, 0.0)]
)
def test_probability_applies_the_prior(llr: float, prior: float, expected: float) -> None:
    assert probability(llr, prior) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("quality", "reason"),
    [
        (SpeechQuality(0.0, 0.0, 0.0), Refusal.NO_SPEECH),
        (SpeechQuality(0.2, 20.0, 0.0), Refusal.TOO_SHORT),
        (SpeechQuality(1.0, 1.0, 0.0), Refusal.TOO_NOISY),
        (SpeechQuality(1.0, 20.0, 0.1), Refusal.CLIPPED),
        (GOOD, None),
    ],
)
def test_bad_recordings_are_refused_with_their_reason(quality: SpeechQuality, reason: Refusal | None) -> None:
    assert judge([Candidate(quality, unit(1))], [], INFO, None) == [reason]


def test_another_voice_is_refused_and_the_next_right_one_is_not() -> None:
    offered = [Candidate(GOOD, unit(*values)) for values in ((1, 0.1), (-1,), (1, 0.2))]
    assert judge(offered, [unit(1)], INFO, None) == [None, Refusal.DIFFERENT_SPEAKER, None]


def test_the_first_clip_cannot_contradict_anything() -> None:
    assert judge([Candidate(GOOD, unit(-1))], [], INFO, None) == [None]


@pytest.fixture
def store(database_url: str) -> Iterator[ProfileStore]:
    opened = ProfileStore(database_url)
    yield opened
    opened.close()


@pytest.fixture
def file_store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(f"sqlite:///{tmp_path}/profiles.sqlite3")


def test_what_is_added_is_found_again_after_reopening(database_url: str) -> None:
    first = ProfileStore(database_url)
    first.add("t", "ada", [enrolment(1, speech_s=1.5), enrolment(0, 1, speech_s=0.5)])
    first.close()
    second = ProfileStore(database_url)
    profile = second.get("t", "ada")
    second.close()
    assert profile is not None
    assert profile.speech_s == pytest.approx(2.0)
    assert profile.enrolments[1].embedding == pytest.approx(unit(0, 1))


def test_tenants_do_not_see_each_other(store: ProfileStore) -> None:
    store.add("one", "ada", [enrolment(1)])
    assert store.get("two", "ada") is None
    assert store.list("two", after="", limit=10) == []
    assert store.delete("two", "ada") is False


def test_the_named_are_found_in_order_and_only_ones_own(store: ProfileStore) -> None:
    for tenant, name in (("t", "bob"), ("t", "ada"), ("u", "eve")):
        store.add(tenant, name, [enrolment(1)])
    assert [one.speaker_id for one in store.named("t", ["bob", "eve", "ada", "nobody"])] == ["ada", "bob"]


def test_listing_goes_on_after_the_last_id(store: ProfileStore) -> None:
    for name in ("carol", "ada", "bob"):
        store.add("t", name, [enrolment(1)])
    assert [profile.speaker_id for profile in store.list("t", after="ada", limit=1)] == ["bob"]


def test_after_deletion_no_byte_of_the_embedding_is_left_on_disk(file_store: ProfileStore, tmp_path: Path) -> None:
    secret = unit(0.123, 0.456, 0.789).astype("<f4").tobytes()
    for index in range(50):
        file_store.add("t", f"other{index}", [enrolment(1)])
    file_store.add("t", "secret-speaker", [enrolment(0.123, 0.456, 0.789)] * 5)
    assert any(secret in path.read_bytes() for path in tmp_path.iterdir())
    assert file_store.delete("t", "secret-speaker") is True
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert secret not in content
        assert b"secret-speaker" not in content


def test_bytes_that_a_long_reader_kept_on_disk_go_with_the_next_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BUSY_TIMEOUT_MS", 10)
    store = ProfileStore(f"sqlite:///{tmp_path}/profiles.sqlite3")
    store.add("t", "secret-speaker", [enrolment(0.123, 0.456, 0.789)])
    backup = sqlite3.connect(tmp_path / "profiles.sqlite3", isolation_level=None)
    backup.execute("BEGIN")
    backup.execute("SELECT * FROM speakers").fetchall()
    assert store.delete("t", "secret-speaker") is True
    assert any(b"secret-speaker" in path.read_bytes() for path in tmp_path.iterdir())
    backup.close()
    store.add("t", "ada", [enrolment(1)])
    assert not any(b"secret-speaker" in path.read_bytes() for path in tmp_path.iterdir())


def test_first_enrolments_at_once_end_in_one_profile(store: ProfileStore) -> None:
    threads = [threading.Thread(target=lambda: store.add("t", "ada", [enrolment(1)])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    profile = store.get("t", "ada")
    assert profile is not None
    assert len(profile.enrolments) == 8


def test_writers_of_one_file_wait_in_a_queue_and_not_for_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [ProfileStore(f"sqlite:///{tmp_path}/profiles.sqlite3") for _ in range(2)]
    for opened in stores:
        opened.close()
    monkeypatch.setattr(connections, "BUSY_TIMEOUT_MS", 0)
    failed = list[StorageUnavailableError]()

    def add(opened: ProfileStore, name: str) -> None:
        try:
            for _ in range(5):
                opened.add("t", name, [enrolment(1)])
                opened.delete("t", name)
                opened.add("t", name, [enrolment(1)])
        except StorageUnavailableError as error:
            failed.append(error)

    threads = [threading.Thread(target=add, args=(stores[one % 2], f"s{one}")) for one in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert stores[0].ids("t") == {f"s{one}" for one in range(6)}


def test_a_writer_whose_turn_does_not_come_is_refused_and_changes_nothing(
    file_store: ProfileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN_TIMEOUT_S", 0.01)
    with turns.TURNS[f"{tmp_path}/profiles.sqlite3"](), pytest.raises(StorageUnavailableError):
        file_store.add("t", "ada", [enrolment(1)])
    assert file_store.get("t", "ada") is None
    file_store.add("t", "ada", [enrolment(1)])
    assert file_store.count("t") == 1


def test_clips_are_judged_against_the_profile_that_they_join(store: ProfileStore) -> None:
    """Of many that come at once, each sees those before it."""
    together = threading.Barrier(6)

    def only_the_first(before: Profile | None) -> list[Enrolment]:
        return [] if before else [enrolment(1)]

    def enrol() -> None:
        together.wait()
        profile = store.enrol("t", "ada", only_the_first)
        assert profile is not None

    threads = [threading.Thread(target=enrol) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    profile = store.get("t", "ada")
    assert profile is not None
    assert len(profile.enrolments) == 1


def test_where_no_clip_is_taken_nothing_changes(store: ProfileStore) -> None:
    before = store.revision("t")
    assert store.enrol("t", "ada", lambda _: []) is None
    assert store.ids("t") == set()
    assert store.revision("t") == before


def test_the_schema_is_stamped_with_its_revision(file_store: ProfileStore, tmp_path: Path) -> None:
    file_store.ping()
    with sqlite3.connect(tmp_path / "profiles.sqlite3") as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    connection.close()
    assert revision == "0003"


def test_a_database_of_a_newer_version_is_refused_by_name(file_store: ProfileStore, tmp_path: Path) -> None:
    file_store.close()
    with sqlite3.connect(tmp_path / "profiles.sqlite3") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(StorageUnavailableError, match="newer version \\(9999\\)"):
        ProfileStore(f"sqlite:///{tmp_path}/profiles.sqlite3")


def test_a_database_that_cannot_be_written_is_a_typed_error(file_store: ProfileStore, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "profiles.sqlite3") as connection:
        connection.execute("DROP TABLE enrolments")
    connection.close()
    with pytest.raises(StorageUnavailableError) as failed:
        file_store.add("t", "ada", [enrolment(1)])
    assert failed.value.retry_after_s == pytest.approx(2.0)
