"""What vLLM's proposer is given: torch versions of its kernels beside plain Python, on random batches."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.platforms import current_platform

from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps
from fraqtl_vllm.platform.proposal_ops import (
    PROPOSAL_KERNELS,
    draft_inputs,
    last_sampled,
    next_slots,
    rejected_drafts,
)

PAD, UNTOUCHED = -1, -77
VOCABULARY = 100
SEEDS = range(20)


def ints(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def room(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.full((count,), UNTOUCHED, dtype=dtype)


@dataclass
class Request:
    """A part of one step's batch: tokens from a position on, of which the last ones are rejected drafts."""

    tokens: list[int]
    first: int
    drafts: int
    rejected: int
    last: int

    @property
    def kept(self) -> list[int]:
        return self.tokens[: len(self.tokens) - self.rejected]


def random_batch(rng: random.Random) -> list[Request]:
    requests = []
    for _ in range(rng.randint(1, 6)):
        drafts = rng.choice([0, 0, 1, 2, 4])
        count = drafts + 1 if drafts else rng.choice([1, 7, 30])  # a chunk of a prompt has no drafts
        tokens = [rng.randrange(VOCABULARY) for _ in range(count)]
        requests.append(Request(tokens, rng.randrange(50), drafts, rng.randint(0, drafts), rng.randrange(VOCABULARY)))
    return requests


def starts_of(requests: list[Request]) -> list[int]:
    return [sum(len(r.tokens) for r in requests[:i]) for i in range(len(requests) + 1)]


@pytest.mark.parametrize("seed", SEEDS)
def test_next_slots(seed: int) -> None:
    rng = random.Random(seed)
    size, blocks, longest = 16, 4, rng.choice([64, 60, 33])
    count, padding = rng.randint(1, 6), rng.randint(0, 3)
    table = [[rng.randrange(1, 99) for _ in range(blocks)] for _ in range(count)]
    positions = [rng.choice([rng.randrange(longest), longest - 1, longest - 2]) for _ in range(count)]
    lengths = [p + 1 for p in positions]
    expected_positions, expected_slots, expected_lengths = [], [], []
    for row, position in enumerate(positions):
        if position + 1 < longest:
            at = position + 1
            expected_positions.append(at)
            expected_slots.append(table[row][at // size] * size + at % size)
            expected_lengths.append(lengths[row] + 1)
        else:
            expected_positions.append(0)
            expected_slots.append(PAD)
            expected_lengths.append(1)
    given, found_lengths, slots = ints(positions, torch.int64), ints(lengths), room(count + padding, torch.int64)
    next_positions = given if seed % 2 else room(count, torch.int64)  # vLLM updates its own buffer in place
    next_slots(given, ints(table), blocks, found_lengths, next_positions, slots, size, longest, blocks, PAD, count)
    assert next_positions.tolist() == expected_positions
    assert slots.tolist() == expected_slots + [PAD] * padding
    assert found_lengths.tolist() == expected_lengths


@pytest.mark.parametrize("seed", SEEDS)
def test_rejected_drafts(seed: int) -> None:
    requests = random_batch(random.Random(seed))
    starts = starts_of(requests)
    ends = [sum(r.drafts for r in requests[: i + 1]) for i in range(len(requests))]
    # One whose prompt goes on was given nothing
    valid = [r.drafts + 1 - r.rejected if r.drafts else seed % 2 for r in requests]
    last_kept, rejected = room(len(requests)), room(len(requests))
    rejected_drafts(ints(ends), ints(valid), ints(starts), last_kept, rejected, len(requests))
    assert rejected.tolist() == [r.rejected for r in requests]
    assert last_kept.tolist() == [start + len(r.kept) - 1 for start, r in zip(starts, requests, strict=False)]


@pytest.mark.parametrize("seed", SEEDS)
def test_last_sampled(seed: int) -> None:
    rng = random.Random(seed)
    count, width = rng.randint(1, 7), rng.randint(1, 6)
    rows, known = [], [rng.randrange(VOCABULARY) for _ in range(count)]
    for _ in range(count):
        row = [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, width))]
        rows.append(row + [-1] * (width - len(row)))
    rows[0][0] = VOCABULARY  # no token
    discarded = [rng.random() < 0.3 for _ in rows]
    expected_last, expected_valid = [], []
    for row, is_discarded, instead in zip(rows, discarded, known, strict=True):
        tokens = [] if is_discarded else [token for token in row if 0 <= token < VOCABULARY]
        expected_last.append(tokens[-1] if tokens else instead)
        expected_valid.append(len(tokens))
    last, valid = room(count), room(count)
    known_buffer = ints([*known, 5, 5])  # vLLM's has room for the largest batch
    last_sampled(ints(rows), torch.tensor(discarded), known_buffer, last, valid, VOCABULARY, width, count, width, 8)
    assert last.tolist() == expected_last
    assert valid.tolist() == expected_valid


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("is_shifted", [False, True])
def test_draft_inputs(seed: int, new: int, is_shifted: bool) -> None:
    pad_token, mask_token = 0, 999
    requests = random_batch(random.Random(seed))
    starts = starts_of(requests)
    tokens, positions, is_rejected, is_masked, new_rows, hidden_rows = ([] for _ in range(6))
    for r in requests:
        first = len(tokens)
        stay = r.kept[1:] if is_shifted else r.kept
        new_rows += range(first + len(stay), first + len(stay) + new)
        hidden_rows += range(first, first + len(r.tokens))
        tokens += [*stay, r.last, *[mask_token] * (new - 1), *[pad_token] * r.rejected]
        positions += [*range(r.first, r.first + len(stay) + new), *[0] * r.rejected]
        is_masked += [*[False] * (len(stay) + 1), *[True] * (new - 1), *[False] * r.rejected]
        is_rejected += [*[False] * (len(stay) + new), *[True] * r.rejected]
    total, spare = starts[-1], 5
    found = [room(len(tokens) + spare), room(len(tokens) + spare, torch.int64)]
    masks = [torch.ones(len(tokens) + spare, dtype=torch.bool) for _ in range(2)]
    found_new, found_hidden = room(new * len(requests)), room(total)
    given = ints([token for r in requests for token in r.tokens])
    at = ints([r.first + i for r in requests for i in range(len(r.tokens))], torch.int64)
    last_kept = ints([start + len(r.kept) - 1 for start, r in zip(starts, requests, strict=False)])
    draft_inputs(
        given, at, ints([r.last for r in requests]), *found, *masks, found_new, found_hidden,
        ints(starts), last_kept, pad_token, mask_token, total, new, is_shifted, 16,
    )  # fmt: skip
    assert found[0].tolist() == tokens + [UNTOUCHED] * spare
    assert found[1].tolist() == positions + [UNTOUCHED] * spare
    assert masks[0].tolist() == is_rejected + [True] * spare
    assert masks[1].tolist() == is_masked + [True] * spare
    assert found_new.tolist() == new_rows
    assert found_hidden.tolist() == (hidden_rows if is_shifted else [UNTOUCHED] * total)


@pytest.mark.skipif(not isinstance(current_platform, CpuWithoutNativeOps), reason="vLLM runs on another platform here")
def test_vllm_launches_them() -> None:
    from vllm.v1.spec_decode import utils

    current_platform.register_triton_kernel_overrides()
    assert [getattr(utils, name.rpartition(".")[2]).func for name in PROPOSAL_KERNELS] == list(
        PROPOSAL_KERNELS.values()
    )
    positions, lengths, slots = ints([20, 63], torch.int64), ints([21, 64]), room(3, torch.int64)
    utils.eagle_step_update_slot_mapping_and_metadata(
        positions, ints([[3, 4, 5, 6], [7, 8, 9, 1]]), lengths, 16, 64, positions, slots, 3
    )
    assert (positions.tolist(), lengths.tolist(), slots.tolist()) == ([21, 0], [22, 1], [69, PAD, PAD])
