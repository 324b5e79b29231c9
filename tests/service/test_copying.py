"""Profiles go from database to database whole, or not at all."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from service.cli import app
from service.speakers import copying
from service.speakers.copying import CopyError, copy_profiles, url_of
from service.speakers.store import Enrolment, ProfileStore

DIM = 8
RNG = np.random.default_rng(31)


def clip() -> Enrolment:
    vector = RNG.standard_normal(DIM).astype(np.float32)
    return Enrolment("m", 1, vector / np.linalg.norm(vector), 2.5, 20.0)


def filled(url: str) -> ProfileStore:
    """Five speakers of two tenants, some with two clips, one of them gone again."""
    store = ProfileStore(url)
    for tenant, name, clips in (("t", "ada", 2), ("t", "bob", 1), ("u", "ada", 1), ("u", "eve", 2), ("u", "gone", 1)):
        store.add(tenant, name, [clip() for _ in range(clips)])
    store.delete("u", "gone")
    store.claim(("m", 1), np.eye(DIM, dtype=np.float32)[0])
    return store


def everything(store: ProfileStore) -> list[object]:
    found: list[object] = [store.claim(("m", 1), np.zeros(DIM, dtype=np.float32)).tolist()]
    for tenant in ("t", "u"):
        found.append(store.revision(tenant))
        for one in store.list(tenant, after="", limit=10):
            entries = [(entry.embedding.tolist(), entry.speech_s, entry.snr_db) for entry in one.enrolments]
            found.append((one.speaker_id, one.created_at, one.updated_at, entries))
    return found


@pytest.mark.parametrize("back", [False, True], ids=["there", "and back"])
def test_everything_arrives_as_it_was(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    monkeypatch.setattr(copying, "PAGE", 2)
    other = f"sqlite:///{tmp_path}/other.sqlite3"
    source, destination = (database_url, other) if back else (other, database_url)
    before = filled(source)
    wanted = everything(before)
    assert copy_profiles(make_url(source), make_url(destination)) == 4
    after = ProfileStore(destination)
    assert everything(after) == wanted
    assert everything(before) == wanted
    # Numbers go on where they ended.
    after.add("t", "new", [clip()])
    assert after.ids("t") == {"ada", "bob", "new"}
    before.close()
    after.close()


def test_times_of_any_zone_are_kept() -> None:
    moment, theirs = datetime(2026, 11, 23, 12, tzinfo=UTC), timezone(timedelta(hours=2))
    assert copying._in_utc(moment.astimezone(theirs)) == moment
    assert copying._in_utc(moment.astimezone(theirs)).utcoffset() == timedelta(0)
    assert copying._in_utc(moment.replace(tzinfo=None)) == moment


def test_a_destination_with_speakers_keeps_them_and_takes_none(database_url: str, tmp_path: Path) -> None:
    source = f"sqlite:///{tmp_path}/other.sqlite3"
    filled(source).close()
    taken = ProfileStore(database_url)
    taken.add("t", "zoe", [clip()])
    with pytest.raises(CopyError, match="has speakers already"):
        copy_profiles(make_url(source), make_url(database_url))
    assert taken.ids("t") == {"zoe"}
    taken.close()


def test_what_breaks_off_leaves_nothing_behind(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"sqlite:///{tmp_path}/other.sqlite3"
    filled(source).close()

    def breaks(*_: object) -> object:
        raise CopyError("pulled the plug")

    with monkeypatch.context() as patched:
        patched.setattr(copying, "_in_utc", breaks)
        with pytest.raises(CopyError, match="plug"):
            copy_profiles(make_url(source), make_url(database_url))
    assert copy_profiles(make_url(source), make_url(database_url)) == 4


def test_sources_that_are_none(tmp_path: Path) -> None:
    to = url_of(str(tmp_path / "to.sqlite3"))
    with pytest.raises(CopyError, match="there is no file"):
        copy_profiles(url_of(str(tmp_path / "nothing.sqlite3")), to)
    with pytest.raises(CopyError, match="one database"):
        copy_profiles(to, to)
    with pytest.raises(CopyError, match="no URL"):
        url_of("://")
    old = tmp_path / "old.sqlite3"
    with sqlite3.connect(old) as connection:
        connection.execute("CREATE TABLE speakers (id INTEGER)")
    connection.close()
    with pytest.raises(CopyError, match="of version None"):
        copy_profiles(url_of(str(old)), to)


def test_the_command_backs_up_what_the_service_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, backup = tmp_path / "profiles.sqlite3", tmp_path / "backup.sqlite3"
    filled(f"sqlite:///{file}").close()
    done = CliRunner().invoke(app, ["profiles", "copy", str(file), str(backup)])
    assert done.exit_code == 0, done.output
    assert done.output.endswith("backup.sqlite3: 4\n")
    monkeypatch.setenv("SOTTO_DATA_DIR", str(tmp_path / "fresh"))
    done = CliRunner().invoke(app, ["profiles", "copy", str(backup)])
    assert done.exit_code == 0, done.output
    restored = ProfileStore(f"sqlite:///{tmp_path}/fresh/profiles.sqlite3")
    assert restored.ids("u") == {"ada", "eve"}
    restored.close()
    again = CliRunner().invoke(app, ["profiles", "copy", str(backup)])
    assert (again.exit_code, "has speakers already" in again.output) == (1, True)
