"""What attention makes of an error in a latent, in the form in which servers decode: with weights absorbed.

A token keeps a latent c and a key k of a few dimensions with its position, both for all heads. With head h's part U_h
of the matrix that makes keys of latents and V_h of that for values, and W_h of the output projection,

    score = s (q U_h · c + r · k),      output = Σ_h Σ_j p_j c_j M_h,      M_h = V_h^T W_h

so one latent is key and value at once, and an error e of it moves both. To first order the output of query i moves by

    Σ_j p_j e_j A,      A = s (q U_h)^T (c_j - o) M_h + M_h,      o = Σ_j p_j c_j

The errors of different tokens are independent, so an error costs e G e^T with G = Σ p_j² A A^T over queries and heads.
That is what `calibration.solve` takes for keys (the first term alone) and for values (the second alone); here both
count, and what they have in common.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave


@dataclass(frozen=True)
class LatentSample:
    """One layer's calibration vectors of one text.

    latent: (T, R). rope_key: (T, P). query: (heads, T, R), with U_h and the scale. rope_query: (heads, T, P), with the
    scale. output: (heads, R, hidden), M_h.
    """

    latent: Tensor
    rope_key: Tensor
    query: Tensor
    rope_query: Tensor
    output: Tensor

    def weights(self) -> Tensor:
        """(heads, T, T): how every query attends."""
        scores = self.query @ self.latent.T + self.rope_query @ self.rope_key.T
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(unseen, -torch.inf).softmax(-1)

    def attend(self) -> Tensor:
        """(T, hidden): what the layer adds to its input."""
        return (self.weights() @ self.latent @ self.output).sum(0)


class _Seen(DynamicCache):
    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.kept[layer_idx] = key_states[0, 0], value_states[0, 0]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def capture(model: Any, ids: Tensor) -> list[LatentSample]:
    """Of every layer, what one forward pass over ids (T,) shows."""
    cache = _Seen(model.config)
    with _queries(model) as queries:
        model(ids[None], past_key_values=cache, use_cache=True)
    return [_sample(layer.self_attn, *queries[i], *cache.kept[i]) for i, layer in enumerate(model.model.layers)]


@contextmanager
def _queries(model: Any) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """By layer: (heads, T, plain) and (heads, T, rope) queries of the passes that are made meanwhile."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        query = module.q_proj(hidden).unflatten(-1, (-1, module.qk_head_dim)).transpose(1, 2)
        plain, rope = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
        rope, _ = apply_rotary_pos_emb_interleave(rope, rope, cos, sin)
        found[module.layer_idx] = plain[0], rope[0]

    hooks = [x.self_attn.register_forward_pre_hook(note, with_kwargs=True) for x in model.model.layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _sample(module: Any, plain: Tensor, rope: Tensor, latent: Tensor, rope_key: Tensor) -> LatentSample:
    of_head = module.kv_b_proj.weight.unflatten(0, (module.num_heads, -1))
    to_key, to_value = of_head.split([module.qk_nope_head_dim, module.v_head_dim], 1)
    projection = module.o_proj.weight.T.unflatten(0, (module.num_heads, -1))
    return LatentSample(
        latent=latent.clone(),
        rope_key=rope_key.clone(),
        query=plain @ to_key * module.scaling,
        rope_query=rope * module.scaling,
        output=to_value.mT @ projection,
    )


def cost(sample: LatentSample, *, of_scores: bool = True, of_values: bool = True) -> Tensor:
    """G of the latent: (R, R). of_scores, of_values: whether an error counts as one of keys, and as one of values."""
    squares = sample.weights().square()
    found = torch.zeros(sample.latent.shape[-1:] * 2)
    if of_scores:
        found += torch.einsum("htr,hts,ht->rs", sample.query, sample.query, _score_weights(sample)[0])
    if of_values:
        found += torch.einsum("hrx,hsx,h->rs", sample.output, sample.output, squares.sum((1, 2)))
    if of_scores and of_values:
        both = torch.einsum("htr,hts->rs", sample.query, _score_weights(sample)[1] @ sample.output.mT)
        found += both + both.T
    return found


def rope_cost(sample: LatentSample) -> Tensor:
    """G of the key with its position, which scores only see: (P, P)."""
    return torch.einsum("htp,htq,ht->pq", sample.rope_query, sample.rope_query, _score_weights(sample)[0])


def _score_weights(sample: LatentSample) -> tuple[Tensor, Tensor]:
    """Of every query (heads, T) and (heads, T, hidden): Σ_j p_j² |d_j|² and Σ_j p_j² d_j, with d_j = (c_j - o) M_h."""
    weights, values = sample.weights(), sample.latent @ sample.output
    squares, attended = weights.square(), weights @ values
    total, moment = squares.sum(-1, keepdim=True), squares @ values
    norm = squares @ values.square().sum(-1, keepdim=True) - 2 * (attended * moment).sum(-1, keepdim=True)
    norm = norm + total * attended.square().sum(-1, keepdim=True)
    return norm[..., 0].clamp_min(0), moment - total * attended
