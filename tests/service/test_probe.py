"""Who takes which core."""

from __future__ import annotations

import pytest

from service import probe
from service.probe import choose_threads, standby


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

    class Graph:
        def __init__(self, threads: int) -> None:
            self.threads = threads

        def run(self, *_: object) -> None:
            pass

    monkeypatch.setattr(probe, "open_session", lambda _, threads: Graph(threads))
    monkeypatch.setattr(probe, "calls_per_s", lambda graph, _, callers, __: rates[callers, graph.threads])
    found = choose_threads(b"a graph", 4)
    assert (found.callers, found.intra_op) == chosen
    assert found.rates == rates
