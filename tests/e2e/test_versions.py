"""What must be the same on every supported vLLM, and the names that 0.33 has for our formats."""

from __future__ import annotations

import re

import httpx
import pytest

from fraqtl_bench.server import STOCK_SERVER
from fraqtl_vllm._vllm import VERSION
from tests.e2e import forks
from tests.e2e.engine import DEMO_MODEL, Run, run
from tests.e2e.prompts import recall_prompt
from tests.e2e.reports import BLOCK_BYTES, MODEL
from tests.e2e.server import Server, remove_log, running, start, stop

pytestmark = pytest.mark.smoke
has_names = pytest.mark.skipif(VERSION == "0.32", reason="vLLM 0.32 has no place for names of cache dtypes")
PROMPTS = [recall_prompt(n, seed=n)[0] for n in (150, 733)]
MEMORY = ("--kv-cache-memory-bytes", str(64 << 20))


def test_28_tokens_are_two_blocks(demo_server: Server) -> None:
    """A CPU's own blocks of 128 tokens, which vLLM 0.33 chooses late, would make it one of 69,632 bytes."""
    body = {"model": MODEL, "prompt": list(range(100, 125)), "max_tokens": 4, "ignore_eos": True}
    answer = httpx.post(f"{demo_server.url}/v1/completions", json=body, timeout=120).raise_for_status().json()
    report = answer["fraqtl"]
    assert (report["tokens"], report["blocks"], report["block_size"]) == (28, 2, 16)
    assert report["bytes"] == answer["usage"]["kv_cache"]["bytes"] == 2 * BLOCK_BYTES == 17408


def what_is_held(result: Run) -> tuple[object, ...]:
    return result.tokens, result.pool["shapes"], result.pool["dtypes"], result.pool["bytes"], result.kv_pool


@pytest.mark.parametrize("given", ["bfloat16", pytest.param("fraqtl_k8v8", marks=has_names)])
def test_a_cache_dtype_is_served_packed(given: str) -> None:
    """The model's own dtype changes nothing; a name of ours is the format's, and needs no backend."""
    named = {"kv_cache_dtype": given} if given == "bfloat16" else named_alone(given)
    assert what_is_held(run(PROMPTS, kv_format="k8v8", **named)) == what_is_held(run(PROMPTS, kv_format="k8v8"))


def named_alone(cache_dtype: str) -> dict[str, object]:
    return {"kv_cache_dtype": cache_dtype, "attention_backend": None, "additional_config": {}}


@has_names
def test_vllms_own_command_serves_a_named_format() -> None:
    """Without our command line, and without --attention-backend."""
    flags = (str(DEMO_MODEL), *MEMORY, "--enforce-eager", "--max-model-len", "2048")
    with running(*flags, "--kv-cache-dtype", "fraqtl_k4v4", module=STOCK_SERVER) as server:
        assert "Packed KV cache: 4 attention layers, all FRAQTL, in pages of k4v4: 68 bytes a token" in server.log
        tokens = re.search(r"GPU KV cache size: ([\d,]+) tokens|KV cache size: ([\d,]+) tokens", server.log)
        assert tokens, server.log[-2000:]
        assert int((tokens[1] or tokens[2]).replace(",", "")) == (64 << 20) // BLOCK_BYTES * 16
        info = httpx.get(f"{server.url}/metrics", timeout=30).text
        assert 'cache_dtype="fraqtl_k4v4"' in info


@has_names
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--kv-format", "k4v4", "--kv-cache-dtype", "fraqtl_k8v8"),
            "--kv-cache-dtype fraqtl_k8v8 contradicts KV format k4v4, which --kv-format or --additional-config says",
        ),
        (("--kv-cache-dtype", "fraqtl_int3"), "unknown KV format 'int3': choose one of bf16, fp16, k8v8, k8v4, k4v4"),
    ],
)
def test_what_is_refused(flags: tuple[str, ...], said: str) -> None:
    server = start(*flags, launch=forks.launch)
    try:
        assert server.process.wait(120) == 2, server.log[-3000:]
    finally:
        stop(server)
    assert said in server.log.strip().splitlines()[-1]
    remove_log(server)
