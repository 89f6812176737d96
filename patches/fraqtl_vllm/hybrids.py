"""Models whose layers partly attend and partly keep a state: how their blocks are cut.

All layers of such a model share one pool of blocks. A state (of a gated delta, Mamba or convolution layer) has one size
however long the sequence is, and isn't packed. By default vLLM gives every layer a region with pages of one size, so a
page of attention must hold as much as a state: packed, that takes 3.9 times as many tokens as unpacked. Blocks of
thousands of tokens make prefixes coarse, and half of a sequence's last block is lost.

So a packed model has another of vLLM's layouts, BLHNC: the pages of all attention layers lie side by side in one block,
and another block holds a few states side by side. Where 16 layers attend, a block then needs a sixteenth of the tokens.
`choose_block_size` takes the size that loses least to padding and to last blocks. Unpacked formats stay as vLLM has
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_kernels.pages import BLOCK_SIZE_MULTIPLE
from fraqtl_vllm import _vllm, hooks
from fraqtl_vllm.config import settings_of
from fraqtl_vllm.names import BACKEND_NAME

LAYOUT = "BLHNC"
"""vLLM's name of the layout of packed hybrid models: block, layer, head, token, content."""
PLAIN_LAYOUT = "LBHNC"
"""That of all other pools, and of every baseline."""

STATE_ALIGNMENT = 64  # bytes, of a state's place in its block
MOST_STATE_GROUPS = 16  # each has a block table, which the scheduler and every step's metadata go through

STATE_LAYERS = ("linear_attention", "mamba", "conv")
"""What transformers calls layers that keep a state."""

Specs = dict[str, Any]
"""vLLM's KVCacheSpec of every layer of one rank, by the layer's name."""


@dataclass(frozen=True)
class Layers:
    """What decides the blocks of one rank."""

    token_bytes: int
    """Of one token, over all layers that attend."""
    states: int
    """Layers that keep a state."""
    state_bytes: int
    """Of the largest state."""

    @property
    def place(self) -> int:
        """Bytes of a state's place in a block."""
        return round_up(self.state_bytes, STATE_ALIGNMENT)

    def tokens_for(self, states: int) -> int:
        """The smallest block, in tokens, that also holds so many states."""
        return round_up(-(-states * self.place // self.token_bytes), BLOCK_SIZE_MULTIPLE)

    def lost(self, tokens: int) -> int:
        """Bytes that a sequence loses on average in blocks of so many tokens: beside its states, and half a block."""
        block = tokens * self.token_bytes
        return groups(self.states, block // self.place) * block - self.states * self.state_bytes + block // 2


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def groups(states: int, states_a_block: int) -> int:
    """Blocks that all states of a sequence take."""
    return -(-states // max(1, states_a_block))


def layers_of(specs: Iterable[Any]) -> Layers | None:
    """None unless there are layers of both kinds. Raises UnsupportedError for attention with sliding windows."""
    specs = list(specs)
    states = [spec for spec in specs if isinstance(spec, _vllm.MambaSpec)]
    attention = [spec for spec in specs if isinstance(spec, _vllm.AttentionSpec)]
    if not states or not attention:
        return None
    if any(type(spec) is not _vllm.FullAttentionSpec for spec in attention):
        raise UnsupportedError("the packed KV cache does not support hybrid models with sliding windows yet")
    token_bytes = sum(spec.unpadded_page_size_bytes // spec.block_size for spec in attention)
    return Layers(token_bytes, len(states), max(spec.state_content_size_bytes for spec in states))


def choose_block_size(layers: Layers) -> int:
    """Tokens of a block: of all sizes that hold a number of states, the one that loses least."""
    sizes = [
        layers.tokens_for(states)
        for states in range(1, layers.states + 1)
        if groups(layers.states, states) <= MOST_STATE_GROUPS
    ]
    return min(sizes, key=lambda tokens: (layers.lost(tokens), -tokens))


def cut(specs: Specs, block_size: int | None = None) -> Specs:
    """The specs with blocks as we cut them, of `block_size` tokens or of the best size."""
    layers = layers_of(specs.values())
    if layers is None:
        return specs
    tokens = block_size or choose_block_size(layers)
    return {name: _with_blocks(spec, tokens, layers.place) for name, spec in specs.items()}


def cut_as_vllm_does(specs: Specs) -> Specs:
    """The specs of unpacked layers with blocks as vLLM cuts them: a page of attention holds a state."""
    layers = layers_of(specs.values())
    if layers is None:
        return specs
    token = max(
        s.unpadded_page_size_bytes // s.block_size for s in specs.values() if isinstance(s, _vllm.AttentionSpec)
    )
    tokens = round_up(-(-layers.state_bytes // token), BLOCK_SIZE_MULTIPLE)
    return {name: _with_blocks(spec, tokens, tokens * token) for name, spec in specs.items()}


def _with_blocks(spec: Any, tokens: int, state_page: int) -> Any:
    if not isinstance(spec, _vllm.MambaSpec):
        return replace(spec, block_size=tokens)
    ends_with_block = spec.mamba_cache_mode == "align"  # the prefix cache keeps states at the ends of blocks
    return replace(spec, page_size_padded=state_page, block_size=tokens if ends_with_block else spec.block_size)


def without_checkpoints(specs: Specs) -> Specs:
    """On a CPU, where vLLM's scan gives no states from the middle of a prompt: the scheduler ends chunks there instead.

    vLLM's Mamba2 layers claim that they export such states wherever they run.
    """
    if not _vllm.current_platform.is_cpu():
        return specs
    return {
        name: replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)
        if isinstance(spec, _vllm.MambaSpec)
        else spec
        for name, spec in specs.items()
    }


# ---- before a model is built


def check(config: _vllm.VllmConfig) -> None:
    """Raises ConfigError or UnsupportedError for a hybrid model whose blocks can't be cut, by its config.json."""
    _check_layers(config.model_config.hf_text_config)
    try:
        specs = _specs_by_config(config)
    except Exception as error:  # what a model's code raises about its config is open
        raise ConfigError(
            f"config.json of this hybrid model does not say how large its states are "
            f"({type(error).__name__}: {error}): take the model's original one"
        ) from error
    if any(size < 1 for spec in specs if isinstance(spec, _vllm.MambaSpec) for shape in spec.shapes for size in shape):
        raise ConfigError("config.json of this hybrid model describes states of no size: take the model's original one")
    layers = layers_of(specs)
    if layers is not None and config.cache_config.user_specified_block_size and are_interleaved(config):
        check_block_size(config.cache_config.block_size, layers)


def _check_layers(text_config: Any) -> None:
    """Raises ConfigError for what vLLM's own sums don't look at."""
    kinds = getattr(text_config, "layer_types", None) or ()
    if kinds and all(kind in STATE_LAYERS for kind in kinds):
        raise ConfigError("config.json of this hybrid model has no layer that attends: take the model's original one")
    keys, values = (getattr(text_config, f"linear_num_{name}_heads", None) for name in ("key", "value"))
    if keys and values and values > 0 and values % keys:
        raise ConfigError(
            f"config.json of this hybrid model has linear_num_value_heads {values}, which must be a multiple of "
            f"linear_num_key_heads {keys}: take the model's original one"
        )


def _specs_by_config(config: _vllm.VllmConfig) -> list[Any]:
    """A spec for every layer that attends, and one of a state: vLLM's own sums over the model's config."""
    import torch

    model, parallel = config.model_config, config.parallel_config
    kind, _ = _vllm.ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    shapes, dtypes = kind.get_mamba_state_shape_from_config(config), kind.get_mamba_state_dtype_from_config(config)
    size = model.get_head_size()
    attention = _vllm.FullAttentionSpec(
        block_size=BLOCK_SIZE_MULTIPLE,
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=size,
        dtype=torch.uint8,
        state_content_bytes=settings_of(config).format.bytes_per_token(size),
    )
    attending = model.get_num_layers_by_block_type(parallel, "attention") or model.get_num_layers(parallel)
    return [attention] * attending + [_vllm.MambaSpec(shapes=shapes, dtypes=dtypes, block_size=-1)]


# ---- in a worker


def are_interleaved(config: _vllm.VllmConfig) -> bool:
    """Whether this model's blocks are cut by us."""
    model = config.model_config
    return model is not None and model.is_hybrid and settings_of(config).format.is_quantized


def install() -> None:
    """Cut blocks of hybrid models before vLLM asks layers for their specs. Called in every process."""
    hooks.BLOCK_SIZE.wrap(type(_vllm.current_platform), _cut_by_us)


def _cut_by_us(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def update_block_size_for_backend(vllm_config: Any) -> None:
        with _vllm.set_current_vllm_config(vllm_config):  # formats are read there when backends are asked
            backend = vllm_config.attention_config.backend
            if backend is None or backend.name != BACKEND_NAME or not are_interleaved(vllm_config):
                original(vllm_config)
            else:
                _set_block_size(vllm_config)

    return update_block_size_for_backend


def _set_block_size(config: _vllm.VllmConfig) -> None:
    cache, specs = config.cache_config, dict(_specs_of_worker(config))
    layers = layers_of(specs.values())
    if layers is None:
        raise UnsupportedError("the packed KV cache does not support hybrid models whose layers lie on several stages")
    best = choose_block_size(layers)
    if not cache.user_specified_block_size:
        cache.block_size = best
    check_block_size(cache.block_size, layers)
    cache.mamba_page_size_padded = layers.place
    if cache.mamba_cache_mode == "align":
        cache.mamba_block_size = cache.block_size
    _start_state_kernels(config, specs)
    logger = _vllm.init_logger("vllm.fraqtl.hybrids")
    logger.info("Hybrid model: blocks of %d tokens, or of states of %d bytes", cache.block_size, layers.state_bytes)


def _start_state_kernels(config: _vllm.VllmConfig, specs: Specs) -> None:
    """Choose the kernels of Mamba layers, which vLLM does for groups of one spec only: our groups have one by layer."""
    groups = [_vllm.KVCacheGroupSpec([name], spec) for name, spec in specs.items()]
    pool = _vllm.KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=groups)
    _vllm.initialize_mamba_ssu_backend(config.mamba_config, pool, use_replayssm=config.cache_config.use_replayssm)


def check_block_size(tokens: int, layers: Layers) -> None:
    """Raises ConfigError where a block of so many tokens holds no state."""
    if tokens * layers.token_bytes < layers.place:
        raise ConfigError(
            f"--block-size {tokens}: a block of this hybrid model also has to hold a state of {layers.state_bytes} "
            f"bytes: give a multiple of {BLOCK_SIZE_MULTIPLE} from {layers.tokens_for(1)} on, or leave it out"
        )


def _specs_of_worker(config: _vllm.VllmConfig) -> Iterator[tuple[str, Any]]:
    for name, layer in config.compilation_config.static_forward_context.items():
        if isinstance(layer, _vllm.AttentionLayerBase) and not getattr(layer, "kv_sharing_target_layer_name", None):
            spec = layer.get_kv_cache_spec(config)
            if isinstance(spec, _vllm.AttentionSpec):
                spec = layer.get_attn_backend().customize_spec(spec)
            if spec is not None:
                yield name, spec
