"""Several ranks: stages and replicas calibrate, and read prompts as one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors import safe_open

from fraqtl_bench.totals import measure
from tests.e2e.accounts import DRAFTS, accepted_drafts
from tests.e2e.engine import Run, run
from tests.e2e.prompts import recall_prompt
from tests.e2e.reports import ANSWER, MODEL, check, messages
from tests.e2e.server import forked, running

PROMPTS = [recall_prompt(n, seed=n)[0] for n in (300, 411)]


def start(cache: Path, kv_format: str = "k4v4", **options: Any) -> Run:
    section = {"kv_format": kv_format, "calibration_cache": str(cache)}
    sampling = {"prompt_logprobs": 0, "max_tokens": 8}
    return run(PROMPTS, sampling=sampling, additional_config={"fraqtl": section}, **options)


def loss(result: Run) -> float:
    """Mean -log p of the prompts' tokens."""
    found = [x for row in result.prompt_logprobs for x in row]
    return -sum(found) / len(found)


def layers(cache: Path) -> list[str]:
    """Of all files of a folder."""
    found = []
    for path in cache.iterdir():
        with safe_open(path, framework="pt") as file:
            found += [name for name in file.keys() if name.endswith("key_basis")]  # noqa: SIM118 (it is no mapping)
    return sorted(found)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str]]:
    cache = tmp_path_factory.mktemp("alone")
    return start(cache), layers(cache)


@pytest.mark.parametrize("ranks", [1, 2])
def test_pipeline_2(ranks: int, alone: tuple[Run, list[str]], tmp_path: Path) -> None:
    expected, names = alone
    result = start(tmp_path, pipeline_parallel_size=2, tensor_parallel_size=ranks, in_process=False)
    assert "KV cache calibrated" in result.log and ": 4 layers, from the built-in prompt" in result.log
    assert layers(tmp_path) == sorted(names * ranks)
    assert loss(result) == pytest.approx(loss(expected), abs=1e-5 if ranks == 1 else 2e-3)
    assert result.tokens == expected.tokens
    for part in ("block_bytes", "baseline_block_bytes", "attention_bytes"):
        assert result.kv_pool[part] == expected.kv_pool[part]


def test_reports_count_all_stages() -> None:
    with forked("--pipeline-parallel-size", "2") as server:
        body = {"model": MODEL, "messages": messages(), "temperature": 0, "max_tokens": 20}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == ANSWER
        usage = answer["usage"]
        check(answer["fraqtl"], tokens=usage["prompt_tokens"] + usage["completion_tokens"] - 1, blocks=3)
        found = measure(server.url, requests=40, concurrency=8, seed=7)
        assert found["failed"] == [] and found["equal"], found


def test_drafts_on_replicas(tmp_path: Path) -> None:
    """Text and drafts of each are those of one engine alone, and all reports add up."""
    flags = ("--kv-calibration-cache", str(tmp_path), "--speculative-config", json.dumps(DRAFTS), "--dtype", "float32")
    body = {"model": MODEL, "prompt": [recall_prompt(200, seed=n)[0] for n in range(4)], "temperature": 0}
    with forked(*flags) as server:
        alone, accepted = completed(server.url, body), accepted_drafts(server.url)
    with forked("--data-parallel-size", "2", "--api-server-count", "1", *flags) as server:
        for rank in ("0", "1"):
            assert completed(server.url, body, {"X-data-parallel-rank": rank}) == alone
        assert accepted_drafts(server.url) == 2 * accepted > 0
        found = measure(server.url, requests=60, concurrency=16, seed=7)
        assert found["failed"] == [] and found["equal"], found


def completed(url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> list[str]:
    answer = httpx.post(f"{url}/v1/completions", json={**body, "max_tokens": 16}, headers=headers, timeout=60)
    return [choice["text"] for choice in answer.raise_for_status().json()["choices"]]


def test_data_parallel_2_behind_two_api_servers(tmp_path: Path) -> None:
    flags = ("--data-parallel-size", "2", "--api-server-count", "2", "--kv-calibration-cache", str(tmp_path))
    with running(*flags) as server:
        assert server.log.count("layers, from the built-in prompt") == 1
        (path,) = tmp_path.iterdir()
        assert server.log.count(f"layers, from {path}") == 1
        body = {"model": MODEL, "messages": messages(), "temperature": 0, "max_tokens": 20, "logprobs": True}
        answers = []
        for rank in ("0", "1"):
            answer = httpx.post(
                f"{server.url}/v1/chat/completions", json=body, headers={"X-data-parallel-rank": rank}, timeout=60
            ).json()
            usage = answer["usage"]
            check(answer["fraqtl"], tokens=usage["prompt_tokens"] + usage["completion_tokens"] - 1, blocks=3)
            assert answer["fraqtl"]["shared_blocks"] == 0  # this rank has not seen the prompt
            answers.append([x["logprob"] for x in answer["choices"][0]["logprobs"]["content"]])
            assert answer["choices"][0]["message"]["content"] == ANSWER
        assert answers[0] == answers[1]
        found = measure(server.url, requests=60, concurrency=16, seed=7)
        assert found["failed"] == [] and found["equal"], found
