"""The same weights in transformers, whose cache rounds keys and values as a format's codec does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fraqtl_bench.quality.grids import Kept
from fraqtl_bench.quality.server_codec import ServerStream
from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.formats import get_format
from tests.e2e.families.engine import Answer
from tests.e2e.families.models import REFERENCE


@dataclass(frozen=True)
class Seen:
    """What transformers makes of a prompt and the tokens that the engine answered with."""

    logprobs: Tensor
    """As `Answer.logprobs`, the prompt's included."""
    lost: Tensor
    """(tokens,) how much likelier, in nat, its own choice is than the engine's; zero where both chose the same."""


@dataclass(frozen=True)
class Rounding:
    """What the codec of a format does to keys and values of a layer."""

    key: ServerStream
    value: ServerStream
    constants: Kept

    def of(self, codec: ServerStream, x: Tensor) -> Tensor:
        """x (1, KV heads, tokens, D) as the cache gives it back.

        transformers may stand several equal heads in the place of one that has constants (see `Family.disguise`).
        """
        heads = x.shape[-3]
        spread = {name: part.repeat_interleave(heads // len(part), 0) for name, part in self.constants.items()}
        return codec.round_trip(x, spread)


class RoundingCache(DynamicCache):
    """Gives attention keys and values that were rounded, by `layers`, or as they are."""

    def __init__(self, config: Any, layers: Sequence[Rounding] | None) -> None:
        super().__init__(config=config)
        self.roundings = layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.roundings is not None:
            layer = self.roundings[layer_idx]
            key_states, value_states = layer.of(layer.key, key_states), layer.of(layer.value, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Reference:
    """A model in float32, so that only what the cache stores differs from one format to the next."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        inside = folder / REFERENCE
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            inside if inside.exists() else folder, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.eval()
        self.layers = int(self.model.config.get_text_config().num_hidden_layers)

    @torch.inference_mode()
    def read(self, answer: Answer, layers: Sequence[Rounding] | None) -> Seen:
        """One pass over prompt and answer; every layer's cache gives back what `layers` says, None: all exactly."""
        ids = [*answer.prompt, *answer.tokens]
        cache = RoundingCache(self.model.config.get_text_config(), layers)
        logits = self.model(torch.tensor([ids[:-1]]), past_key_values=cache, use_cache=True).logits[0]
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        answered = slice(len(answer.prompt) - 1, None)
        return Seen(chosen, logprobs[answered].amax(-1) - chosen[answered])


def rounding(kv_format: str, layers: int, constants: Mapping[int, LayerConstants] | None = None) -> list[Rounding]:
    """The codec of a format for each of so many layers, without residuals. constants: by layer."""
    key, value = (ServerStream(get_format(kv_format), name) for name in ("key", "value"))
    return [Rounding(key, value, (constants or {}).get(layer, IDENTITY).tensors()) for layer in range(layers)]
