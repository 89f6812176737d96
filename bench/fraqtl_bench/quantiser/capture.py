"""Keys, queries and values of a real model, taken where its attention receives them (after RoPE)."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.demo_model.corpus import FACTS, standard_library_prose
from fraqtl_bench.quantiser.cases import CALIBRATION_TOKENS, QUERIES, TOKENS, Case, Head, Sample, causal
from fraqtl_bench.recall import make_text
from fraqtl_kernels.errors import ConfigError

Layers = list[tuple[Tensor, Tensor, Tensor]]


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
def capture(model: Any, ids: list[int]) -> Layers:
    """Per layer (query heads, T, D), (KV heads, T, D) twice: the queries, keys and values of one forward pass."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layers: Layers = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        layers.append((query[0].float(), key[0].float(), value[0].float()))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("fraqtl_capture", attention)
    model.set_attn_implementation("fraqtl_capture")
    model(torch.tensor([ids]), use_cache=False)
    return layers


def samples(layers: Layers) -> list[Sample]:
    """One sample per (layer, KV head): the last queries of all query heads that share the KV head."""
    found = []
    for query, key, value in layers:
        tokens, size = key.shape[1:]
        seen = causal(tokens, QUERIES).repeat(query.shape[0] // key.shape[0], 1)
        for head, own in enumerate(query[:, -QUERIES:].chunk(key.shape[0])):
            found.append(Sample(key[head], value[head], own.reshape(-1, size), seen))
    return found


def model_case(path: Path, seed: int) -> Case:
    """All KV heads of the model at `path`, calibrated on one text and measured on another."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (path / "config.json").is_file():
        raise ConfigError(f"--model {path}: no config.json there, name a folder with a Hugging Face model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    texts = (token_ids(tokenizer, n, f"{seed}-{n}") for n in (CALIBRATION_TOKENS, TOKENS))
    calibration, measured = (samples(capture(model, ids)) for ids in texts)
    heads = tuple(Head(*pair) for pair in zip(calibration, measured, strict=True))
    size = heads[0].measured.key.shape[-1]
    return Case(f"{path.name}, D={size}", size, heads, "model")
