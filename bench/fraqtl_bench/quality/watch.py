"""Looks at queries, keys and values where attention receives them: after RoPE, before anything is stored."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from fraqtl_bench.projection import output_projection
from fraqtl_bench.quality.codecs import LayerSample, Rope
from fraqtl_kernels.calibration.importance import attend

_NAME = "fraqtl_watch"


@dataclass(frozen=True)
class Seen:
    """What one layer's attention received.

    module: the attention module. query (query heads, T, D), key and value (KV heads, T, D). mask: (T, T), added to the
    scores. scale: of the scores. soft_cap: of the scores, None for none. window: of the keys, None for all.
    """

    module: Any
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    scale: float
    soft_cap: float | None
    window: int | None

    def rows(self, count: int) -> Tensor:
        """At most `count` query positions, spread evenly over the second half and half of the first."""
        tokens = self.query.shape[1]
        return torch.linspace(tokens // 4, tokens - 1, min(count, tokens)).long().unique()

    def scores(self, rows: Tensor, key: Tensor | None = None) -> Tensor:
        """(query heads, rows, T) float32 scores of the queries at `rows`, with `key` in the place of the own keys."""
        key = self.key if key is None else key
        group = self.query.shape[0] // key.shape[0]
        keys = key.float().repeat_interleave(group, 0)
        scores = self.query[:, rows].float() @ keys.mT * self.scale
        if self.soft_cap:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        return scores + self.mask[rows].float()

    def sample(self) -> LayerSample:
        """For calibration, weighted as a server weights it."""
        query, key, value = (x.transpose(0, 1) for x in (self.query, self.key, self.value))
        _, importance = attend(
            query,
            key,
            value,
            sequences=1,
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            projection=output_projection(self.module, query.shape[-1]),
        )
        return LayerSample(self.query, self.key, self.value, importance)


@contextmanager
def attention_of(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Within the context, `function` is the model's attention. Its mask is added to the scores."""
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, function)
    AttentionMaskInterface.register(_NAME, eager_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def plain_attention(module: Any) -> Callable[..., Any]:
    """The attention function in plain torch that stands beside an attention module."""
    return sys.modules[type(module).__module__].eager_attention_forward


def full_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """(queries, keys), added to the scores; causal if there is none."""
    return _causal(query.shape[2], query) if mask is None else mask[0, 0, :, : key.shape[2]]


@contextmanager
def watching(model: Any, handler: Callable[[Seen], None]) -> Iterator[None]:
    """Within the context, `handler` sees every attention layer of every forward pass of `model`."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        full = full_mask(mask, query, key)
        cap = kwargs.get("softcap")
        window = kwargs.get("sliding_window")
        handler(Seen(module, module.layer_idx, query[0], key[0], value[0], full, scale, cap, window))
        return plain_attention(module)(module, query, key, value, full[None, None], *args, **kwargs)

    with attention_of(model, attention):
        yield


def _causal(tokens: int, like: Tensor) -> Tensor:
    least = torch.finfo(like.dtype).min
    return torch.full((tokens, tokens), least, dtype=like.dtype, device=like.device).triu(1)


def calibration_samples(model: Any, ids: Sequence[int], *, gradients: bool = False) -> list[LayerSample]:
    """Queries, keys and values of every layer in one forward pass over the calibration text.

    gradients: also those of the text's loss, by a second pass and its backward pass.
    """
    samples: list[LayerSample] = []
    ropes: dict[int, Rope] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_embeddings") is not None:
            ropes[module.layer_idx] = rope_of(*kwargs["position_embeddings"])

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "layer_idx")
    ]
    try:
        with torch.inference_mode(), watching(model, lambda seen: samples.append(seen.sample())):
            model(torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    samples = [replace(sample, rope=ropes.get(layer)) for layer, sample in enumerate(samples)]
    if not gradients:
        return samples
    return [replace(s, gradient=g) for s, g in zip(samples, loss_gradients(model, ids), strict=True)]


def rope_of(cos: Tensor, sin: Tensor) -> Rope:
    """From the cosines and sines (1, T, R) of a model's first positions."""
    half = cos.shape[-1] // 2
    halves = torch.equal(cos[..., :half], cos[..., half:])
    own = slice(0, half) if halves else slice(0, None, 2)
    return Rope(torch.atan2(sin[0, 1, own].float(), cos[0, 1, own].float()), halves)


class _Leaves(DynamicCache):
    """Keeps the gradients of the keys and values that attention layers hand over."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.found: dict[int, dict[str, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        key_states.retain_grad()
        value_states.retain_grad()
        self.found[layer_idx] = {"key": key_states, "value": value_states}
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def loss_gradients(model: Any, ids: Sequence[int]) -> list[dict[str, Tensor]]:
    """Per layer, the gradients of the mean next-token loss at its keys and values, (KV heads, T, D) each."""
    tokens = torch.tensor([list(ids)], device=model.device)
    model.requires_grad_(False)  # only what flows through the cache is asked for
    cache = _Leaves(model.config.get_text_config())
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(tokens).requires_grad_()
        logits = model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).backward()
    grads = ({name: x.grad for name, x in cache.found[layer].items()} for layer in range(len(cache.found)))
    return [{name: g[0] for name, g in found.items() if g is not None} for found in grads]
