"""Waiting no longer than a request's deadline, which is a moment on time.monotonic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from service.errors import DeadlineExceededError

T = TypeVar("T")


def until(deadline: float) -> asyncio.Timeout:
    """Raises TimeoutError in the block once `deadline` passes."""
    return asyncio.timeout(deadline - time.monotonic())


async def within(pool: Executor, work: Callable[[], T], deadline: float) -> T:
    """What `work` returns in a thread of the pool. Work that has not begun by the deadline never does; work that has is
    not waited for. Raises DeadlineExceededError and what `work` does."""
    if time.monotonic() >= deadline:
        raise DeadlineExceededError("the deadline passed before the work began")
    loop = asyncio.get_running_loop()
    try:
        async with until(deadline):
            return await loop.run_in_executor(pool, work)
    except TimeoutError as error:
        raise DeadlineExceededError("the deadline passed") from error
