"""Configuration: typed, closed, silent about secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from service import settings
from service.auth import hash_key, new_key
from service.settings import Settings, available_cpus, is_loopback


def test_the_defaults_listen_on_loopback() -> None:
    settings = Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOTTO_PORT", "9001")
    assert Settings().port == 9001


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOTTO_PROT", "9001")
    with pytest.raises(ValidationError, match="SOTTO_PROT"):
        Settings()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_open_addresses_need_a_key(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("SOTTO_HOST", host)
    with pytest.raises(ValidationError, match="sotto keys new"):
        Settings()
    monkeypatch.setenv("SOTTO_API_KEYS", json.dumps([{"name": "a", "sha256": hash_key("x")}]))
    assert Settings().host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_is_recognised(host: str) -> None:
    assert is_loopback(host)


def test_settings_do_not_print_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hash_key(new_key())
    monkeypatch.setenv("SOTTO_API_KEYS", json.dumps([{"name": "a", "sha256": digest}]))
    monkeypatch.setenv("SOTTO_DATABASE_URL", "postgresql://user:hunter2@db/sotto")
    text = repr(Settings())
    assert digest not in text
    assert "hunter2" not in text


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1


def test_two_keys_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"name": "a", "sha256": hash_key("x")}
    monkeypatch.setenv("SOTTO_API_KEYS", json.dumps([key, key]))
    with pytest.raises(ValidationError, match="share a name"):
        Settings()


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu.max": "what is this\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_a_quota_lowers_the_cpus_that_the_machine_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: int
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(settings, "CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cpus() == cpus
