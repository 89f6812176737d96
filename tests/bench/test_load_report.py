"""The arithmetic of a load report, what is read of a server, the options for `vllm bench serve`, and the page."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fraqtl_bench import server
from fraqtl_bench.load import figures, machine, metrics, options, summary
from fraqtl_bench.load.arms import STOCK, arms_of, last_error
from fraqtl_bench.load.drive import options as client_options
from fraqtl_bench.load.markdown import markdown
from fraqtl_bench.load.measure import Outcome
from fraqtl_bench.load.schema import ArmReport, Capacity, Fit, Latency, Point, Report, Run, Served, Settings
from fraqtl_bench.reporting.page import fill
from tests.browser import file_page

LADDER = [Point(concurrency=c, input=100, output=10, requests=4 * c) for c in (1, 4)]
SPEEDS = {("bf16", 1): 100, ("bf16", 4): 200, ("k4v4", 1): 90, ("k4v4", 4): 270}
PIPES: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
CONTEXTS = [Point(kind="context", concurrency=1, input=i, output=10, requests=2) for i in (100, 1000, 2000)]


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "arms": ["bf16", "k4v4"], "urls": {}, "model": None, "tokenizer": None, "kv_memory_bytes": 1 << 20,
        "gpu_memory_utilization": None, "server_args": [], "dataset": "random", "dataset_path": None, "prefix_len": 8,
        "prefixes": 2, "points": [*CONTEXTS, *LADDER], "repeats": 2, "warmup": 1, "slo": {}, "temperature": 0.0,
        "seed": 0,
    }  # fmt: skip
    return Settings(**{**given, **changes})


def made_run(arm: str, repeat: int, point: Point, speed: float, itl: float, **served: Any) -> Run:
    gained: dict[str, Any] = {
        "requests": point.requests, "prompt_tokens": 100 * point.requests, "output_tokens": 10 * point.requests,
        "preemptions": 0, "queue_ms": 1.0, "prefill_ms": 1.0, "decode_ms": 1.0, "prefix_hits": 0.0, "kv_bytes": 10.0,
        "saved_bytes": 30.0, "running_mean": 1.0, "running_peak": 1, "waiting_peak": 0, "pool_use_peak": 0.5,
    }  # fmt: skip
    latency = Latency(median=itl, p99=2 * itl)
    return Run(
        arm=arm, repeat=repeat, point=point, seconds=8.0, completed=point.requests, output_tokens_per_s=speed,
        total_tokens_per_s=2 * speed, requests_per_s=speed / 10, goodput=speed / 20, tpot=latency, itl=latency,
        ttft=Latency(median=500.0, p99=900.0), served=Served(**{**gained, **served}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    """bf16 and k4v4; in the second turn the machine is half as fast."""
    runs = []
    for repeat, pace in enumerate((1.0, 0.5)):
        for arm, base, slope in (("bf16", 2.0, 0.002), ("k4v4", 3.0, 0.001)):
            runs += [made_run(arm, repeat, point, 10, base + slope * (point.input + 5)) for point in CONTEXTS]
            for point in LADDER:
                speed = pace * SPEEDS[arm, point.concurrency]
                runs.append(made_run(arm, repeat, point, speed, 5, preemptions=repeat))
    capacities = {
        arm: Capacity(
            kv_format=arm, tokens=tokens, blocks=tokens // 16, block_size=16, pool_bytes=1 << 20, max_model_len=4096,
            full_length=1.0,
        )
        for arm, tokens in (("bf16", 1600), ("k4v4", 6400))
    }  # fmt: skip
    given = settings(arms=["bf16", "k4v4", "k8v8"])
    found = Outcome(runs=runs, capacities=capacities, reasons={"k8v8": "its server did not start: no </script> memory"})
    provenance = {"command": "fraqtl-bench load", "machine": {"cpu": "a CPU", "cores": 2}}
    arms = summary.reports(given, found)
    return Report(provenance=provenance, settings=given, ended="complete", seconds=5, arms=arms, runs=runs)


def at(arm: ArmReport, concurrency: int) -> Any:
    return next(s for s in arm.summaries if s.point.kind == "ladder" and s.point.concurrency == concurrency)


def test_ratios_are_taken_within_a_turn(report: Report) -> None:
    first, second, third = report.arms
    four = at(second, 4)
    assert four.ratios["output_tokens_per_s"].model_dump() == pytest.approx({"median": 1.35, "low": 1.35, "high": 1.35})
    assert four.values["output_tokens_per_s"].model_dump() == pytest.approx({"median": 202.5, "low": 135, "high": 270})
    assert at(first, 4).ratios["itl_ms"].median == 1
    assert "preemptions" not in four.ratios and four.values["preemptions"].high == 1
    assert third.summaries == [] and third.capacity is None and third.reason


def test_prompts_are_set_against_the_speed_of_one_that_is_alone(report: Report) -> None:
    # 500 ms each, 16 requests one after another, in 8 s: all of the time
    assert at(report.arms[0], 4).prompt_share == pytest.approx(1.0)
    assert at(report.arms[0], 1).prompt_share == pytest.approx(0.25)


def test_lines_are_fitted_and_crossed(report: Report) -> None:
    first, second = report.arms[0].fit, report.arms[1].fit
    assert first and second
    assert (first.slope_us_per_1k, first.intercept_ms) == pytest.approx((2000, 2)) and first.r_squared > 0.999
    assert second.slope_ratio == pytest.approx(0.5) and second.break_even == pytest.approx(1000)
    assert second.verdict == "faster from 1,000 tokens of context" and first.verdict == ""


@pytest.mark.parametrize(
    ("slope", "intercept", "verdict", "break_even"),
    [
        (3.0, 1.0, "slower from 1,000 tokens of context", 1000),
        (1.0, 1.0, "faster at every context", None),
        (3.0, 3.0, "slower at every context", None),
        (2.0, 3.0, "slower at every context", None),
    ],
)
def test_verdicts(slope: float, intercept: float, verdict: str, break_even: float | None) -> None:
    def line(slope: float, intercept: float) -> Fit:
        return Fit(concurrency=1, points=[], slope_us_per_1k=1000 * slope, intercept_ms=intercept, r_squared=1)

    own = line(slope, intercept)
    summary.compare_fits(own, line(2.0, 2.0))
    assert own.verdict == verdict and own.break_even == (None if break_even is None else pytest.approx(break_even))


def test_the_frontier_has_what_nothing_beats(report: Report) -> None:
    frontier = {(a.name, s.point.concurrency) for a in report.arms for s in a.summaries if s.on_frontier}
    assert frontier == {("bf16", 1), ("k4v4", 4)}


def test_requests_fit_in_whole_blocks() -> None:
    # 4 requests of 2,048 + 128 tokens: 136 blocks each, the last token is not written
    found = Capacity(
        kv_format=None, tokens=8720, blocks=545, block_size=16, pool_bytes=None, max_model_len=None, full_length=None
    )
    metrics.add_request_size(found, 2176.0)
    assert found.requests == 4
    metrics.add_request_size(found, 2178.0)  # 2,177 entries: 137 blocks
    assert found.requests == 3


def test_what_a_server_says_of_itself() -> None:
    text = (
        "# TYPE vllm:cache_config_info gauge\n"
        'vllm:cache_config_info{block_size="16",cache_dtype="fp8",engine="0",kv_cache_max_concurrency="3.5",'
        'kv_cache_size_tokens="1584",num_gpu_blocks="100"} 1.0\n'
        "# TYPE vllm:num_preemptions counter\n"
        'vllm:num_preemptions_total{engine="0"} 3.0\nvllm:num_preemptions_total{engine="1"} 4.0\n'
        "# TYPE vllm:request_queue_time_seconds histogram\n"
        'vllm:request_queue_time_seconds_bucket{engine="0",le="+Inf"} 2.0\n'
        'vllm:request_queue_time_seconds_count{engine="0"} 2.0\nvllm:request_queue_time_seconds_sum{engine="0"} 3.0\n'
        "# TYPE vllm:request_success counter\n"
        'vllm:request_success_total{finished_reason="stop"} 1.0\n'
        'vllm:request_success_total{finished_reason="length"} 4.0\n'
    )

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=text) if request.url.path == "/metrics" else httpx.Response(404)

    with httpx.Client(transport=httpx.MockTransport(answer)) as http:
        found = metrics.capacity(http, "http://stock")
        after = metrics.read(http, "http://stock")
    assert found and (found.tokens, found.blocks, found.kv_format, found.full_length) == (1584, 100, "fp8", 3.5)
    assert found.pool_bytes is None  # a stock server doesn't tell
    before = metrics.Snapshot(Counter({"vllm:num_preemptions_total": 2, "vllm:request_success_total": 1}), {})
    served = metrics.gained(before, after, metrics.Gauges(running=[2, 4], waiting=[0, 3], use=[0.5, 0.25]))
    assert (served.preemptions, served.requests, served.queue_ms) == (5, 4, 1500)
    assert (served.running_mean, served.running_peak, served.waiting_peak, served.pool_use_peak) == (3, 4, 3, 0.5)
    assert served.kv_bytes is None and served.prefix_hits is None


def test_cores_of_others_are_what_is_busy_without_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, now = os.sysconf("SC_CLK_TCK"), [100.0]
    stat, used = tmp_path / "stat", [0.0]

    def busy(seconds: float) -> None:
        stat.write_text(f"cpu  {int(seconds * ticks)} 0 0 99999 7 0 0 0 0 0\ncpu0 1 1 1\n")

    monkeypatch.setattr(machine, "STAT", stat)
    monkeypatch.setattr(machine, "_group", lambda server: used[0])
    monkeypatch.setattr(machine.resource, "getrusage", lambda who: SimpleNamespace(ru_utime=used[0], ru_stime=0.5))
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])
    busy(50)
    watch = machine.Watch(SimpleNamespace())  # type: ignore[arg-type]
    busy(68)
    used[0], now[0] = 1.0, 110.0  # 18 s of work in 10 s, 3 of them the server's, the client's and ours
    assert watch.cores() == pytest.approx(1.5)
    assert machine.Watch(None).cores() is None


def test_the_work_of_a_group_is_read_of_its_processes() -> None:
    process = subprocess.Popen([sys.executable, "-c", "sum(range(10**7)); print(flush=True); input()"], **PIPES)
    assert process.stdout
    process.stdout.readline()
    assert machine._group(server.Server("", process, Path())) > 0
    process.communicate(b"\n")
    assert machine._group(server.Server("", process, Path())) == 0


def test_the_reason_in_a_log() -> None:
    log = (
        "INFO starting\n(EngineCore pid=7) ERROR ValueError: No available memory for the cache blocks.\n"
        "(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_error(log) == "ValueError: No available memory for the cache blocks."
    assert last_error("fraqtl-serve: unknown KV format 'x'\n") == "fraqtl-serve: unknown KV format 'x'"
    assert (
        last_error("RuntimeError: Engine core initialization failed.")
        == "RuntimeError: Engine core initialization failed."
    )
    assert last_error("all is well") is None


def arguments(*given: str) -> argparse.Namespace:
    from fraqtl_bench.load import add_command

    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    return parser.parse_args(["load", *given])


def test_points_of_a_turn(tmp_path: Path) -> None:
    found = options.settings_of(
        arguments("--contexts", "512", "2048", "--concurrency", "1", "8", "--rates", "0.5", "--kv-memory", "256MiB")
    )
    assert found.kv_memory_bytes == 256 << 20
    names = [
        "context 512, concurrency 1",
        "context 2048, concurrency 1",
        "concurrency 1",
        "concurrency 8",
        "0.5 requests/s",
    ]
    assert [p.name for p in found.points] == names
    assert [p.requests for p in found.points] == [2, 2, 8, 32, 64]
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n\n')
    custom = options.settings_of(arguments("--dataset", "custom", "--dataset-path", str(file), "--concurrency", "2"))
    assert [p.requests for p in custom.points] == [3]  # no prompt twice
    shared = options.settings_of(arguments("--dataset", "prefix_repetition", "--prefixes", "3", "--concurrency", "4"))
    assert [p.requests for p in shared.points] == [18]  # a whole number for every prefix


def test_every_arm_gets_the_same_memory_and_flags() -> None:
    found = arms_of(settings(arms=["k4v4", "vllm:fp8"], model="/m", server_args=["--max-model-len", "64"]))
    same = ("--kv-cache-memory-bytes", "1048576", "--max-model-len", "64")
    assert found[0].arguments == ("/m", "--kv-format", "k4v4", *same) and found[0].plugins
    assert found[1].arguments == ("/m", "--kv-cache-dtype", "fp8", *same) and not found[1].plugins
    assert found[1].module[-1] == "serve"
    on_gpu = arms_of(settings(kv_memory_bytes=None, gpu_memory_utilization=0.5))
    assert on_gpu[0].arguments[-2:] == ("--gpu-memory-utilization", "0.5")


def test_vllm_knows_the_options_and_the_stock_arms(tmp_path: Path) -> None:
    from typing import get_args

    from vllm.benchmarks.serve import add_cli_args
    from vllm.config.cache import CacheDType

    from fraqtl_bench import bench_serve

    assert {name.removeprefix("vllm:") for name in STOCK} <= set(get_args(CacheDType))
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    for change in (
        {"slo": {"ttft": 200.0}},
        {"dataset": "prefix_repetition"},
        {"dataset": "custom", "dataset_path": "p.jsonl"},
    ):
        given = settings(**change)
        for point in (given.points[-1], Point(rate=2.5, input=100, output=10, requests=4)):
            line = bench_serve.command("http://h:1", "m", "/m", tmp_path, *client_options(given, point, 7))
            found = parser.parse_args(line[5:])
            assert (found.num_prompts, found.seed, found.model, found.tokenizer) == (point.requests, 7, "m", "/m")
            assert found.max_concurrency == point.concurrency and found.request_rate == (point.rate or float("inf"))
            assert found.ready_check_timeout_sec == 0 and found.num_warmups == 0  # the first prompt would be cached
            if given.dataset == "custom":
                assert found.output_len == 10 and found.no_oversample
                continue
            assert found.prefix_repetition_prefix_len + found.prefix_repetition_suffix_len == 100
            prefixes = point.requests if given.dataset == "random" else 2
            assert found.prefix_repetition_num_prefixes == prefixes


def test_markdown_has_every_arm_and_measure(report: Report) -> None:
    text = markdown(report)
    assert "- `k8v8` did not run: its server did not start" in text
    assert "| `k4v4` | 1.00 | 400 | 6,400 | 4.00 | 57 of 110 tokens | 1.00 |" in text
    assert "| concurrency 4 | `k4v4` | 202.5 (135.0-270.0) | 1.35 |" in text
    assert "faster from 1,000 tokens of context" in text


def test_the_figure_is_written(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    [file] = figures.save(report, tmp_path)
    assert file.name == "load.png" and file.read_bytes().startswith(b"\x89PNG")
    bare = report.model_copy(update={"arms": [a.model_copy(update={"fit": None}) for a in report.arms]})
    assert figures.save(bare, tmp_path) == [file]


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("page") / "load.html"
    path.write_text(fill("fraqtl_bench.load", report.model_dump(mode="json")), encoding="utf-8")
    with file_page(path) as found:
        yield found


def test_the_page_shows_every_arm_run_and_reason(page: Any, report: Report) -> None:
    cards = [node.text_content() for node in page.query_selector_all("#capacity .card")]
    assert "57 requests at once" in cards[1] and "4 times bf16" in cards[1]
    assert "did not run" in cards[2] and "no </script> memory" in cards[2]
    assert len(page.query_selector_all("#body tr")) == len(report.runs)
    page.select_option("#arm", "k4v4")
    assert page.text_content("#count") == f"{len(report.runs) // 2} of {len(report.runs)}"
    assert "faster from 1,000 tokens of context" in page.text_content("#fits")
    assert len(page.query_selector_all("#pareto circle")) == 4 and len(page.query_selector_all("#fit circle")) == 6


def test_the_curves_follow_the_choice(page: Any) -> None:
    assert len(page.query_selector_all("#curves polyline")) == 2 and len(page.query_selector_all("#curves circle")) == 4
    titles = [node.text_content() for node in page.query_selector_all("#curves circle title")]
    assert "k4v4, concurrency 4: 202.5 (135 to 270)" in titles
    page.check("#ratio")
    titles = [node.text_content() for node in page.query_selector_all("#curves circle title")]
    assert "k4v4, concurrency 4: 1.35 (1.35 to 1.35)" in titles
    page.select_option("#measure", "preemptions")  # a count has no ratio
    assert page.query_selector_all("#curves circle") == []
    page.uncheck("#ratio")
    assert len(page.query_selector_all("#curves circle")) == 4


def test_it_fits_a_narrow_window(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_data_of_the_page_is_the_report(report: Report) -> None:
    text = fill("fraqtl_bench.load", report.model_dump(mode="json"))
    data = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert json.loads(data) == report.model_dump(mode="json")
