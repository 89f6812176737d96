"""How requests with several new tokens, of which some may be rejected, read and write pages with residuals.

A speculation hands a request up to K drafts behind its newest token, to be verified in one step. Their slots may hold
residuals of the tokens before, which a rejected draft would leave overwritten; and a draft must read what it would
have read had it come alone, when there were no drafts behind it. So a layer takes them in turns, as plain decoding
does: each turn writes one token of every request and attends it. Before a turn the slots that it will write are
copied, and when the sampler has said which drafts are rejected, their slots get back what they held.

    turn 0   the newest token of every request: it stays, whatever becomes of the drafts
    turn 1   the first draft: if it is rejected, the next step writes its slot before anybody reads it
    turn n   the n-th draft: copied, since the next step may read the residual that was there

With formats without residuals a slot holds its token only. There is nothing to take back, and all tokens go at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fraqtl_kernels import cpu
from fraqtl_kernels.pages import PageLayout
from fraqtl_vllm._vllm import CommonAttentionMetadata

FIRST_COPIED = 2


@dataclass(frozen=True)
class Turn:
    """The new tokens with one number, of those requests of a batch that have so many. requests: (n,) their rows."""

    number: int
    requests: Tensor
    plan: cpu.StepPlan

    @property
    def rows(self) -> Tensor:
        """Where in the batch its tokens stand, (n,)."""
        return torch.from_numpy(self.plan.rows)


def plan_turns(batch: CommonAttentionMetadata, most: int) -> tuple[Turn, ...]:
    """All turns of the requests with at most so many new tokens; none if there is no such request."""
    if batch.max_query_len == 1:
        plan = cpu.StepPlan(batch.seq_lens, batch.block_table_tensor, batch.slot_mapping)
        return (Turn(0, torch.arange(len(batch.seq_lens)), plan),)
    counts = batch.query_start_loc.diff()
    counts = counts.where(counts <= most, 0)
    return tuple(_turn(batch, counts, number) for number in range(int(counts.max())))


def _turn(batch: CommonAttentionMetadata, counts: Tensor, number: int) -> Turn:
    requests = (counts > number).nonzero()[:, 0]
    seq_lens = batch.seq_lens[requests] - counts[requests] + number + 1
    rows = (batch.query_start_loc[requests] + number).long()
    # Of other turns it knows nothing: a residual is stored even where a later one's token will displace it.
    slots = torch.full_like(batch.slot_mapping, -1)
    slots[rows] = batch.slot_mapping[rows]
    return Turn(number, requests, cpu.StepPlan(seq_lens, batch.block_table_tensor[requests], slots, rows))


def without(slot_mapping: Tensor, turns: Sequence[Turn]) -> Tensor:
    """The slots of the tokens that no turn takes; -1 for the others."""
    slots = slot_mapping.clone()
    for turn in turns:
        slots[turn.rows] = -1
    return slots


@dataclass
class Displaced:
    """What the slots of one layer's drafts held before, of the step that runs or ran last."""

    layout: PageLayout
    _copies: list[tuple[Turn, Tensor, list[Tensor]]] = field(default_factory=list)

    def forget(self) -> None:
        self._copies.clear()

    def copy(self, pool: Tensor, turn: Turn) -> None:
        """Before `turn` writes to its slots."""
        if turn.number < FIRST_COPIED:
            return
        slots = turn.plan.slot_mapping[turn.rows].long()
        self._copies.append((turn, slots, [plane[_place(slots, self.layout)] for plane in self._planes(pool)]))

    def take_back(self, pool: Tensor, kept: Tensor) -> None:
        """Give rejected drafts' slots back what they held. kept: (requests,) how many new tokens of each stay."""
        for turn, slots, copies in self._copies:
            rejected = (kept[turn.requests] <= turn.number) & (slots >= 0)
            if not bool(rejected.any()):
                continue
            for plane, copy in zip(self._planes(pool), copies, strict=True):
                plane[_place(slots[rejected], self.layout)] = copy[rejected]
        self.forget()

    def _planes(self, pool: Tensor) -> list[Tensor]:
        planes = self.layout.planes(pool)
        return [plane for plane in (planes.k, planes.v, planes.k_scale, planes.v_scale) if plane is not None]


def _place(slots: Tensor, layout: PageLayout) -> tuple[Tensor, slice, Tensor]:
    """Of (tokens,) slots, to index planes."""
    return slots // layout.block_size, slice(None), slots % layout.block_size
