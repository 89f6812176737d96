"""The hook: a transformers cache that hands attention what a method would have kept.

Attention layers give their keys (after RoPE) and values to the cache's `update` and attend what it returns, so
this works for every model with a standard cache, whatever its attention. Most methods store each token by
itself; therefore one forward pass over a text attends just what decoding it token by token would. For those that keep
the newest tokens in another way, see `recent`: there every query attends what it would have found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fraqtl_bench.quality.attention import attending
from fraqtl_bench.quality.fitted import FittedLayer


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
