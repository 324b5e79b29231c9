"""Who takes which core."""

from __future__ import annotations

import pytest

from service import probe
from service.probe import Threads, choose_threads, clips_a_call, standby


@pytest.mark.parametrize(
    ("callers", "intra_op", "cpus", "late"),
    [
        (1, 1, 1, 0),
        (2, 1, 2, 1),
        (1, 2, 2, 0),
        (1, 1, 2, 0),
        (8, 1, 8, 1),
        (4, 1, 8, 0),
        (2, 2, 4, 1),
        (8, 1, 4, 5),
        (3, 1, 1, 2),
    ],
)
def test_callers_that_leave_the_event_loop_no_core_begin_late(
    callers: int, intra_op: int, cpus: int, late: int
) -> None:
    assert standby(callers, intra_op, cpus) == late


class Graph:
    def __init__(self, threads: int) -> None:
        self.threads = threads

    def run(self, *_: object) -> None:
        pass


def test_one_cpu_needs_no_probe() -> None:
    chosen = choose_threads(b"no graph", 1)
    assert (chosen.callers, chosen.intra_op, chosen.rates) == (1, 1, {})


@pytest.mark.parametrize(
    ("alone", "one_of_all", "chosen"),
    [
        (50.0, 60.0, (4, 1)),
        (50.0, 109.0, (4, 1)),
        (50.0, 111.0, (1, 4)),
        (111.0, 50.0, (1, 1)),
        (112.0, 113.0, (1, 4)),
    ],
)
def test_calls_run_side_by_side_unless_another_way_is_clearly_better(
    monkeypatch: pytest.MonkeyPatch, alone: float, one_of_all: float, chosen: tuple[int, int]
) -> None:
    rates = {(4, 1): 100.0, (1, 1): alone, (1, 4): one_of_all}

    monkeypatch.setattr(probe, "open_clips", lambda _, threads: Graph(threads))
    monkeypatch.setattr(probe, "calls_per_s", lambda graph, _, callers, __: rates[callers, graph.threads])
    found = choose_threads(b"a graph", 4)
    assert (found.callers, found.intra_op) == chosen
    assert found.rates == rates


@pytest.mark.parametrize(("calls_of_eight", "chosen"), [(9.9, 1), (10.1, 4), (18.7, 4), (18.8, 8), (100.0, 8)])
def test_clips_share_a_call_where_that_is_worth_waiting_for(
    monkeypatch: pytest.MonkeyPatch, calls_of_eight: float, chosen: int
) -> None:
    rates = {1: 100.0, 8: calls_of_eight}
    asked: list[tuple[int, int]] = []

    def calls_per_s(_: object, feeds: probe.Feeds, callers: int, __: float) -> float:
        count = len(feeds["waveform"])
        asked.append((count, callers))
        return rates[count]

    monkeypatch.setattr(probe, "open_clips", lambda *_, **__: Graph(1))
    monkeypatch.setattr(probe, "calls_per_s", calls_per_s)
    assert clips_a_call(b"a graph", Threads(4, 1, {}), 8) == chosen
    # In turns, so that what slows the machine slows both.
    assert asked == [(1, 4), (8, 4)] * probe.ROUNDS


def test_few_share_a_call_only_where_so_many_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "open_clips", lambda *_, **__: Graph(1))
    # As many clips a second, however many share a call.
    monkeypatch.setattr(probe, "calls_per_s", lambda _, feeds, *__: 100.0 / len(feeds["waveform"]))
    assert clips_a_call(b"a graph", Threads(4, 1, {}), 2) == 2
    assert clips_a_call(b"a graph", Threads(4, 1, {}), 3) == 3


def test_where_one_clip_is_all_a_call_may_have_nothing_is_asked() -> None:
    assert clips_a_call(b"no graph", Threads(2, 1, {}), 1) == 1
