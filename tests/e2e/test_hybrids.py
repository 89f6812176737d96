"""Hybrid models with random weights: attention packed, states as they are, against transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e import random_models
from tests.e2e.engine import Run, run

Maker = Callable[[Path], Path]

PROMPTS = [[(7 * i * (i + n) + 3) % 2000 + 3 for i in range(n)] for n in (3, 40, 150, 333)]
SAMPLING = {"max_tokens": 12, "ignore_eos": True, "prompt_logprobs": 0}
FIRST = 4
"""Tokens of an answer that `k8v8` must have, too, up to one that leads by less than TIE."""
TIE = 0.05  # nat

# The family, and the dtype in which texts are compared. States in float32: in 16 bits a cut of the prompt rounds them.
FAMILIES: dict[str, tuple[Maker, str]] = {
    "lfm2": (random_models.random_lfm2, "float32"),
    "granite": (random_models.random_granite_hybrid, "float32"),
    "falcon_h1": (random_models.random_falcon_h1, "float32"),
    "qwen3_next": (random_models.random_qwen3_next, "float32"),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("hybrids")

    def model(family: str) -> Path:
        return folder / family if (folder / family).exists() else FAMILIES[family][0](folder / family)

    return model


def served(model: Path, family: str, kv_format: str, **options: Any) -> Run:
    options = {"sampling": SAMPLING, "mamba_ssm_cache_dtype": "float32", "max_model_len": 512, **options}
    return run(PROMPTS, model=model, kv_format=kv_format, dtype=FAMILIES[family][1], **options)


def by_transformers(model: Path, dtype: str) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
    """Greedy tokens, by how much each leads, and log-probabilities of the prompts' tokens after the first."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    tokens, leads, prompts = [], [], []
    for ids in PROMPTS:
        with torch.inference_mode():
            whole, lead = list(ids), []
            for _ in range(SAMPLING["max_tokens"]):
                logits = network(torch.tensor([whole])).logits[0].float()
                best = logits[-1].topk(2)
                whole.append(int(best.indices[0]))
                lead.append(float(best.values[0] - best.values[1]))
        logits = logits[: len(ids) - 1].log_softmax(-1)
        prompts.append([float(logits[i, token]) for i, token in enumerate(ids[1:])])
        tokens.append(whole[len(ids) :])
        leads.append(lead)
    return tokens, leads, prompts


def begins_alike(text: list[int], expected: list[int], leads: list[float]) -> bool:
    differing = (lead for a, b, lead in zip(text[:FIRST], expected, leads, strict=False) if a != b)
    return next(differing, 0.0) < TIE


def largest_difference(a: list[list[float]], b: list[list[float]]) -> float:
    return max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


@every_family
def test_logits_and_text_are_those_of_transformers(models: Callable[[str], Path], family: str) -> None:
    model, dtype = models(family), FAMILIES[family][1]
    tokens, leads, logprobs = by_transformers(model, dtype)
    plain = served(model, family, "bf16")
    assert largest_difference(plain.prompt_logprobs, logprobs) < 0.05  # the cache is in bfloat16
    assert [text[:FIRST] for text in plain.tokens] == [text[:FIRST] for text in tokens]
    packed = served(model, family, "k8v8")
    assert all(map(begins_alike, packed.tokens, tokens, leads))
    bound = 0.2 if family == "qwen3_next" else 0.1  # heads of 256, a quarter of them rotated, and experts behind
    assert 0 < largest_difference(packed.prompt_logprobs, plain.prompt_logprobs) < bound


@every_family
def test_chunks_and_prefix_hits_leave_what_follows(models: Callable[[str], Path], family: str) -> None:
    """Up to rounding. Texts in `k8v8`: in `k4v4` a code that rounding moves can turn a near tie after many tokens."""
    model = models(family)
    whole = served(model, family, "k4v4")
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": max(64, whole.kv_pool["block_size"])}
    chunks = served(model, family, "k4v4", **options)
    assert largest_difference(whole.prompt_logprobs, chunks.prompt_logprobs) < 1e-4
    sampling = {"max_tokens": 150, "ignore_eos": True}
    plain = served(model, family, "k8v8", sampling=sampling)
    again = served(model, family, "k8v8", sampling=sampling, rounds=2, **options)
    assert max(plain.cached_tokens) == 0 < max(again.cached_tokens)
    assert plain.tokens == again.tokens


@every_family
def test_preemption_leaves_the_text(models: Callable[[str], Path], family: str) -> None:
    """Short prompts are let in together, and their answers don't fit."""
    model = models(family)
    options = {"sampling": {"max_tokens": 300, "ignore_eos": True}, "dtype": FAMILIES[family][1], "max_model_len": 512}
    options |= {"mamba_ssm_cache_dtype": "float32", "model": model, "kv_format": "k8v8"}
    prompts = [prompt[:n] for n, prompt in zip((5, 7, 9, 11), PROMPTS[1:] * 2, strict=False)]
    free = run(prompts, **options)
    pool = free.kv_pool
    sequence = pool["attention_bytes"] + pool["state_bytes"] + pool["padding_bytes"]
    tight = run(prompts, kv_cache_memory_bytes=2 * sequence, **options)
    assert free.preemptions == 0 < tight.preemptions
    assert free.tokens == tight.tokens
