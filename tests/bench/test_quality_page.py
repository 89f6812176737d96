"""The report's page in Chromium, from a file, with a report made up for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fraqtl_bench.quality import figures, margins
from fraqtl_bench.quality.markdown import markdown
from fraqtl_bench.quality.page import page as render
from fraqtl_bench.quality.schema import Law, LawLine, LawRatio, ModelReport, Report, Row, Settings
from tests.browser import file_page

POINTS = (  # method, family, budget, bits, perplexity
    ("fp16", "baseline", 16, 16.0, 5.0), ("int4-channel", "quantisation", 4, 4.1, 5.2),
    ("int2-token", "quantisation", 2, 2.3, 9.0), ("rank16", "rank", 4, 5.1, 20.0), ("rank8", "rank", 2, 2.6, 80.0),
    ("rank32x8", "hybrid", 4, 4.6, 15.0), ("k4v4", "server", 4, 4.3, 5.1),
    ("int4-channel@pca", "quantisation", 4, 5.0, 5.3),
)  # fmt: skip


def model(name: str, group: int, factor: float) -> ModelReport:
    rows = [
        Row(
            method=method, family=family, budget=budget, basis="pca" if "@" in method else "identity", side="kv",
            dims=64, bits_per_dim=bits, vector_bits_per_dim=budget + 0.02 * (budget < 16),
            perplexity=perplexity * factor,
            perplexity_delta=(perplexity - 5) * factor, needle_accuracy=0.5, flips=0.01,
        )
        for method, family, budget, bits, perplexity in POINTS
    ]  # fmt: skip
    margins.add_margins(rows)
    line = LawLine(
        kind="projection", bits=0, points=1, measured=1, predicted=1, ratio=1, published_ratio=1, within_quarter=1
    )
    law = Law(
        lines=[line], ratios=[LawRatio(bits=4, measured=9, predicted=8, published=768)], points=[("rank", 8, 0.1, 0.2)]
    )
    return ModelReport(
        model=name, attention="GQA", group=group, layers=2, heads=2 * group, kv_heads=2, head_size=64, parameters=9,
        dtype="float32", scored_tokens=100, windows=2, rows=rows, skipped={"rank3": "why not"}, law=law,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    settings = Settings(
        models=["one", "two"], text="generated", calibration="generated", last_word="generated", window=64, stride=32,
        tokens=100, calibration_tokens=64, methods=None, measures=["perplexity"], needle_lengths=[64],
        needle_depths=[0.5], needle_repeats=1, passages=1, routing_windows=1, queries=8, dtype=None,
        device="cpu", seed=0,
    )  # fmt: skip
    models = [model("one", 2, 1.0), model("two", 8, 3.0)]
    return Report(
        provenance={"command": "fraqtl-bench quality one two"}, settings=settings, seconds=1, models=models,
        published={"one": {"perplexity_fp16": 9.19}, "three": {}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("page") / "quality.html"
    path.write_text(render(report), encoding="utf-8")
    with file_page(path) as found:
        yield found


def winners(page: Any) -> list[str]:
    return [node.text_content() for node in page.query_selector_all(".card .first")]


def column(page: Any, index: int) -> list[str]:
    return [node.text_content() for node in page.query_selector_all(f"#body td:nth-child({index})")]


def slide(page: Any, bits: float) -> None:
    page.eval_on_selector("#budget", f"e => {{ e.value = {bits}; e.dispatchEvent(new Event('input')); }}")


def test_the_slider_names_the_winner_at_every_budget(page: Any) -> None:
    wanted = {2.0: "nothing fits", 2.5: "int2-token", 4.2: "int4-channel", 4.5: "k4v4", 16.0: "fp16"}
    for bits, name in wanted.items():
        slide(page, bits)
        assert winners(page) == [name, name]
        assert f"{bits:.2f} bits per dimension" in page.text_content("#budget-value")
    slide(page, 4.5)
    affordable = len(page.query_selector_all("#body tr:not(.over)"))
    assert affordable == 2 * sum(bits <= 4.5 for *_, bits, _ in POINTS)
    first = page.get_attribute("#budget-line", "x1")
    slide(page, 8)
    assert page.get_attribute("#budget-line", "x1") != first
    slide(page, 4.5)


def test_constants_count_less_in_a_longer_text(page: Any) -> None:
    assert page.eval_on_selector_all("#context option", "all => all.map(o => o.value)") == [
        "64", "1024", "8192", "131072",
    ]  # fmt: skip
    slide(page, 4.05)
    assert winners(page) == ["int2-token"] * 2
    circle = "#figure circle:has(title:text('k4v4'))"
    before = float(page.get_attribute(circle, "cx"))
    page.select_option("#context", "131072")
    assert winners(page) == ["k4v4"] * 2 and float(page.get_attribute(circle, "cx")) < before
    page.fill("#search", "rank16")
    assert column(page, 6) == ["4.021"] * 2  # 4.02 and 1.08 · 64 / 131072
    page.fill("#search", "")
    page.select_option("#context", "64")
    assert winners(page) == ["int2-token"] * 2
    slide(page, 4.5)


def test_keys_move_the_slider(page: Any) -> None:
    page.focus("#budget")
    before = page.eval_on_selector("#budget", "e => e.value")
    page.keyboard.press("ArrowRight")
    assert page.eval_on_selector("#budget", "e => e.value") > before
    slide(page, 4.5)


def test_columns_sort_both_ways(page: Any) -> None:
    page.click("button[data-key=perplexity]")
    up = [float(x) for x in column(page, 10)]
    assert up == sorted(up) and len(up) == 2 * len(POINTS)
    assert page.get_attribute("th:has(button[data-key=perplexity])", "aria-sort") == "ascending"
    page.click("button[data-key=perplexity]")
    assert [float(x) for x in column(page, 10)] == sorted(up, reverse=True)
    page.click("button[data-key=method]")
    assert column(page, 3) == sorted(column(page, 3))


def test_columns_without_a_measurement_are_left_out(page: Any) -> None:
    titles = [node.text_content() for node in page.query_selector_all("#head button")]
    assert "needle" in titles and "last word" not in titles and "KL" not in titles
    assert page.is_hidden("#heat")  # no needle by depth, nor RULER's tasks


def test_filters_leave_what_they_name(page: Any) -> None:
    page.select_option("#model", "two")
    assert set(column(page, 1)) == {"two"} and page.text_content("#count") == f"{len(POINTS)} of {2 * len(POINTS)}"
    page.uncheck("#families input[value=quantisation]")
    assert "quantisation" not in column(page, 4) and column(page, 4)
    page.check("#families input[value=quantisation]")
    page.select_option("#basis", "pca")
    assert column(page, 3) == ["int4-channel@pca"]
    page.select_option("#basis", "")
    page.select_option("#at", "2")
    assert sorted(column(page, 3)) == ["int2-token", "rank8"]
    page.select_option("#at", "")
    page.fill("#search", "rank16")
    assert column(page, 3) == ["rank16"] and column(page, 12) == ["-44.40"]
    page.fill("#search", "")
    page.select_option("#model", "")


def test_the_figure_has_a_curve_per_method(page: Any) -> None:
    legend = page.text_content("#legend")
    for name in ("int, per channel", "int, per token", "rank at 16 bits", "rank at 8 bits", "server formats", "fp16"):
        assert name in legend
    assert len(page.query_selector_all("#figure circle")) == sum("@" not in p[0] for p in POINTS)
    before = page.inner_html("#figure")
    page.select_option("#figure-model", "1")
    assert page.inner_html("#figure") != before


def test_it_fits_a_narrow_window(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.set_viewport_size({"width": 1280, "height": 1000})


def test_every_figure_is_written(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = figures.save(report, tmp_path)
    names = {"perplexity.png", "flips.png", "needle_accuracy.png", "law.png", "margin_by_group.png"}
    assert {f.name for f in files} == names
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


def test_markdown_says_what_is_and_is_not_measured(report: Report) -> None:
    text = markdown(report)
    assert "| three | not yet |" in text and "| one | yes | 9.19 |" in text
    assert "Left out: `rank3` (why not)." in text
    assert "| `rank16` | rank | 4 | identity | kv | 64 | 5.100 | 20.000 | 15.000 | -14.80 |" in text
    assert "| one | GQA 2:1 | 5.000 | 5.200 |  | 0.100 /  | 14.80 | 71.00 | 9.80 |\n| two | GQA 8:1 | 15.000 |" in text
