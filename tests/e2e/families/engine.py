"""vLLM's engine in this process, so that its layers and its block manager can be looked at."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.e2e.families.models import CONTEXT
from tests.e2e.witness import FILE

BATCH = 128  # tokens a step: prompts that come together are cut into chunks
LENGTHS = (13, 14, 29, 30, 57, 101, 119, 127)  # short ones grow, whatever window there is
SHARED_PREFIX = 48  # tokens that the longer half of the prompts begin with
ANSWER = 24  # tokens
FIRST_TOKEN = 3  # behind the special tokens of both tokenizers


def prompts(vocabulary: int) -> list[list[int]]:
    """Token ids of LENGTHS; each fits into one step."""
    rng = random.Random(0)
    tokens = range(FIRST_TOKEN, min(vocabulary, 256))
    prefix = rng.choices(tokens, k=SHARED_PREFIX)
    found = [rng.choices(tokens, k=length) for length in LENGTHS]
    half = len(found) // 2
    return found[:half] + [prefix + prompt[SHARED_PREFIX:] for prompt in found[half:]]


@dataclass(frozen=True)
class Answer:
    """What one prompt led to, greedily."""

    prompt: list[int]
    tokens: list[int]
    logprobs: Tensor
    """(prompt - 1 + tokens,) of every token but the first, by the model; of `tokens` only where not asked for."""
    cached: int
    """Tokens of the prompt that were found in the prefix cache."""
    gaps: list[float]
    """nat: how far the second best token of each of `tokens` lies behind it."""

    def departs_from(self, other: Answer, tie: float) -> bool:
        """Whether its text is another one, and not only since two tokens, up to `tie`, were as likely there."""
        parts = next((i for i, (a, b) in enumerate(zip(self.tokens, other.tokens, strict=True)) if a != b), None)
        return parts is not None and min(self.gaps[parts], other.gaps[parts]) > tie


class Engine:
    """One engine over one model in one format."""

    def __init__(self, llm: Any, notes: Path) -> None:
        self.llm, self.notes = llm, notes
        self.core = llm.llm_engine.engine_core.engine_core
        self.config = llm.llm_engine.vllm_config

    def close(self) -> None:
        """End it now: it takes the groups of ranks with it, which the next engine of this process makes anew."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.config
        gc.collect()

    def answer(self, prompts: Sequence[list[int]], *, with_prompts: bool = False) -> list[Answer]:
        """The prompts together, as the scheduler likes. with_prompts: log-probabilities of their tokens, too."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=ANSWER,
            ignore_eos=True,
            logprobs=2,
            prompt_logprobs=0 if with_prompts else None,
        )
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [_answer(output) for output in outputs]

    def alone(self, prompts: Sequence[list[int]], *, with_prompts: bool = False) -> list[Answer]:
        """One after the other."""
        return [self.answer([prompt], with_prompts=with_prompts)[0] for prompt in prompts]

    def forget_prefixes(self) -> None:
        assert self.llm.reset_prefix_cache(), "vLLM kept its prefix cache"

    @property
    def preemptions(self) -> int:
        [metric] = [m for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions"]
        return int(metric.value)

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def layers(self) -> dict[str, Any]:
        """Our attention layers, by name."""
        found = self.config.compilation_config.static_forward_context.items()
        return {name: layer for name, layer in found if hasattr(getattr(layer, "impl", None), "use_constants")}

    @property
    def groups(self) -> list[Any]:
        """vLLM's groups of layers that share a block table."""
        return list(self.core.model_executor.driver_worker.worker.model_runner.kv_cache_config.kv_cache_groups)

    @property
    def pool(self) -> dict[str, Any]:
        found: dict[str, Any] = self.llm.collective_rpc("fraqtl_kv_pool")[0]
        return found

    def seen(self) -> list[dict[str, Any]]:
        """What the witness wrote down so far."""
        return [json.loads(line) for line in self.notes.read_text().splitlines()]


@contextmanager
def running(folder: Path, kv_format: str, dtype: torch.dtype, **options: Any) -> Iterator[Engine]:
    """An engine for the model in `folder`, watched by a witness, with prefix caching and steps of BATCH tokens."""
    from vllm import LLM

    notes = folder / f"{kv_format}-{str(dtype).removeprefix('torch.')}.jsonl"
    os.environ[FILE] = str(notes)
    llm = LLM(
        model=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        attention_backend="FRAQTL",
        additional_config={"fraqtl": {"kv_format": kv_format, "calibration_cache": str(folder / "calibration")}},
        enforce_eager=True,
        trust_remote_code=True,
        max_num_batched_tokens=BATCH,
        enable_prefix_caching=True,
        disable_log_stats=False,
        scheduler_cls="tests.e2e.witness.witnessed_scheduler",
        worker_extension_cls="tests.e2e.witness.Pages",
        **{"kv_cache_memory_bytes": 64 << 20, "max_model_len": CONTEXT, **options},
    )
    engine = Engine(llm, notes)
    del llm
    try:
        yield engine
    finally:
        engine.close()


def _answer(output: Any) -> Answer:
    ids = list(output.prompt_token_ids)
    tokens = list(output.outputs[0].token_ids)
    steps = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
    chosen = [*ids[1:], *tokens][-len(steps) :]
    logprobs = torch.tensor([found[token].logprob for token, found in zip(chosen, steps, strict=True)])
    best = [sorted((token.logprob for token in found.values()), reverse=True) for found in output.outputs[0].logprobs]
    return Answer(ids, tokens, logprobs, output.num_cached_tokens or 0, [first - second for first, second, *_ in best])
