"""Attention without a cache, which takes the statistics of its layer on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.calibration import calibrate
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import KVFormat


class Recorder:
    """One calibration run. `constants` has an entry for every layer that has keys of its own, by name."""

    def __init__(self, format: KVFormat, sequences: int) -> None:
        self.format = format
        self.sequences = sequences
        self.constants: dict[str, LayerConstants] = {}
        self._keys: dict[str, tuple[Tensor, Tensor]] = {}

    def attend(
        self,
        layer: str,
        shares: str | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        """Causal attention within every sequence, and the layer's constants.

        query: (tokens, query heads, D), key, value: (tokens, KV heads, D), sequences of equal length one after
        another. shares: the layer whose keys this one uses, if any. Returns float32 like query.
        """
        if shares is None:
            self.constants[layer] = calibrate(self.format, key, query, value)
            self._keys[layer] = key, value
        else:
            key, value = self._keys[shares]
        q, k, v = (x.float().unflatten(0, (self.sequences, -1)).transpose(1, 2) for x in (query, key, value))
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return out.transpose(1, 2).flatten(0, 1)
