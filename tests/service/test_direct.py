"""Requests that skip FastAPI's search for arguments answer as those that do not."""

from __future__ import annotations

import pytest

from tests.conftest import RunningService
from tests.service.asking import ANALYZE, COMPUTER, DETECT, EMBEDDINGS, answer


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (DETECT, "top_k=5"),
        (EMBEDDINGS, "type=speaker&encoding=float"),
        (ANALYZE, "tasks=keywords&tasks=speaker&tasks=embedding"),
    ],
)
def test_defaults_are_the_same_written_out_and_left_out(service: RunningService, path: str, query: str) -> None:
    assert answer(service.post(path, COMPUTER)) == answer(service.post(f"{path}?{query}", COMPUTER))


@pytest.mark.parametrize("query", ["", "?model=sotto-edge"])
def test_a_wrong_path_is_told_with_and_without_a_query(service: RunningService, query: str) -> None:
    refused = service.post(f"/v1/speakers/-/verify{query}", COMPUTER)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert "speaker_id" in refused.json()["detail"]
