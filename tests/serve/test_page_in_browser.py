"""The page in Chromium, against the plugin's own routes with figures made up for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fraqtl_serve.reports.capacity import Load
from tests.browser import Visit, chromium, expected_figures, expected_row, plain, shown_bytes
from tests.serve.page_server import LONG, MODEL, NASTY, POOL, PageServer, page_server, record

pytestmark = pytest.mark.slow

KEY = "sesame"
CELLS = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
PIXELS = """([canvas, colour]) => {
    const [r, g, b] = colour.match(/\\d+/g).map(Number);
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
    let found = 0;
    for (let i = 0; i < data.length; i += 4) found += data[i] === r && data[i + 1] === g && data[i + 2] === b;
    return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PageServer]:
    with page_server(monkeypatch) as server:
        yield server


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[PageServer]:
    with page_server(monkeypatch, KEY) as server:
        yield server


@pytest.fixture
def visit(browser: Any, server: PageServer) -> Iterator[Visit]:
    """A visit at which nothing may go wrong."""
    visit = Visit(browser, server.page)
    visit.wait_for("live")
    yield visit
    visit.context.close()
    assert visit.complaints == []
    assert all(url.startswith(server.url) for url in visit.requests)


def colors(visit: Visit) -> dict[str, int]:
    """How many pixels of the chart have each color of its key."""
    canvas = visit.page.query_selector("#chart canvas")
    of = "e => getComputedStyle(e).color"
    found = {name: visit.page.eval_on_selector(f".key .{name} i", of) for name in ("packed", "plain", "limit")}
    return {name: visit.page.evaluate(PIXELS, [canvas, color]) for name, color in found.items()}


def test_numbers_are_those_of_the_json(visit: Visit, server: PageServer) -> None:
    capacity = httpx.get(f"{server.page}capacity").json()
    expected = expected_figures(capacity)
    assert expected["used"] == shown_bytes(250 * POOL.block_bytes)
    assert expected.items() <= visit.figures().items()
    assert visit.text("#subject") == f"{MODEL} in k4v4, blocks of 16 tokens"
    assert MODEL in visit.page.title()
    server.load = Load(pool_use=1.0, running=12, waiting=3456)
    visit.until("document.getElementById('waiting').value === '3456'")
    assert visit.figures()["used"] == visit.figures()["pool"] == shown_bytes(POOL.total_bytes)


def test_table_of_requests(visit: Visit, server: PageServer) -> None:
    records = httpx.get(f"{server.page}requests").json()["requests"]
    rows = [[plain(cell) for cell in row] for row in visit.page.eval_on_selector_all("#rows tr", CELLS)]
    assert [row[2:] for row in rows] == [expected_row(record) for record in records]
    assert [row[1] for row in rows] == [
        f"/v1/chat/completions {LONG}",
        f"/v1/chat/completions {NASTY}",
        "/v1/chat/completions cmpl-silent",
        "/v1/completions aborted cmpl-aborted",
    ]
    assert visit.page.query_selector("#rows img") is None  # an id is text, whatever stands in it
    held = sum(record["report"]["bytes"] for record in records if record["report"])
    assert f"These 3 held {shown_bytes(held)}" in visit.text("#requests-sum")


def test_requests_of_several_processes_come_together(visit: Visit, server: PageServer) -> None:
    """Each API server answers with its own requests; the page shows all, the newest first."""
    newest = record("cmpl-other", 5, server.app.state.fraqtl_records.get(LONG).time + 60)
    server.app.state.fraqtl_records = type(server.app.state.fraqtl_records)()
    server.app.state.fraqtl_records.add(newest)
    visit.until("document.querySelectorAll('#rows tr').length === 5")
    assert visit.text("#rows tr:first-child .id") == "cmpl-other"


def test_chart_and_its_alternatives(visit: Visit, server: PageServer) -> None:
    drawn = colors(visit)
    assert min(drawn.values()) > 100, drawn  # all three lines are there
    history = httpx.get(f"{server.page}history").json()
    peak = round(max(history["pool_use"]) * POOL.blocks)
    for text in (visit.text("#chart-caption"), visit.page.get_attribute("#chart", "aria-label")):
        assert f"at most {shown_bytes(peak * POOL.block_bytes)} were in use" in plain(text)
        assert f"need {shown_bytes(peak * POOL.baseline_block_bytes)}, more than the pool" in plain(text)
    visit.page.click("summary")
    visit.page.wait_for_selector("#chart-rows tr")
    rows = [[plain(cell) for cell in row] for row in visit.page.eval_on_selector_all("#chart-rows tr", CELLS)]
    assert len(rows) == 10
    size = shown_bytes(peak * POOL.block_bytes), shown_bytes(peak * POOL.baseline_block_bytes)
    assert max(rows, key=lambda row: float(row[3].split()[0]))[1:] == [*size, "60.0 %"]


def test_curve_under_the_pointer(visit: Visit, server: PageServer) -> None:
    history = httpx.get(f"{server.page}history").json()
    box = visit.page.locator("#chart .u-over").bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 20)
    visit.until("document.getElementById('key-time').textContent !== ''")
    shown = visit.figures()["key-packed"]
    assert shown in {shown_bytes(round(use * POOL.blocks) * POOL.block_bytes) for use in history["pool_use"][1:]}


def test_figures_and_gaps_in_the_scripts(visit: Visit) -> None:
    """The scripts' own arithmetic, at its edges."""
    sizes = [0, 1, 1023, 1024, 10_234, 10_240, 1024**2 - 1, 1024**2, 99.95 * 1024**2, 5 * 1024**3, 3 * 1024**4]
    found = visit.page.evaluate(
        "async sizes => { const { bytes } = await import('./static/format.js'); return sizes.map(bytes); }", sizes
    )
    assert [plain(text) for text in found] == [
        *("0 B", "1 B", "1,023 B", "1.00 KiB", "9.99 KiB", "10.0 KiB"),
        *("1.00 MiB", "1.00 MiB", "100 MiB", "5.00 GiB", "3.00 TiB"),
    ]
    within = visit.page.evaluate(
        """async () => {
            const { History } = await import('./static/history.js');
            const history = new History();
            history.add({ seconds: 2, time: [100, 102], pool_use: [0.1, 0.2] });
            history.add({ seconds: 2, time: [101, 200], pool_use: [0.9, 0.3] });  // one of them is old
            return history.within(300);
        }"""
    )
    assert within == {"time": [100, 102, 104, 200], "use": [0.1, 0.2, None, 0.3]}


@pytest.mark.parametrize("system", ["light", "dark"])
def test_themes(browser: Any, server: PageServer, system: str) -> None:
    visit = Visit(browser, server.page, color_scheme=system)
    visit.wait_for("live")

    def look() -> tuple[bool, str]:
        ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, ground[4:-1].split(", "))) < 384, visit.text("#theme")

    dark, light = (True, "Light theme"), (False, "Dark theme")
    assert look() == (dark if system == "dark" else light)
    assert colors(visit)["packed"] > 100  # the curve takes the theme's colors
    visit.page.click("#theme")
    assert look() == (light if system == "dark" else dark)
    assert colors(visit)["packed"] > 100
    visit.page.reload()
    assert look() == (light if system == "dark" else dark)  # what was chosen stays
    visit.wait_for("live")
    assert visit.violations() == []
    visit.context.close()
    assert visit.complaints == []


def test_theme_follows_the_system(visit: Visit) -> None:
    visit.page.emulate_media(color_scheme="dark")
    visit.until("document.getElementById('theme').textContent === 'Light theme'")
    assert colors(visit)["packed"] > 100


def test_everything_by_keyboard(visit: Visit) -> None:
    page = visit.page
    seen = []
    for _ in range(7):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || "
                "document.activeElement.name || document.activeElement.localName"
            )
        )
        outline = "getComputedStyle(document.activeElement.closest('.ranges') ?? document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid", seen
        if seen[-1] == "range":
            page.keyboard.press("ArrowRight")
            assert page.evaluate("document.querySelector('[name=range]:checked').value") == "900"
        if seen[-1] == "summary":
            page.keyboard.press("Enter")
            page.wait_for_selector("#chart-rows tr")
    assert seen == ["skip", "pause", "theme", "range", "summary", "scroll", "limit"]
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.getElementById('limit').value") == "50"
    page.evaluate("document.querySelector('.skip').focus()")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_pause(visit: Visit, server: PageServer) -> None:
    visit.page.focus("#pause")
    visit.page.keyboard.press("Space")
    visit.wait_for("paused")
    visit.page.wait_for_timeout(500)  # what was asked before is answered
    asked = len(visit.requests)
    server.load = Load(pool_use=0.5, running=99, waiting=0)
    visit.page.wait_for_timeout(4500)
    assert len(visit.requests) == asked
    assert visit.figures()["running"] == "3"
    visit.page.keyboard.press("Space")
    visit.until("document.getElementById('running').value === '99'")
    assert visit.text("#state") == "Live"


def test_accessibility_and_what_is_announced(visit: Visit) -> None:
    visit.page.click("summary")
    assert visit.violations() == []
    for width in (375, 768):
        visit.page.set_viewport_size({"width": width, "height": 800})
        assert visit.violations() == []
    live = visit.page.eval_on_selector_all("[role=status], [role=alert], [aria-live]", "all => all.map(e => e.id)")
    assert live == ["state", "notice", "key-error"]  # figures change every two seconds: none is read out
    for role in ("banner", "main", "contentinfo"):
        assert visit.page.get_by_role(role).count() == 1
    assert visit.page.get_by_role("table", name="Recent requests").get_by_role("row").count() == 5


@pytest.mark.parametrize("width", [320, 375, 721, 961])
def test_nothing_is_wider_than_the_window(browser: Any, server: PageServer, locked: PageServer, width: int) -> None:
    for address, state in ((server.page, "live"), (locked.page, "locked")):
        visit = Visit(browser, address, viewport={"width": width, "height": 812})
        visit.wait_for(state)
        if state == "live":
            visit.page.click("summary")
            visit.page.wait_for_selector("#chart-rows tr")
        assert visit.overflow() == 0, state
        visit.context.close()


def test_server_gone_and_back(browser: Any, server: PageServer) -> None:
    visit = Visit(browser, server.page)
    visit.wait_for("live")
    server.stop()
    visit.wait_for("lost")
    assert "can't be reached" in visit.text("#notice-text")
    assert "The figures below are those of" in visit.text("#notice-text")
    assert visit.figures()["running"] == "3"
    assert visit.violations() == []
    visit.page.set_viewport_size({"width": 375, "height": 812})
    visit.until_nothing_overflows()
    server.load = Load(pool_use=0.5, running=7, waiting=0)
    server.start()
    visit.page.click("#retry")
    visit.wait_for("live")
    visit.until("document.getElementById('running').value === '7'")
    assert visit.page.is_hidden("#notice")
    visit.context.close()
    assert all("ERR_" in complaint for complaint in visit.complaints)  # the browser's own words for it


def test_server_not_ready(browser: Any, server: PageServer) -> None:
    pool = server.app.state.fraqtl_pool
    server.app.state.fraqtl_pool = None
    visit = Visit(browser, server.page)
    visit.wait_for("lost")
    assert "The engine isn't ready" in visit.text("#notice-text")
    assert visit.page.is_hidden("#figures")
    server.app.state.fraqtl_pool = pool
    visit.wait_for("live")  # by itself
    assert visit.figures()["tokens"] == "16,000"
    visit.context.close()
    assert all("503" in complaint for complaint in visit.complaints)


def test_server_without_metrics(visit: Visit, server: PageServer) -> None:
    server.load = Load()
    visit.until("document.getElementById('running').textContent === '–'")
    assert visit.figures()["used"] == visit.figures()["use"] == "–"
    assert "keeps no metrics" in visit.text("#chart-caption")


def enter(visit: Visit, key: str) -> None:
    visit.page.fill("#key", key)
    visit.page.keyboard.press("Enter")


def test_key(browser: Any, locked: PageServer) -> None:
    visit = Visit(browser, locked.page)
    visit.wait_for("locked")
    assert visit.page.evaluate("document.activeElement.id") == "key"
    assert visit.page.is_hidden("#figures")
    assert set(visit.figures().values()) == {""}
    assert visit.page.query_selector("#rows tr") is None
    assert visit.violations() == []

    for wrong in ("open", "ключ", "a\tb"):
        enter(visit, wrong)
        visit.until("document.getElementById('key-error').textContent !== ''")
        assert visit.text("#key-error") == "The server refuses this key."
        assert visit.page.is_hidden("#figures")
        assert set(visit.figures().values()) == {""}

    enter(visit, KEY)
    visit.wait_for("live")
    assert visit.figures()["tokens"] == "16,000"
    assert KEY not in visit.page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
    assert all(KEY not in url for url in visit.requests)
    visit.page.reload()
    visit.wait_for("live")  # this tab remembers
    visit.page, first = visit.open(), visit.page
    visit.wait_for("locked")  # another doesn't know
    visit.page = first

    locked.stop()
    locked.start_anew(["changed"])
    visit.wait_for("locked")
    assert set(visit.figures().values()) == {""}
    assert visit.page.query_selector("#rows tr") is None and MODEL not in visit.page.inner_text("body")
    enter(visit, "changed")
    visit.wait_for("live")
    visit.page.click("#forget")
    visit.wait_for("locked")
    assert visit.page.evaluate("sessionStorage.length") == 0
    visit.context.close()
    assert all("401" in complaint or "ERR_" in complaint for complaint in visit.complaints)


def test_behind_a_proxy(browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with page_server(monkeypatch, KEY, prefix="/behind/proxy") as server:
        visit = Visit(browser, server.page)
        visit.page.goto(server.page.rstrip("/"))  # without the slash
        visit.wait_for("locked")
        assert visit.page.url == server.page
        enter(visit, KEY)
        visit.wait_for("live")
        assert visit.text("#subject").startswith(MODEL)
        visit.context.close()
