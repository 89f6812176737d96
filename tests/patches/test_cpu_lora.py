from __future__ import annotations

import pytest
import torch

from fraqtl_vllm.platform.lora import FraqtlPunicaWrapper


def head(adapted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one slot, as vLLM stacks them: (slots, 1, rank, inputs) and (slots, 1, outputs, rank)."""
    a, b = torch.randn(1, 1, 4, 64), torch.zeros(1, 1, 96, 4)
    return a, b.normal_() if adapted else b


def wrapper(sampled: list[int]) -> FraqtlPunicaWrapper:
    """For a batch whose sampled rows have these slots."""
    made = FraqtlPunicaWrapper(512, 8, "cpu")
    made._sampler_indices[: len(sampled)] = torch.tensor(sampled)
    made.indices_len[1] = len(sampled)
    return made


def test_rows_of_prompts_get_the_head_as_it_is() -> None:
    logits = torch.randn(300, 96)
    before = logits.clone()
    wrapper([0, 0]).add_lora_logits(logits, torch.randn(300, 64), *head(adapted=False), 1.0)
    assert torch.equal(logits, before)


def test_sampled_rows_get_their_adapter() -> None:
    x, logits, (a, b) = torch.randn(2, 64), torch.zeros(2, 96), head(adapted=True)
    wrapper([0, 0]).add_lora_logits(logits, x, a, b, 1.0)
    torch.testing.assert_close(logits, x @ a[0, 0].T @ b[0, 0].T, rtol=1e-4, atol=1e-3)


def test_an_adapted_head_is_not_passed_over() -> None:
    with pytest.raises(RuntimeError):
        wrapper([0, 0]).add_lora_logits(torch.randn(300, 96), torch.randn(300, 64), *head(adapted=True), 1.0)
