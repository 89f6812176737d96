"""The next token's distribution against that with a 16-bit cache, by sums written out in doubles."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fraqtl_bench.quality.divergence import Divergence, compare, summarize
from fraqtl_bench.quality.lab import Lab, Ticker
from fraqtl_bench.quality.markdown import divergence_lines
from fraqtl_bench.quality.options import QUICK
from fraqtl_bench.quality.schema import ModelReport, Settings
from fraqtl_bench.quality.score import Score, compare_perplexity
from fraqtl_bench.quality.uncertainty import standard_error
from fraqtl_bench.reporting.progress import Progress
from tests.bench.quality_models import demo


def softmax(row: list[float]) -> list[float]:
    most = max(row)
    weights = [math.exp(x - most) for x in row]
    return [w / sum(weights) for w in weights]


def test_against_sums_in_doubles() -> None:
    rows, reference = torch.randn(300, 50) * 3, torch.randn(300, 50) * 3
    found = compare(rows, reference, 7)
    for n in (0, 255, 256, 299):
        p, q = softmax(reference[n].tolist()), softmax(rows[n].tolist())
        assert found.kl[n] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-4)
        assert found.total_variation[n] == pytest.approx(
            sum(max(0.0, a - b) for a, b in zip(p, q, strict=True)), rel=1e-4
        )
        assert found.same[n] == (p.index(max(p)) == q.index(max(q)))
    assert found.context == 7 and any(found.same) != all(found.same)


def test_a_token_that_neither_finds_possible_counts_nothing() -> None:
    rows, reference = torch.randn(4, 9), torch.randn(4, 9)
    whole = compare(rows, reference, 1)
    barred = torch.full((4, 1), -torch.inf)
    assert compare(torch.cat([rows, barred], 1), torch.cat([reference, barred], 1), 1).kl == pytest.approx(whole.kl)


def test_means_percentiles_and_classes_of_context() -> None:
    """Contexts 100 to 399: 29 tokens up to 128, 128 up to 256, 143 up to 512."""
    kl = [random.random() for _ in range(300)]
    windows = [
        Divergence(100, kl, [x / 2 for x in kl], [x < 0.5 for x in kl]),
        Divergence(500, [9.0] * 2, [1.0] * 2, [False] * 2),
        Divergence(513, [5.0], [1.0], [True]),
    ]
    found = summarize(windows)
    assert [(c.up_to, c.tokens) for c in found.by_context] == [(128, 29), (256, 128), (512, 145), (1024, 1)]
    assert found.by_context[1].kl == pytest.approx(sum(kl[29:157]) / 128)
    assert found.by_context[3].agreement == 1.0 and found.by_context[3].kl_error is None
    assert found.tokens == 303 and found.kl == pytest.approx((sum(kl) + 9 * 2 + 5) / 303)
    assert 9.0 >= found.kl_p999 > 8 > 1 > found.kl_p99 > 0.9
    assert found.agreement == pytest.approx((sum(x < 0.5 for x in kl) + 1) / 303)


def test_standard_error_is_that_of_windows_not_of_tokens() -> None:
    means = [random.gauss(0, 1) for _ in range(50)]
    alike = standard_error([10 * m for m in means], [10] * 50)
    assert alike == pytest.approx(torch.tensor(means, dtype=torch.float64).std().item() / 50**0.5)
    assert standard_error([1.0], [10]) is None


def test_standard_error_covers_the_truth_about_as_often_as_it_says() -> None:
    """Windows of several lengths around a mean of 2, two standard errors: 95 % of many tries, with room for chance."""
    rng, covered = random.Random(5), 0
    for _ in range(400):
        counts = [rng.choice([50, 100, 200]) for _ in range(40)]
        sums = [n * rng.gauss(2, 1) for n in counts]
        error = standard_error(sums, counts)
        assert error is not None
        covered += abs(sum(sums) / sum(counts) - 2) < 2 * error
    assert 0.89 < covered / 400 < 0.99


def test_error_of_a_difference_of_perplexities_knows_that_the_text_is_the_same() -> None:
    """Windows differ much from each other, and both methods alike."""
    baseline = [Score(nll, 10, True) for nll in (10.0, 30.0, 20.0)]
    worse = [replace(s, nll=s.nll + gain) for s, gain in zip(baseline, (1.0, 1.2, 1.1), strict=True)]
    delta, error = compare_perplexity(worse, baseline)
    assert delta == pytest.approx(math.exp(2.11) - math.exp(2.0))
    assert error == pytest.approx(math.exp(2.11) * 0.01 / 3**0.5)


class Nobody(Ticker):
    """Watches nothing."""


@pytest.mark.slow
def test_in_the_lab_finer_formats_diverge_less_and_notes_are_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        **QUICK, models=["demo"], text="generated", calibration="generated", last_word="generated",
        methods=["fp16", "k8v8", "k4v4", "int2-token"], measures=["divergence"], dtype=None, device="cpu", seed=0,
    )  # fmt: skip
    notes = Progress(tmp_path / "notes", {}, resume=False)
    report = Lab(demo(), settings, notes, Nobody()).run()
    fine, coarse, worst = (report.row(name).divergence for name in ("k8v8", "k4v4", "int2-token"))  # type: ignore[union-attr]
    assert report.row("fp16").divergence is None  # type: ignore[union-attr]
    assert 0 < fine.kl < coarse.kl < worst.kl and fine.agreement > worst.agreement  # type: ignore[union-attr]
    assert fine.total_variation < coarse.total_variation < worst.total_variation <= 1  # type: ignore[union-attr]
    assert coarse.tokens == report.scored_tokens == sum(c.tokens for c in coarse.by_context)  # type: ignore[union-attr]
    assert said(report)[0].startswith("### The next token")
    again = Lab(demo(), settings, Progress(tmp_path / "notes", {}, resume=True), Nobody())
    monkeypatch.setattr(again.subject.model, "forward", None)  # nothing may be computed anew
    rows = again.rows()
    from fraqtl_bench.quality.lab import add_windows

    assert add_windows(rows, again.measured_windows()) == (report.scored_tokens, report.windows)
    assert rows["k4v4"].divergence == coarse


def said(report: ModelReport) -> list[str]:
    return list(divergence_lines(report))
