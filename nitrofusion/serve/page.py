"""The page's files, read once: no request names a path on the disk."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

from .api import REFUSALS, Error

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
TOKEN = "{{token}}"


def routes(token: str) -> APIRouter:
    """The page at ``/`` and its parts.

    Args:
        token: put into the page, which any visitor may then read; "" where visitors have to bring it.
    """
    folder = resources.files(__package__) / "static"
    files = {item.name: item.read_bytes() for item in folder.iterdir() if item.name.endswith(tuple(TYPES))}
    index = files.pop("index.html").replace(TOKEN.encode(), token.encode())
    router = APIRouter()
    errors = {status: {"model": Error, "description": REFUSALS[status]} for status in (400, 403, 414, 431)}

    @router.head("/", include_in_schema=False)
    @router.get("/", response_class=Response, responses=errors)
    async def page() -> Response:
        """The app."""
        return Response(index, media_type=TYPES[".html"])

    @router.head("/static/{name}", include_in_schema=False)
    @router.get("/static/{name}", response_class=Response, responses=errors | {404: {"description": "no such file"}})
    async def part(name: str) -> Response:
        """One of its files."""
        if name not in files:
            return Response("no such file", 404, media_type="text/plain")
        return Response(files[name], media_type=TYPES[name[name.rindex(".") :]])

    return router
