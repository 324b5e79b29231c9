"""The streams that are open, and their end."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Gauge

from service.live import LiveStreams

PATIENCE_S = 60.0


def streams() -> LiveStreams:
    return LiveStreams(Gauge("streams", "Of a test.", registry=CollectorRegistry()))


def test_a_stream_that_comes_to_be_while_all_end_is_asked_as_well() -> None:
    async def work() -> list[str]:
        live, told = streams(), []
        accepted = asyncio.Event()

        async def stream(name: str, accepting: asyncio.Event) -> None:
            asked = asyncio.Event()

            def finish() -> None:
                told.append(name)
                asked.set()

            with live.counting():
                await accepting.wait()
                with live.finishing(finish):
                    await asked.wait()

        open_already = asyncio.Event()
        open_already.set()
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            group.create_task(stream("early", open_already))
            group.create_task(stream("late", accepted))
            await asyncio.sleep(0)
            finishing = group.create_task(live.finish(PATIENCE_S))
            await asyncio.sleep(0)
            assert (told, len(live)) == (["early"], 2)
            accepted.set()
            await finishing
            assert len(live) == 0
        return told

    assert asyncio.run(work()) == ["early", "late"]


def test_patience_is_limited() -> None:
    async def work() -> None:
        live = streams()
        with live.counting(), live.finishing(lambda: None):
            async with asyncio.timeout(PATIENCE_S):
                await live.finish(0.05)

    asyncio.run(work())
