"""The rejection sampler of vLLM on torch versions of its kernels: what it must give, and how often."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps
from fraqtl_vllm.platform.draft_ops import DRAFT_KERNELS, accept_best, accept_drawn, draw_recovered, repeat_rows

ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)  # rows with two, no and three drafts
EMPTY = -1
TOKENS = 4


def empty(rows: int = 3, longest: int = 3) -> Tensor:
    return torch.full((rows, longest + 1), EMPTY, dtype=torch.int32)


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        ([1, 2, 3, 1, 2], [[1, 2, 90, -1], [91, -1, -1, -1], [3, 1, 2, 92]]),
        ([9, 2, 3, 1, 9], [[1, -1, -1, -1], [91, -1, -1, -1], [3, 1, 2, -1]]),
        ([1, 9, 9, 1, 2], [[1, 2, -1, -1], [91, -1, -1, -1], [3, -1, -1, -1]]),
        ([-1, -1, 3, -1, -1], [[1, -1, -1, -1], [91, -1, -1, -1], [3, 1, -1, -1]]),
    ],
)
def test_greedy_rows_get_the_models_tokens(drafts: list[int], expected: list[list[int]]) -> None:
    best, bonus = torch.tensor([1, 2, 3, 1, 2]), torch.tensor([[90], [91], [92]])
    output = empty()
    accept_best(output, ENDS, torch.tensor(drafts, dtype=torch.int32), best, bonus, None, 3, None, None, False)
    assert output.tolist() == expected
    only_last = torch.tensor([False, False, True])
    output = empty()
    accept_best(output, ENDS, torch.tensor(drafts, dtype=torch.int32), best, bonus, only_last, 3, None, None, False)
    assert output.tolist() == [[EMPTY] * 4, [EMPTY] * 4, expected[2]]


def draw(target: Tensor, draft: Tensor | None, drafts: Tensor, rows: int) -> Tensor:
    """One draft a row through the sampler's kernels: (rows, 2) tokens."""
    ends = torch.arange(1, rows + 1, dtype=torch.int32)
    p, q = target.expand(rows, -1), None if draft is None else draft.expand(rows, -1)
    recovered = torch.empty(rows, dtype=torch.int32)
    draw_recovered(recovered, ends, drafts, q, p, torch.empty(rows, TOKENS).exponential_().reciprocal(), TOKENS)
    output = empty(rows, 1)
    uniform, greedy = torch.rand(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.bool)
    bonus = torch.full((rows, 1), 99)
    accept_drawn(output, ends, drafts, q, p, bonus, recovered, uniform, greedy, 1, TOKENS, None, q is None, False)
    return output


@pytest.mark.parametrize("has_probabilities", [True, False])
def test_other_rows_are_drawn_from_the_models_probabilities(has_probabilities: bool) -> None:
    """Whatever the drafts are drawn from: that is the promise of rejection sampling."""
    torch.manual_seed(0)
    rows = 20_000
    target, draft = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.4, 0.1, 0.1])
    drafts = torch.multinomial(draft, rows, replacement=True).int()
    if not has_probabilities:
        drafts = torch.full((rows,), 1, dtype=torch.int32)
    output = draw(target, draft if has_probabilities else None, drafts, rows)
    counts = torch.bincount(output[:, 0], minlength=TOKENS)
    expected = rows * target
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.27  # chi-square, 3 degrees of freedom, 1 in 1,000
    accepted = output[:, 0] == drafts
    assert torch.equal(output[:, 1] == 99, accepted)
    assert torch.equal(output[:, 1] == EMPTY, ~accepted)
    share = float(torch.minimum(target, draft).sum()) if has_probabilities else float(target[1])
    assert math.isclose(float(accepted.float().mean()), share, abs_tol=0.02)


def test_drafts_that_only_fill_up_are_rejected() -> None:
    torch.manual_seed(0)
    output = draw(torch.tensor([0.0, 0.0, 0.0, 1.0]), None, torch.full((5,), -1, dtype=torch.int32), 5)
    assert output.tolist() == [[3, EMPTY]] * 5


def test_numbers_of_rows_are_repeated_for_their_drafts() -> None:
    output = torch.empty(5)
    repeat_rows(output, torch.tensor([0.0, 7.0, 2.0]), ENDS, 0, 1, 128)
    assert output.tolist() == [1, 1, 2, 2, 2]


def test_synthetic_acceptance_is_refused() -> None:
    tokens = torch.zeros(5, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="rejection_sample_method synthetic needs a GPU: choose standard"):
        accept_best(empty(), ENDS, tokens, tokens, torch.zeros(3, 1), None, 3, None, None, True)


@pytest.mark.skipif(not isinstance(current_platform, CpuWithoutNativeOps), reason="vLLM runs on another platform here")
def test_vllm_launches_them() -> None:
    current_platform.register_triton_kernel_overrides()
    assert [getattr(rejection_sampler, name.rpartition(".")[2]).func for name in DRAFT_KERNELS] == list(
        DRAFT_KERNELS.values()
    )
    expanded = rejection_sampler.expand_batch_to_tokens(torch.tensor([5, 6, 7]), ENDS, 5)
    assert expanded.tolist() == [5, 5, 7, 7, 7]
