"""The hook: a transformers cache that hands attention what a method would have kept.

Attention layers give their keys (after RoPE) and values to the cache's `update` and attend what it returns, so
this works for every model with a standard cache, whatever its attention. Most methods store each token by
itself; therefore one forward pass over a text attends just what decoding it token by token would. For those that keep
the newest tokens in another way, see `recent`: there every query attends what it would have found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fraqtl_bench.quality.attention import attending
from fraqtl_bench.quality.codecs import Codec, Exact, LayerSample
from fraqtl_bench.quality.grids import Kept
from fraqtl_bench.quality.methods import Method
from fraqtl_bench.quality.recent import Recent


@dataclass(frozen=True)
class FittedStream:
    """A codec with its constants for one layer of `heads` KV heads."""

    codec: Codec
    constants: Kept
    heads: int

    def round_trip(self, x: Tensor) -> Tensor:
        """x (B, H, T, D) as the cache gives it back."""
        return self.codec.round_trip(x, self.constants)

    def hand_over(self, x: Tensor) -> Tensor:
        """x (B, H, T, D) as attention gets it: itself where each query attends another state of it (see `recent`)."""
        return x if isinstance(self.codec, Recent) else self.round_trip(x)


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
        bits = sum(
            x.codec.sequence_bits(head_size, x.heads, tokens)
            + x.codec.all_constant_bits(head_size, x.heads, x.constants)
            for x in self._streams()
        )
        return bits / (head_size * tokens * sum(x.heads for x in self._streams()))

    def vector_bits(self, head_size: int) -> float:
        """Bits per (token, KV head) of a long sequence, key and value together, mean over the layers."""
        bits = sum(x.codec.token_bits(head_size, x.heads) / x.heads for x in self._streams())
        return bits / len(self.layers)

    def _streams(self) -> Iterator[FittedStream]:
        return (x for layer in self.layers for x in (layer.key, layer.value))


def fit_layer(method: Method, sample: LayerSample, *, exact: bool = False) -> FittedLayer:
    """`method` fitted to a layer's calibration sample; exact: the layer stays fp16."""
    streams = {"key": method.key, "value": method.value}
    fitted = {}
    for name, codec in streams.items():
        chosen = Exact() if exact else codec
        fitted[name] = FittedStream(chosen, chosen.fit(sample, name), len(sample.stream(name)))
    return FittedLayer(**fitted)


def fit(method: Method, samples: Sequence[LayerSample]) -> Fitted:
    """Fit a method to every layer's calibration sample."""
    layers = range(len(samples))
    count = min(method.exact_ends, len(samples) // 2)
    ends = {*layers[:count], *layers[len(samples) - count :]}
    return Fitted(method, tuple(fit_layer(method, sample, exact=i in ends) for i, sample in enumerate(samples)))


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
            key_states = layer.key.hand_over(key_states)
            value_states = layer.value.hand_over(value_states)
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
    with attending(model, layers):
        return model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=last, **options).logits[0]
