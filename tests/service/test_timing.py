"""What `Server-Timing` says of a request."""

from __future__ import annotations

import pytest

from service.metrics import Metrics
from service.timing import StageClock


class Now:
    """In place of the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.s = 1000.0
        monkeypatch.setattr("service.timing.time.perf_counter", lambda: self.s)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    return Now(monkeypatch)


def test_what_follows_adds_up(now: Now) -> None:
    clock = StageClock(Metrics())
    for _ in range(3):
        with clock.stage("decode"):
            now.s += 0.5
        now.s += 1.0
        clock.record("inference", 0.25)
    assert clock.header() == "decode;dur=1500.000, inference;dur=750.000"


def test_clips_in_one_call_take_the_time_of_one(now: Now) -> None:
    clock = StageClock(Metrics())
    for _ in range(16):
        now.s += 0.001
        clock.record("inference", 2.0)
    assert clock.durations_s["inference"] == pytest.approx(2.015)


def test_what_overlaps_counts_once(now: Now) -> None:
    clock = StageClock(Metrics())
    clock.record("queue", 1.0)  # from 999 to 1000
    now.s += 2
    clock.record("queue", 1.0)  # from 1001
    now.s += 1
    clock.record("queue", 1.5)  # from 1001.5 to 1003
    assert clock.durations_s["queue"] == pytest.approx(3.0)
    now.s += 1
    clock.record("queue", 10.0)
    assert clock.durations_s["queue"] == pytest.approx(10.0)


def test_the_histogram_has_every_clip(now: Now) -> None:
    metrics = Metrics()
    clock = StageClock(metrics)
    now.s += 1
    clock.record("inference", 0.5)
    clock.record("inference", 0.5)
    labels = {"stage": "inference"}
    assert metrics.registry.get_sample_value("sotto_stage_duration_seconds_count", labels) == 2
    assert metrics.registry.get_sample_value("sotto_stage_duration_seconds_sum", labels) == 1.0
