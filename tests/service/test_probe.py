"""Who takes which core."""

from __future__ import annotations

import pytest

from service.probe import standby


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
