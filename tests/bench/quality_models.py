"""Small models with random weights in the manner of well-known ones, and the demo model, for the quality lab."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fraqtl_bench.quality.models import Subject, load, subject
from fraqtl_bench.quality.texts import encode, generated_documents
from fraqtl_bench.quantizer.capture import demo_model

SIZE = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 2048, "n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "llama": {**SIZE, **GROUPED},
    "mistral": {**SIZE, **GROUPED, "sliding_window": 24},
    "qwen2": {**SIZE, **GROUPED},
    "gemma": {**SIZE, **GROUPED, "num_key_value_heads": 1},
    "gemma2": {**SIZE, **GROUPED, "sliding_window": 24, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64},
}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model())


def config(kind: str, **options: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**ARCHITECTURES.get(kind, {}), **IDS, **options})


@cache
def random_model(kind: str) -> Any:
    """A model of this kind; its weights are large enough for attention to prefer some keys."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(kind, initializer_range=0.2))
    made.set_attn_implementation("eager" if kind == "gemma2" else "sdpa")
    return made.eval()


def random_subject(kind: str) -> Subject:
    return subject(kind, random_model(kind), tokenizer())


@cache
def demo() -> Subject:
    return load("demo", None, "cpu")


def token_ids(count: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(6, 2048, (count,), generator=generator).tolist())


def chat_ids(count: int) -> tuple[int, ...]:
    """The first tokens of a generated text of the kind that the demo model was trained on."""
    document = next(generated_documents(tokenizer(), "test", 0))
    ids = encode(tokenizer(), document)
    assert len(ids) >= count
    return tuple(ids[:count])
