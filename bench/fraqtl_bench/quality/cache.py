"""The hook: a transformers cache that hands attention what a method would have kept.

Attention layers give their keys (after RoPE) and values to the cache's `update` and attend what it returns, so
this works for every model with a standard cache, whatever its attention. Most methods store each token by
itself; therefore one forward pass over a text attends just what decoding it token by token would. For those that keep
the newest tokens in another way, see `recent`: there every query attends what it would have found. A pass over several
tokens needs `attention.attending` for that; a step of one token gets it from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fraqtl_bench.quality.attention import attending, is_attending
from fraqtl_bench.quality.fitted import FittedLayer, FittedStream
from fraqtl_bench.quality.recent import History, Recent


class LabCache(DynamicCache):
    """A DynamicCache, sliding layers included, whose keys and values went through `layers`.

    config: the model's text configuration. layers: one per layer of the model, None for no change at all.
    """

    def __init__(self, config: Any, layers: Sequence[FittedLayer] | None = None) -> None:
        super().__init__(config=config)
        self.fitted = layers
        self._histories = [(_history(layer.key), _history(layer.value)) for layer in layers or ()]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.fitted is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer, histories = self.fitted[layer_idx], self._histories[layer_idx]
        for history, x in zip(histories, (key_states, value_states), strict=True):
            if history is not None:
                history.append(x)
        kept = super().update(
            layer.key.hand_over(key_states), layer.value.hand_over(value_states), layer_idx, *args, **kwargs
        )
        if is_attending() or not any(histories):
            return kept
        if key_states.shape[2] > 1:
            raise RuntimeError("several tokens at once, of which each finds the newest in another way: use attending()")
        key, value = (
            x if history is None else history.found()[..., -x.shape[2] :, :]  # a layer with a window keeps fewer
            for history, x in zip(histories, kept, strict=True)
        )
        return key, value


def _history(stream: FittedStream) -> History | None:
    return History(stream.codec, stream.constants) if isinstance(stream.codec, Recent) else None


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
