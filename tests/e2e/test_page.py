"""The page in Chromium on a live server under load, behind an API key.

FRAQTL_SCREENSHOTS=docs/images keeps the pictures that the documentation shows.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser import Visit, chromium, expected_figures, expected_row, plain, shown_bytes
from tests.e2e.reports import BASELINE_BLOCK_BYTES, BLOCK_BYTES, MODEL
from tests.e2e.server import Server, forked
from tests.grafana import metric_names

KEY = "sesame"
HEADERS = {"Authorization": f"Bearer {KEY}"}
PAGE = "/plugins/fraqtl/"
POOL = 4_600_000  # bytes: room for one sequence of the greatest length
USERS = 6
IDS_AND_CELLS = """rows => rows.map(row => [
    row.querySelector(".id").textContent, [...row.cells].map(cell => cell.textContent)])"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with forked("--api-key", KEY, "--kv-cache-memory-bytes", str(POOL)) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@contextmanager
def load(server: Server) -> Iterator[None]:
    """Several people who ask one thing after another, some of whom leave before the end."""
    stop = threading.Event()

    def ask(person: int) -> None:
        dice = random.Random(person)
        start = [7] * 64  # found in the prefix cache by all but the first
        with httpx.Client(base_url=server.url, headers=HEADERS, timeout=120) as client:
            while not stop.wait(dice.random()):
                prompt = start + [dice.randrange(100, 400) for _ in range(dice.choice([30, 100, 300, 900]))]
                body = {
                    "model": MODEL,
                    "prompt": prompt,
                    "max_tokens": dice.choice([10, 150]),
                    "ignore_eos": True,
                    "stream": True,
                }
                leaves = dice.random() < 0.2
                with client.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200
                    for number, _ in enumerate(response.iter_lines()):
                        if stop.is_set() or (leaves and number > 40):
                            break

    people = [threading.Thread(target=ask, args=(person,), daemon=True) for person in range(USERS)]
    for person in people:
        person.start()
    try:
        yield
    finally:
        stop.set()
        for person in people:
            person.join(60)
        assert not any(person.is_alive() for person in people)


def get(server: Server, path: str) -> Any:
    return httpx.get(f"{server.url}{PAGE}{path}", headers=HEADERS, timeout=60).raise_for_status().json()


def enter(visit: Visit, key: str) -> None:
    visit.page.fill("#key", key)
    visit.page.keyboard.press("Enter")


def check_numbers(visit: Visit) -> dict[str, Any]:
    """With the page paused, its figures are those of the last answer that it got; returns that answer."""
    heard: list[Any] = []
    listen = lambda response: heard.append(response) if response.url.endswith(f"{PAGE}capacity") else None  # noqa: E731
    visit.page.on("response", listen)
    while not heard:
        visit.page.wait_for_timeout(100)
    visit.page.click("#pause")
    visit.wait_for("paused")
    end = time.monotonic() + 30  # what was asked before the pause may still come
    while not expected_figures(heard[-1].json()).items() <= visit.figures().items():
        assert time.monotonic() < end, (heard[-1].json(), visit.figures())
        visit.page.wait_for_timeout(100)
    visit.page.remove_listener("response", listen)
    capacity: dict[str, Any] = heard[-1].json()
    visit.page.click("#pause")
    visit.wait_for("live")
    return capacity


def check_rows(visit: Visit, server: Server) -> int:
    """Every row says what the server says of that request; returns how many there are."""
    # In one look: under load a row may come between two
    found = visit.page.eval_on_selector_all("#rows tr", IDS_AND_CELLS)
    rows = [[plain(cell) for cell in cells] for _, cells in found]
    for row, (request_id, _) in zip(rows, found, strict=True):
        record = get(server, f"requests/{request_id}")
        assert row[2:] == expected_row(record)
        assert row[1].split()[0] == record["endpoint"]
        assert ("aborted" in row[1]) == (record["status"] == "aborted")
    return len(rows)


def keep_picture(visit: Visit, name: str) -> None:
    if folder := os.environ.get("FRAQTL_SCREENSHOTS"):
        visit.page.screenshot(path=Path(folder) / f"{name}.png")


def test_under_load(browser: Any, server: Server) -> None:
    with load(server):
        visit = Visit(browser, server.url + PAGE, color_scheme="light")
        visit.wait_for("locked")
        assert visit.page.is_hidden("#figures")
        assert set(visit.figures().values()) == {""}  # without the key: no data
        for path in ("capacity", "history", "requests"):
            assert httpx.get(f"{server.url}{PAGE}{path}").status_code == 401
        enter(visit, "open")
        visit.until("document.getElementById('key-error').textContent !== ''")
        assert "refuses this key" in visit.text("#key-error")
        assert visit.page.is_hidden("#figures")
        assert all("401" in said for said in visit.complaints)
        visit.complaints.clear()

        enter(visit, KEY)
        visit.wait_for("live")
        assert visit.text("#subject") == f"{MODEL} in k4v4, blocks of 16 tokens"
        visit.until("Number(document.getElementById('running').value) > 0", seconds=60)
        visit.until("document.querySelectorAll('#rows tr .id').length >= 3", seconds=200)
        for _ in range(3):
            assert check_numbers(visit)["blocks"] == POOL // BLOCK_BYTES
        assert check_rows(visit, server) >= 3
        assert visit.violations() == []
        visit.page.wait_for_timeout(1000 * int(os.environ.get("FRAQTL_SCREENSHOT_SECONDS", "0")))
        take_pictures(visit)

    visit.until("document.getElementById('running').value === '0'")  # the load is over
    visit.until("document.getElementById('used').value === '0'")
    check_numbers(visit)
    check_curve(visit, server)
    assert visit.complaints == []  # not one error on the console
    assert all(url.startswith(server.url) for url in visit.requests)
    visit.context.close()


def take_pictures(visit: Visit) -> None:
    """As wide as a desk's screen and as narrow as a telephone's, in both themes."""
    for width, height in ((1280, 1180), (375, 812)):
        visit.page.set_viewport_size({"width": width, "height": height})
        for theme in ("light", "dark"):
            visit.page.emulate_media(color_scheme=theme)
            ground = "getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'"
            visit.until(ground if theme == "light" else f"!({ground})")
            visit.page.mouse.move(0, 0)
            visit.page.evaluate("scrollTo(0, 0)")
            visit.page.wait_for_timeout(300)  # the chart follows its new size at the next frame
            assert visit.overflow() == 0
            keep_picture(visit, f"page-{width}-{theme}")
    visit.page.emulate_media(color_scheme="light")
    visit.page.set_viewport_size({"width": 1280, "height": 900})


def check_curve(visit: Visit, server: Server) -> None:
    """The peak that the page tells in words is that of the server's samples."""
    visit.page.click("label:has(input[value='3600'])")
    history = get(server, "history")
    peak = round(max(history["pool_use"]) * (POOL // BLOCK_BYTES))
    assert peak > 0
    caption = visit.text("#chart-caption")
    assert f"at most {shown_bytes(peak * BLOCK_BYTES)} were in use" in caption
    assert f"bfloat16 need {shown_bytes(peak * BASELINE_BLOCK_BYTES)}" in caption


def test_files_need_no_key_and_data_do(server: Server) -> None:
    for path in (PAGE, PAGE[:-1], f"{PAGE}static/app.js", f"{PAGE}static/vendor/uPlot.iife.min.js"):
        assert httpx.get(server.url + path, follow_redirects=True).status_code == 200
    for path in ("static/__init__.py", "static/..%2froutes.py"):
        assert httpx.get(f"{server.url}{PAGE}{path}").status_code == 404


def test_history_grows_while_the_server_runs(server: Server) -> None:
    first = get(server, "history")
    assert first["time"] == sorted(first["time"]) and len(first["time"]) == len(first["pool_use"])
    newer = get(server, f"history?since={first['time'][-2]}")
    assert newer["time"][0] == first["time"][-1]


def test_every_metric_of_the_grafana_dashboard_is_exposed(server: Server) -> None:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    exposed = {line.split("{")[0].split(" ")[0] for line in lines if line and not line.startswith("#")}
    assert len(metric_names()) > 15
    assert metric_names() - exposed == set()
