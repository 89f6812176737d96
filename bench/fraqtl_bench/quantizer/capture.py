"""Keys, queries and values of a real model, taken where its attention receives them (after RoPE)."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.demo_model.corpus import FACTS, standard_library_prose
from fraqtl_bench.projection import output_projection
from fraqtl_bench.quantizer.cases import QUERIES, TOKENS, Case, Head, Sample, causal
from fraqtl_bench.recall import make_text
from fraqtl_kernels.calibration.importance import Importance, attend
from fraqtl_kernels.calibration.prompt import positions, texts_in_tokens, token_rows
from fraqtl_kernels.errors import ConfigError

Layers = list[tuple[Tensor, Tensor, Tensor]]
Projections = list[Tensor | None]


def demo_model() -> Path:
    """The folder of the model that ships with fraqtl-serve. Raises ConfigError if it is not installed."""
    found = importlib.util.find_spec("fraqtl_serve")
    if found is None or found.origin is None:
        raise ConfigError("the demo model is not installed: name a model folder with --model")
    return Path(found.origin).parent / "demo_model"


def token_ids(tokenizer: Any, context: int, seed: str) -> list[int]:
    """A chat of about `context` tokens: a text with codes in it and a question about one of them."""
    rng = random.Random(seed)
    text, codes = make_text(rng, standard_library_prose(limit_bytes=400_000), tokenizer, context)
    name = rng.choice(sorted(codes))
    chat = [{"role": "user", "content": text + "\n" + FACTS["code"][1].format(k=name)}]
    chat.append({"role": "assistant", "content": FACTS["code"][0].format(k=name, v=codes[name])})
    return list(tokenizer.apply_chat_template(chat, return_dict=False))


@torch.inference_mode()
def capture(model: Any, ids: list[int], places: Tensor | None = None) -> Layers:
    """Per layer (query heads, T, D), (KV heads, T, D) twice: the queries, keys and values of one forward pass.

    places: (T,) positions of the tokens, 0, 1, .. if not given.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layers: Layers = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        layers.append((query[0].float(), key[0].float(), value[0].float()))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("fraqtl_capture", attention)
    model.set_attn_implementation("fraqtl_capture")
    # Without a mask transformers takes a jump of positions for the beginning of another text
    mask = torch.ones(1, len(ids), dtype=torch.long)
    where = None if places is None else places[None]
    model(torch.tensor([ids]), position_ids=where, attention_mask=mask, use_cache=False)
    return layers


@dataclass(frozen=True)
class Passes:
    """Several forward passes of one length: the tokens of all one after another, and how many they were.

    projections: `output_projection` of every layer.
    """

    layers: Layers
    count: int
    projections: Projections

    @classmethod
    def joined(cls, passes: list[Layers], projections: Projections) -> Passes:
        length = min(layers[0][0].shape[1] for layers in passes)
        by_layer = (zip(*layer, strict=True) for layer in zip(*passes, strict=True))
        q, k, v = zip(*([torch.cat([x[:, :length] for x in xs], 1) for xs in layer] for layer in by_layer), strict=True)
        return cls(list(zip(q, k, v, strict=True)), len(passes), projections)

    def importance(self) -> list[Importance]:
        """Of every layer."""
        found = []
        for layer, projection in zip(self.layers, self.projections, strict=True):
            query, key, value = (x.transpose(0, 1) for x in layer)
            scale = query.shape[-1] ** -0.5
            found.append(attend(query, key, value, sequences=self.count, scale=scale, projection=projection)[1])
        return found


def capture_prompt(model: Any, tokenizer: Any) -> Passes:
    """What the prompt that servers calibrate with gives."""
    places = positions(model.config.max_position_embeddings)
    rows = token_rows(texts_in_tokens(tokenizer), places.shape[1], tokenizer.bos_token_id)
    found = [capture(model, row, own) for row, own in zip(rows, places, strict=True)]
    return Passes.joined(found, output_projections(model))


def output_projections(model: Any) -> Projections:
    """Of every layer, in their order."""
    return [output_projection(module, module.head_dim) for module in model.modules() if hasattr(module, "layer_idx")]


def samples(layers: Layers) -> list[Sample]:
    """One sample per (layer, KV head): the last queries of all query heads that share the KV head."""
    found = []
    for query, key, value in layers:
        tokens, size = key.shape[1:]
        seen = causal(tokens, QUERIES).repeat(query.shape[0] // key.shape[0], 1)
        for head, own in enumerate(query[:, -QUERIES:].chunk(key.shape[0])):
            found.append(Sample(key[head], value[head], own.reshape(-1, size), seen))
    return found


def calibration_samples(prompt: Passes) -> list[Sample]:
    """One sample per (layer, KV head), with all queries and what each of them and each value is worth."""
    found = []
    for layer, importance in zip(prompt.layers, prompt.importance(), strict=True):
        query, key, value = (x.transpose(0, 1) for x in layer)
        group = query.shape[1] // key.shape[1]
        for h in range(key.shape[1]):
            own = slice(h * group, (h + 1) * group)
            queries, weight = query[:, own].transpose(0, 1).flatten(0, 1), importance.query[:, own].T.flatten()
            seen = torch.empty(0, key.shape[0], dtype=torch.bool)
            of_value = importance.value[:, h], None if importance.direction is None else importance.direction[h]
            found.append(Sample(key[:, h], value[:, h], queries, seen, weight, *of_value))
    return found


def model_case(path: Path, seed: int) -> Case:
    """All KV heads of the model at `path`, calibrated as in a server and measured on another text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (path / "config.json").is_file():
        raise ConfigError(f"--model {path}: no config.json there, name a folder with a Hugging Face model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = capture_prompt(model, tokenizer)
    calibration = calibration_samples(prompt)
    measured = samples(capture(model, token_ids(tokenizer, TOKENS, f"{seed}-{TOKENS}")))
    heads = tuple(Head(*pair) for pair in zip(calibration, measured, strict=True))
    size = heads[0].measured.key.shape[-1]
    return Case(f"{path.name}, D={size}", size, heads, "model")
