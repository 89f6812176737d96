"""How many tokens and users fit into a given KV memory: the sums behind `fraqtl-serve plan`.

Bytes come from the formats' own descriptors. Blocks are counted as vLLM counts them when it starts
(`kv_cache_utils`): layers of one kind form groups of equal size, all groups draw from one pool of blocks, and
a layer with a sliding window needs blocks for its window and for the tokens that are being computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import FORMATS, KVFormat, check_head_size
from fraqtl_kernels.pages import PageLayout

BLOCK_SIZE = 16
BASELINE = "bf16"


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the size of its KV cache."""

    name: str
    layers: int
    kv_heads: int
    head_size: int
    context: int
    """The longest sequence, in tokens."""
    window: int = 0
    """Tokens that a layer with a sliding window sees."""
    windowed_layers: int = 0

    def __post_init__(self) -> None:
        check_head_size(self.head_size)
        for name in ("layers", "kv_heads", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.name}: {name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.windowed_layers <= self.layers or (self.windowed_layers and self.window < 1):
            raise ConfigError(f"{self.name}: {self.windowed_layers} of {self.layers} layers with a window is no model")

    def groups(self) -> tuple[int, int, int]:
        """(layers a group, groups of layers that see everything, groups of those with a window), as vLLM forms them."""
        kinds = [n for n in (self.layers - self.windowed_layers, self.windowed_layers) if n]
        size = max(kinds) if max(kinds) < 1.5 * min(kinds) else min(kinds)
        return size, ceil((self.layers - self.windowed_layers) / size), ceil(self.windowed_layers / size)


@dataclass(frozen=True)
class Fit:
    """What a pool of one format holds."""

    name: str
    block_bytes: int
    """Of one block: all layers of a group, one rank."""
    blocks: int
    tokens: int
    """In sequences of the planned context."""
    concurrency: float

    @property
    def users(self) -> int:
        return int(self.concurrency)


def fit(
    shape: ModelShape, kv_format: KVFormat, memory: int, *, context: int, ranks: int = 1, in_flight: int = 8192
) -> Fit:
    """What `memory` bytes on each of `ranks` hold, if every sequence is `context` tokens long.

    in_flight: tokens that may be scheduled and not yet settled, which layers with a window keep as well.
    """
    size, full_groups, window_groups = shape.groups()
    page = PageLayout(kv_format, shape.head_size, BLOCK_SIZE).page_bytes
    block_bytes = page * max(1, shape.kv_heads // ranks) * size
    of_window = ceil(min(shape.window - 1 + in_flight, context) / BLOCK_SIZE) + 1
    per_user = full_groups * ceil(context / BLOCK_SIZE) + window_groups * of_window
    blocks = memory // block_bytes
    return Fit(kv_format.name, block_bytes, blocks, int(blocks / per_user * context), blocks / per_user)


def plan(shape: ModelShape, memory: int, *, context: int, ranks: int = 1, in_flight: int = 8192) -> dict[str, Any]:
    """Every format's fit, and the model and memory it is for; plain numbers, ready for JSON."""
    if ranks < 1 or (shape.kv_heads % ranks and ranks % shape.kv_heads):
        raise ConfigError(f"{shape.kv_heads} KV heads can't be shared by {ranks} ranks: choose a divisor of them")
    if context < 1:
        raise ConfigError(f"the context must be at least 1 token, not {context}")
    fits = {
        name: fit(shape, f, memory, context=context, ranks=ranks, in_flight=in_flight) for name, f in FORMATS.items()
    }
    baseline = fits[BASELINE]
    return {
        "model": vars(shape),
        "kv_memory": memory,
        "ranks": ranks,
        "context": context,
        "block_size": BLOCK_SIZE,
        "formats": [
            {
                "name": one.name,
                "block_bytes": one.block_bytes,
                "blocks": one.blocks,
                "tokens": one.tokens,
                "users": one.users,
                "tokens_vs_baseline": round(one.tokens / baseline.tokens, 2) if baseline.tokens else None,
            }
            for one in fits.values()
        ],
    }
