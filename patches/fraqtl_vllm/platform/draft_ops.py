"""Torch versions of the Triton kernels of vLLM's rejection sampler, for machines without a GPU.

Arguments are those of the kernels, in their order. A batch's rows are few, so most of it is plain Python.

    ends          (rows,) where the drafts of each row end in a flat tensor of all drafts
    output        (rows, longest draft + 1) <- the tokens that a row gets; the rest keeps its placeholder
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError


def _spans(ends: Tensor) -> Iterator[tuple[int, range]]:
    """Every row and the numbers of its drafts."""
    return enumerate(range(*span) for span in pairwise([0, *ends.tolist()]))


def _refuse_synthetic(synthetic: bool) -> None:
    if synthetic:
        raise UnsupportedError("rejection_sample_method synthetic needs a GPU: choose standard")


def accept_best(
    output: Tensor,
    ends: Tensor,
    drafts: Tensor,
    best: Tensor,
    bonus: Tensor,
    is_greedy: Tensor | None,
    max_drafts: int,
    uniform: Tensor | None,
    rates: Tensor | None,
    synthetic: bool,
) -> None:
    """Greedy rows: the model's tokens up to the first that differs from its draft, or all and the bonus token.

    drafts, best: (drafts,) tokens. bonus: (rows, 1). is_greedy: (rows,), None: all are.
    """
    _refuse_synthetic(synthetic)
    proposed, chosen = drafts.tolist(), best.tolist()
    for row, span in _spans(ends):
        if is_greedy is not None and not bool(is_greedy[row]):
            continue
        wrong = next((n for n, i in enumerate(span) if proposed[i] != chosen[i]), len(span))
        taken = chosen[span.start : min(span.start + wrong + 1, span.stop)]
        _give(output, row, taken, bonus if wrong == len(span) else None)


def accept_drawn(  # noqa: PLR0917 (vLLM's order)
    output: Tensor,
    ends: Tensor,
    drafts: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    bonus: Tensor,
    recovered: Tensor,
    uniform: Tensor,
    is_greedy: Tensor,
    max_drafts: int,
    vocab_size: int,
    rates: Tensor | None,
    no_draft_probs: bool,
    synthetic: bool,
) -> None:
    """Other rows: drafts as long as p(draft) / q(draft) is at least a random number; then the recovered token.

    draft_probs, target_probs: (drafts, tokens), q and p. Without the first, q is 1. uniform, recovered: (drafts,).
    """
    _refuse_synthetic(synthetic)
    known = drafts >= 0  # those that only fill up are -1
    token = drafts.clamp_min(0).long()[:, None]
    p = target_probs.gather(1, token)[:, 0]
    q = torch.ones_like(p) if draft_probs is None else draft_probs.gather(1, token)[:, 0]
    accepted = (known & (q > 0) & (p / q >= uniform)).tolist()
    for row, span in _spans(ends):
        if bool(is_greedy[row]):
            continue
        kept = next((n for n, i in enumerate(span) if not accepted[i]), len(span))
        taken = drafts[span.start : span.start + kept].tolist()
        if kept < len(span):
            taken.append(int(recovered[span.start + kept]))
        _give(output, row, taken, bonus if kept == len(span) else None)


def _give(output: Tensor, row: int, tokens: list[int], bonus: Tensor | None) -> None:
    if bonus is not None:
        tokens = [*tokens, int(bonus.view(-1)[row])]
    output[row, : len(tokens)] = torch.tensor(tokens, dtype=output.dtype)


def repeat_rows(output: Tensor, x: Tensor, ends: Tensor, old: float, new: float, most: int) -> None:
    """output (drafts,) <- the number of each draft's row, with `new` in the place of `old`. x: (rows,)."""
    counts = ends.diff(prepend=ends.new_zeros(1)).long()
    output.copy_(torch.where(x == old, torch.full_like(x, new), x).repeat_interleave(counts))


def draw_recovered(
    output: Tensor,
    ends: Tensor,
    drafts: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    inverse: Tensor,
    *_: Any,
) -> None:
    """output (drafts,) <- a token drawn from max(p - q, 0), for the case that the draft is rejected.

    inverse: (rows, tokens), 1 over exponential random numbers: the largest product is a draw. Without draft_probs q is
    1 at the draft and 0 elsewhere.
    """
    for row, span in _spans(ends):
        for i in span:
            if draft_probs is None:
                left = target_probs[i].clone()
                left[drafts[i].clamp_min(0)] *= drafts[i] < 0
            else:
                left = (target_probs[i] - draft_probs[i]).clamp_min(0)
            output[i] = (left * inverse[row]).argmax()


SAMPLING = "vllm.v1.sample.rejection_sampler"
DRAFT_MODULES = (SAMPLING,)

DRAFT_KERNELS: dict[str, Callable[..., None]] = {
    f"{SAMPLING}.rejection_greedy_sample_kernel": accept_best,
    f"{SAMPLING}.rejection_random_sample_kernel": accept_drawn,
    f"{SAMPLING}.expand_kernel": repeat_rows,
    f"{SAMPLING}.sample_recovered_tokens_kernel": draw_recovered,
}
