"""The page's files over HTTP: what is served, with which headers, and what isn't."""

from __future__ import annotations

import asyncio
import re
from argparse import Namespace
from pathlib import Path
from urllib.parse import unquote

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from fraqtl_serve.page import FILES, FOLDER, router
from tests.serve.small_app import Answer, make_scope, messages

PAGE = "/plugins/fraqtl/"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def make_app(root_path: str = "") -> FastAPI:
    app = FastAPI()
    app.root_path = root_path  # as vLLM does with --root-path
    init_exception_handler(app)
    app.include_router(router)
    app.state.args = Namespace(api_key=["sesame"], log_error_stack=False)
    return app


@pytest.fixture
def client() -> TestClient:
    return TestClient(make_app(), follow_redirects=False)


@pytest.mark.parametrize("name", ["", *sorted(FILES)])
def test_every_file_is_served_without_the_key(client: TestClient, name: str) -> None:
    path = FOLDER / (name or "index.html")
    address = f"{PAGE}static/{name}" if name else PAGE
    response = client.get(address)
    assert response.status_code == 200
    assert response.content == path.read_bytes()
    assert response.headers["content-type"].split(";")[0] == KINDS[path.suffix]
    head = client.head(address)
    assert head.status_code == 200 and head.content == b""
    assert head.headers == response.headers


def test_headers_allow_the_servers_own_files_only(client: TestClient) -> None:
    headers = client.get(PAGE).headers
    rules = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
    assert rules.pop("default-src") == "'none'"
    assert set(rules.values()) == {"'self'", "'none'"}  # nothing inline, no eval, no other host
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_copies_are_checked_and_not_sent_again(client: TestClient) -> None:
    first = client.get(PAGE)
    assert first.headers["cache-control"] == "no-cache"
    again = client.get(PAGE, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert client.get(PAGE, headers={"If-None-Match": '"another"'}).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "nope.js",
        "index.html",
        "__init__.py",
        "",
        "vendor",
        "vendor/",
        "../routes.py",
        "..%2froutes.py",
        "%2e%2e/%2e%2e/pyproject.toml",
        "vendor/../../routes.py",
        "vendor%2f..%2f__init__.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "app.js%00",
        "..\\routes.py",
    ],
)
def test_nothing_else_is_served(name: str) -> None:
    """Past any client: they would tidy the dots away."""
    answer = Answer()
    scope = make_scope(unquote(f"{PAGE}static/{name}"), "GET")
    asyncio.run(make_app()(scope, messages(b""), answer.send))
    assert answer.status == 404
    assert answer.json["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_files_are_read_only(client: TestClient, method: str) -> None:
    for address in (PAGE, f"{PAGE}static/app.js"):
        assert client.request(method, address).status_code == 405


def test_address_without_slash_leads_to_the_page(client: TestClient) -> None:
    response = client.get("/plugins/fraqtl")
    assert response.status_code == 307
    assert response.headers["location"] == "fraqtl/"  # relative: right behind any proxy


@pytest.mark.parametrize("sent", ["/behind/a/proxy", ""])
def test_root_path(sent: str) -> None:
    """Whether the proxy leaves the prefix on or takes it off."""
    client = TestClient(make_app("/behind/a/proxy"))
    for name in (PAGE, f"{PAGE}static/app.js", f"{PAGE}static/vendor/uPlot.min.css"):
        assert client.get(sent + name).status_code == 200


def test_every_address_in_the_page_is_relative_and_there() -> None:
    html = (FOLDER / "index.html").read_text()
    named = re.findall(r'(?:href|src)="([^"#][^"]*)"', html)
    assert named and {name.removeprefix("static/") for name in named} <= FILES
    for script in FOLDER.glob("*.js"):
        for module in re.findall(r'from "([^"]+)"', script.read_text()):
            assert module.removeprefix("./") in FILES
    ours = "".join(path.read_text() for path in FOLDER.iterdir() if path.suffix in KINDS)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", ours)  # an SVG must name its namespace


def test_vendored_library_comes_with_its_licence() -> None:
    assert "MIT License" in (FOLDER / "vendor" / "LICENSE-uPlot").read_text()
    assert "uPlot (v1.6.32)" in (FOLDER / "vendor" / "uPlot.iife.min.js").read_text()[:200]


def test_packages_hold_every_file() -> None:
    """What setuptools is told to ship covers what is served."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["fraqtl_serve"]
    root = FOLDER.parent
    shipped = {path for pattern in patterns for path in root.glob(pattern)}
    assert {FOLDER / "index.html", FOLDER / "vendor" / "LICENSE-uPlot", *(FOLDER / n for n in FILES)} <= shipped
