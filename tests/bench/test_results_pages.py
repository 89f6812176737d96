"""The documentation says what the result files say, and its links and paths lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fraqtl_bench.reporting.pages.__main__ import write
from fraqtl_bench.reporting.pages.fill import MARK, by_hand, fill, names, pages
from fraqtl_bench.reporting.pages.results import BLOCKS, RESULTS, ROOT
from fraqtl_kernels.errors import ConfigError

PAGES = [path.relative_to(ROOT).as_posix() for path in pages(ROOT)]
RESULT_PAGES = [page for page in PAGES if page.startswith("docs/results/")]
TEXTS = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "bench/examples/README.md"]
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
FOLDERS = "fraqtl_serve|kernels|patches|bench|tests|docker|docs|examples"
PATH = re.compile(rf"`(?:python3? )?((?:{FOLDERS})/[\w./-]+)[^`\n]*`")
MODULE = re.compile(r"`([\w/]+\.py)`")
# A number with a unit in which results come; limits and sizes that are set, not measured, have other units.
MEASURED = re.compile(r"\d(?:[\d,.]*\d)? ?(?:%|x\b|ms\b|µs\b|ns\b|tokens/s|GB/s|times\b)")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_pages_are_what_the_command_makes() -> None:
    assert write(ROOT, only_check=True) == [], "run python -m fraqtl_bench.reporting.pages"


def test_a_page_that_was_changed_by_hand_is_found() -> None:
    page = "docs/results/recall.md"
    text = read(page)
    changed = text.replace("97.0 %", "99.0 %")
    assert changed != text
    assert fill(changed, Path(page)) == text


def test_every_block_is_on_a_page() -> None:
    assert {name for page in PAGES for name in names(read(page))} == BLOCKS.keys()


def test_unknown_blocks_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown block speed-of-light: choose one of accounting, "):
        fill("<!-- results: speed-of-light -->\n<!-- end -->", Path("README.md"))


@pytest.mark.parametrize("page", [page for page in RESULT_PAGES if not page.endswith("README.md")])
def test_tables_say_where_they_come_from(page: str) -> None:
    blocks = list(MARK.finditer(read(page)))
    assert blocks
    for found in blocks:
        body = found["body"]
        assert "| " in body and f"{RESULTS}/" in body, found["name"]
        if found["name"] != "floors":  # sums up the tables of other pages
            assert re.search(r"^Model: .*machine: ", body, re.MULTILINE) and "```\n" in body, found["name"]


@pytest.mark.parametrize("page", ["README.md", *RESULT_PAGES])
def test_measured_numbers_stand_in_blocks_only(page: str) -> None:
    assert MEASURED.findall(CODE.sub("", by_hand(read(page)))) == []


def links(page: str) -> Iterator[str]:
    for found in LINK.finditer(CODE.sub("", read(page))):
        target = found[1] or found[2]
        if not target.startswith(("http://", "https://", "mailto:")):
            yield target


def anchors(path: Path) -> set[str]:
    """Those of GitHub: lower case, no punctuation, a hyphen for each space."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize("page", TEXTS)
def test_paths_that_are_named_are_there(page: str) -> None:
    for path in PATH.findall(by_hand(read(page))):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", TEXTS)
def test_modules_that_are_named_by_their_end_are_there(page: str) -> None:
    """As in the glossary: `cpu/operands.py`."""
    files = [f"/{path.as_posix()}" for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.py")]
    for module in MODULE.findall(by_hand(read(page))):
        assert any(file.endswith(f"/{module}") for file in files), module


def test_every_page_is_in_an_index() -> None:
    for folder in ("docs", "docs/results"):
        index = f"{folder}/README.md"
        linked = {((ROOT / folder) / target.partition("#")[0]).resolve() for target in links(index)}
        inside = (ROOT / "docs").rglob("*.md") if folder == "docs" else (ROOT / folder).glob("*.md")
        parts = [path for path in inside if folder != "docs" or path.parent.name != "results"]
        assert {path for path in parts if path.name != "README.md"} <= linked
