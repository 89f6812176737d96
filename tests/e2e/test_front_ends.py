"""Front ends that aren't ours: refused by our command line, and told nothing by the engine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from fraqtl_bench.server import STOCK_SERVER
from tests.e2e.engine import DEMO_MODEL, run
from tests.e2e.reports import ANSWER, messages
from tests.e2e.server import running

SCHEDULER = "fraqtl_vllm.accounting.scheduler.accounting_scheduler"
STOCK = [str(DEMO_MODEL), "--attention-backend", "FRAQTL", "--scheduler-cls", SCHEDULER, "--enforce-eager"]
STOCK += ["--kv-cache-memory-bytes", "64M", "--served-model-name", "demo"]


def vllm_folder() -> Path:
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def answer_of(url: str) -> Any:
    body = {"model": "demo", "messages": messages(), "temperature": 0, "max_tokens": 30, "stop": ["\n"]}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()


@pytest.mark.parametrize(
    "rust",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not (vllm_folder() / "vllm-rs").exists(), reason="vLLM came without it")
        ),
    ],
)
def test_server_of_vllm_with_our_scheduler_tells_clients_no_block_numbers(rust: bool) -> None:
    with running(*STOCK, module=STOCK_SERVER, environment={"VLLM_USE_RUST_FRONTEND": str(int(rust))}) as server:
        answer = answer_of(server.url)
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert answer["kv_transfer_params"] is None
    assert "fraqtl" not in answer


def test_engine_in_this_process_tells_nobody() -> None:
    found = run([list(range(40, 60))], scheduler_cls=SCHEDULER)
    assert found.kv_transfer_params == [None]
    assert len(found.tokens[0]) == 16
