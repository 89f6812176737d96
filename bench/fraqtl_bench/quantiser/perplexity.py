"""Perplexity of a model whose attention reads stored keys and values, its own token's included, as the server's does.

Texts are chats with codes to remember between paragraphs of prose, made from the seed; calibration sees another
one. Every text is one window, teacher forced, and every token but the first counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.quantiser.capture import capture, token_ids
from fraqtl_bench.quantiser.cases import CALIBRATION_TOKENS, TOKENS
from fraqtl_bench.quantiser.stored import through_pages
from fraqtl_bench.quantiser.variants import PLAIN, store
from fraqtl_kernels.calibration import calibrate
from fraqtl_kernels.constants import IDENTITY
from fraqtl_kernels.formats import FORMATS

TEXTS = 16
PLAIN_NAME = "plain INT4"
UNCALIBRATED = "k4v4, not calibrated"

Storage = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]  # layer, key, value (T, heads, D) -> as stored


def storages(calibration: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Storage]:
    """Every format of the server, k4v4 without its constants, and plain INT4. calibration: see `capture`."""

    def plain(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return store(key, PLAIN), store(value, PLAIN)

    def uncalibrated(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return through_pages(FORMATS["k4v4"], key, value, IDENTITY)

    def calibrated(name: str) -> Storage:
        format = FORMATS[name]
        rows = [[x.transpose(0, 1) for x in (key, query, value)] for query, key, value in calibration]
        constants = [calibrate(format, *row) for row in rows]
        return lambda layer, key, value: through_pages(format, key, value, constants[layer])

    formats = {name: calibrated(name) for name in FORMATS if name != "fp16"}
    return {**formats, UNCALIBRATED: uncalibrated, PLAIN_NAME: plain}


@torch.inference_mode()
def log_loss(model: Any, ids: list[int], storage: Storage | None) -> float:
    """Sum of -log p over the tokens after the first, with keys and values that `storage` has been given."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if storage is not None:
            stored = storage(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
            key, value = (x.transpose(0, 1)[None] for x in stored)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("fraqtl_stored", attention)
    model.set_attn_implementation("fraqtl_stored")
    tokens = torch.tensor([ids])
    logits = model(tokens, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()


def measure_perplexity(path: Path, seed: int) -> dict[str, dict[str, float]]:
    """Perplexity by storage, and its increase over the unquantised model's, as a share."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = storages(capture(model, token_ids(tokenizer, CALIBRATION_TOKENS, f"{seed}-{CALIBRATION_TOKENS}")))
    texts = [token_ids(tokenizer, TOKENS, f"{seed}-perplexity-{i}") for i in range(TEXTS)]
    count = sum(len(ids) - 1 for ids in texts)

    def perplexity(storage: Storage | None) -> float:
        return math.exp(sum(log_loss(model, ids, storage) for ids in texts) / count)

    exact = perplexity(None)
    table = {"float32": {"perplexity": exact, "increase": 0.0, "tokens": count}}
    for name, storage in found.items():
        value = perplexity(storage)
        table[name] = {"perplexity": value, "increase": value / exact - 1, "tokens": count}
    return table
