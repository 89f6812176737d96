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
from tests.e2e.random_models import random_gpt2, random_gpt_oss, random_mixtral, random_qwen3_moe

PROMPTS = [recall_prompt(n, seed=n)[0] for n in (150, 301)]
TOKENS, FIRST = 12, 4
MARGIN = 0.05  # between the logits of two tokens


def of_transformers(folder: Path) -> tuple[list[list[float]], list[list[int]]]:
    """The log-probability of every prompt token after the first, and greedy text after each prompt, in float32.

    A text ends before a token that is nearly even with another.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs, texts = [], []
    with torch.no_grad():
        for ids in PROMPTS:
            prompt = torch.tensor([ids])
            scores = model(prompt).logits[0, :-1].log_softmax(-1)
            logprobs.append(scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
            options = {"do_sample": False, "eos_token_id": None, "output_scores": True, "return_dict_in_generate": True}
            said = model.generate(prompt, max_new_tokens=TOKENS, **options)
            margins = [float(step[0].topk(2).values.diff().abs()) for step in said.scores]
            sure = next((i for i, margin in enumerate(margins) if margin < MARGIN), TOKENS)
            texts.append(said.sequences[0, len(ids) :][:sure].tolist())
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


def first_tokens(result: Run, texts: list[list[int]]) -> list[list[int]]:
    return [tokens[: len(text)][:FIRST] for tokens, text in zip(result.tokens, texts, strict=True)]


def test_gpt2(tmp_path: Path) -> None:
    folder = random_gpt2(tmp_path)
    expected, _ = of_transformers(folder)
    found = apart(served(folder, kv_format="fp16", dtype="float32"), expected)  # pages round to 16 bits, nothing else
    assert found.mean() < 0.002 and found.max() < 0.02  # with "quick_gelu" for "gelu_new" 0.013 and 0.05


@pytest.mark.parametrize("make", [random_mixtral, random_qwen3_moe, random_gpt_oss])
def test_mixtures_of_experts(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    expected, texts = of_transformers(folder)
    exact = served(folder, kv_format="fp16", dtype="float32")
    found = apart(exact, expected)
    # Where two experts are nearly even, a rounded page may choose the other.
    assert found.mean() < 0.005 and found.quantile(0.98) < 0.02
    assert sum(map(len, texts)) > 3
    assert [tokens[: len(text)] for tokens, text in zip(exact.tokens, texts, strict=True)] == texts
    rounded = served(folder, kv_format="k8v8", dtype="bfloat16")
    assert apart(rounded, expected).mean() < 0.1
    assert first_tokens(rounded, texts) == [text[:FIRST] for text in texts]


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    """Of gpt-oss, which vLLM runs in bfloat16 only; transformers gets the same numbers as 16-bit weights."""
    for folder in (tmp_path / "wide", tmp_path / "packed"):
        random_gpt_oss(folder, mxfp4=folder.name == "packed")
    expected, texts = of_transformers(tmp_path / "wide")
    found = served(tmp_path / "packed", kv_format="bf16", dtype="bfloat16")
    assert apart(found, expected).mean() < 0.1
    assert first_tokens(found, texts) == [text[:FIRST] for text in texts]
