"""How many tokens and users fit into a given KV memory: the sums behind `fraqtl-serve plan`.

Bytes come from the formats' own descriptors, everything else from the planner that vLLM starts with
(`fraqtl_vllm.accounting.planner`): which layers form groups, what a block takes, how many blocks a sequence needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

from fraqtl_kernels.errors import ConfigError, one_of
from fraqtl_kernels.formats import FORMATS, KVFormat, check_head_size
from fraqtl_vllm.config import FraqtlConfig

BLOCK_SIZE = 16
BASELINE = "bf16"


@dataclass(frozen=True)
class LayerKind:
    """Layers that store keys and values alike."""

    layers: int
    kv_heads: int
    head_size: int
    window: int = 0
    """Tokens that the layer sees, 0 for all."""

    def check(self, model: str) -> None:
        check_head_size(self.head_size)
        for name in ("layers", "kv_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{model}: {name} must be at least 1, not {getattr(self, name)}")


STATE_KINDS = {
    "delta": "gated_delta_net_state_shape",
    "mamba2": "mamba2_state_shape",
    "conv": "short_conv_state_shape",
}
"""Kinds of layers that keep a state, and the function of vLLM's that knows its shape on one rank."""


@dataclass(frozen=True)
class StateKind:
    """Layers that keep a state of one size, however long the sequence is."""

    layers: int
    kind: str
    sizes: dict[str, int]
    """What vLLM's function takes beside the number of ranks."""
    dtypes: tuple[str, ...]
    """Of the parts of a state, by torch's names."""

    def shapes(self, ranks: int, drafts: int = 0) -> tuple[tuple[int, ...], ...]:
        """Of the parts of a state on one rank, with so many drafts a step."""
        from fraqtl_vllm import _vllm

        if self.kind not in STATE_KINDS:
            raise one_of("kind of state", self.kind, STATE_KINDS)
        of = getattr(_vllm.MambaStateShapeCalculator, STATE_KINDS[self.kind])
        return tuple(of(tp_world_size=ranks, num_spec=drafts, **self.sizes))


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the size of its KV cache. A layer that reads the cache of another doesn't count."""

    name: str
    layers: int
    kv_heads: int
    head_size: int
    context: int
    """The longest sequence, in tokens."""
    window: int = 0
    """Tokens that a layer with a sliding window sees."""
    windowed_layers: int = 0
    others: tuple[LayerKind, ...] = ()
    """Layers beside these with another number of KV heads or another head size."""
    states: StateKind | None = None
    """Of a hybrid model: layers that keep a state in the place of keys and values."""

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError(f"{self.name}: context must be at least 1, not {self.context}")
        if not 0 <= self.windowed_layers <= self.layers or (self.windowed_layers and self.window < 1):
            raise ConfigError(f"{self.name}: {self.windowed_layers} of {self.layers} layers with a window is no model")
        LayerKind(self.layers, self.kv_heads, self.head_size).check(self.name)
        for other in self.others:
            other.check(self.name)

    def kinds(self) -> list[LayerKind]:
        """All layers, by what they store."""
        windowed = self.windowed_layers
        own = [(self.layers - windowed, 0), (windowed, self.window)]
        return [LayerKind(n, self.kv_heads, self.head_size, window) for n, window in own if n] + list(self.others)

    def numbers(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("others", "states")}
        plain |= {"others": [vars(other) for other in self.others]} if self.others else {}
        return plain | ({"states": vars(self.states)} if self.states else {})

    def check_ranks(self, ranks: int) -> None:
        for kind in self.kinds():
            if ranks < 1 or (kind.kv_heads % ranks and ranks % kind.kv_heads):
                raise ConfigError(
                    f"{kind.kv_heads} KV heads can't be shared by {ranks} ranks: choose a divisor of them"
                )


@dataclass(frozen=True)
class Fit:
    """What a pool of one format holds."""

    name: str
    block_size: int
    block_bytes: int
    """Of one block: all layers of a group, one rank."""
    blocks: int
    tokens: int
    """In sequences of the planned context."""
    concurrency: float
    attention_bytes: int
    """Of one such sequence on one rank: its keys and values."""
    state_bytes: int
    padding_bytes: int

    def split(self) -> dict[str, int]:
        """What a sequence of a hybrid model takes."""
        return {name: vars(self)[name] for name in ("block_size", "attention_bytes", "state_bytes", "padding_bytes")}

    @property
    def users(self) -> int:
        return int(self.concurrency)


def fit(
    shape: ModelShape,
    kv_format: KVFormat,
    memory: int,
    *,
    context: int,
    ranks: int = 1,
    batched_tokens: int = 8192,
    async_scheduling: bool = True,
    prefix_caching: bool = True,
    own: FraqtlConfig | None = None,
    draft: ModelShape | None = None,
    drafts: int = 0,
) -> Fit:
    """What `memory` bytes on each of `ranks` hold, if every sequence is `context` tokens long.

    batched_tokens: of a step; layers with a window keep blocks for the tokens that are not settled yet.
    async_scheduling: whether two steps may be on their way, vLLM's default on GPUs. prefix_caching: with it a sequence
    of a hybrid model holds its states twice. own: settings with formats of single layers, in the place of `kv_format`.
    draft: a model that drafts, whose pages are in the same blocks. drafts: of a step, for each of which a sequence of a
    hybrid model holds its states once more. Raises ConfigError or UnsupportedError.
    """
    from fraqtl_vllm import hybrids, speculation
    from fraqtl_vllm.accounting import planner

    config = _config()
    config.model_config = SimpleNamespace(
        max_model_len=context,
        original_max_model_len=context,
        supports_kv_cache_grouping=False,  # by itself; vLLM 0.33 asks
    )
    config.scheduler_config.max_num_batched_tokens = batched_tokens
    config.scheduler_config.async_scheduling = async_scheduling
    config.cache_config.mamba_cache_mode = "align" if prefix_caching else "none"
    mode, layout = config.cache_config.mamba_cache_mode, hybrids.PLAIN_LAYOUT
    specs = _specs(shape, kv_format, ranks, mode, drafts)
    if not kv_format.is_quantized:
        specs = hybrids.cut_as_vllm_does(specs)
    elif shape.states is not None:
        specs, layout = hybrids.cut(specs), hybrids.LAYOUT
    if own is not None:
        specs = _in_own_formats(shape, specs, own)
    if draft is not None:
        specs |= _draft_specs(shape, draft, kv_format, ranks)
        speculation.check_windows(specs)
    pool = planner.plan(config, [specs], [memory], layout=layout)
    parts = {name: getattr(pool, name) for name in ("attention_bytes", "state_bytes", "padding_bytes")}
    name = kv_format.name if own is None else own.format_name
    return Fit(name, pool.block_size, pool.block_bytes, pool.blocks, pool.tokens, pool.concurrency, **parts)


@cache
def _config() -> Any:
    """A configuration of vLLM without a model, as far as its planner reads it."""
    try:
        from fraqtl_vllm import _vllm, hybrids

        config: Any = _vllm.VllmConfig()
    except ImportError as error:
        raise ConfigError(f"vLLM's own planner counts what fits, and it can't be imported: {error}") from error
    config.cache_config.kv_cache_layout = hybrids.PLAIN_LAYOUT
    return config


def _specs(shape: ModelShape, kv_format: KVFormat, ranks: int, mode: str, drafts: int = 0) -> dict[str, Any]:
    """The layers of one rank, as our backend describes them to vLLM."""
    import torch

    from fraqtl_vllm import _vllm

    specs: dict[str, Any] = {}
    for kind in shape.kinds():
        of: dict[str, Any] = {"block_size": BLOCK_SIZE, "num_kv_heads": max(1, kind.kv_heads // ranks)}
        of |= {"head_size": kind.head_size, "dtype": torch.uint8}
        of["state_content_bytes"] = kv_format.bytes_per_token(kind.head_size)
        spec = (
            _vllm.SlidingWindowSpec(sliding_window=kind.window, **of) if kind.window else _vllm.FullAttentionSpec(**of)
        )
        specs |= {f"layers.{len(specs) + i}": spec for i in range(kind.layers)}
    if (states := shape.states) is not None:
        dtypes = tuple(getattr(torch, name) for name in states.dtypes)
        # In the middle of a prompt vLLM keeps a state of Mamba2 layers for the prefix cache.
        spec = _vllm.MambaSpec(
            shapes=states.shapes(ranks, drafts),
            dtypes=dtypes,
            block_size=shape.context,
            mamba_cache_mode=mode,
            num_prefill_checkpoint_blocks=int(states.kind == "mamba2"),
            num_speculative_blocks=drafts,
        )
        specs |= {f"states.{i}": spec for i in range(states.layers)}
    return specs


def _in_own_formats(shape: ModelShape, specs: dict[str, Any], own: FraqtlConfig) -> dict[str, Any]:
    """The specs of `_specs` with each layer's own format. Raises ConfigError for a model that isn't served so."""
    if len(shape.kinds()) > 1 or shape.states is not None:
        raise ConfigError("formats of single layers are for models whose layers all attend alike: leave them out")
    formats = own.by_layer(len(specs))
    return {
        name: replace(spec, state_content_bytes=each.bytes_per_token(shape.head_size))
        for (name, spec), each in zip(specs.items(), formats, strict=True)
    }


def _draft_specs(shape: ModelShape, draft: ModelShape, kv_format: KVFormat, ranks: int) -> dict[str, Any]:
    """The layers of a model that drafts, in the format that they are stored in beside `kv_format`."""
    from fraqtl_vllm import speculation

    if shape.states is not None or draft.states is not None:
        raise ConfigError("hybrid models are not served with a draft model: leave --draft-model out")
    stored_as = speculation.format_of_drafts(FraqtlConfig(kv_format=kv_format.name))
    return {f"draft.{name}": spec for name, spec in _specs(draft, stored_as, ranks, mode="none").items()}


def plan(
    shape: ModelShape,
    memory: int,
    *,
    context: int,
    ranks: int = 1,
    own: FraqtlConfig | None = None,
    draft: ModelShape | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Every format's fit (`options`: see there), and the model and memory it is for; plain numbers, ready for JSON.

    own: settings with formats of single layers, for a fit of their own. draft: a model that drafts.
    """
    shape.check_ranks(ranks)
    if draft is not None:
        draft.check_ranks(ranks)
        options["draft"] = draft
    if context < 1:
        raise ConfigError(f"the context must be at least 1 token, not {context}")
    fits = {name: fit(shape, f, memory, context=context, ranks=ranks, **options) for name, f in FORMATS.items()}
    if own is not None:
        fits[own.format_name] = fit(shape, own.format, memory, context=context, ranks=ranks, own=own, **options)
    baseline = fits[BASELINE]
    return {
        "model": shape.numbers(),
        **({"draft_model": draft.numbers()} if draft else {}),
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
                **(one.split() if shape.states else {}),
            }
            for one in fits.values()
        ],
    }
