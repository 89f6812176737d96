"""The families, each as a small model with random weights.

Weights are large enough for attention to have favourites: with those that models are usually initialized with, every
token attends all others alike, and neither a window nor a rounded key would show.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.e2e.engine import DEMO_MODEL
from tests.e2e.random_models import NAS_CONFIG

WORDS, BYTES = "words", "bytes"
VOCABULARY = {WORDS: 2048, BYTES: 320}
CONTEXT = 256
REFERENCE = "reference"  # the folder beside a disguised model with what transformers can read


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    title: str
    model_type: str
    """Of transformers."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of its configuration, beside those that all families share; None for one of these that it doesn't have."""
    tokenizer: str = WORDS
    blocks: int | Mapping[str, int] = 30
    """Of the pool: enough for one sequence of CONTEXT tokens in all its groups of layers, too few for eight.

    By format for hybrids, whose blocks hold other numbers of tokens in each.
    """
    refused: str = ""
    """How the sentence begins with which it is refused."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Of random weights, by how their names end."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Options of vLLM's engine."""
    disguise: Callable[[Any, Path], None] | None = None
    """For what transformers has no class: writes its model there as vLLM reads it, and makes the model compute it."""


def blocks_of(family: Family, kv_format: str) -> int:
    return family.blocks if isinstance(family.blocks, int) else family.blocks[kv_format]


def make(family: Family, folder: Path) -> None:
    """Write the model and its tokenizer to `folder`. The same family is always the same model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = {**SHARED, "vocab_size": VOCABULARY[family.tokenizer], **family.options}
    given = {name: value for name, value in options.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **given))
    _stir(model)
    _scale(model, family.factors)
    model.to(torch.bfloat16)
    if family.disguise is not None:
        family.disguise(model, folder)
    model.save_pretrained(folder if family.disguise is None else folder / REFERENCE)
    _TOKENIZERS[family.tokenizer](folder)


@torch.no_grad()
def _nemotron_nas(model: Any, folder: Path) -> None:
    """Of three Llama layers the second has no attention, the third one KV head in the place of two, and no MLP."""
    _, second, third = model.model.layers
    second.self_attn.o_proj.weight.zero_()
    third.mlp.down_proj.weight.zero_()
    for projection in (third.self_attn.k_proj, third.self_attn.v_proj):
        one, other = projection.weight.chunk(2)
        other.copy_(one)
    stripped = deepcopy(model)
    _, second, third = stripped.model.layers
    del second.self_attn, second.input_layernorm, third.mlp, third.post_attention_layernorm
    for projection in (third.self_attn.k_proj, third.self_attn.v_proj):
        projection.weight = nn.Parameter(projection.weight.chunk(2)[0].clone())
    stripped.save_pretrained(folder)
    attention = [{"no_op": False, "n_heads_in_group": 2}, {"no_op": True}, {"no_op": False, "n_heads_in_group": 4}]
    mlp = [{"no_op": i == 2, "ffn_mult": 1.5} for i in range(3)]  # of 256 channels, rounded up: 256
    blocks = [{"attention": a, "ffn": b} for a, b in zip(attention, mlp, strict=True)]
    file = folder / "config.json"
    written = json.loads(file.read_text()) | {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"]}
    written |= {"auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"}, "num_key_value_heads": None}
    file.write_text(json.dumps(written | {"block_configs": blocks}))
    (folder / "configuration_decilm.py").write_text(NAS_CONFIG)


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Give biases and the weights of norms, which begin as zeros and ones, values of their own.

    The bias of keys is large, as in Qwen2.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            size = 2.0 if name.endswith("k_proj.bias") else 0.2
            parameter.add_(torch.randn_like(parameter), alpha=size)


@torch.no_grad()
def _scale(model: nn.Module, factors: Mapping[str, float]) -> None:
    for ending, factor in factors.items():
        scaled = [parameter.mul_(factor) for name, parameter in model.named_parameters() if name.endswith(ending)]
        assert scaled, f"no weight is called {ending}"


def _words(folder: Path) -> None:
    """The demo model's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, folder / name)


def _bytes(folder: Path) -> None:
    """One token a byte, and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = special
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos).save_pretrained(
        folder
    )


_TOKENIZERS = {WORDS: _words, BYTES: _bytes}

SHARED = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MANY_GROUPS = 84  # blocks, for models whose layers with windows form several groups

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
# Not of Qwen3-MoE: vLLM would make one there, too, and find no weights for it.
SHARED_EXPERT = {"shared_expert_intermediate_size": 128}
GATED_DELTA = {
    "num_hidden_layers": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# Small states: a block holds one, and prefixes are found in whole blocks.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32}
TWO_STATES = {"bf16": 18, "k8v8": 14, "k4v4": 10}  # blocks
STATES_IN_FLOAT32 = {"mamba_ssm_cache_dtype": "float32"}  # in 16 bits a text depends on how its prompt was cut

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "llama"),
    "mistral": Family("Mistral", "mistral", {"head_dim": 64, "sliding_window": 48}, BYTES, blocks=18),
    "qwen2": Family("Qwen2, Qwen2.5", "qwen2"),
    "qwen3": Family("Qwen3", "qwen3", {"head_dim": 128}, BYTES),
    "gemma2": Family(
        "Gemma 2",
        "gemma2",
        {"head_dim": 256, "sliding_window": 32, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 256},
    ),
    "gemma3": Family(
        "Gemma 3",
        "gemma3_text",
        {"num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 64},
        blocks=MANY_GROUPS,
    ),
    "gemma4": Family(
        "Gemma 4",
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 64,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCABULARY[WORDS],
        },
        blocks=MANY_GROUPS,
        # It doesn't divide scores by the root of the head size: weights of one would let attention see one token only.
        factors={"q_norm.weight": 1 / 16},
    ),
    "phi3": Family(
        "Phi-3, Phi-4",
        "phi3",
        {
            "hidden_size": 384,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
    ),
    "gpt2": Family("GPT-2", "gpt2", {"num_key_value_heads": None}, BYTES),
    "olmo2": Family("OLMo 2", "olmo2", {"hidden_size": 512}),
    "nemotron-nas": Family("Nemotron-NAS", "llama", {"num_hidden_layers": 3}, disguise=_nemotron_nas),
    "mixtral": Family("Mixtral", "mixtral", {"head_dim": 64, "num_local_experts": 4, **EXPERTS}, BYTES),
    "gpt-oss": Family(
        "gpt-oss",
        "gpt_oss",
        {"sliding_window": 32, "num_local_experts": 4, **EXPERTS},
    ),
    "qwen3-moe": Family("Qwen3-MoE", "qwen3_moe", {"head_dim": 64, "num_experts": 4, **EXPERTS}),
    "granite-hybrid": Family(
        "Granite 4 hybrid",
        "granitemoehybrid",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "position_embedding_type": "rope",
            "attention_multiplier": 0.125,
            "num_local_experts": 0,
            "shared_intermediate_size": 256,
            "mamba_expand": 1,
            **MAMBA,
        },
        blocks=TWO_STATES,
        engine=STATES_IN_FLOAT32,
    ),
    "falcon-h1": Family(
        "Falcon-H1",
        "falcon_h1",
        {"num_key_value_heads": 4, "mamba_d_ssm": 256, **MAMBA},
        blocks=TWO_STATES,
        engine=STATES_IN_FLOAT32,
    ),
    "qwen3-next": Family(
        "Qwen3-Next",
        "qwen3_next",
        # vLLM wants experts in some layer, and they are slow here.
        {**GATED_DELTA, "num_experts": 4, "mlp_only_layers": [*range(7)], **EXPERTS, **SHARED_EXPERT},
        blocks={"bf16": 24, "k8v8": 16, "k4v4": 18},
        engine=STATES_IN_FLOAT32,
    ),
    "qwen3.5": Family(
        "Qwen3.5",
        "qwen3_5_text",
        GATED_DELTA,
        # vLLM's module of it imports torchvision, which an install for CPUs leaves out.
        refused="vLLM's code of Qwen3_5ForCausalLM needs the package torchvision, which is not installed",
    ),
}
