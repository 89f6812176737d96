"""The demo model that lies in the package is what its card says."""

from __future__ import annotations

import json

from safetensors import safe_open

from fraqtl_serve.cli.serve import DEMO_MODEL


def test_shape_and_size() -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 64)
    assert config["max_position_embeddings"] >= 4096
    weights = DEMO_MODEL / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, framework="pt") as tensors:
        dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}


def test_chat_template() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>Be short.<|end|><|user|>Hi<|end|><|assistant|>"
    assert tokenizer.decode(tokenizer.encode("The code for apple is 4821. ünïcödé", add_special_tokens=False)) == (
        "The code for apple is 4821. ünïcödé"
    )
    digits = tokenizer.encode("4821", add_special_tokens=False)
    assert len(digits) == 4
