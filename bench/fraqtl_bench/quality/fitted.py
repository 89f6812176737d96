"""Methods with the constants of a model's layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

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
