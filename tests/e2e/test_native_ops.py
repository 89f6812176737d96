"""Models whose layers look up operators of vLLM's CPU extension, through the engine, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.e2e.engine import Run, run
from tests.e2e.prompts import recall_prompt
from tests.e2e.random_models import random_gpt2, random_mixtral, random_qwen3_moe

PROMPTS = [recall_prompt(n, seed=n)[0] for n in (150, 301)]
TOKENS, FIRST = 12, 4


def of_transformers(folder: Path) -> tuple[list[list[float]], list[list[int]]]:
    """The log-probability of every prompt token after the first, and greedy text after each prompt, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs, texts = [], []
    with torch.no_grad():
        for ids in PROMPTS:
            prompt = torch.tensor([ids])
            scores = model(prompt).logits[0, :-1].log_softmax(-1)
            logprobs.append(scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
            said = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
            texts.append(said[0, len(ids) :].tolist())
    return logprobs, texts


def served(folder: Path, **options: Any) -> Run:
    """The same of the engine."""
    sampling = {"prompt_logprobs": 0, "max_tokens": TOKENS, "ignore_eos": True}
    return run(PROMPTS, model=folder, sampling=sampling, **options)


def apart(result: Run, expected: list[list[float]]) -> Tensor:
    """How far all log-probabilities are from transformers', and the model says something: they vary."""
    pairs = [p for a, b in zip(result.prompt_logprobs, expected, strict=True) for p in zip(a, b, strict=True)]
    assert len(pairs) == sum(len(ids) - 1 for ids in PROMPTS)
    assert torch.tensor([b for _, b in pairs]).std() > 1
    return torch.tensor([abs(a - b) for a, b in pairs])


def test_gpt2(tmp_path: Path) -> None:
    folder = random_gpt2(tmp_path)
    expected, _ = of_transformers(folder)
    found = apart(served(folder, kv_format="fp16", dtype="float32"), expected)  # pages round to 16 bits, nothing else
    assert found.mean() < 0.002 and found.max() < 0.02  # with "quick_gelu" for "gelu_new" 0.013 and 0.05


@pytest.mark.parametrize("make", [random_mixtral, random_qwen3_moe])
def test_mixtures_of_experts(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    expected, texts = of_transformers(folder)
    exact = served(folder, kv_format="fp16", dtype="float32")
    found = apart(exact, expected)
    assert found.mean() < 0.002 and found.max() < 0.02
    assert exact.tokens == texts
    rounded = served(folder, kv_format="k8v8", dtype="bfloat16")  # a token's experts may be others, where two are even
    assert apart(rounded, expected).mean() < 0.1
    assert [tokens[:FIRST] for tokens in rounded.tokens] == [tokens[:FIRST] for tokens in texts]
