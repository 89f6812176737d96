"""A headless Chromium for tests of the page. Where there is none they are skipped.

Debian: `apt-get install chromium`; elsewhere any Chromium or Chrome on the path, or FRAQTL_CHROMIUM=/path/to/it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest

OVERFLOW = "(document.documentElement.scrollWidth - document.documentElement.clientWidth)"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium would otherwise look for updates and the like: a test talks to its own server only.
QUIET = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def chromium() -> Iterator[Any]:
    """Ends with its block: while it lives, Playwright's event loop runs in this thread and no other can."""
    path = os.environ.get("FRAQTL_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*QUIET, *root])
        yield browser
        browser.close()


@contextmanager
def file_page(path: Path) -> Iterator[Any]:
    """A report's page, open; at the end nothing may have gone wrong and nothing may have been asked of a network."""
    complaints: list[str] = []
    requests: list[str] = []
    with chromium() as browser:
        found = browser.new_page(viewport={"width": 1280, "height": 1000})
        found.on("console", lambda said: complaints.append(said.text))
        found.on("pageerror", lambda error: complaints.append(str(error)))
        found.on("request", lambda request: requests.append(request.url))
        found.goto(path.as_uri())
        yield found
    assert complaints == []
    assert requests == [path.as_uri()]


class Visit:
    """One person's browser: its own storage, and all that its console said and its pages asked for."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url.rstrip("/") + "/"
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = self.open()

    def open(self) -> Any:
        """A new tab on the page."""
        page = self.context.new_page()
        page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(self.url)
        return page

    def wait_for(self, state: str) -> None:
        self.page.wait_for_selector(f"body[data-state={state}]", timeout=30_000)

    def until(self, expression: str, seconds: float = 30) -> None:
        """Wait until this JavaScript is true; Playwright's own way needs eval, which the page forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(50)

    def text(self, selector: str) -> str:
        return plain(self.page.text_content(selector))

    def figures(self) -> dict[str, str]:
        """The text of every figure that has an id."""
        found = self.page.eval_on_selector_all("#figures data[id]", "all => all.map(e => [e.id, e.textContent])")
        return {key: plain(value) for key, value in found}

    def overflow(self) -> int:
        """How many pixels the page is wider than its window."""
        width: int = self.page.evaluate(OVERFLOW)
        return width

    def until_nothing_overflows(self) -> None:
        """After the window's size changed: the chart follows a frame later."""
        self.until(f"{OVERFLOW} === 0", seconds=5)

    def violations(self) -> list[str]:
        """What axe-core finds wrong with the page as it is now."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [f"{v['id']}: {v['help']}: {n['html']} ({n['failureSummary']})" for v in found for n in v["nodes"]]


def plain(text: str) -> str:
    return text.replace("\u00a0", " ").strip()


def fixed(value: float, digits: int) -> str:
    """Rounded as people do, and browsers: half away from zero."""
    return f"{Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP):,}"


def shown_bytes(value: int) -> str:
    """Three figures and a binary unit, worked out apart from the page."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    size, unit = float(value), 0
    while size >= 1023.5:
        size, unit = size / 1024, unit + 1
    if unit == 0:
        return f"{value:,} B"
    digits = next(d for d in (2, 1, 0) if len(fixed(size, d).replace(",", "").replace(".", "")) <= 3 or d == 0)
    return f"{fixed(size, digits)} {units[unit]}"


def expected_figures(capacity: dict[str, Any]) -> dict[str, str]:
    """What the page must show for the server's answer to `capacity`."""
    blocks = round(capacity["pool_use"] * capacity["blocks"])
    return {
        "tokens": f"{capacity['tokens']:,}",
        "baseline-tokens": f"{capacity['baseline_tokens']:,}",
        "ratio": f"{fixed(capacity['ratio'], 2)} ×",
        "max-model-len": f"{capacity['max_model_len']:,}",
        "concurrency": fixed(capacity["concurrency"], 1),
        "baseline-concurrency": fixed(capacity["baseline_concurrency"], 1),
        "used": shown_bytes(blocks * capacity["block_bytes"]),
        "baseline-used": shown_bytes(blocks * capacity["baseline_block_bytes"]),
        "use": f"{fixed(100 * capacity['pool_use'], 1)} %",
        "pool": shown_bytes(capacity["pool_bytes"]),
        "running": f"{capacity['running']:,}",
        "waiting": f"{capacity['waiting']:,}",
    }


def expected_row(record: dict[str, Any]) -> list[str]:
    """Tokens, blocks, held, baseline and saved of one request, as the table must show them."""
    report = record["report"]
    if report is None:
        return ["–"] * 5
    cached = f", {report['shared_blocks']:,} cached" if report["shared_blocks"] else ""
    share = f"{fixed(100 * (report['saved_bytes'] / report['baseline_bytes']), 1)} %"
    return [
        f"{report['tokens']:,}",
        f"{report['blocks']:,}{cached}",
        shown_bytes(report["bytes"]),
        shown_bytes(report["baseline_bytes"]),
        f"{shown_bytes(report['saved_bytes'])}, {share}",
    ]
