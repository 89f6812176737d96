"""Loads a model, says what its attention is like, and refuses what has no standard KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from fraqtl_bench.quality.cache import LabCache
from fraqtl_bench.quantizer.capture import demo_model
from fraqtl_kernels.errors import ConfigError, UnsupportedError, one_of

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TAKES = (
    "the quality lab takes decoders that cache keys and values (GPT-2, Llama, Mistral, Qwen2, Gemma and their like)"
)


@dataclass(frozen=True)
class Subject:
    """A loaded model and what the lab needs to know of it."""

    name: str
    model: Any
    tokenizer: Any
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    max_length: int
    parameters: int

    @property
    def attention(self) -> str:
        """MHA, GQA or MQA."""
        return "MHA" if self.kv_heads == self.heads else "MQA" if self.kv_heads == 1 else "GQA"

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


def load(name: str, dtype: str | None, device: str) -> Subject:
    """Load a model and its tokenizer.

    name: a folder, a name on the Hugging Face Hub, or `demo`. dtype: one of DTYPES, None for float32 on the CPU
    and the checkpoint's own elsewhere. Raises ConfigError or UnsupportedError in one sentence.
    """
    if dtype is not None and dtype not in DTYPES:
        raise one_of("dtype", dtype, DTYPES)
    _check_device(device)
    logging.disable_progress_bar()
    source = str(demo_model()) if name == DEMO else name
    config = _read(AutoConfig, source, name)
    check_supported(config)
    tokenizer = _read(AutoTokenizer, source, name)
    chosen = DTYPES[dtype] if dtype else (torch.float32 if device == "cpu" else "auto")
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    model = _read(AutoModelForCausalLM, source, name, dtype=chosen, attn_implementation="eager" if capped else "sdpa")
    return subject(name if name == DEMO else Path(source).name, model.to(device).eval(), tokenizer)


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch knows all three, and no parent of them
        raise ConfigError(f"device {device!r} is not there: give cpu, or cuda where there is a GPU") from error


def _read(kind: Any, source: str, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        if isinstance(error, OSError):
            raise ConfigError(
                f"model {name!r} was not found: give a folder with a Hugging Face model, a name on the Hub that "
                f"this machine can reach, or {DEMO!r}"
            ) from error
        raise UnsupportedError(f"model {name!r} can't be loaded: {reason[0] if reason else error}") from error


def check_supported(config: Any) -> None:
    """Raises UnsupportedError for models without a standard cache of keys and values."""
    text = config.get_text_config()
    kind = text.model_type
    if config.is_encoder_decoder:
        raise UnsupportedError(f"model type {kind!r} is an encoder-decoder: {_TAKES}")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError(f"model type {kind!r} caches a latent (MLA), not keys and values: {_TAKES}")
    standard = (DynamicLayer, DynamicSlidingWindowLayer)
    if not getattr(text, "num_attention_heads", None) or any(
        type(layer) not in standard for layer in DynamicCache(config=text).layers
    ):
        raise UnsupportedError(f"model type {kind!r} keeps a recurrent state, not only keys and values: {_TAKES}")


class _Probe(LabCache):
    """Notes the shapes that attention layers hand over."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shapes: dict[int, tuple[torch.Size, torch.Size]] = {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.shapes[layer_idx] = (key_states.shape, value_states.shape)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def subject(name: str, model: Any, tokenizer: Any) -> Subject:
    """What one forward pass over a few tokens shows of a loaded model."""
    text = model.config.get_text_config()
    probe = _Probe(text)
    model(torch.tensor([[1, 2, 3]], device=model.device), past_key_values=probe, use_cache=True)
    shapes = set(probe.shapes.values())
    layers = int(text.num_hidden_layers)
    if set(probe.shapes) != set(range(layers)) or len(shapes) != 1 or len(set(next(iter(shapes)))) != 1:
        raise UnsupportedError(
            f"model type {text.model_type!r}: its layers don't cache keys and values alike: {_TAKES}"
        )
    _, kv_heads, _, head_size = next(iter(shapes))[0]
    limit = getattr(text, "max_position_embeddings", None) or 2048
    count = sum(p.numel() for p in model.parameters())
    return Subject(name, model, tokenizer, layers, text.num_attention_heads, kv_heads, head_size, limit, count)
