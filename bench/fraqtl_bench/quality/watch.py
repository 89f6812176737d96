"""Looks at queries, keys and values where attention receives them: after RoPE, before anything is stored."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from fraqtl_bench.projection import output_projection
from fraqtl_bench.quality.codecs import LayerSample
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
def watching(model: Any, handler: Callable[[Seen], None]) -> Iterator[None]:
    """Within the context, `handler` sees every attention layer of every forward pass of `model`."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        tokens = query.shape[2]
        full = _causal(tokens, query) if mask is None else mask[0, 0, :, : key.shape[2]]
        cap = kwargs.get("softcap")
        window = kwargs.get("sliding_window")
        handler(Seen(module, module.layer_idx, query[0], key[0], value[0], full, scale, cap, window))
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, full[None, None], *args, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _causal(tokens: int, like: Tensor) -> Tensor:
    least = torch.finfo(like.dtype).min
    return torch.full((tokens, tokens), least, dtype=like.dtype, device=like.device).triu(1)


@torch.inference_mode()
def calibration_samples(model: Any, ids: Sequence[int]) -> list[LayerSample]:
    """Queries, keys and values of every layer in one forward pass over the calibration text."""
    samples: list[LayerSample] = []
    with watching(model, lambda seen: samples.append(seen.sample())):
        model(torch.tensor([list(ids)], device=model.device), use_cache=False)
    return samples
