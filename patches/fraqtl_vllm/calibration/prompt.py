"""The built-in prompt (`fraqtl_kernels.calibration.prompt`) in the tokens of the model that vLLM has loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fraqtl_kernels.calibration.prompt import SEQUENCES, positions, texts_in_tokens, token_rows
from fraqtl_vllm import _vllm


@dataclass(frozen=True)
class Prompt:
    """`sequences` rows of one length. ids: (tokens,) int64. positions: alike, or (3, tokens) for M-RoPE."""

    ids: Tensor
    positions: Tensor
    sequences: int


def make_prompt(model: Any) -> Prompt:
    """The texts in the tokens of a model. model: vLLM's ModelConfig."""
    places = positions(model.max_model_len)
    flat = places.flatten()
    if model.uses_mrope:
        flat = flat.expand(3, -1)
    return Prompt(torch.tensor(token_ids(model, places.shape[1])).flatten(), flat, len(places))


def token_ids(model: Any, length: int) -> list[list[int]]:
    """Rows of the texts' tokens, every other text as a chat if the model has a template; random without a tokenizer."""
    if model.skip_tokenizer_init:
        random = torch.Generator().manual_seed(0)
        return torch.randint(model.get_vocab_size(), (SEQUENCES, length), generator=random).tolist()
    tokenizer = _vllm.cached_tokenizer_from_config(model)
    return token_rows(texts_in_tokens(tokenizer), length, getattr(tokenizer, "bos_token_id", None))
