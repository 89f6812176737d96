"""What a response says about its KV memory: the `fraqtl` object, version 1.

Every figure comes from the engine: block numbers from its block manager at the moment the request
ended, bytes from the specs its pool was built from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, Field

from fraqtl_vllm.accounting.schema import Account


class KVUsage(BaseModel):
    """The part of the report that is mirrored in `usage.kv_cache`: integers that can be added up.

    LangChain sums whatever integers it finds in `usage` over a batch; a sum of block sizes says nothing.
    """

    tokens: int = Field(description="KV entries written: prompt + generated - 1, summed over the sequences")
    blocks: int = Field(description="blocks held at the end; those that sequences share count once")
    shared_blocks: int = Field(description="of `blocks`, those found in the prefix cache or in a store")
    loaded_blocks: int = Field(0, description="of `shared_blocks`, those loaded from a store by a KV connector")
    bytes: int = Field(description="bytes of blocks of attention: all layers and ranks, scales and padding included")
    baseline_bytes: int = Field(description="bytes of the same blocks in the model's own dtype")
    saved_bytes: int = Field(description="baseline_bytes - bytes")
    state_bytes: int = Field(0, description="bytes of blocks that hold states of hybrid models, not part of `bytes`")


class KVReport(KVUsage):
    """The top-level `fraqtl` object of a response."""

    version: Literal[1] = 1
    kv_format: str = Field(description="name of the KV-cache format")
    block_size: int = Field(description="tokens a block")
    ratio: float = Field(description="baseline_bytes / bytes")

    def usage(self) -> dict[str, int]:
        """The part that goes into `usage.kv_cache`: integers only, clients choke on anything else there."""
        return KVUsage(**self.model_dump(include=set(KVUsage.model_fields))).model_dump()


@dataclass
class Ledger:
    """Collects the engine's accounts of one HTTP request: one for every sequence of every prompt."""

    kv_format: str
    sequences: int = 0
    """How many sequences the request asked for: n, summed over its prompts."""
    accounts: dict[str, Account] = field(default_factory=dict)
    """The last account of every sequence, by the engine's request id."""
    closed: bool = False
    """The response is out, or the client has gone: what comes now is in no response."""
    endpoint: str = ""
    request_id: str = ""
    """vLLM's id of the first prompt."""
    response_id: str = ""
    """The id that the client was told."""
    started: set[str] = field(default_factory=set)
    """The engine's ids of all sequences that it was given."""
    ended: set[str] = field(default_factory=set)
    """Those of them that have ended in the engine, whatever the reason."""
    finished: set[str] = field(default_factory=set)
    """Those of them that came to their own end: nobody aborted them."""

    @property
    def is_settled(self) -> bool:
        """Nothing more can come."""
        return self.closed and self.ended >= self.started

    def report(self) -> KVReport | None:
        """The report over all sequences, or None if the engine said nothing (it failed, say)."""
        return self.report_of(self.accounts)

    def report_of(self, keys: Iterable[str]) -> KVReport | None:
        """The report over some of the sequences, by the engine's ids."""
        keys = [key for key in keys if key in self.accounts]
        if not keys:
            return None
        accounts = [self.accounts[key] for key in keys]
        sizes = accounts[0]
        groups = range(len(sizes["block_size"]))
        # Engines beside each other (data parallel) number their blocks alike.
        held = [{(a["engine"], b) for a in accounts for b in a["blocks"][g]} for g in groups]
        shared = [{(a["engine"], b) for a in accounts for b in a["shared"][g]} for g in groups]
        loaded = [{(a["engine"], b) for a in accounts for b in a["loaded"][g]} for g in groups]
        used = sum(len(h) * n for h, n in zip(held, sizes["block_bytes"], strict=True))
        baseline = sum(len(h) * n for h, n in zip(held, sizes["baseline_block_bytes"], strict=True))
        states = sum(len(h) * n for h, n in zip(held, sizes["state_block_bytes"], strict=True))
        return KVReport(
            kv_format=self.kv_format,
            tokens=sum(a["tokens"] for a in accounts),
            blocks=sum(map(len, held)),
            block_size=next(n for n, s in zip(sizes["block_size"], sizes["state_block_bytes"], strict=True) if not s),
            shared_blocks=sum(map(len, shared)),
            loaded_blocks=sum(map(len, loaded)),
            bytes=used,
            baseline_bytes=baseline,
            saved_bytes=baseline - used,
            state_bytes=states,
            ratio=round(baseline / used, 4) if used else 1.0,
        )
