"""Refusals that no application gives: the connection answers by itself."""

from __future__ import annotations

from http import HTTPStatus

from service.errors import OverloadedError, ServiceError, problem_response

RETRY_AFTER_S = 2.0


def too_many() -> OverloadedError:
    return OverloadedError("too many connections are open", retry_after_s=RETRY_AFTER_S)


def in_full(error: ServiceError, path: str, headers: dict[str, str], *, close: bool) -> bytes:
    """The whole response, with these headers beside its own."""
    response = problem_response(error, path)
    response.headers.update(headers)
    if close:
        response.headers["connection"] = "close"
    status = HTTPStatus(error.status)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode()]
    lines += [name + b": " + text for name, text in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])
