"""What vLLM's engine makes of a family, in every format: to be judged in a process that knows transformers only.

Some models of vLLM are transformers' own classes, changed, so that the process can't compute a reference any more.
"""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fraqtl_kernels.constants import LayerConstants
from fraqtl_vllm.start import reasons
from tests.e2e.families.accounts import compare
from tests.e2e.families.engine import Answer, Engine, prompts, running
from tests.e2e.families.models import VOCABULARY, Family, blocks_of, make
from tests.e2e.families.row import AccountsResult, Scheduling

FORMATS, DEFAULT = ("bf16", "k8v8", "k4v4"), "k4v4"
QUICK = ("bf16", DEFAULT)
TIES = {"bf16": 0.0, "k8v8": 0.0, "k4v4": 0.05}
"""nat: how near the two best tokens may be where another schedule turns a text. In another order float32 sums differ in
their last bit, on some processors, which tips a code of 4 bits over now and then."""
LONG_CONTEXT = 4096  # tokens of the sequences that capacity is counted for: where a window or a state shows
LAYER = re.compile(r"\.(\d+)\.")

Say = Callable[[str], None]


@dataclass
class FormatRun:
    """One format in a float32 model."""

    answers: list[Answer]
    constants: dict[int, LayerConstants]
    """What calibration found, by the layer's number."""
    scheduling: Scheduling


@dataclass
class Run:
    """A family."""

    refused: str = ""
    failed: str = ""
    layers: list[str] = field(default_factory=list)
    formats: dict[str, FormatRun] = field(default_factory=dict)
    accounts: AccountsResult | None = None
    bfloat16: dict[str, list[Answer]] = field(default_factory=dict)
    """By format, in a bfloat16 model."""
    pools: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of `bfloat16`, of as many bytes each."""


def serve(family: Family, folder: Path, *, quick: bool, say: Say) -> Run:
    """Make the model in `folder`, and serve it. quick: fewer formats, and no bfloat16."""
    run = Run()
    try:
        make(family, folder)
        _in_float32(family, folder, run, QUICK if quick else FORMATS, say)
        if not quick:
            _in_bfloat16(family, folder, run, say)
    except Exception as error:
        traceback.print_exc()
        run.refused = reasons.known(error) or ""
        run.failed = "" if run.refused else reasons.sentence(error)
    return run


def _in_float32(family: Family, folder: Path, run: Run, formats: Sequence[str], say: Say) -> None:
    """So that nothing but the cache rounds. Accounts in the default format."""
    asked = prompts(VOCABULARY[family.tokenizer])
    for kv_format in formats:
        say(f"{kv_format} in a float32 model")
        options = {"num_gpu_blocks_override": blocks_of(family, kv_format), **family.engine}
        with running(folder, kv_format, torch.float32, **options) as engine:
            run.layers = run.layers or _describe(engine)
            answers = engine.alone(asked, with_prompts=True)
            run.formats[kv_format] = FormatRun(
                answers, _constants(engine), _rescheduled(engine, answers, TIES[kv_format])
            )
            if kv_format == DEFAULT:
                say("random requests")
                run.accounts = compare(engine, kv_format)


def _in_bfloat16(family: Family, folder: Path, run: Run, say: Say) -> None:
    """As people serve it, and bf16 in a pool of as many bytes."""
    asked = prompts(VOCABULARY[family.tokenizer])
    memory: dict[str, int] = {}
    for kv_format in (DEFAULT, "bf16"):
        say(f"{kv_format} in a bfloat16 model")
        with running(
            folder, kv_format, torch.bfloat16, **memory, max_model_len=LONG_CONTEXT, **family.engine
        ) as engine:
            run.pools[kv_format] = pool = engine.pool
            run.bfloat16[kv_format] = engine.alone(asked, with_prompts=True)
        memory = {"kv_cache_memory_bytes": pool["blocks"] * pool["block_bytes"]}


def _rescheduled(engine: Engine, alone: list[Answer], tie: float) -> Scheduling:
    """The same prompts as chunks, as prefix hits, and all at once in a pool that is too small. tie: see TIES."""
    asked = [answer.prompt for answer in alone]
    engine.forget_prefixes()
    hit = [engine.alone([prompt, prompt])[1] for prompt in asked]
    engine.forget_prefixes()
    before = engine.preemptions
    chunked = engine.answer(asked[-2:])  # more tokens than a step takes
    after_chunks = engine.preemptions
    engine.forget_prefixes()
    crowded = engine.answer(asked)
    assert after_chunks == before, "two prompts preempted each other: the pool is too small to tell chunks from it"
    found = {"a prefix hit": (hit, alone), "chunks": (chunked, alone[-2:]), "preemption": (crowded, alone)}
    return Scheduling(
        cached_tokens=sum(answer.cached for answer in hit),
        preemptions=engine.preemptions - before,
        changed=[
            what for what, (a, b) in found.items() if any(x.departs_from(y, tie) for x, y in zip(a, b, strict=True))
        ],
    )


def _constants(engine: Engine) -> dict[int, LayerConstants]:
    return {_number(name): layer.impl.constants for name, layer in engine.layers.items()}


def _number(name: str) -> int:
    found = LAYER.search(name)
    assert found is not None, name
    return int(found[1])


def _describe(engine: Engine) -> list[str]:
    """The kinds of attention layers, and how many there are of each."""
    kinds = Counter(
        (layer.impl.num_heads, layer.impl.num_kv_heads, layer.head_size, layer.impl.sliding_window)
        for layer in engine.layers.values()
    )
    return [
        f"{count}: {heads} query heads, {kv_heads} KV heads of {size}" + (f", window {window}" if window else "")
        for (heads, kv_heads, size, window), count in kinds.items()
    ]
