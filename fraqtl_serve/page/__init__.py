"""The live page at `/plugins/fraqtl/`: static files, open to all; its data comes from routes that ask for the key."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parent
SUFFIXES = {".css", ".js", ".svg"}
INDEX = "index.html"
FILES = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.suffix in SUFFIXES}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # a browser asks each time whether its copy is still the server's
}

router = APIRouter(prefix="/plugins/fraqtl", include_in_schema=False)
_static = StaticFiles(directory=FOLDER)  # called, not mounted: a mount under --root-path finds nothing


async def _answer(name: str, request: Request) -> Response:
    response = await _static.get_response(name, request.scope)
    response.headers.update(HEADERS)
    return response


@router.api_route("", methods=["GET", "HEAD"])
async def without_slash() -> Response:
    """The page's addresses are relative to the one with the slash; so is this one, for proxies' sake."""
    return RedirectResponse("fraqtl/", headers=HEADERS)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    return await _answer(INDEX, request)


@router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
async def file(request: Request, name: str) -> Response:
    if name not in FILES:
        raise HTTPException(404, "no such file: the page is at /plugins/fraqtl/")
    return await _answer(name, request)
