"""`GET /docs` and `GET /redoc`: the OpenAPI document to read and to try. FastAPI's own pages load their scripts from a
CDN, which a closed network does not reach and which learns who looks; these come with the package fastapi-offline.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html

from service.errors import NotFoundError

TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
    "favicon.png": "image/png",
}
# Nothing from elsewhere. Both pages begin with a script of their own, both style what they draw, and ReDoc searches in
# a worker that it makes.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' data:; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# Relative, so that they hold behind a prefix as well.
DOCUMENT, PARTS = "openapi.json", "docs"

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def swagger() -> Response:
    page = get_swagger_ui_html(
        openapi_url=DOCUMENT,
        title="sotto",
        swagger_js_url=f"{PARTS}/swagger-ui-bundle.js",
        swagger_css_url=f"{PARTS}/swagger-ui.css",
        swagger_favicon_url=f"{PARTS}/favicon.png",
    )
    page.headers.update(HEADERS)
    return page


@router.get("/redoc")
async def redoc() -> Response:
    page = get_redoc_html(
        openapi_url=DOCUMENT,
        title="sotto",
        redoc_js_url=f"{PARTS}/redoc.standalone.js",
        redoc_favicon_url=f"{PARTS}/favicon.png",
        with_google_fonts=False,
    )
    page.headers.update(HEADERS)
    return page


@router.get("/docs/{name}")
def part(name: str) -> Response:
    if name not in TYPES:
        raise NotFoundError(f"no route /docs/{name[:200]}")
    content = files("fastapi_offline").joinpath("static", name).read_bytes()
    kept = {"Cache-Control": "public, max-age=86400", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=TYPES[name], headers=kept)
