"""A GGUF file of a small Llama with a byte-level BPE tokenizer, written out as a Hugging Face folder.

vLLM serves GGUF files only through a plugin with native kernels. Dequantized once, the model is an ordinary one:
bfloat16 weights, `config.json`, a tokenizer and its chat template. The library `gguf` reads and dequantizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError

ARCHITECTURE, TOKENIZER, PRE_TOKENIZER = "llama", "gpt2", "smollm"
CONTROL_TOKEN, USER_TOKEN = 3, 4  # GGUF's kinds of tokens that text never makes

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer of `gguf` into `folder`.

    Raises UnsupportedError for an architecture or a tokenizer that this does not know.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    described = tuple(
        facts.get(f"{name}") for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    if described != (ARCHITECTURE, TOKENIZER, PRE_TOKENIZER):
        raise UnsupportedError(f"{gguf.name}: only the GGUF of a SmolLM2 can be converted, not {described}")
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        name, part = _name_of(tensor.name)
        weights[name] = _weight(tensor, heads.get(part))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # others may read it, like the rest
    _write(folder / "config.json", _config(facts, tied="lm_head.weight" not in weights))
    ids = {f"{kind}_token_id": facts[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos")}
    _write(folder / "generation_config.json", ids | {"pad_token_id": facts["tokenizer.ggml.padding_token_id"]})
    _write_tokenizer(facts, folder)


def _name_of(name: str) -> tuple[str, str]:
    """The Hugging Face name of a tensor, and which part of its layer it is."""
    whole = {"token_embd.weight": "model.embed_tokens", "output_norm.weight": "model.norm", "output.weight": "lm_head"}
    if name in whole:
        return f"{whole[name]}.weight", ""
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}", part


def _weight(tensor: Any, heads: int | None) -> Tensor:
    """In bfloat16, (out, in). heads: of a query or key projection, whose rows GGUF orders for another RoPE."""
    from gguf.quants import dequantize

    shape = [int(size) for size in reversed(tensor.shape)]
    numbers = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)).view(shape)
    if heads is not None:  # a head's rows lie as pairs (i, i + D/2); transformers wants the halves one after the other
        numbers = numbers.view(heads, -1, 2, shape[1]).transpose(1, 2).reshape(shape)
    return numbers.to(torch.bfloat16).contiguous()


def _config(facts: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    def fact(name: str) -> Any:
        return facts[f"{ARCHITECTURE}.{name}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": fact("embedding_length"),
        "intermediate_size": fact("feed_forward_length"),
        "num_hidden_layers": fact("block_count"),
        "num_attention_heads": fact("attention.head_count"),
        "num_key_value_heads": fact("attention.head_count_kv"),
        "head_dim": fact("rope.dimension_count"),
        "max_position_embeddings": fact("context_length"),
        "rope_theta": _short(fact("rope.freq_base")),
        "rms_norm_eps": _short(fact("attention.layer_norm_rms_epsilon")),
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _short(number: float) -> float:
    """GGUF's float32 as people wrote it: 1e-05, not 9.999999747378752e-06."""
    return float(np.format_float_scientific(np.float32(number), unique=True))


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE in which every digit is a token of its own, as SmolLM2 was trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    special = [t for t, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL_TOKEN]
    if USER_TOKEN in facts["tokenizer.ggml.token_type"]:
        raise UnsupportedError("tokens that are added but not special are not known here")
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    _write(
        folder / "tokenizer_config.json",
        {f"{name}_token": tokens[facts[f"tokenizer.ggml.{kind}_token_id"]] for name, kind in names.items()}
        | {
            # A class for one model family would put its own pre-tokenizer in the place of this one.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": facts[f"{ARCHITECTURE}.context_length"],
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": special,
            "chat_template": facts["tokenizer.chat_template"],
        },
    )


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
