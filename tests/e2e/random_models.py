"""Small models with random weights, for shapes that the demo model doesn't have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.e2e.engine import DEMO_MODEL

SHAPE = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}


def random_llama(folder: Path, head_size: int, **options: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(LlamaForCausalLM(_config(LlamaConfig, head_dim=head_size, **options)), folder)


def random_gemma2(folder: Path) -> Path:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = _config(
        Gemma2Config, head_dim=256, sliding_window=32, attn_logit_softcapping=5.0, query_pre_attn_scalar=256
    )
    return _save(Gemma2ForCausalLM(config), folder)


def random_gemma3(folder: Path) -> Path:
    """Five layers with a window for one that sees everything, and a last group that isn't full."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = _config(Gemma3TextConfig, num_hidden_layers=8, head_dim=64, sliding_window=64, query_pre_attn_scalar=64)
    return _save(Gemma3ForCausalLM(config), folder)


def random_gemma4(folder: Path) -> Path:
    """Four heads of 256 with a window, one of 512 where all is seen: blocks of 16 and of 32 tokens. The last
    four layers read the cache of earlier ones."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = _config(
        Gemma4TextConfig,
        num_hidden_layers=10,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 3 + ["full_attention"],
        num_kv_shared_layers=4,
        head_dim=256,
        global_head_dim=512,
        num_key_value_heads=4,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=64,
        vocab_size_per_layer_input=SHAPE["vocab_size"],
        hidden_size_per_layer_input=32,
    )
    model = Gemma4ForCausalLM(config)
    for layer in model.model.layers:  # scores aren't divided by sqrt(D): training makes this norm's weights small
        layer.self_attn.q_norm.weight.data.fill_(layer.self_attn.head_dim**-0.5)
    return _save(model, folder)


def random_mistral(folder: Path) -> Path:
    """Every layer has a window."""
    from transformers import MistralConfig, MistralForCausalLM

    return _save(MistralForCausalLM(_config(MistralConfig, head_dim=64, sliding_window=96)), folder)


def random_gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=SHAPE["vocab_size"],
        n_embd=128,
        n_head=2,
        n_layer=2,
        n_positions=2048,
        activation_function="gelu_new",
        initializer_range=0.15,  # so that what an activation does shows
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(GPT2LMHeadModel(config), folder)


def random_mixtral(folder: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "initializer_range": 0.1}
    return _save(MixtralForCausalLM(_config(MixtralConfig, **options)), folder)


def random_qwen3_moe(folder: Path) -> Path:
    """Its last layer has no experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    options: dict[str, Any] = {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    }
    options |= {"head_dim": 64, "initializer_range": 0.1, "num_hidden_layers": 3, "mlp_only_layers": [2]}
    return _save(Qwen3MoeForCausalLM(_config(Qwen3MoeConfig, **options)), folder)


def random_glm4_moe(folder: Path) -> Path:
    """Its checkpoint has a head for multi-token prediction: a layer that reads the model's hidden states.

    It mostly repeats what the model has just said, which a random model often does itself.
    """
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    options: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    options |= {"first_k_dense_replace": 1, "head_dim": 64, "initializer_range": 0.1, "num_nextn_predict_layers": 1}
    _save(Glm4MoeForCausalLM(_config(Glm4MoeConfig, **options)), folder)
    weights, of_head = load_file(folder / "model.safetensors"), SHAPE["num_hidden_layers"]
    like, head = f"model.layers.{of_head - 1}.", f"model.layers.{of_head}."
    last = {name.replace(like, head): weight.clone() for name, weight in weights.items() if name.startswith(like)}
    last |= {name: weight * 0.2 for name, weight in last.items() if "o_proj" in name or "down_proj" in name}
    size = SHAPE["hidden_size"]
    embedding, hidden = torch.randn(size, size) * 0.02, torch.eye(size)
    last[f"{head}eh_proj.weight"] = torch.cat([embedding, hidden], 1).bfloat16()
    ones = torch.ones(size, dtype=torch.bfloat16)
    last |= {f"{head}{name}.weight": ones.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    save_file(weights | last, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_gpt_oss(folder: Path, *, mxfp4: bool = False) -> Path:
    """The same numbers either way: MXFP4 weights in float32 range, written as bfloat16, or as they lie in files."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "initializer_range": 0.1}
    model = GptOssForCausalLM(_config(GptOssConfig, **options, intermediate_size=96, sliding_window=64))
    packed: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        for bias in (experts.gate_up_proj_bias, experts.down_proj_bias, layer.mlp.router.bias, layer.self_attn.sinks):
            bias.data.normal_()
        experts.gate_up_proj.data *= 8  # so that what the activation clamps shows
        for name in ("gate_up_proj", "down_proj"):
            blocks, scales = to_mxfp4(getattr(experts, name).detach().transpose(1, 2).contiguous())
            getattr(experts, name).data = convert_moe_packed_tensors(blocks, scales).float()
            of_file = f"model.layers.{i}.mlp.experts.{name}"
            packed |= {f"{of_file}_blocks": blocks, f"{of_file}_scales": scales}
    _save(model, folder)
    if mxfp4:
        _replace_experts(folder, packed)
    return folder


FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
"""What compressed-tensors says of a KV cache in FP8."""


def ask_for_fp8_cache(folder: Path) -> Path:
    """The checkpoint in `folder`, with a scheme and scales for an FP8 cache; weights stay as they are."""
    weights = load_file(folder / "model.safetensors")
    layers = [name.removesuffix("k_proj.weight") for name in weights if name.endswith("k_proj.weight")]
    scales = {f"{layer}{kind}_scale": torch.tensor([0.5]) for layer in layers for kind in "kv"}
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "kv_cache_scheme": FP8_CACHE,
    }
    return _quantized(folder, weights | scales, scheme)


def round_to_fp8(folder: Path) -> tuple[Path, Path]:
    """The checkpoint in `folder` with FP8 weights, a scale a channel; and beside it the same numbers in float32."""
    weights, wide = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].float().abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale"] = scale
        wide[name] = weights[name].float() * scale
    kept = {name: weight.float() for name, weight in weights.items() if "_proj" not in name}
    of_weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
    of_inputs = of_weights | {"dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": of_weights, "input_activations": of_inputs}
    scheme = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
    plain = folder.with_name(f"{folder.name}-wide")
    shutil.copytree(folder, plain)
    save_file(kept | wide, plain / "model.safetensors", metadata={"format": "pt"})
    return _quantized(
        folder, weights, scheme | {"config_groups": {"group_0": group}, "kv_cache_scheme": FP8_CACHE}
    ), plain


def _quantized(folder: Path, weights: dict[str, torch.Tensor], scheme: dict[str, Any]) -> Path:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": scheme}))
    return folder


MXFP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., K) -> codes (..., K / 32, 16), the even weight in the low half, and scales (..., K / 32), both uint8."""
    blocks = weight.unflatten(-1, (-1, 32))
    exponent = (blocks.abs().amax(-1) / 6).clamp_min(2.0**-100).log2().ceil()
    scaled = blocks / 2.0 ** exponent[..., None]
    codes = (scaled.abs()[..., None] - MXFP4_VALUES).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8), (exponent + 127).to(torch.uint8)


def _replace_experts(folder: Path, packed: dict[str, torch.Tensor]) -> None:
    """Put MXFP4 weights in the place of those that they stand for, as in OpenAI's own checkpoints."""
    file = folder / "model.safetensors"
    replaced = {name.removesuffix("_blocks") for name in packed}
    kept = {name: weight for name, weight in load_file(file).items() if name not in replaced}
    excepted = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _quantized(folder, kept | packed, {"quant_method": "mxfp4", "modules_to_not_convert": excepted})


NAS_CONFIG = '''
from transformers import LlamaConfig


class Part(dict):
    """What vLLM reads as attributes."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **options):
        super().__init__(**options)
        self.block_configs = [Part({name: Part(part) for name, part in block.items()}) for block in block_configs]
'''
NAS_KV_HEADS = (2, 0, 1)
"""Of the layers of `random_nemotron_nas`; 0 is a layer without attention."""


def random_nemotron_nas(folder: Path) -> Path:
    """KV heads that differ, a layer without attention, one without MLP. transformers has no class for it, only vLLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = range(len(NAS_KV_HEADS))
    config = _config(LlamaConfig, head_dim=64, num_hidden_layers=len(layers), initializer_range=0.1)
    blocks: list[dict[str, dict[str, Any]]] = [
        {
            "attention": {"no_op": not n, "n_heads_in_group": config.num_attention_heads // n if n else None},
            "ffn": {"no_op": i == 2, "ffn_mult": 1.5},  # of 128 channels, rounded up: 256
        }
        for i, n in enumerate(NAS_KV_HEADS)
    ]
    config.intermediate_size = 256
    model = LlamaForCausalLM(config)
    for layer, block, n in zip(model.model.layers, blocks, NAS_KV_HEADS, strict=True):
        if block["ffn"]["no_op"]:
            del layer.mlp, layer.post_attention_layernorm
        if not n:
            del layer.self_attn, layer.input_layernorm
            continue
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data = projection.weight[: n * 64].detach().clone()
    _save(model, folder)
    file = folder / "config.json"
    written = json.loads(file.read_text()) | {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"]}
    written |= {"auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"}, "num_key_value_heads": None}
    file.write_text(json.dumps(written | {"block_configs": blocks}))
    (folder / "configuration_decilm.py").write_text(NAS_CONFIG)
    return folder


# Hybrids: two layers attend, four or six keep a state


def random_lfm2(folder: Path) -> Path:
    """Short convolutions."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    kinds = ["conv", "conv", "full_attention"] * 2
    config = _config(Lfm2Config, num_hidden_layers=6, num_attention_heads=2, layer_types=kinds, initializer_range=0.1)
    config.conv_dim = config.block_dim = config.hidden_size  # as published checkpoints say it
    return _save(Lfm2ForCausalLM(config), folder)


def random_granite_hybrid(folder: Path) -> Path:
    """Mamba2 layers, one dense layer after each."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = _config(
        GraniteMoeHybridConfig,
        num_hidden_layers=6,
        num_attention_heads=2,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        position_embedding_type="rope",
        attention_multiplier=0.125,
        num_local_experts=0,
        shared_intermediate_size=128,
        mamba_n_heads=8,
        mamba_d_state=32,
        mamba_chunk_size=64,
        initializer_range=0.1,
    )
    return _save(GraniteMoeHybridForCausalLM(config), folder)


def random_falcon_h1(folder: Path) -> Path:
    """Attention and Mamba2 beside each other in every layer."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = _config(
        FalconH1Config,
        num_attention_heads=2,
        mamba_d_ssm=128,
        mamba_n_heads=4,
        mamba_d_state=32,
        mamba_chunk_size=64,
        initializer_range=0.1,
    )
    return _save(FalconH1ForCausalLM(config), folder)


def random_qwen3_next(folder: Path, *, experts_in: int = 7) -> Path:
    """Gated delta layers; every fourth layer attends. Experts in one layer only: vLLM wants some."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = _config(
        Qwen3NextConfig,
        num_hidden_layers=8,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        mlp_only_layers=[n for n in range(8) if n != experts_in],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        initializer_range=0.1,
    )
    return _save(Qwen3NextForCausalLM(config), folder)


def random_repeating_qwen3_next(folder: Path, *, sharpness: int = 1) -> Path:
    """The same, with layers that add so little to a token that it often comes again: a draft from the text is right.

    It has a head for multi-token prediction, too: a layer of the model's. sharpness: of the distributions, so that
    drafts are right where tokens are drawn, too.
    """
    random_qwen3_next(folder, experts_in=0)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if any(part in name for part in ("o_proj", "out_proj", "down_proj")):
            weights[name] *= 0.15
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * sharpness
    head = {
        "mtp.layers.0." + name.split(".", 3)[3]: weight.clone()
        for name, weight in weights.items()
        if name.startswith("model.layers.0.mlp.") or (name.startswith("model.layers.3.") and ".mlp." not in name)
    }
    size = SHAPE["hidden_size"]
    embedding, hidden = torch.randn(size, size) * 0.02, torch.eye(size)
    head["mtp.fc.weight"] = torch.cat([embedding, hidden], 1).bfloat16()
    norms = ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
    head |= {f"mtp.{name}.weight": torch.zeros(size, dtype=torch.bfloat16) for name in norms}  # one, to that model
    save_file(weights | head, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _config(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(**{**SHAPE, **HEADS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **options})


def _save(model: Any, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, folder / name)
    return folder
