"""What FastAPI would tell of requests by itself."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from opentelemetry import trace

from service.app import create_app
from service.settings import Settings


def asked_of(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a tracer is asked for, where an operator has set traces up, while one request is answered."""
    asked: list[object] = []

    class Provider(trace.TracerProvider):
        def get_tracer(self, *arguments: object, **options: object) -> trace.Tracer:
            asked.append((arguments, options))
            return trace.NoOpTracer()

    monkeypatch.setattr(trace, "get_tracer_provider", Provider)

    async def ask() -> None:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as client:
            await client.get("/nowhere/who-speaks")

    asyncio.run(ask())
    return len(asked)


def test_no_trace_is_made_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths hold who speaks."""
    assert asked_of(FastAPI(), monkeypatch) > 0, "the test would see none"
    assert asked_of(create_app(Settings()), monkeypatch) == 0
