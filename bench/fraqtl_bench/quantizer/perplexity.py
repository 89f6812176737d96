"""Perplexity of a model whose attention reads stored keys and values, its own token's included, as the server's does.

Texts are chats with codes to remember between paragraphs of prose, made from the seed. Calibration sees the prompt that
servers calibrate with, and none of them. Every text is one window, teacher forced, and all tokens but the first count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.quantizer.capture import Passes, capture, capture_prompt, output_projections, token_ids
from fraqtl_bench.quantizer.cases import TOKENS
from fraqtl_bench.quantizer.steps import STEPS
from fraqtl_bench.quantizer.stored import BLOCK_SIZE, Stored, through_pages
from fraqtl_bench.quantizer.variants import PLAIN, Constants, Variant, store
from fraqtl_kernels.calibration.importance import Importance
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import IDENTITY
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.residual import reads_residual

TEXTS = 96
CHATS = 2  # that the comparison calibrates on
EXACT = "float32"
PLAIN_NAME = "plain INT4"
UNCALIBRATED = "k4v4, not calibrated"
ON_CHATS = "k4v4, calibrated on chats like these"
WITHOUT_RESIDUAL = "k4v4, not refined"
UNDIRECTED = "k4v4, output projection ignored"
POWERS_NAME = "centred, balanced by powers of 2"
POWERS = Variant("midpoint", "hadamard", "edge", "sinks", "powers")

Storage = Callable[[int, Tensor, Tensor], Stored]  # layer, key, value (T, heads, D)


def storages(prompt: Passes, chats: Passes) -> dict[str, Storage]:
    """Every format of the server, k4v4 without what makes it good, its earlier steps, and plain INT4. See `capture`."""

    def plain(layer: int, key: Tensor, value: Tensor) -> Stored:
        return Stored(store(key, PLAIN), store(value, PLAIN))

    def uncalibrated(layer: int, key: Tensor, value: Tensor) -> Stored:
        return through_pages(FORMATS["k4v4"], key, value, IDENTITY)

    def calibrated(name: str, layers: Passes) -> Storage:
        constants = [calibrate(FORMATS[name], *row, seen) for row, seen in by_token(layers)]
        return lambda layer, key, value: through_pages(FORMATS[name], key, value, constants[layer])

    def step(name: str) -> Storage:
        constants = [STEPS[name].calibrate(*row, seen) for row, seen in by_token(prompt)]
        return lambda layer, key, value: Stored(*STEPS[name].store(key, value, constants[layer]))

    def without_residual(layer: int, key: Tensor, value: Tensor) -> Stored:
        return replace(formats["k4v4"](layer, key, value), residual_key=None, residual_value=None)

    formats = {name: calibrated(name, prompt) for name in FORMATS if name != "fp16"}
    others: dict[str, Storage] = {
        WITHOUT_RESIDUAL: without_residual,
        POWERS_NAME: powers(prompt),
        UNCALIBRATED: uncalibrated,
        PLAIN_NAME: plain,
    }
    ignored = replace(prompt, projections=[None] * len(prompt.projections))
    formats |= {ON_CHATS: calibrated("k4v4", chats), UNDIRECTED: calibrated("k4v4", ignored)}
    return {**formats, **{f"k4v4, {n} only": step(n) for n in STEPS}, **others}


def by_token(layers: Passes) -> list[tuple[tuple[Tensor, Tensor, Tensor], Importance]]:
    """Per layer keys, queries and values, (tokens, heads, D), and their importance."""
    found = []
    for layer, importance in zip(layers.layers, layers.importance(), strict=True):
        query, key, value = (x.transpose(0, 1) for x in layer)
        found.append(((key, query, value), importance))
    return found


def powers(prompt: Passes) -> Storage:
    """The best of the variants that a factor for each channel allows, values rotated."""
    constants = [
        [Constants.calibrate(key[h], own.flatten(0, 1), POWERS) for h, own in enumerate(query.chunk(len(key)))]
        for query, key, _ in prompt.layers
    ]

    def storage(layer: int, key: Tensor, value: Tensor) -> Stored:
        keys = [store(key[:, h], POWERS, found) for h, found in enumerate(constants[layer])]
        return Stored(torch.stack(keys, 1), store(value.flatten(0, 1), POWERS.values).view_as(value))

    return storage


@torch.inference_mode()
def log_probabilities(model: Any, ids: list[int], storage: Storage | None) -> Tensor:
    """(T - 1, vocabulary): of the tokens after the first, with keys and values that `storage` has been given."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if storage is not None:
            stored = storage(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
            if stored.residual_key is not None:
                return attend_with_residual(query[0], stored, module.scaling).transpose(0, 1)[None], None
            key, value = (x.transpose(0, 1)[None] for x in (stored.key, stored.value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("fraqtl_stored", attention)
    model.set_attn_implementation("fraqtl_stored")
    logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1)


def attend_with_residual(query: Tensor, stored: Stored, scale: float) -> Tensor:
    """Causal attention (query heads, T, D) of one sequence. query: like the output; stored: with what is added."""
    tensors = stored.key, stored.value, stored.residual_key, stored.residual_value
    group = query.shape[0] // stored.key.shape[1]
    key, value, residual_key, residual_value = (
        x.transpose(0, 1).repeat_interleave(group, 0) for x in tensors if x is not None
    )
    position = torch.arange(query.shape[1])
    near = reads_residual(position[:, None], position, BLOCK_SIZE)
    scores = query @ key.mT + (query @ residual_key.mT).masked_fill(~near, 0)
    weights = (scores * scale).masked_fill(position > position[:, None], -torch.inf).softmax(-1)
    return weights @ value + weights.masked_fill(~near, 0) @ residual_value


@dataclass
class Losses:
    """Sums over the tokens of each text: -log p, and the divergence of the exact model's distribution."""

    loss: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)

    def add(self, ids: list[int], exact: Tensor, found: Tensor) -> None:
        self.loss.append(-found.gather(1, torch.tensor(ids)[1:, None]).sum().item())
        self.divergence.append((exact.exp() * (exact - found)).sum().item())

    def row(self, exact: Losses, tokens: list[int]) -> dict[str, float]:
        """The increase is a share of the perplexity; its standard error is over texts, paired with the exact model."""
        count = sum(tokens)
        pairs = zip(self.loss, exact.loss, tokens, strict=True)
        differences = torch.tensor([(a - b) / n for a, b, n in pairs], dtype=torch.float64)
        return {
            "perplexity": math.exp(sum(self.loss) / count),
            "increase": math.expm1((sum(self.loss) - sum(exact.loss)) / count),
            "standard_error": differences.std().item() / math.sqrt(len(tokens)),
            "divergence": sum(self.divergence) / count,
            "tokens": count,
        }


def measure_perplexity(path: Path, seed: int) -> dict[str, dict[str, float]]:
    """By storage: perplexity, its increase over the unquantized model's, and the divergence a token in nats."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    chats = (token_ids(tokenizer, TOKENS, f"{seed}-calibration-{i}") for i in range(CHATS))
    joined = Passes.joined([capture(model, ids) for ids in chats], output_projections(model))
    found = storages(capture_prompt(model, tokenizer), joined)
    losses = {name: Losses() for name in (EXACT, *found)}
    tokens = []
    for i in range(TEXTS):
        ids = token_ids(tokenizer, TOKENS, f"{seed}-perplexity-{i}")
        exact = log_probabilities(model, ids, None)
        tokens.append(len(ids) - 1)
        losses[EXACT].add(ids, exact, exact)
        for name, storage in found.items():
            losses[name].add(ids, exact, log_probabilities(model, ids, storage))
    return {name: losses[name].row(losses[EXACT], tokens) for name in losses}
