"""How far the next token moves with each form."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fraqtl_bench.demo_model.corpus import Corpus
from fraqtl_bench.quality.divergence import compare, summarize
from fraqtl_bench.quality.latent.absorbed import capture
from fraqtl_bench.quality.latent.forms import FORMS, Side, fit
from fraqtl_bench.quality.latent.model import rows

CALIBRATION, TESTED = (4, 512), (8, 512)  # texts and tokens of each
SEEDS = 1, 2


class LatentCache(DynamicCache):
    """Gives attention the latent and the key as a form keeps them. layers: None for as they are."""

    def __init__(self, config: Any, layers: Sequence[tuple[Side, Side]] | None) -> None:
        super().__init__(config=config)
        self.sides = layers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.sides is not None:
            latent, rope = self.sides[layer_idx]
            key_states, value_states = latent.round_trip(key_states), rope.round_trip(value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def logits(model: Any, ids: Tensor, layers: Sequence[tuple[Side, Side]] | None) -> Tensor:
    """(T, vocabulary) of ids (T,)."""
    cache = LatentCache(model.config, layers)
    found: Tensor = model(ids[None], past_key_values=cache, use_cache=True).logits[0]
    return found


def measure(model: Any, texts: Corpus) -> list[dict[str, Any]]:
    """One row a form."""
    calibration, tested = (
        rows(texts, random.Random(seed), *shape) for seed, shape in zip(SEEDS, (CALIBRATION, TESTED), strict=True)
    )
    samples = list(zip(*(capture(model, ids) for ids in calibration), strict=True))  # by layer
    exact = [logits(model, ids, None) for ids in tested]
    found = []
    for form in FORMS:
        layers = [fit(form, of_layer) for of_layer in samples]
        kept = [logits(model, ids, layers) for ids in tested]
        summary = summarize([compare(a, b, 1) for a, b in zip(kept, exact, strict=True)])
        found.append(
            {
                "form": form.name,
                "token_bytes": form.token_bytes,
                "kl": summary.kl,
                "kl_p99": summary.kl_p99,
                "agreement": summary.agreement,
                "perplexity": _perplexity(kept, tested),
            }
        )
        print(found[-1], flush=True)
    return found


def _perplexity(kept: Sequence[Tensor], ids: Tensor) -> float:
    losses = [torch.nn.functional.cross_entropy(x[:-1], row[1:]) for x, row in zip(kept, ids, strict=True)]
    return float(torch.stack(losses).mean().exp())


def settings() -> dict[str, Any]:
    """What a result file says of the texts."""
    names = ("texts", "tokens")
    return {
        "calibration": dict(zip(names, CALIBRATION, strict=True)),
        "tested": dict(zip(names, TESTED, strict=True)),
    }
