"""Torch versions of the Triton kernels with which vLLM lets a second model draft, for machines without a GPU.

Arguments are those of the kernels, in their order; what only shapes a launch is ignored. Of all requests of a batch
the tokens stand one after another, and `starts` (requests + 1,) says where.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def next_slots(
    positions: Tensor,
    block_table: Tensor,
    block_table_stride: int,
    lengths: Tensor,
    next_positions: Tensor,
    slots: Tensor,
    block_size: int,
    longest: int,
    blocks: int,
    pad_id: int,
    requests: int,
) -> None:
    """Between two drafts: every request goes one position on.

    positions, lengths (updated), next_positions <-: (requests,). block_table: (requests, blocks). slots <- as many as
    it has, those beyond the batch are `pad_id`. A request that would get longer than `longest` starts anew at 0, and
    writes nowhere: its drafts come to nothing.
    """
    position = positions[:requests] + 1
    is_over = position >= longest
    position = position.where(~is_over, 0)
    block = (position // block_size).clamp_max(blocks - 1).long()
    slot = block_table[:requests].gather(1, block[:, None])[:, 0].long() * block_size + position % block_size
    slots[:requests] = slot.where(~is_over, pad_id)
    slots[requests:] = pad_id
    lengths[:requests] = (lengths[:requests] + 1).where(~is_over, 1).clamp_max(longest)
    next_positions[:requests] = position


def rejected_drafts(
    ends: Tensor, valid: Tensor, starts: Tensor, last_kept: Tensor, rejected: Tensor, requests: int
) -> None:
    """rejected (requests,) <- how many drafts of each are, last_kept (requests,) <- the batch's row of its last token.

    ends: (requests,) where each one's drafts end in a list of all. valid: (requests,) how many tokens it got. One
    without drafts keeps all its tokens: they may be a chunk of its prompt.
    """
    ends = ends[:requests]
    drafts = ends.diff(prepend=ends.new_zeros(1))
    rejected[:requests] = (drafts + 1 - valid[:requests]).where(drafts > 0, 0)
    last_kept[:requests] = starts[1 : requests + 1] - 1 - rejected[:requests]


def last_sampled(
    sampled: Tensor,
    discarded: Tensor,
    known: Tensor,
    last: Tensor,
    valid: Tensor,
    vocab_size: int,
    width: int,
    requests: int,
    *_: int,
) -> None:
    """valid (requests,) <- how many tokens each was given, last (requests,) <- the last of them.

    sampled: (requests, width) tokens, -1 where there is none. discarded: (requests,) whose prompt isn't over: they were
    given none. known: (requests,) the last token for those without.
    """
    sampled = sampled[:requests, :width]
    given = (sampled >= 0) & (sampled < vocab_size) & ~discarded[:requests, None]
    column = torch.arange(1, width + 1).where(given, 0).amax(1)
    tokens = sampled.gather(1, (column - 1).clamp_min(0)[:, None])[:, 0]
    valid[:requests] = given.sum(1)
    last[:requests] = tokens.where(column > 0, known[:requests])


def draft_inputs(  # noqa: PLR0917 (vLLM's order)
    tokens: Tensor,
    positions: Tensor,
    last: Tensor,
    out_tokens: Tensor,
    out_positions: Tensor,
    is_rejected: Tensor,
    is_masked: Tensor,
    new_rows: Tensor,
    hidden_rows: Tensor,
    starts: Tensor,
    last_kept: Tensor,
    pad_token: int,
    mask_token: int,
    total: int,
    new: int,
    is_shifted: bool,
    *_: int,
) -> None:
    """What the drafting model is given: of every request the tokens that stay, `new` more, and room for the rejected.

        kept  kept  kept | last  mask  mask | pad  pad

    tokens, positions: (total,), of the step. last, last_kept: (requests,), the token that was sampled last and the row
    of the last token that stays. out_tokens, out_positions, is_rejected, is_masked <- by row of the new batch.
    new_rows (requests * new,) <- those of the new tokens. With `is_shifted` each request's first token is left out, and
    hidden_rows (total,) <- where each row's hidden state goes.
    """
    offset = int(is_shifted)
    begins = starts.tolist()
    for request, (begin, end, kept) in enumerate(zip(begins, begins[1:], (last_kept + 1).tolist(), strict=False)):
        first, stay = begin + request * (new - offset), kept - begin - offset
        fresh, stop = first + stay, first + end - begin + new - offset
        out_tokens[first:fresh] = tokens[begin + offset : kept]
        out_tokens[fresh] = last[request]
        out_tokens[fresh + 1 : fresh + new] = mask_token
        out_tokens[fresh + new : stop] = pad_token
        out_positions[first : fresh + new] = positions[begin] + torch.arange(stay + new)
        out_positions[fresh + new : stop] = 0
        is_rejected[first:stop] = torch.arange(first, stop) >= fresh + new
        is_masked[first:stop] = torch.arange(first, stop) > fresh
        is_masked[fresh + new : stop] = False
        new_rows[request * new : (request + 1) * new] = torch.arange(fresh, fresh + new)
        if is_shifted:
            hidden_rows[begin:end] = torch.arange(first, first + end - begin)


UTILS = "vllm.v1.spec_decode.utils"
PROPOSAL_MODULES = (UTILS, "vllm.v1.spec_decode.llm_base_proposer")

PROPOSAL_KERNELS: dict[str, Callable[..., None]] = {
    f"{UTILS}.eagle_step_slot_mapping_metadata_kernel": next_slots,
    f"{UTILS}.eagle_prepare_inputs_padded_kernel": rejected_drafts,
    f"{UTILS}.eagle_prepare_next_token_padded_kernel": last_sampled,
    f"{UTILS}.copy_and_expand_eagle_inputs_kernel": draft_inputs,
}
