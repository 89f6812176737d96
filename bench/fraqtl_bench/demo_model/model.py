"""The demo model: a Llama written out, because its training looks inside the attention.

`export` writes it as a Hugging Face checkpoint, which is what everything else reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DemoConfig:
    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    rope_theta: float = 500_000.0
    max_length: int = 8192


def rope_table(config: DemoConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each (max_length, head_size), in the half-split convention of Llama."""
    half = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
    angle = torch.arange(config.max_length, dtype=torch.float64)[:, None] / config.rope_theta**half
    angle = torch.cat([angle, angle], -1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Layer(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.num_heads * config.head_size
        kv_width = config.num_kv_heads * config.head_size
        self.input_layernorm = nn.RMSNorm(hidden, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=1e-5)
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        self.gate_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, hidden) -> x, q (B, heads, L, D), k (B, KV heads, L, D), both after RoPE."""
        batch, length, _ = x.shape
        config = self.config
        h = self.input_layernorm(x)
        q = self.q_proj(h).view(batch, length, config.num_heads, config.head_size).transpose(1, 2)
        k = self.k_proj(h).view(batch, length, config.num_kv_heads, config.head_size).transpose(1, 2)
        v = self.v_proj(h).view(batch, length, config.num_kv_heads, config.head_size).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        group = config.num_heads // config.num_kv_heads
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        o = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        x = x + self.o_proj(o.transpose(1, 2).reshape(batch, length, -1))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h)), q, k


class DemoModel(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-5)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.num_layers) ** 0.5 if last else 0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """ids (B, L) -> hidden states before the output matrix (B, L, hidden), and (q, k) of every layer."""
        length = ids.shape[1]
        x = self.embed_tokens(ids)
        attention = []
        for layer in self.layers:
            x, q, k = layer(x, self.cos[:length], self.sin[:length])
            attention.append((q, k))
        return self.norm(x), attention

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)

    def export(self, folder: Path, *, bos: int, eos: int, pad: int) -> None:
        """Write `folder` as a transformers LlamaForCausalLM in bfloat16."""
        from transformers import LlamaConfig, LlamaForCausalLM

        c = self.config
        hf_config = LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_size,
            max_position_embeddings=c.max_length,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
        )
        model = LlamaForCausalLM(hf_config)
        missing, unexpected = model.load_state_dict(self._hf_state(), strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"checkpoint names differ: missing {missing}, unexpected {unexpected}")
        model.tie_weights()
        model.to(torch.bfloat16).save_pretrained(folder)

    def _hf_state(self) -> dict[str, Tensor]:
        state = {}
        for name, tensor in self.state_dict().items():
            parts = name.split(".")
            if parts[-2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
                parts.insert(-2, "self_attn")
            elif parts[-2] in ("gate_proj", "up_proj", "down_proj"):
                parts.insert(-2, "mlp")
            state["model." + ".".join(parts)] = tensor
        return state
