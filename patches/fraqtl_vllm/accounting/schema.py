"""What the engine and the API server tell each other: the one place of these names.

Plain dictionaries of plain numbers, because vLLM's messages carry nothing else of ours; mypy knows their keys.
"""

from __future__ import annotations

from typing import TypedDict, cast

ACCOUNT_KEY = "fraqtl"
"""Under which an account travels, in the `kv_transfer_params` of an engine's output."""


class GroupBytes(TypedDict):
    """What a block of every KV-cache group takes."""

    block_bytes: list[int]
    """Bytes, over all layers of the group and all ranks."""
    baseline_block_bytes: list[int]
    """The same in the model's own dtype."""
    state_block_bytes: list[int]
    """Bytes of a block of states, which are not packed: in groups whose layers keep states, where the two before are 0,
    and 0 in all others."""


class Sizes(GroupBytes):
    """What is the same in all accounts of an engine. Lists have an entry for every KV-cache group."""

    engine: int
    """Its number among data-parallel engines, which number their blocks alike."""
    block_size: list[int]
    """Tokens a block."""


class Account(Sizes):
    """What one sequence holds."""

    tokens: int
    blocks: list[list[int]]
    """Of every group a number for every block, the same in two accounts only if both mean one allocation of it."""
    shared: list[list[int]]
    """Those of them that the sequence found in the prefix cache, or that a connector filled from its store."""
    loaded: list[list[int]]
    """The latter."""


class Growth(TypedDict):
    """In the place of an account: the blocks are those that were last told, only the tokens are more."""

    tokens: int


class PoolNumbers(TypedDict):
    """What an engine's pool holds, over all its ranks, and what the same memory would hold in the model's own dtype."""

    max_model_len: int
    block_size: int
    block_bytes: int
    blocks: int
    tokens: int
    concurrency: float
    attention_bytes: int
    """Of one sequence of the longest context: its keys and values. The next two: its states, and all other bytes of
    its blocks."""
    state_bytes: int
    padding_bytes: int
    baseline_block_size: int
    baseline_block_bytes: int
    baseline_blocks: int
    baseline_tokens: int
    baseline_concurrency: float
    baseline_attention_bytes: int
    baseline_padding_bytes: int


def brought_up_to_date(last: Account | None, news: Account | Growth) -> Account:
    """The account after `news`, which may leave out what has not changed."""
    return cast(Account, {**(last or {}), **news})
