"""Who can be identified, held in memory: always what the database says."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from model_store import Calibration, SpeakerInfo
from service.engine import Engine
from service.speakers import roster
from service.speakers.roster import Found, Rosters, TooManyError, bytes_each
from service.speakers.scoring import scores
from service.speakers.store import Enrolment, Profile, ProfileStore

DIM = 8
LOTS = 2**20
REQUIRED_S = 2.0
RNG = np.random.default_rng(0)
COHORT = RNG.standard_normal((6, DIM)).astype(np.float32)
COHORT /= np.linalg.norm(COHORT, axis=1, keepdims=True)


def model(digest: str = "m", cohort: np.ndarray | None = COHORT) -> Engine:
    info = SpeakerInfo(
        dim=DIM, calibration=Calibration(scale=10.0, offset=-5.0, fitted_on="these tests"), threshold=0.0, cohort_top=3
    )
    bundle = SimpleNamespace(digest=digest)
    return cast(Engine, SimpleNamespace(speaker=info, cohort=cohort, bundle=bundle, space=("m", 1)))


def rosters_of(store: ProfileStore, most_bytes: int = LOTS, **options: Any) -> Rosters:
    return Rosters(store, required_speech_s=REQUIRED_S, most_bytes=most_bytes, **options)


def vector(rng: np.random.Generator) -> np.ndarray:
    drawn = rng.standard_normal(DIM).astype(np.float32)
    return cast(np.ndarray, drawn / np.linalg.norm(drawn))


def clip(rng: np.random.Generator, speech_s: float = 2.0, version: int = 1) -> Enrolment:
    return Enrolment("m", version, vector(rng), speech_s, 20.0)


def usable(profile: Profile) -> bool:
    return profile.speech_s >= REQUIRED_S and {one.model_version for one in profile.enrolments} == {1}


def asked(rosters: Rosters, engine: Engine, test: np.ndarray, top_k: int = 1000, tenant: str = "t") -> Found:
    for _ in range(1000):
        found = rosters.best(tenant, engine, test, top_k)
        if found is not None:
            return found
    raise AssertionError("it never ends")


def expected(store: ProfileStore, engine: Engine, test: np.ndarray, tenant: str = "t") -> tuple[list[Any], int]:
    profiles = store.list(tenant, after="", limit=1000)
    ready = [one for one in profiles if usable(one)]
    if not ready:
        return [], len(profiles)
    vectors = np.stack([roster.vector_of(one) for one in ready])
    found = scores(vectors, test, engine.speaker, engine.cohort)
    listed = [(one.speaker_id, score.llr) for one, score in zip(ready, found, strict=True)]
    return sorted(listed, key=lambda one: (-one[1], one[0])), len(profiles) - len(ready)


def same(found: Found, want: tuple[list[Any], int]) -> None:
    assert [name for name, _ in found.best] == [name for name, _ in want[0]]
    assert [score.llr for _, score in found.best] == pytest.approx([llr for _, llr in want[0]], rel=1e-4, abs=1e-3)
    assert (found.compared, found.skipped) == (len(want[0]), want[1])


@pytest.fixture
def stores(database_url: str) -> Iterator[tuple[ProfileStore, ProfileStore]]:
    """Two processes' on one database."""
    own, other = ProfileStore(database_url), ProfileStore(database_url)
    yield own, other
    own.close()
    other.close()


@pytest.mark.parametrize("page", [1, 3, 500])
@pytest.mark.parametrize("cohort", [None, COHORT], ids=["plain", "cohort"])
def test_whatever_changes_it_is_as_if_read_anew(
    stores: tuple[ProfileStore, ProfileStore], page: int, cohort: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "PAGE", page)
    drawn, rng = random.Random(page), np.random.default_rng(page)
    own, other = stores
    rosters, engine = rosters_of(own), model(cohort=cohort)
    names = [f"s{number}" for number in range(8)]
    for _ in range(60):
        store, name = drawn.choice((own, other)), drawn.choice(names)
        if drawn.random() < 0.4:
            store.delete("t", name)
        else:
            version = 2 if drawn.random() < 0.1 else 1
            store.add("t", name, [clip(rng, drawn.choice((0.5, 2.0)), version) for _ in range(drawn.randint(1, 2))])
        if drawn.random() < 0.5:
            test = vector(rng)
            same(asked(rosters, engine, test), expected(own, engine, test))


def test_only_the_best_are_told_and_equal_ones_by_their_ids(stores: tuple[ProfileStore, ProfileStore]) -> None:
    store, rng = stores[0], np.random.default_rng(3)
    twin = clip(rng)
    for name in ("d", "b", "c"):
        store.add("t", name, [twin])
    store.add("t", "a", [Enrolment("m", 1, -twin.embedding, 2.0, 20.0)])
    rosters = rosters_of(store)
    for top_k, names in ((1, ["b"]), (2, ["b", "c"]), (3, ["b", "c", "d"]), (4, ["b", "c", "d", "a"])):
        found = asked(rosters, model(), twin.embedding, top_k)
        assert ([name for name, _ in found.best], found.compared) == (names, 4)


def test_tenants_and_models_have_their_own(stores: tuple[ProfileStore, ProfileStore]) -> None:
    store, rng = stores[0], np.random.default_rng(4)
    store.add("t", "ada", [clip(rng)])
    store.add("u", "bob", [clip(rng)])
    rosters, test = rosters_of(store), vector(rng)
    for tenant, name in (("t", "ada"), ("u", "bob"), ("t", "ada")):
        for engine in (model("one"), model("two", cohort=None)):
            found = asked(rosters, engine, test, tenant=tenant)
            assert [who for who, _ in found.best] == [name]
            same(found, expected(store, engine, test, tenant))


def test_nobody_is_found_where_nobody_is(stores: tuple[ProfileStore, ProfileStore]) -> None:
    assert asked(rosters_of(stores[0]), model(), vector(RNG)) == Found([], 0, 0)


def test_what_is_unchanged_is_not_read_again(
    stores: tuple[ProfileStore, ProfileStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rng = stores[0], np.random.default_rng(5)
    for number in range(5):
        store.add("t", f"s{number}", [clip(rng)])
    rosters = rosters_of(store)
    asked(rosters, model(), vector(rng))
    read: list[int] = []
    changes = store.changes

    def counted(*args: Any, **options: Any) -> Any:
        found = changes(*args, **options)
        read.append(len(found))
        return found

    monkeypatch.setattr(store, "changes", counted)
    asked(rosters, model(), vector(rng))
    assert read == []
    store.add("t", "s3", [clip(rng)])
    assert asked(rosters, model(), vector(rng)).compared == 5
    assert read == [1]


def test_more_than_fit_are_refused_before_they_are_read(stores: tuple[ProfileStore, ProfileStore]) -> None:
    store, rng = stores[0], np.random.default_rng(6)
    rosters = rosters_of(store, round(3.5 * bytes_each(model())))
    for number in range(3):
        store.add("t", f"s{number}", [clip(rng)])
    assert asked(rosters, model(), vector(rng)).compared == 3
    for _ in range(2):
        store.add("t", f"more{rng.integers(10**9)}", [clip(rng)])
        with pytest.raises(TooManyError):
            asked(rosters, model(), vector(rng))
        assert rosters.memory_bytes == 0


def test_who_was_not_asked_for_makes_room(stores: tuple[ProfileStore, ProfileStore]) -> None:
    store, rng = stores[0], np.random.default_rng(7)
    rosters = rosters_of(store, 5 * bytes_each(model()))
    for tenant in ("t", "u", "v"):
        for number in range(2):
            store.add(tenant, f"s{number}", [clip(rng)])
    for tenant in ("t", "u", "t", "v", "t", "u"):
        assert asked(rosters, model(), vector(rng), tenant=tenant).compared == 2
        assert 0 < rosters.memory_bytes <= 5 * bytes_each(model())


def test_nothing_is_held_that_nobody_uses(stores: tuple[ProfileStore, ProfileStore]) -> None:
    store, rng, now = stores[0], np.random.default_rng(8), [0.0]
    rosters = rosters_of(store, clock=lambda: now[0])
    store.add("t", "ada", [clip(rng)])
    asked(rosters, model(), vector(rng))
    now[0] = roster.UNUSED_S - 1
    rosters.expire()
    assert rosters.memory_bytes > 0
    now[0] = roster.UNUSED_S + 1
    rosters.expire()
    assert rosters.memory_bytes == 0


def test_a_deleted_speaker_is_forgotten_before_anyone_asks(stores: tuple[ProfileStore, ProfileStore]) -> None:
    store, rng = stores[0], np.random.default_rng(9)
    secret = roster.vector_of(store.add("t", "ada", [clip(rng)]))
    rosters = rosters_of(store)
    asked(rosters, model(), vector(rng))
    (held,) = rosters._held.values()

    def holds() -> bool:
        return bool(np.isclose(held.roster._vectors, secret, atol=1e-5).all(axis=1).any())

    assert holds()
    rosters.forget("t", "ada")
    assert not holds()


def test_a_database_from_a_backup_is_read_anew(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(11), tmp_path / "profiles.sqlite3"
    store = ProfileStore(f"sqlite:///{path}")
    store.add("t", "ada", [clip(rng)])
    store.close()
    backup = path.read_bytes()
    store.add("t", "bob", [clip(rng)])
    rosters = rosters_of(store)
    assert asked(rosters, model(), vector(rng)).compared == 2
    store.close()
    for name in ("-wal", "-shm"):
        path.with_name(path.name + name).unlink(missing_ok=True)
    path.write_bytes(backup)
    found = asked(rosters, model(), vector(rng))
    assert [name for name, _ in found.best] == ["ada"]


def test_speakers_of_a_database_from_before_revisions_are_there(database_url: str) -> None:
    rng = np.random.default_rng(12)
    before = ProfileStore(database_url)
    for tenant, name in (("t", "ada"), ("t", "bob"), ("u", "eve")):
        before.add(tenant, name, [clip(rng)])
    with before._writer.begin() as connection:
        for line in (
            "DROP INDEX ix_speakers_tenant_revision",
            "ALTER TABLE speakers DROP COLUMN revision",
            "DROP TABLE revisions",
            "DROP TABLE spaces",
            "UPDATE alembic_version SET version_num = '0001'",
        ):
            connection.exec_driver_sql(line)
    before.close()
    store = ProfileStore(database_url)
    rosters = rosters_of(store)
    assert asked(rosters, model(), vector(rng)).compared == 2
    assert store.delete("t", "ada")
    assert [name for name, _ in asked(rosters, model(), vector(rng)).best] == ["bob"]
    store.close()


def test_asking_while_others_change_ends_in_what_is_there(
    stores: tuple[ProfileStore, ProfileStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "PAGE", 2)
    engine, done, failed = model(), threading.Event(), list[BaseException]()
    kept = [rosters_of(store) for store in stores]

    def change(seed: int) -> None:
        drawn, rng = random.Random(seed), np.random.default_rng(seed)
        for _ in range(20):
            store, name = drawn.choice(stores), f"s{drawn.randrange(6)}"
            if drawn.random() < 0.4:
                store.delete("t", name)
            else:
                store.add("t", name, [clip(rng)])

    def ask(rosters: Rosters) -> None:
        rng = np.random.default_rng(0)
        while not done.is_set():
            rosters.best("t", engine, vector(rng), 3)

    def guarded(work: Callable[[Any], None], argument: Any) -> None:
        try:
            work(argument)
        except BaseException as error:
            failed.append(error)

    asking = [threading.Thread(target=guarded, args=(ask, one)) for one in kept]
    changing = [threading.Thread(target=guarded, args=(change, seed)) for seed in range(4)]
    for thread in asking + changing:
        thread.start()
    for thread in changing:
        thread.join()
    done.set()
    for thread in asking:
        thread.join()
    assert failed == []
    test = vector(np.random.default_rng(1))
    for rosters in kept:
        same(asked(rosters, engine, test), expected(stores[0], engine, test))
