"""What calibration fixes for one layer before the first request, and what it does to keys and queries.

With c the centre, e the exponents and H the rotation, a key is stored as z, and seen by a query as

    z = ((k - c) · 2^-e) H        q·k = ((q · 2^e) H)·z + q·c

- The centre takes away what all keys of a head share, such as a key bias (Qwen2). Softmax is blind to
  q·c, which is the same for every key, so it is only computed where scores are capped or sinks are learned.
- The exponents even out the channels, tied over each RoPE pair. Powers of two are exact in every
  floating dtype, so they cost no accuracy and fold into the matrix of the rotation.
- A few tokens (attention sinks, mostly the first of a sequence) have huge keys that are much alike in
  every text (Sun et al., "Massive activations in large language models", 2024). They get a centre of their
  own: each key takes the centre that leaves less of it, by the scale it would need. Which one it took is
  the sign bit of its scale; a query then adds q·(sink centre - centre) to the scores of those tokens.

Formats with static scales (`VectorFormat.static`) use `key_scale` and `value_scale` instead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

LARGEST_EXPONENT = 7


@dataclass(frozen=True)
class LayerConstants:
    """One layer's constants, each (KV heads, D), or None where there is nothing to do.

    key_centre: fp32, subtracted from keys. key_exponent: int8, keys are divided by 2^e and queries multiplied.
    sink_centre: fp32, in the place of key_centre for keys nearer to it; comes with a key_centre.
    key_scale, value_scale: fp32, the steps of static formats.
    """

    key_centre: Tensor | None = None
    key_exponent: Tensor | None = None
    sink_centre: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def smoothing(self) -> Tensor | None:
        """2^e, (KV heads, D) fp32."""
        return None if self.key_exponent is None else torch.exp2(self.key_exponent.float())

    def prepare_keys(self, key: Tensor) -> Tensor:
        """(k - c) · 2^-e. key: (..., KV heads, D), floating point; keeps the dtype."""
        if self.key_centre is not None:
            key = key - self.key_centre.to(key)
        return key if self.smoothing is None else key / self.smoothing.to(key)

    def restore_keys(self, key: Tensor, is_sink: Tensor) -> Tensor:
        """The inverse of `prepare_keys`. is_sink: (..., KV heads) bool, which keys were moved by the sink centre."""
        if self.smoothing is not None:
            key = key * self.smoothing.to(key)
        if self.key_centre is None:
            return key
        centre = self.key_centre.to(key)
        if self.sink_centre is not None:
            centre = torch.where(is_sink[..., None], self.sink_centre.to(key), centre)
        return key + centre

    def prepare_queries(self, query: Tensor) -> Tensor:
        """q · 2^e or q · s. query: (..., KV heads, queries, D), the queries of a KV head together."""
        for factor in (self.smoothing, self.key_scale):
            query = query if factor is None else query * factor.to(query)[:, None]
        return query

    def to(self, device: torch.device | str) -> LayerConstants:
        """The same on another device."""
        moved = ((f.name, getattr(self, f.name)) for f in fields(self))
        return LayerConstants(**{name: x if x is None else x.to(device) for name, x in moved})


IDENTITY = LayerConstants()
