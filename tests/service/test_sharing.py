"""Who shares a call of the batcher: as many as an item says, until the queue is long; and who goes first on a core."""

from __future__ import annotations

import asyncio
import os
import sys
import time

import pytest

from service import batching
from tests.service.batchers import Gate, batcher, entered, queued, submit


def test_an_item_says_how_many_share_its_call() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate, max_batch=3) as (made, observer):
            tasks = [submit(made, 10.0)]
            await entered(gate)
            tasks += [submit(made, 11.0 + index, most=most) for index, most in enumerate((1, 1, 2, 2, 9, 9, 9, 9))]
            await queued(observer, 8)
            gate.open.set()
            await asyncio.gather(*tasks)
        return gate.calls

    # No more than all may be, however many one asks for.
    assert asyncio.run(main()) == [[10.0], [11.0], [12.0], [13.0, 14.0], [15.0, 16.0, 17.0], [18.0]]


@pytest.mark.parametrize(("waited_s", "calls"), [(0.9, [1, 1, 1]), (1.1, [3])])
def test_items_that_have_waited_long_share_calls_whatever_they_said(waited_s: float, calls: list[int]) -> None:
    async def main() -> list[int]:
        gate, now = Gate(), 0.0
        with batcher(gate, max_batch=3, clock=lambda: now) as (made, observer):
            tasks = [submit(made, 10.0)]
            await entered(gate)
            tasks += [submit(made, 11.0 + index, most=1) for index in range(3)]
            await queued(observer, 3)
            now = waited_s * batching.BEHIND_S
            gate.open.set()
            await asyncio.gather(*tasks)
        return [len(call) for call in gate.calls[1:]]

    assert asyncio.run(main()) == calls


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux alone")
def test_workers_give_way_to_the_event_loop() -> None:
    def niceness(items: list[float]) -> list[float]:
        return [float(os.getpriority(os.PRIO_PROCESS, 0))] * len(items)

    async def main() -> float:
        with batcher(niceness) as (made, _):
            return await submit(made, 1.0)

    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert asyncio.run(main()) == min(19, own + batching.NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_an_item_that_goes_alone_waits_for_no_one_on_standby() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate, workers=2, standby=1, max_batch=3, clock=lambda: 0.0) as (made, _):
            tasks = [submit(made, 1.0, most=1)]
            await entered(gate)
            tasks.append(submit(made, 1.1, most=1))
            await entered(gate)
            gate.open.set()
            await asyncio.gather(*tasks)
        return gate.calls

    assert asyncio.run(asyncio.wait_for(main(), 20)) == [[1.0], [1.1]]


def test_a_stall_in_the_first_call_after_a_move_turns_nobody_away() -> None:
    takes_s = 0.01

    def call(items: list[float]) -> list[float]:
        time.sleep(takes_s)
        return [item * 10 for item in items]

    async def main() -> list[float]:
        nonlocal takes_s
        with batcher(call) as (made, _):
            await submit(made, 1.0, group="before")
            made.forget(lambda group: group == "before")
            takes_s = 0.5
            await submit(made, 1.0, group="after")
            takes_s = 0.05
            running = submit(made, 1.0, group="after")
            await asyncio.sleep(0.02)
            # By what the stall took, four that share a call would take two seconds.
            return await asyncio.gather(running, submit(made, 1.0, time.monotonic() + 1.0, group="after"))

    assert asyncio.run(asyncio.wait_for(main(), 20)) == [10.0, 10.0]
