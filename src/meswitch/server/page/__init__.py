"""Pages for people: at `/` chat, the router's scores, memory and throughput; at `/docs` the endpoints.

The first is three files, without a build step. The second is the server's own OpenAPI document, without scripts.
Neither needs anything from elsewhere: they work offline.
"""

import html
from collections.abc import Awaitable, Callable, Iterator, Mapping
from html import escape
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
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

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
:root{color-scheme:light dark}
code{font-family:ui-monospace,monospace}h2{margin-top:2.5rem}table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0;border-top:1px solid #8884}"""


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


def docs_routes(app: FastAPI) -> APIRouter:
    """`/docs`. app: whose endpoints are described."""
    router = APIRouter()

    @router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> str:
        return docs_page(app.openapi())

    return router


def docs_page(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as HTML."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    body = "\n".join(_sections(document))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f'<body><h1>{title}</h1><p>The same for programs: <a href="openapi.json">openapi.json</a></p>{body}'
        "</body></html>"
    )


def _sections(document: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p>"
            content = operation.get("requestBody", {}).get("content", {})
            schema = _resolved(content.get("application/json", {}).get("schema", {}), document)
            rows = list(_rows(schema, document))
            if rows:
                yield f"<table><tr><th>field<th>type<th>default</tr>{''.join(rows)}</table>"


def _rows(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    required = set(schema.get("required", ()))
    for name, field in schema.get("properties", {}).items():
        default = "<b>required</b>" if name in required else f"<code>{escape(repr(field.get('default', '')))}</code>"
        yield f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field, document))}<td>{default}</tr>"


def _resolved(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _type(field: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """A few words on what a field may be."""
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "anyOf" in field:
        kinds = (_type(one, document) for one in field["anyOf"] if one.get("type") != "null")
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return ", ".join(map(repr, field["enum"]))
    if "const" in field:
        return repr(field["const"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), document)}"
    lowest = field.get("minimum", field.get("exclusiveMinimum"))
    limits = f", {lowest} to {field['maximum']}" if lowest is not None and "maximum" in field else ""
    return f"{field.get('type', 'anything')}{limits}"
