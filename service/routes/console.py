"""`GET /`: the web page from which the service can be tried, with a microphone. It asks what everybody may ask."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

from service.errors import NotFoundError

FOLDER = Path(__file__).parents[1] / "console"
PAGE, PARTS = "index.html", ("console.css", "console.js", "recorder.js")
# Nothing from elsewhere, nothing inline, and in no other page's frame: it may hold an API key.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cache-Control": "no-cache",
}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

router = APIRouter(include_in_schema=False)


@router.head("/")
@router.get("/")
async def page() -> Response:
    return _file(PAGE)


@router.get("/console/{name}")
async def part(name: str) -> Response:
    if name not in PARTS:
        raise NotFoundError(f"no route /console/{name[:200]}")
    return _file(name)


def _file(name: str) -> Response:
    path = FOLDER / name
    return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=HEADERS)
