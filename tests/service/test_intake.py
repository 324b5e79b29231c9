"""How a body is read, below HTTP."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager

import pytest
from starlette.requests import Request

from service import intake
from service.intake import WHOLE, read_body


@pytest.mark.parametrize(("whole", "timers"), [(True, 0), (False, 1)])
def test_only_a_body_that_is_not_here_yet_needs_a_timer(
    monkeypatch: pytest.MonkeyPatch, whole: bool, timers: int
) -> None:
    set_up: list[float] = []

    def until(deadline: float) -> AbstractAsyncContextManager[object]:
        set_up.append(deadline)
        return asyncio.timeout(None)

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"whole", "more_body": False}

    monkeypatch.setattr(intake, "until", until)
    scope = {"type": "http", "method": "POST", "headers": [], "state": {WHOLE: lambda: whole}}
    assert asyncio.run(read_body(Request(scope, receive), 5, time.monotonic() + 60)) == b"whole"
    assert len(set_up) == timers
