"""Models whose layers look up operators of vLLM's CPU extension, through the engine, against transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.e2e.engine import run
from tests.e2e.prompts import recall_prompt
from tests.e2e.random_models import random_gpt2, random_mixtral

PROMPTS = [recall_prompt(n, seed=n)[0] for n in (150, 301)]


def logprobs_of_transformers(folder: Path) -> list[list[float]]:
    """The log-probability of every prompt token after the first, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for ids in PROMPTS:
            scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            found.append(scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return found


def differences(folder: Path) -> tuple[float, float]:
    """Mean and greatest difference to transformers, and the model says something: its log-probabilities vary."""
    expected = logprobs_of_transformers(folder)
    result = run(
        PROMPTS,
        model=folder,
        kv_format="fp16",  # pages round to 16 bits, nothing else does
        dtype="float32",
        sampling={"prompt_logprobs": 0, "max_tokens": 2},
    )
    pairs = [p for a, b in zip(result.prompt_logprobs, expected, strict=True) for p in zip(a, b, strict=True)]
    assert len(pairs) == sum(len(ids) - 1 for ids in PROMPTS)
    assert torch.tensor([b for _, b in pairs]).std() > 1
    apart = torch.tensor([abs(a - b) for a, b in pairs])
    return float(apart.mean()), float(apart.max())


def test_gpt2(tmp_path: Path) -> None:
    mean, greatest = differences(random_gpt2(tmp_path))
    assert mean < 0.002 and greatest < 0.02  # with "quick_gelu" for "gelu_new" 0.013 and 0.05


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    mean, greatest = differences(random_mixtral(tmp_path))
    assert mean < 0.002 and greatest < 0.02
