"""A small dense DeepSeek-V3, with random weights or trained on the demo model's corpus."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from fraqtl_bench.demo_model.corpus import Corpus, standard_library_prose
from fraqtl_bench.demo_model.train import make_optimizers
from fraqtl_bench.quantizer.capture import demo_model

LAYERS, HEADS = 3, 4
LATENT, ROPE, PLAIN = 128, 64, 64
"""Dimensions of the latent, of the key that all heads share, and of a head's own key and value."""
SIZE = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 2048}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
RATE = 4e-3  # of learning
WARM_UP, COOL_DOWN = 20, 0.5  # steps, and the share of all steps in which the learning rate falls


def random_model(seed: int = 0, initializer_range: float = 0.02) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    config = DeepseekV3Config(
        **SIZE,
        **IDS,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,  # no experts
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=PLAIN,
        v_head_dim=PLAIN,
        initializer_range=initializer_range,
    )
    return DeepseekV3ForCausalLM(config).eval()


def corpus() -> Corpus:
    return Corpus(AutoTokenizer.from_pretrained(demo_model()).backend_tokenizer, standard_library_prose())


def rows(texts: Corpus, rng: random.Random, count: int, length: int) -> Tensor:
    """(count, length) token ids."""
    return torch.tensor([texts.sample(rng, length).ids for _ in range(count)])


def train(model: Any, texts: Corpus, steps: int, length: int = 256, batch: int = 8) -> dict[str, Any]:
    """Next-token prediction, in place. Returns what a result file says of it."""
    rng, optimizers = random.Random(0), make_optimizers(model, RATE)
    losses = []
    for step in range(steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP, (1 - step / steps) / COOL_DOWN)
        ids = rows(texts, rng, batch, length)
        loss = F.cross_entropy(model(ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}: loss {sum(losses[-25:]) / 25:.3f}", flush=True)
    last = losses[-max(1, steps // 10) :]
    return {"steps": steps, "tokens": steps * batch * length, "loss": sum(last) / len(last)}
