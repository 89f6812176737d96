"""Attention in which every query finds each key and value in the state that decoding would have shown it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.quality.fitted import FittedLayer, FittedStream
from fraqtl_bench.quality.recent import Recent
from fraqtl_bench.quality.watch import attention_of, full_mask, plain_attention

ROWS = 256  # queries at a time, so that memory grows with the length and not with its square
State = tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]
"""Keys or values (1, H, T, D), and which pairs of positions of queries and keys find them so."""
_ATTENDING = ContextVar("_ATTENDING", default=False)


@contextmanager
def attending(model: Any, layers: Sequence[FittedLayer] | None) -> Iterator[None]:
    """Within the context, `model` attends what `layers` kept of keys and values that reach attention untouched.

    Nothing changes if no layer keeps its newest tokens in another way.
    """
    if not any(isinstance(s.codec, Recent) for layer in layers or () for s in (layer.key, layer.value)):
        yield
        return

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        assert layers is not None
        layer, full = layers[module.layer_idx], full_mask(mask, query, key)
        pairs = [(k, v) for k in _states(layer.key, key) for v in _states(layer.value, value)]
        positions = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)
        outputs = []
        for own, seen, at in zip(query.split(ROWS, 2), full.split(ROWS), positions.split(ROWS), strict=True):
            found = [_columns(k, v, seen, at) for k, v in pairs]
            keys, values = (torch.cat([columns[i] for columns in found], 2) for i in (0, 1))
            masks = torch.cat([columns[2] for columns in found], 1)
            outputs.append(plain_attention(module)(module, own, keys, values, masks[None, None], *args, **kwargs)[0])
        return torch.cat(outputs, 1), None

    token = _ATTENDING.set(True)
    try:
        with attention_of(model, attention):
            yield
    finally:
        _ATTENDING.reset(token)


def is_attending() -> bool:
    """Whether this is within such a context, for layers that keep their newest tokens in another way."""
    return _ATTENDING.get()


def _states(stream: FittedStream, x: Tensor) -> list[State]:
    """The states in which x is found; one, if the cache has already given it back."""
    codec = stream.codec
    if not isinstance(codec, Recent):
        return [(x, lambda query, key: torch.ones_like(query - key, dtype=torch.bool))]
    old, new = codec.states(x, stream.constants)
    return [(old, lambda query, key: ~codec.is_new(query, key)), (new, codec.is_new)]


def _columns(key: State, value: State, mask: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask of the tokens that some query at the positions `at` finds in these states.

    mask: (queries, keys). Queries that find a token in another state have it masked.
    """
    least = torch.finfo(mask.dtype).min
    tokens = torch.arange(mask.shape[1], device=mask.device)
    found = key[1](at[:, None], tokens) & value[1](at[:, None], tokens) & (mask > least / 2)
    some = found.any(0).nonzero()[:, 0]
    own = mask[:, some].masked_fill(~found[:, some], least)
    return key[0][:, :, some], value[0][:, :, some], own
