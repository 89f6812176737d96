"""RULER's tasks on the demo model: replies are those of greedy decoding, and what the lab reports of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fraqtl_bench.cli import main
from fraqtl_bench.quality import figures
from fraqtl_bench.quality.cache import logits
from fraqtl_bench.quality.fitted import fit
from fraqtl_bench.quality.heatmaps import needle_maps, ruler_maps
from fraqtl_bench.quality.methods import parse
from fraqtl_bench.quality.ruler.replies import found, greedy
from fraqtl_bench.quality.ruler.tasks import ruler_items
from fraqtl_bench.quality.schema import Report, RulerCell
from fraqtl_bench.quality.watch import calibration_samples
from tests.bench.quality_models import demo, random_subject, token_ids, tokenizer
from tests.browser import file_page

pytestmark = pytest.mark.slow
OPTIONS = ["--quick", "--threads", "1", "--seed", "3", "--ruler-lengths", "400", "--needle-repeats", "1"]


def test_the_demo_model_finds_needles_and_loses_them_without_its_keys() -> None:
    subject = demo()
    samples = calibration_samples(subject.model, token_ids(100))
    items = ruler_items(subject.tokenizer, ["niah_single_2", "niah_multikey_1"], [300], 3, 0)
    right = {
        name: sum(all(found(i, greedy(subject, i, fit(parse(name), samples).layers))) for i in items)
        for name in ("fp16", "rank1")
    }
    assert right["fp16"] >= 5 and right["rank1"] == 0


def test_replies_are_what_the_model_itself_generates() -> None:
    subject = demo()
    for item in ruler_items(subject.tokenizer, ["niah_multivalue", "vt"], [300], 1, 0):
        prompt = torch.tensor([item.prompt])
        said = subject.model.generate(prompt, max_new_tokens=item.limit, do_sample=False)[0][len(item.prompt) :]
        text, reply = subject.tokenizer.decode(said, skip_special_tokens=True), greedy(subject, item, None)
        assert reply and text.startswith(reply) and found(item, reply) == found(item, text)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("method", ["int4-token@hadamard", "k4v2+residual", "kivi-2", "turbo-attn"])
def test_replies_with_a_lossy_cache_are_the_likeliest_tokens_of_one_pass(kind: str, method: str) -> None:
    """Which is what teacher forcing sees: decoding step by step attends the same stored keys."""
    subject = random_subject(kind)
    subject.model.double()  # or a code next to its rounding threshold may fall on either side
    layers = fit(parse(method), calibration_samples(subject.model, token_ids(64))).layers
    [item] = ruler_items(tokenizer(), ["niah_multivalue"], [200], 1, 0)
    reply = greedy(subject, item, layers)
    said = _one_pass_a_token(subject, item.prompt, layers, item.limit)
    assert tokenizer().decode(said, skip_special_tokens=True).startswith(reply) and reply
    assert reply != greedy(subject, item, None)


def _one_pass_a_token(subject: Any, prompt: tuple[int, ...], layers: Any, count: int) -> list[int]:
    said: list[int] = []
    for _ in range(count):
        said.append(int(logits(subject.model, [*prompt, *said], layers, 1)[0].argmax()))
    return said


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("ruler")
    main(
        ["quality", "demo", "--out", str(out), *OPTIONS, "--methods", "fp16", "rank4", "--measures", "ruler", "needle"]
    )
    return Report.model_validate_json((out / "quality.json").read_text()), out


def test_a_run_reports_every_task_and_length(report: tuple[Report, Path]) -> None:
    found, out = report
    exact, reduced = (row.ruler or [] for row in found.models[0].rows)
    assert [(c.task, c.length, c.items) for c in exact] == [
        ("niah_single_2", 400, 2), ("niah_multikey_1", 400, 2), ("vt", 400, 2)
    ]  # fmt: skip
    assert sum(c.lost + c.gained for c in exact) == 0
    for one, other in zip(exact, reduced, strict=True):
        assert other.found == one.found - other.lost + other.gained
    assert exact[0].found == 2 and reduced[0].lost == 2
    lines = (out / "quality.md").read_text().splitlines()
    assert "| 400 tokens (items) | `fp16` | `rank4` |" in lines
    assert "| niah_single_2 (2) | 100% ± 0 | 0% ± 0 (2 / 0) |" in lines
    assert {"needle_depth.png", "ruler.png"} <= {path.name for path in out.iterdir()}


def test_heat_maps_hold_the_results(report: tuple[Report, Path], tmp_path: Path) -> None:
    found, _ = report
    model = found.models[0]
    [grid] = ruler_maps(model)
    assert grid.rows == ["fp16", "rank4"] and grid.columns == ["niah_single_2", "niah_multikey_1", "vt"]
    assert grid.shares == [[cell.accuracy for cell in row.ruler or []] for row in model.rows]
    needle, _ = needle_maps(found.settings, model)
    assert needle.rows == ["depth 0%", "depth 50%", "depth 100%"] and needle.columns == ["256 tokens"]
    assert [line[0] for line in needle.shares] == list((model.rows[0].needle or {}).values())
    model.rows[0].ruler = model.rows[1].ruler = None
    names = {path.name for path in figures.save(found, tmp_path)}
    assert "needle_depth.png" in names and "ruler.png" not in names


def test_the_page_shows_the_heat_map_that_is_picked(report: tuple[Report, Path]) -> None:
    with file_page(report[1] / "quality.html") as page:
        options = page.eval_on_selector_all("#heat-choice option", "all => all.map(o => o.textContent)")
        assert options == ["demo: RULER, 400 tokens", "demo: needle, fp16", "demo: needle, rank4"]
        assert page.is_visible("#heat") and page.is_hidden("#figure")  # no perplexity to draw
        cells = [cell.text_content() for cell in page.query_selector_all("#heat-table tr:nth-child(2) > *")]
        assert cells[:2] == ["fp16", "100 % ± 0"] and len(cells) == 4
        page.select_option("#heat-choice", "1")
        rows = [cell.text_content() for cell in page.query_selector_all("#heat-table th[scope=row]")]
        assert rows == ["depth 0%", "depth 50%", "depth 100%"]


def test_cells_of_two_lengths_are_two_tables_and_two_maps(report: tuple[Report, Path]) -> None:
    from fraqtl_bench.quality.ruler.tables import ruler_lines

    numbers = {"items": 4, "answers": 4, "found": 2, "accuracy": 0.5, "standard_error": 0.25, "lost": 1, "gained": 0}
    cells = [RulerCell(task="vt", length=length, **numbers) for length in (512, 1024)]  # type: ignore[arg-type]
    model = report[0].models[0].model_copy(deep=True)
    for row in model.rows:
        row.ruler = cells
    text = "\n".join(ruler_lines(model))
    assert "| 512 tokens (items) |" in text and "| 1,024 tokens (items) |" in text
    assert text.count("| vt (4) | 50% ± 25 (1 / 0) | 50% ± 25 (1 / 0) |") == 2
    assert [grid.title for grid in ruler_maps(model)] == ["RULER, 512 tokens", "RULER, 1,024 tokens"]


def test_what_can_not_be_asked_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, says in (
        (["--ruler-lengths", "9000"], "--ruler-lengths 9000: the model takes 8192: give shorter ones"),
        (["--ruler-lengths", "40"], "--ruler-lengths 40: niah_single_2 takes"),
        (["--ruler-tasks", "qa_1"], "unknown RULER task 'qa_1'"),
        (["--ruler-repeats", "0"], "--ruler-repeats 0 is too small: give 1 or more"),
    ):
        with pytest.raises(SystemExit):
            main(
                ["quality", "demo", "--quick", "--no-figures", "--out", str(tmp_path), "--measures", "ruler", *options]
            )
        assert says in capsys.readouterr().err
