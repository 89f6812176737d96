"""Runs vLLM's engine on prompts in a fresh process and tells what it saw, for tests of the engine itself.

In that process the engine core is not a process of its own (VLLM_ENABLE_V1_MULTIPROCESSING=0), so
the pool tensors and the block manager can be looked at directly; with tensor parallelism they can't.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.e2e import forks

DEMO_MODEL = forks.ROOT / "fraqtl_serve" / "demo_model"


@dataclass(frozen=True)
class Run:
    texts: list[str]
    tokens: list[list[int]]
    preemptions: int
    queried: int
    """Tokens that were looked for in a connector's store."""
    loaded: int
    """Those of them that it had."""
    cached_tokens: list[int]
    pool: dict[str, Any]
    prompt_logprobs: list[list[float]]
    kv_transfer_params: list[Any]
    kv_pool: dict[str, Any]
    choices: list[list[list[int]]]
    logprobs: list[list[float]]
    accepted: int
    drafted: int
    log: str


def run(
    prompts: list[list[int]],
    *,
    kv_format: str = "k4v4",
    model: str | Path = DEMO_MODEL,
    sampling: dict[str, Any] | None = None,
    rounds: int = 1,
    in_process: bool = True,
    compares_pools: bool = False,
    **engine: Any,
) -> Run:
    """Greedy text of every prompt. `rounds` > 1 runs the same prompts again; the last round counts.

    compares_pools: say which layers' pools have changed, which takes a second or two.
    """
    options = {
        "model": str(model),
        "enforce_eager": True,
        "max_model_len": 2048,
        "dtype": "bfloat16",
        "attention_backend": "FRAQTL",
    }
    options |= {"kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": False, "disable_log_stats": False}
    options |= {"additional_config": {"fraqtl": {"kv_format": kv_format}}, **engine}
    job = {"engine": options, "prompts": prompts, "sampling": sampling or {}, "rounds": rounds}
    job["compares_pools"] = compares_pools
    with tempfile.TemporaryDirectory(prefix="fraqtl-engine-") as folder:
        log = Path(folder) / "log"
        try:
            found = forks.in_process(log, _answer, job, VLLM_ENABLE_V1_MULTIPROCESSING="0" if in_process else "1")
        except forks.ProcessError as error:
            raise RuntimeError(f"{error}:\n{log.read_text(errors='replace')[-6000:]}") from None
        return Run(**found, log=log.read_text(errors="replace"))


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(**job["engine"])
    if "json_schema" in job["sampling"]:
        schema = job["sampling"].pop("json_schema")
        job["sampling"]["structured_outputs"] = StructuredOutputsParams(json=schema)
    pools = _pools(llm)
    compared = pools if job["compares_pools"] else []
    before = [_digest(pool) for pool in compared]
    params = SamplingParams(**{"temperature": 0, "max_tokens": 16, **job["sampling"]})
    memory = [_resident_bytes()]
    outputs: list[Any] = []
    for _ in range(job["rounds"]):
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        memory.append(_resident_bytes())
    counters = {m.name: getattr(m, "value", None) for m in llm.get_metrics() if not hasattr(m, "values")}
    result = {
        "texts": [o.outputs[0].text for o in outputs],
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "preemptions": counters.get("vllm:num_preemptions", 0),
        "queried": counters.get("vllm:external_prefix_cache_queries", 0),
        "loaded": counters.get("vllm:external_prefix_cache_hits", 0),
        "cached_tokens": [o.num_cached_tokens or 0 for o in outputs],
        "kv_transfer_params": [o.kv_transfer_params for o in outputs],
        "kv_pool": llm.collective_rpc("fraqtl_kv_pool")[0],
        "choices": [[list(choice.token_ids) for choice in o.outputs] for o in outputs],
        "logprobs": [_logprobs(o) for o in outputs],
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens") or 0,
        "drafted": counters.get("vllm:spec_decode_num_draft_tokens") or 0,
        "prompt_logprobs": [_prompt_logprobs(o) for o in outputs],
        "pool": {
            "dtypes": sorted({str(p.dtype) for p in pools}),
            "shapes": [list(p.shape) for p in pools],
            "bytes": sum(
                p.untyped_storage().nbytes() for p in {p.untyped_storage().data_ptr(): p for p in pools}.values()
            ),
            "changed": [_digest(p) != b for p, b in zip(compared, before, strict=True)],
            "resident_growth": memory[-1] - memory[0],
        },
    }
    with mock.patch("gc.collect"):  # twice, of all that vLLM imports
        llm.llm_engine.engine_core.shutdown()  # this process ends without what Python does at an exit
    return result


def _prompt_logprobs(output: Any) -> list[float]:
    """The log-probability of every prompt token after the first, if it was asked for."""
    tokens = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=False)
    return [found[token].logprob for token, found in tokens]


def _logprobs(output: Any) -> list[float]:
    """The log-probability of every token of a text, if it was asked for."""
    text = output.outputs[0]
    return [found[token].logprob for token, found in zip(text.token_ids, text.logprobs or [], strict=False)]


def _pools(llm: Any) -> list[Any]:
    """The KV-cache tensor of every layer, or nothing if the engine lives in other processes."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return [] if core is None else list(core.model_executor.driver_worker.worker.model_runner.kv_caches)


def _digest(tensor: Any) -> int:
    import torch

    return int(tensor.to(torch.int64).sum())


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")
