"""`fraqtl-bench decode-step`: what is read of a server, and how rounds are paired."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from fraqtl_bench import decode_step
from fraqtl_bench.cli import main
from fraqtl_bench.decode_step import Arm, measure, summarize
from fraqtl_bench.server import Server


class FakeServer:
    """Answers like the server: every completion adds its latencies to the histogram."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.sum, self.count, self.asked = seconds, 5.0, 7.0, []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            label = '{engine="0",model_name="m"}'
            return httpx.Response(
                200,
                text=f"# HELP vllm:inter_token_latency_seconds x\n"
                f'vllm:inter_token_latency_seconds_bucket{{engine="0",le="0.01",model_name="m"}} 3.0\n'
                f"vllm:inter_token_latency_seconds_count{label} {self.count}\n"
                f"vllm:inter_token_latency_seconds_sum{label} {self.sum}\n"
                f"vllm:inter_token_latency_seconds_created{label} 1.7e+09\n",
            )
        body: dict[str, Any] = __import__("json").loads(request.content)
        self.asked.append(body)
        self.sum += self.seconds * (body["max_tokens"] - 1)
        self.count += body["max_tokens"] - 1
        return httpx.Response(200, json={})


def test_a_round_is_what_the_histogram_grew_by() -> None:
    fake = FakeServer(0.25)
    arm = Arm("k4v4", Server("http://server", None, None), "m")  # type: ignore[arg-type]
    with httpx.Client(transport=httpx.MockTransport(fake)) as client, ThreadPoolExecutor(2) as pool:
        assert arm.round(client, pool, [[1, 2], [3, 4]], 5) == pytest.approx(0.25)
    assert sorted(body["prompt"] for body in fake.asked) == [[1, 2], [3, 4]]
    assert all(body["ignore_eos"] and body["max_tokens"] == 5 for body in fake.asked)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down halfway changes the times, not the ratio."""
    found = summarize({"bf16": [1.0, 1.0, 5.0, 5.0], "k4v4": [1.1, 1.1, 5.5, 5.5]})
    assert found["k4v4"]["ratio"]["median"] == pytest.approx(1.1)
    assert found["bf16"]["ratio"]["median"] == 1 and found["bf16"]["itl_ms"]["median"] == 3000


def test_arms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int, int]] = []

    def round_of(self: Arm, client: Any, pool: Any, prompts: list[list[int]], tokens: int) -> float:
        order.append((self.name, len(prompts[0]), tokens))
        return 1.0

    monkeypatch.setattr(Arm, "round", round_of)
    arms = [Arm(name, Server("", None, None), "m") for name in ("a", "b")]  # type: ignore[arg-type]
    measure(arms, 33, argparse.Namespace(seed=0, batch=1, rounds=3, tokens=9))
    assert order == [("a", 33, 8), ("b", 33, 8)] + [(n, 33, 9) for n in ("a", "b", "b", "a", "a", "b")]


def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No server starts before the last one has ended, and the result of each is there before the next starts."""
    out, events = tmp_path / "itl.json", []

    def start(name: str, servers: ExitStack, args: argparse.Namespace) -> Arm:
        saved = list(json.loads(out.read_text())["decode_step"]["33"]) if out.exists() else []
        events.append(("start", name, saved))
        servers.callback(lambda: events.append(("stop", name)))
        return Arm(name, Server("", None, None), "m")  # type: ignore[arg-type]

    monkeypatch.setattr(decode_step, "start", start)
    monkeypatch.setattr(Arm, "round", lambda self, *_: {"bf16": 2.0, "k4v4": 1.0}[self.name])
    main(["decode-step", "--one-at-a-time", "--contexts", "33", "--rounds", "2", "--out", str(out)])
    assert events == [("start", "bf16", []), ("stop", "bf16"), ("start", "k4v4", ["bf16"]), ("stop", "k4v4")]
    assert json.loads(out.read_text())["decode_step"]["33"]["k4v4"]["ratio"]["median"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--formats", "int3"], "unknown KV format 'int3': choose one of stock, bf16, "),
        (["--formats", "stock", "k4v4"], "stock vLLM doesn't know the demo model: give one with --model"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_step, "running", None)
    with pytest.raises(SystemExit) as ended:
        main(["decode-step", *arguments])
    assert ended.value.code == 2
    assert f"fraqtl-bench: {sentence}" in capsys.readouterr().err
