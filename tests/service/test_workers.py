"""Workers whose calls fail, die or hang: what they took is answered, and others take their place."""

from __future__ import annotations

import asyncio

import pytest

from service.batching import FAILING_CALLS, MOST_STUCK, UNREADY_S, Batcher
from service.queueing import (
    CallFailedError,
    ClosedError,
    Limits,
)
from tests.service.batchers import Gate, Observer, batcher, entered, submit


def test_a_failing_call_fails_its_items_and_no_others() -> None:
    def call(items: list[float]) -> list[float]:
        if 2.0 in items:
            raise ValueError("boom")
        return items

    async def main() -> tuple[float, list[str]]:
        with batcher(call) as (made, observer):
            with pytest.raises(CallFailedError):
                await submit(made, 2.0)
            return await submit(made, 1.0), observer.failures

    assert asyncio.run(main()) == (1.0, ["call"])


def test_calls_that_fail_one_after_another_show_for_a_while_or_until_one_succeeds() -> None:
    now = [0.0]

    def call(items: list[float]) -> list[float]:
        if 2.0 in items:
            raise ValueError("boom")
        return items

    async def main() -> tuple[list[bool], list[bool]]:
        alive = []
        with batcher(call, clock=lambda: now[0]) as (made, _):

            async def fail() -> bool:
                with pytest.raises(CallFailedError):
                    await submit(made, 2.0)
                return made.alive

            failing = [await fail() for _ in range(FAILING_CALLS)]
            await submit(made, 1.0)
            alive.append(made.alive)
            # Counted anew.
            failing += [await fail() for _ in range(FAILING_CALLS)]
            now[0] += UNREADY_S
            alive.append(made.alive)
            failing.append(await fail())
        return failing, alive

    in_a_row = [True] * (FAILING_CALLS - 1) + [False]
    assert asyncio.run(main()) == ([*in_a_row, *in_a_row, False], [True, True])


def test_a_call_that_returns_too_few_results_fails_instead_of_hanging() -> None:
    async def main() -> None:
        with batcher(lambda items: items[1:]) as (made, _):
            await submit(made, 1.0)

    with pytest.raises(CallFailedError):
        asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_worker_fails_what_it_held_and_is_replaced() -> None:
    def call(items: list[float]) -> list[float]:
        if 2.0 in items:
            raise SystemExit
        return items

    async def main() -> tuple[float, list[str], bool]:
        with batcher(call) as (made, observer):
            with pytest.raises(CallFailedError):
                await submit(made, 2.0)
            value = await submit(made, 1.0)
            return value, observer.failures, made.alive

    # Not ready for a while, so that a probe sees it.
    assert asyncio.run(main()) == (1.0, ["restart"], False)


def test_a_call_that_hangs_fails_what_it_took_and_others_are_served() -> None:
    now = [0.0]

    async def main() -> tuple[list[str], list[bool]]:
        gate = Gate()
        with batcher(gate, clock=lambda: now[0], hang_s=30.0) as (made, observer):
            hanging = submit(made, 1.0)
            await entered(gate)
            now[0] = 31.0
            unready = not made.alive
            with pytest.raises(CallFailedError, match="hung"):
                await hanging
            after = submit(made, 2.0)
            # By another thread: the first is still in its call.
            await entered(gate)
            shown = not made.alive
            gate.open.set()
            assert await after == 20.0
            now[0] += UNREADY_S
            return observer.failures, [unready, shown, made.alive]

    # Not ready for long enough that a probe sees it.
    assert asyncio.run(main()) == (["hang"], [True, True, True])


def test_too_many_hanging_threads_are_beyond_repair() -> None:
    now = [0.0]

    async def main() -> tuple[list[bool], list[str]]:
        gate = Gate()
        seen = []
        with batcher(gate, clock=lambda: now[0], hang_s=30.0) as (made, observer):
            for _ in range(MOST_STUCK):
                seen.append(made.beyond_repair)
                hanging = submit(made, 1.0)
                await entered(gate)
                now[0] += 31.0
                with pytest.raises(CallFailedError):
                    await hanging
            seen.append(made.beyond_repair)
            gate.open.set()
        return seen, observer.failures

    assert asyncio.run(main()) == ([False] * MOST_STUCK + [True], ["hang"] * MOST_STUCK)


def test_close_answers_what_a_stuck_worker_keeps_waiting() -> None:
    async def main() -> None:
        gate = Gate()
        made: Batcher[float, float] = Batcher(gate, workers=1, limits=Limits(1, 100, 1000), observer=Observer())
        stuck = submit(made, 1.0)
        await entered(gate)
        waiting = submit(made, 1.0)
        await asyncio.sleep(0)
        await asyncio.to_thread(made.close, 0.1)
        for task in (waiting, stuck):
            with pytest.raises(ClosedError):
                await task
        gate.open.set()

    asyncio.run(main())
