"""The page at `/`: chat, the router's scores, memory and throughput.

Three files, without a build step, and nothing from elsewhere: it works offline.
"""

import html
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

_TYPES = {"page.js": "text/javascript", "page.css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PATHS = frozenset({"/", *(f"/page/{name}" for name in _TYPES)})
"""What is served without a key; the page asks for one where it is needed."""


def page_routes(root_path: str) -> APIRouter:
    """The page and its files.

    Args:
        root_path: under which a proxy serves them.
    """
    routes = APIRouter(include_in_schema=False)
    here = files(__name__)
    index = here.joinpath("index.html").read_text(encoding="utf-8").replace("{root}", html.escape(root_path))

    @routes.get("/")
    async def page() -> Response:
        return HTMLResponse(index, headers=_HEADERS)

    for name, media_type in _TYPES.items():
        text = here.joinpath(name).read_text(encoding="utf-8")
        routes.add_api_route(f"/page/{name}", _fixed(text, media_type), methods=["GET"])
    return routes


def _fixed(text: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return Response(text, media_type=media_type, headers=_HEADERS)

    return file
