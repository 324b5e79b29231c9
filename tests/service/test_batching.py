"""The batcher: idle items go at once, busy ones are grouped, and every item ends in exactly one outcome."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from service import batching
from service.batching import STANDBY_S, Batcher
from service.queueing import (
    AbandonedError,
    ClosedError,
    ExpiredError,
    Limits,
    Priority,
    QueueFullError,
)
from tests.service.batchers import FAR, Gate, Observer, batcher, entered, queued, submit


def test_an_idle_batcher_runs_a_single_item_at_once() -> None:
    async def main() -> tuple[float, list[int]]:
        with batcher(lambda items: [item * 10 for item in items]) as (made, observer):
            return await submit(made, 1.0), observer.batches

    assert asyncio.run(main()) == (10.0, [1])


def test_items_that_arrive_while_busy_run_together() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate) as (made, observer):
            first = submit(made, 1.0)
            await entered(gate)
            others = [submit(made, 1.0 + index / 100) for index in range(3)]
            await queued(observer, 3)
            gate.open.set()
            assert await asyncio.gather(first, *others) == pytest.approx([10.0, 10.0, 10.1, 10.2])
        return gate.calls

    assert asyncio.run(main()) == [[1.0], [1.0, 1.01, 1.02]]


def test_a_worker_on_standby_begins_with_a_full_batch() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate, workers=2, standby=1, max_batch=3, clock=lambda: 0.0) as (made, observer):
            tasks = [submit(made, 1.0)]
            await entered(gate)
            tasks += [submit(made, 1.1), submit(made, 1.2)]
            await queued(observer, 2)
            await asyncio.sleep(5 * STANDBY_S)
            assert gate.calls == [[1.0]], "nothing has waited long by the batcher's clock, which stands still"
            tasks.append(submit(made, 1.3))
            await entered(gate)
            gate.open.set()
            await asyncio.gather(*tasks)
        return gate.calls

    assert asyncio.run(main()) == [[1.0], [1.1, 1.2, 1.3]]


def test_a_worker_on_standby_takes_what_has_waited() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate, workers=2, standby=1) as (made, _):
            tasks = [submit(made, 1.0)]
            await entered(gate)
            tasks.append(submit(made, 1.1))
            # The first call is still held up.
            await entered(gate)
            gate.open.set()
            await asyncio.gather(*tasks)
        return gate.calls

    assert asyncio.run(main()) == [[1.0], [1.1]]


def test_items_that_gather_wait_for_others_and_for_no_longer() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        gate.open.set()
        with batcher(gate, max_batch=3) as (made, observer):
            tasks = [submit(made, 1.0, gather_s=60.0), submit(made, 1.1, gather_s=60.0)]
            await queued(observer, 2)
            await asyncio.sleep(0.05)
            assert gate.calls == []
            await asyncio.gather(*tasks, submit(made, 1.2, gather_s=60.0))
            # Fewer than fill a batch go when the first has waited as long as it said.
            await asyncio.gather(submit(made, 1.3, gather_s=0.05), submit(made, 1.4, gather_s=60.0))
            # What does not gather waits for nothing, and takes along what does.
            await asyncio.gather(submit(made, 1.5, gather_s=60.0), submit(made, 1.6))
        return gate.calls

    assert asyncio.run(asyncio.wait_for(main(), 20)) == [[1.0, 1.1, 1.2], [1.3, 1.4], [1.5, 1.6]]


def test_items_that_gathered_are_not_shared_out() -> None:
    async def main() -> list[int]:
        gate = Gate()
        gate.open.set()
        with batcher(gate, workers=4, standby=1, max_batch=8) as (made, _):
            for count in (8, 6):
                # As the last one fills the batch, or waits no longer.
                tasks = [submit(made, 1.0, gather_s=60.0) for _ in range(count - 1)]
                await asyncio.gather(*tasks, submit(made, 1.0, gather_s=0.0 if count == 8 else 0.05))
        return [len(call) for call in gate.calls]

    assert asyncio.run(asyncio.wait_for(main(), 20)) == [8, 6]


def test_items_of_two_groups_that_are_due_at_once_find_two_workers() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate, workers=2) as (made, _):
            tasks = [submit(made, 1.0, group="one", gather_s=0.05), submit(made, 1.1, group="other", gather_s=0.05)]
            # Neither call returns before both have begun.
            await entered(gate)
            await entered(gate)
            gate.open.set()
            await asyncio.gather(*tasks)
        return sorted(gate.calls)

    assert asyncio.run(main()) == [[1.0], [1.1]]


def test_many_items_find_workers_on_standby_awake() -> None:
    async def main() -> list[float]:
        with batcher(lambda items: [item * 10 for item in items], workers=3, standby=1) as (made, _):
            found: list[float] = []
            for count in (1, 2, 5, 40):
                found += await asyncio.gather(*(submit(made, 1.0 + index / 1000) for index in range(count)))
            return found

    expected = [10 + index / 100 for count in (1, 2, 5, 40) for index in range(count)]
    assert asyncio.run(asyncio.wait_for(main(), 20)) == pytest.approx(expected)


def test_items_of_different_length_are_not_padded_together() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate) as (made, observer):
            tasks = [submit(made, 1.0)]
            await entered(gate)
            for size in (1.0, 8.0, 1.2):
                tasks.append(submit(made, size))
                await queued(observer, len(tasks) - 1)
            gate.open.set()
            await asyncio.gather(*tasks)
        return gate.calls

    assert asyncio.run(main()) == [[1.0], [1.0, 1.2], [8.0]]


@pytest.mark.parametrize(("max_batch", "max_area", "sizes"), [(2, 100.0, [2, 2, 1]), (4, 3.0, [3, 2])])
def test_batches_keep_to_their_limits(max_batch: int, max_area: float, sizes: list[int]) -> None:
    async def main() -> list[int]:
        gate = Gate()
        with batcher(gate, max_batch=max_batch, max_area=max_area) as (made, observer):
            tasks = [submit(made, 1.0)]
            await entered(gate)
            tasks += [submit(made, 1.0) for _ in range(5)]
            await queued(observer, 5)
            gate.open.set()
            await asyncio.gather(*tasks)
        return [len(call) for call in gate.calls[1:]]

    assert asyncio.run(main()) == sizes


def test_results_reach_the_items_they_belong_to() -> None:
    async def main() -> list[float]:
        with batcher(lambda items: [item * 10 for item in items], workers=3) as (made, _):
            return list(await asyncio.gather(*(submit(made, 1.0 + index / 1000) for index in range(300))))

    assert asyncio.run(main()) == pytest.approx([10 + index / 100 for index in range(300)])


def test_an_item_whose_deadline_passes_in_the_queue_is_never_run() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate) as (made, observer):
            first = submit(made, 1.0)
            await entered(gate)
            late = submit(made, 1.1, deadline=time.monotonic() + 0.05)
            await queued(observer, 1)
            await asyncio.sleep(0.06)
            gate.open.set()
            await first
            with pytest.raises(ExpiredError):
                await late
        return gate.calls

    assert asyncio.run(main()) == [[1.0]]


def test_a_cancelled_item_leaves_the_queue() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate) as (made, observer):
            first = submit(made, 1.0)
            await entered(gate)
            gone = submit(made, 1.1)
            await queued(observer, 1)
            gone.cancel()
            await queued(observer, 0)
            gate.open.set()
            await first
        return gate.calls

    assert asyncio.run(main()) == [[1.0]]


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    async def main() -> float:
        gate = Gate()
        with batcher(gate, max_waiting=2.0) as (made, observer):
            tasks = [submit(made, 1.0)]
            await entered(gate)
            tasks += [submit(made, 1.0), submit(made, 1.0)]
            await queued(observer, 2)
            with pytest.raises(QueueFullError) as refused:
                await submit(made, 1.0)
            gate.open.set()
            await asyncio.gather(*tasks)
        return refused.value.retry_after_s

    assert asyncio.run(main()) >= 1.0


def test_work_that_cannot_meet_its_deadline_is_refused_on_arrival() -> None:
    def slow(items: list[float]) -> list[float]:
        time.sleep(0.2)
        return items

    async def main() -> list[BaseException | float]:
        with batcher(slow, max_batch=1) as (made, observer):
            await submit(made, 1.0)
            waiting = [submit(made, 1.0) for _ in range(5)]
            await queued(observer, 4)
            with pytest.raises(QueueFullError):
                await submit(made, 1.0, deadline=time.monotonic() + 0.1)
            return list(await asyncio.gather(*waiting))

    assert asyncio.run(main()) == [1.0] * 5


def test_whoever_is_alone_is_run_whatever_was_learnt() -> None:
    """A first call that a stopped process made slow must not refuse all others for ever."""
    delays = iter([0.2, 0.0])

    def call(items: list[float]) -> list[float]:
        time.sleep(next(delays))
        return items

    async def main() -> list[float]:
        with batcher(call, max_batch=8) as (made, _):
            first = await made.submit(1.0, size=0.1, deadline=FAR)
            # By what was learnt it would take 8 times 8 seconds.
            second = await made.submit(2.0, size=4.0, deadline=time.monotonic() + 1.0)
            return [first.value, second.value]

    assert asyncio.run(main()) == [1.0, 2.0]


def test_what_a_worker_has_answered_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    delays = iter([0.2, 0.0])

    def call(items: list[float]) -> list[float]:
        time.sleep(next(delays))
        return items

    async def main() -> list[float]:
        with batcher(call, max_batch=8) as (made, _):
            finish_all = batching.finish_all

            def finish_and_linger(outcomes: Any) -> None:
                finish_all(outcomes)
                time.sleep(0.2)

            monkeypatch.setattr(batching, "finish_all", finish_and_linger)
            first = await made.submit(1.0, size=0.1, deadline=FAR)
            second = await made.submit(2.0, size=4.0, deadline=time.monotonic() + 1.0)
            return [first.value, second.value]

    assert asyncio.run(main()) == [1.0, 2.0]


def test_one_slow_call_moves_the_estimate_little() -> None:
    with batcher(lambda items: items) as (made, _):
        for group, seconds in (("a", 0.01), ("a", 10.0), ("b", 10.0)):
            made._learn_speed(group, seconds, 1.0)
        assert made._rate("a") == pytest.approx(0.01 + 0.1 * 0.03)
        assert made._rate("b") == pytest.approx(4 * made._rate("a"))


def test_close_finishes_what_is_queued_and_refuses_the_rest() -> None:
    async def main() -> list[float]:
        made: Batcher[float, float] = Batcher(
            lambda items: items, workers=2, limits=Limits(4, 100, 1000), observer=Observer()
        )
        tasks = [submit(made, 1.0) for _ in range(50)]
        await asyncio.sleep(0)
        await asyncio.to_thread(made.close, 10)
        with pytest.raises(ClosedError):
            await submit(made, 1.0)
        return list(await asyncio.gather(*tasks))

    assert asyncio.run(main()) == [1.0] * 50


def test_what_nobody_waits_for_is_not_computed() -> None:
    async def main() -> tuple[list[list[float]], list[str]]:
        gate, gone = Gate(), []
        with batcher(gate) as (made, observer):
            first = submit(made, 1.0)
            await entered(gate)
            left = asyncio.ensure_future(made.submit(2.0, size=2.0, deadline=FAR, abandoned=lambda: bool(gone)))
            waits = submit(made, 3.0)
            await queued(observer, 2)
            gone.append(True)
            gate.open.set()
            with pytest.raises(AbandonedError):
                await left
            await asyncio.gather(first, waits)
        return gate.calls, observer.drops

    assert asyncio.run(main()) == ([[1.0], [3.0]], ["abandoned"])


def test_groups_do_not_share_a_call() -> None:
    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate) as (made, observer):
            tasks = [submit(made, 1.0)]
            await entered(gate)
            tasks += [submit(made, 1.0 + index / 100, group=index % 2) for index in range(4)]
            await queued(observer, 4)
            gate.open.set()
            await asyncio.gather(*tasks)
        return gate.calls

    assert asyncio.run(main()) == [[1.0], [1.0, 1.02], [1.01, 1.03]]


def test_an_urgent_item_goes_before_one_that_came_a_little_earlier_and_not_before_one_that_waited() -> None:
    now = [0.0]

    async def main() -> list[list[float]]:
        gate = Gate()
        with batcher(gate, max_batch=1, clock=lambda: now[0]) as (made, observer):
            tasks = [submit(made, 1.0)]
            await entered(gate)
            for at, item, priority in (
                (0.0, 2.0, Priority.BULK),
                (0.5, 3.0, Priority.CLIP),
                (0.55, 4.0, Priority.STREAM),
            ):
                now[0] = at
                tasks.append(submit(made, item, priority=priority))
                await queued(observer, len(tasks) - 1)
            now[0] = Priority.BULK.value
            tasks.append(submit(made, 5.0, priority=Priority.STREAM))
            await queued(observer, 4)
            gate.open.set()
            await asyncio.gather(*tasks)
        return gate.calls

    assert asyncio.run(main()) == [[1.0], [4.0], [3.0], [2.0], [5.0]]
