"""The hook: a transformers cache that hands attention what a method would have kept.

Attention layers give their keys (after RoPE) and values to the cache's `update` and attend what it returns, so
this works for every model with a standard cache, whatever its attention. All methods store each token by
itself; therefore one forward pass over a text attends just what decoding it token by token would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fraqtl_bench.quality.codecs import Codec, LayerSample
from fraqtl_bench.quality.grids import Kept
from fraqtl_bench.quality.methods import Method


@dataclass(frozen=True)
class FittedStream:
    """A codec with its constants for one layer."""

    codec: Codec
    constants: Kept

    def round_trip(self, x: Tensor) -> Tensor:
        """x (B, H, T, D) as the cache gives it back."""
        return self.codec.round_trip(x, self.constants)


@dataclass(frozen=True)
class FittedLayer:
    key: FittedStream
    value: FittedStream


@dataclass(frozen=True)
class Fitted:
    """A method with the constants of every layer of a model."""

    method: Method
    layers: tuple[FittedLayer, ...]

    def bits_per_dim(self, head_size: int, tokens: int) -> float:
        """Bits per dimension of everything kept for one sequence of `tokens` tokens, constants included."""
        return self.vector_bits(head_size) / (2 * head_size) + self.constant_bits(head_size) / (2 * head_size * tokens)

    def vector_bits(self, head_size: int) -> float:
        """Bits per (token, KV head), key and value together, mean over the layers."""
        bits = (x.codec.vector_bits(head_size) for layer in self.layers for x in (layer.key, layer.value))
        return sum(bits) / len(self.layers)

    def constant_bits(self, head_size: int) -> float:
        """Bits of constants per (layer, KV head), key and value together, mean over the layers."""
        streams = (x for layer in self.layers for x in (layer.key, layer.value))
        return sum(x.codec.constant_bits(head_size, x.constants) for x in streams) / len(self.layers)


def fit_layer(method: Method, sample: LayerSample) -> FittedLayer:
    return FittedLayer(
        FittedStream(method.key, method.key.fit(sample, "key")),
        FittedStream(method.value, method.value.fit(sample, "value")),
    )


def fit(method: Method, samples: Sequence[LayerSample]) -> Fitted:
    """Fit a method to every layer's calibration sample."""
    return Fitted(method, tuple(fit_layer(method, sample) for sample in samples))


class LabCache(DynamicCache):
    """A DynamicCache, sliding layers included, whose keys and values went through `layers`.

    config: the model's text configuration. layers: one per layer of the model, None for no change at all.
    """

    def __init__(self, config: Any, layers: Sequence[FittedLayer] | None = None) -> None:
        super().__init__(config=config)
        self.fitted = layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.fitted is not None:
            layer = self.fitted[layer_idx]
            key_states = layer.key.round_trip(key_states)
            value_states = layer.value.round_trip(value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def logits(
    model: Any, ids: Sequence[int], layers: Sequence[FittedLayer] | None, last: int, places: Tensor | None = None
) -> Tensor:
    """(last, vocabulary): logits of the last tokens of one forward pass over `ids` with the given cache.

    places: (tokens,) positions of `ids`; 0, 1, .. if not given.
    """
    inputs = torch.tensor([list(ids)], device=model.device)
    cache = LabCache(model.config.get_text_config(), layers)
    options = {} if places is None else {"position_ids": places[None].to(model.device)}
    return model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=last, **options).logits[0]
