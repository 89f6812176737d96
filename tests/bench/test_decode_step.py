"""`fraqtl-bench decode-step`: what is read of a server, and how rounds are paired."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
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
