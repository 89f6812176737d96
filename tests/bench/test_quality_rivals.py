"""Rivals of the quality lab: their bytes, their groups, and numbers from their papers and codes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec, Exact, LayerSample, Rope, deserialize, serialize
from fraqtl_bench.quality.fitted import FittedLayer, fit, fit_layer
from fraqtl_bench.quality.grids import unpack_bits
from fraqtl_bench.quality.methods import parse
from fraqtl_bench.quality.recent import Recent
from fraqtl_bench.quality.rivals import RIVALS, floats, kivi, kvquant, llama_cpp, turbo_attn, turboquant
from fraqtl_bench.quality.rivals.int4_per_token_head import Int4PerTokenHead
from fraqtl_bench.quality.rivals.levels import fit_levels, nearest, normal_levels
from fraqtl_kernels.errors import ConfigError, UnsupportedError
from tests.bench import vllm_kernels

HEADS = 3
KEY_AND_VALUE_BYTES = {  # of a token and KV head of size 128, by their sources' own arithmetic
    "fp8": (128, 128),
    "nvfp4": (72, 72),  # vLLM's nvfp4_kv_cache_full_dim
    "int4_per_token_head": (68, 68),
    "turboquant-4bit": (66, 68),  # vLLM's key_packed_size and value_packed_size
    "turboquant-3bit": (50, 52),
    "turbo-attn": (66, 66),
    "q8_0": (136, 136),  # ggml's type sizes 34 and 18
    "q4_0": (72, 72),
    "kivi-4": (80, 80),  # 32 bits a group of 32
    "kivi-2": (48, 48),
    "kvquant-nuq4": (64, 64 + 4 / HEADS),  # the range of a token's values is of all heads
    "kvquant-nuq3": (48, 48 + 4 / HEADS),
}


def vectors(size: int, tokens: int, seed: int = 0) -> Tensor:
    """(HEADS, tokens, size) with channels of different size and a mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(HEADS, tokens, size, generator=generator)
    return x * torch.linspace(0.2, 3, size) + torch.linspace(-1, 1, size)


def rope(size: int) -> Rope:
    return Rope(10000 ** -(torch.arange(size // 2) * 2 / size), halves=True)


def sample(size: int, tokens: int = 64) -> LayerSample:
    query, key, value = (vectors(size, tokens, seed) for seed in (1, 2, 3))
    gradient = {"key": vectors(size, tokens, 4), "value": vectors(size, tokens, 5)}
    return LayerSample(query.repeat(2, 1, 1), key, value, gradient=gradient, rope=rope(size))


def fitted(name: str, size: int = 128) -> FittedLayer:
    return fit_layer(parse(name), sample(size))


@pytest.mark.parametrize("name", RIVALS)
def test_bytes_are_those_that_the_source_says(name: str) -> None:
    layer = fitted(name)
    bits = [s.codec.token_bits(128, HEADS) / HEADS for s in (layer.key, layer.value)]
    wanted = KEY_AND_VALUE_BYTES[name.removesuffix("-plain").removesuffix("-ends")]
    assert bits == pytest.approx([8 * b for b in wanted])


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("tokens", [7, 128, 300])
def test_what_is_kept_are_these_bytes_and_enough_to_read(name: str, tokens: int) -> None:
    layer = fitted(name)
    for stream in (layer.key, layer.value):
        x, codec, constants = vectors(128, tokens, seed=9)[None], stream.codec, stream.constants
        kept = codec.encode(x, constants)
        assert 8 * len(serialize(kept)) == codec.sequence_bits(128, HEADS, tokens)
        assert 8 * len(serialize(constants)) == codec.all_constant_bits(128, HEADS, constants)
        again, known = deserialize(serialize(kept), kept), deserialize(serialize(constants), constants)
        assert torch.equal(codec.decode(again, known, 128), stream.round_trip(x))


def test_bytes_of_a_sequence_count_its_newest_tokens() -> None:
    kivi_key, kivi_value = fitted("kivi-2").key.codec, fitted("kivi-2").value.codec
    assert kivi_key.sequence_bits(128, HEADS, 300) == HEADS * 128 * (256 * 3 + 44 * 16)
    assert kivi_value.sequence_bits(128, HEADS, 300) == HEADS * 128 * (172 * 3 + 128 * 16)
    ring = fitted("turbo-attn").key.codec  # kept beside the codes, not instead of them
    assert ring.sequence_bits(128, HEADS, 300) == HEADS * (300 * 66 * 8 + 128 * (128 * 8 + 32))


def old(codec: Codec) -> Codec:
    return codec.old if isinstance(codec, Recent) else codec


FOOTPRINTS = {  # heads, tokens and dimensions that one value's change reaches: (first, count) each
    ("fp8", "key"): ((1, 1), (37, 1), (50, 1)),
    ("nvfp4", "key"): ((1, 1), (37, 1), (48, 16)),
    ("q8_0-plain", "value"): ((1, 1), (37, 1), (32, 32)),
    ("q4_0-plain", "key"): ((1, 1), (37, 1), (32, 32)),
    ("q4_0", "key"): ((1, 1), (37, 1), (0, 128)),
    ("q4_0", "value"): ((1, 1), (37, 1), (0, 64)),
    ("int4_per_token_head", "key"): ((1, 1), (37, 1), (0, 128)),
    ("turboquant-4bit", "key"): ((1, 1), (37, 1), (0, 128)),
    ("turboquant-4bit", "value"): ((1, 1), (37, 1), (0, 128)),
    ("kivi-4", "key"): ((1, 1), (32, 32), (50, 1)),
    ("kivi-4", "value"): ((1, 1), (37, 1), (32, 32)),
    ("kvquant-nuq4", "value"): ((0, 3), (37, 1), (0, 128)),
    ("turbo-attn", "key"): ((1, 1), (37, 1), (0, 128)),
}


@pytest.mark.parametrize(("name", "stream"), FOOTPRINTS)
def test_a_value_shares_its_scale_with_its_group_and_nothing_else(name: str, stream: str) -> None:
    part = getattr(fitted(name), stream)
    x = vectors(128, 64, seed=9)
    x[1, 37] = 1.0 + (torch.arange(128) + 1) % 7
    louder = x.clone()
    louder[1, 37, 50] = 40.0
    a, b = (old(part.codec).round_trip(y[None], part.constants)[0] for y in (x, louder))
    where = (a != b).nonzero()  # neither 0 nor the least of a group stands at its end: these stay
    first, last = where.amin(0), where.amax(0)
    assert tuple(zip(first.tolist(), (last - first + 1).tolist(), strict=True)) == FOOTPRINTS[name, stream]


@pytest.mark.parametrize("name", [n for n in RIVALS if not n.endswith("-ends")])
def test_more_bits_lose_less(name: str) -> None:
    """Relative errors on plain normal vectors lie where the number of bits puts them."""
    x = torch.randn(HEADS, 256, 128, generator=torch.Generator().manual_seed(7))
    layer = fit_layer(parse(name), LayerSample(x.flip(0), x, x.flip(1)))
    bits = RIVALS[name].bits
    least, most = {8: (0.002, 0.03), 4: (0.05, 0.12), 3: (0.1, 0.25), 2: (0.2, 0.5)}[bits]
    for stream in (layer.key, layer.value):
        error = old(stream.codec).round_trip(x[None], stream.constants)[0] - x
        assert least < error.norm() / x.norm() < most


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_have_ggmls_own_bytes(bits: int) -> None:
    gguf = pytest.importorskip("gguf")
    x = vectors(64, 20, seed=3)
    x[0, 0] = 0.0
    x[0, 1, :2] = torch.tensor([5.0, -5.0])  # equal magnitudes: the first one decides the sign of q4_0's scale
    kind = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}[bits]
    expected = torch.from_numpy(gguf.quantize(x.numpy(), kind))
    kept = llama_cpp.Blocks(bits, "none").encode(x, {})
    assert torch.equal(kept["blocks"], expected)
    read = torch.from_numpy(gguf.dequantize(expected.numpy(), kind))
    assert torch.equal(llama_cpp.Blocks(bits, "none").decode(kept, {}, 64), read)


def test_llama_cpp_rotates_keys_whole_and_values_by_64() -> None:
    """A constant vector goes into the first coordinate of a rotation: only blocks that begin one have a scale."""
    for stream, loud in (("key", [0]), ("value", [0, 2])):
        kept = getattr(fitted("q8_0"), stream).codec.encode(torch.ones(1, 1, 128), {})["blocks"]
        scales = kept.unflatten(-1, (4, 34))[0, 0, :, :2].contiguous().view(torch.float16)[:, 0].float()
        assert scales.gt(0.01).nonzero()[:, 0].tolist() == loud
        assert scales[0].item() == pytest.approx((128 if stream == "key" else 64) ** 0.5 / 127, rel=1e-3)
    orders = {size: llama_cpp.Blocks(4, "largest").order(size) for size in (32, 64, 96, 192, 256)}
    assert orders == {32: 1, 64: 64, 96: 1, 192: 64, 256: 256}


def test_int4_hides_its_zero_point_in_the_scale() -> None:
    x = vectors(64, 9, seed=2)
    codec = Int4PerTokenHead()
    kept = codec.encode(x, {})
    word = kept["scale"].view(torch.int32)
    codes, zero = unpack_bits(kept["codes"], 4, 64), word & 15
    assert kept["scale"].dtype == torch.float32 and zero.unique().numel() > 1
    assert bool((codes.amin(-1) == 0).all() and (codes.amax(-1) == 15).all())  # from the least to the largest
    step = (word & ~15).view(torch.float32)
    error = (codec.decode(kept, {}, 64) - x).norm(dim=-1)
    assert bool((error < 0.4 * step).all() and (error > 0.2 * step).all())  # about step / sqrt(12): 8 * 8 / 64 of it


def test_floats_round_to_even_and_stop_at_the_largest() -> None:
    values = torch.tensor([[0.3, 1.0625, 1.1875, 500.0, -1e9, 2.0**-9, 2.0**-11]])
    read = floats.Fp8().round_trip(values, {})
    assert read.tolist() == [[0.3125, 1.0, 1.25, 448.0, -448.0, 2.0**-9, 0.0]]
    block = torch.tensor([[6, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5.01, -0.75, 0.74, 1.26, 2.49, 3.49, 0]])
    read = floats.Nvfp4().round_trip(block, {"scale": torch.tensor([1.0])})
    assert read.tolist() == [[6, 0, 0.5, 1, 1, 2, 2, 4, 4, -6, -1, 0.5, 1.5, 2, 3, 0]]
    kept = floats.Nvfp4().encode(block * 3, {"scale": torch.tensor([0.5])})
    assert kept["scales"].dtype == torch.float8_e4m3fn and kept["scales"].float().tolist() == [[6.0]]  # 18 / 6 / 0.5
    layer = fitted("nvfp4")
    largest = sample(128).key.abs().max()
    top = layer.key.codec.encode(sample(128).key, layer.key.constants)["scales"].float().max()
    assert top == 448 and layer.key.constants["scale"].item() == pytest.approx(largest.item() / 6 / 448)


def test_levels_are_those_of_the_papers() -> None:
    assert normal_levels(3)[4:].tolist() == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=1e-3)  # Max 1960
    assert normal_levels(4)[8:].tolist() == pytest.approx(
        [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], abs=1e-3
    )
    x = torch.tensor([1.0] * 5 + [4.0] * 3 + [9.0, 10.0])
    assert fit_levels(x, 3).tolist() == [1.0, 4.0, 9.5]
    weights = torch.tensor([1.0] * 8 + [1.0, 3.0])
    assert fit_levels(x, 3, weights).tolist() == [1.0, 4.0, 9.75]
    assert nearest(torch.tensor([-9.0, 2.4, 2.6, 7.0, 99.0]), fit_levels(x, 3)).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(("bits", "distortion"), [(4, 0.0095), (3, 0.0345)])
def test_turboquants_distortion(bits: int, distortion: float) -> None:
    """Theorem 1 of the paper: about 0.009 and 0.03 of the squared length for any vector. nc keeps the length."""
    x = vectors(128, 200, seed=5) - torch.linspace(-1, 1, 128)
    codec = turboquant.Keys(bits)
    read = codec.round_trip(x, {})
    assert torch.allclose(read.norm(dim=-1), x.norm(dim=-1), rtol=1e-3)
    assert ((read - x).square().sum() / x.square().sum()).item() == pytest.approx(distortion, rel=0.1)


def test_turboquants_values_reach_both_ends() -> None:
    x = torch.tensor([[-1.0, 0.49, 0.51, 14.0] + [3.0] * 4])
    assert turboquant.Values(4).round_trip(x, {}).tolist() == [[-1.0, 0.0, 1.0, 14.0] + [3.0] * 4]
    assert turboquant.Values(3).round_trip(torch.arange(8.0)[None], {}).tolist() == [[*range(8)]]


def test_kivi_by_hand() -> None:
    tokens = torch.arange(64.0)[:, None] * torch.tensor([1.0, 100.0])  # two groups of 32 tokens, two channels
    codec = kivi.Groups(2, along_tokens=True)
    kept = codec.encode(tokens, {})
    assert kept["ends"].shape == (2, 2, 2)  # channel, group, (step, least)
    assert kept["ends"][1].tolist() == [
        [pytest.approx(3100 / 3, rel=1e-3), 0],
        [pytest.approx(3100 / 3, rel=1e-3), 3200],
    ]
    read = codec.decode(kept, {}, 2)
    assert read[:, 1].unique().tolist() == pytest.approx([0, 1033, 2067, 3100, 3200, 4233, 5267, 6300], rel=1e-3)
    assert torch.allclose(read[:, 1], 100 * read[:, 0], rtol=1e-3)


def test_kvquant_scales_keys_before_rope() -> None:
    """Keys that are equal before RoPE have equal codes; after RoPE they differ."""
    raw = vectors(64, 1, seed=8).expand(-1, 40, -1)
    frequencies = rope(64).frequencies
    turned = kvquant.turn(raw, frequencies)
    assert torch.allclose(kvquant.turn(turned, frequencies, back=True), raw, atol=1e-5)
    assert torch.allclose((turned[0, 5] * turned[0, 9]).sum(), (turned[0, 15] * turned[0, 19]).sum(), rtol=1e-4)
    layer = fitted("kvquant-nuq4", 64)
    codes = layer.key.codec.encode(turned, layer.key.constants)["codes"]
    assert (codes == codes[:, :1]).float().mean() > 0.95  # but for values at a threshold
    ranges = layer.key.constants["ranges"].float()
    before = kvquant.turn(sample(64).key, frequencies, back=True)
    assert torch.allclose(ranges[..., 0] + ranges[..., 1], before.amax(-2), rtol=2e-3, atol=2e-3)


def test_kvquant_weighs_by_squared_gradients() -> None:
    plain = sample(64)
    loud = torch.where(plain.value > 0, 1.0, 0.0)
    weighted = LayerSample(plain.query, plain.key, plain.value, gradient={"key": loud, "value": loud})
    levels = kvquant.Values(3).fit(weighted, "value")["levels"][0]
    flat = kvquant.Values(3).fit(LayerSample(plain.query, plain.key, plain.value), "value")["levels"][0]
    assert (levels > 0).sum() > (flat > 0).sum()  # all levels go where the loss looks
    with pytest.raises(UnsupportedError, match="only where RoPE pairs dimensions i and i"):
        other = LayerSample(plain.query, plain.key, plain.value, rope=Rope(rope(64).frequencies, halves=False))
        kvquant.Keys(4).fit(other, "key")


def test_turbo_attns_scales() -> None:
    size = torch.tensor([1.0, 1.0, 4.0, 4.0])
    x = torch.ones(2, 8, 4) * size
    assert torch.allclose(turbo_attn.channel_scales(x, None)[0], (size / 2.5).sqrt())
    # queries as loud as keys: the power (1 - 1) / 2 is 0; queries that even them out: (1 + 1) / 2
    assert torch.allclose(turbo_attn.channel_scales(x, x)[0], torch.ones(4), atol=0.01)
    assert torch.allclose(turbo_attn.channel_scales(x, 1 / x)[0], size / 2.5)
    pairs = turbo_attn.channel_scales(torch.ones(1, 8, 4) * torch.tensor([1.0, 4.0, 9.0, 9.0]), torch.ones(1, 8, 4))
    assert pairs[0, 0] == pairs[0, 1] and pairs[0, 2] == pairs[0, 3]


def test_turbo_attn_keeps_the_length_of_keys_and_the_newest_at_8_bits() -> None:
    layer, x = fitted("turbo-attn"), vectors(128, 300, seed=9)
    scaled = x / layer.key.constants["scales"]
    coded = old(layer.key.codec).round_trip(x[None], layer.key.constants)[0] / layer.key.constants["scales"]
    assert torch.allclose(coded.norm(dim=-1), scaled.norm(dim=-1), rtol=1e-2)  # bf16
    for stream in (layer.key, layer.value):
        off = (stream.round_trip(x[None])[0] - x).norm(dim=-1) / x.norm(dim=-1)
        assert off[:, :172].mean() > 0.05 and off[:, 172:].max() < 0.02


def test_ends_that_stay_fp16() -> None:
    samples = [sample(64)] * 7
    method = fit(parse("turboquant-4bit-ends"), samples)
    assert [isinstance(layer.key.codec, Exact) for layer in method.layers] == [
        True,
        True,
        False,
        False,
        False,
        True,
        True,
    ]
    assert method.vector_bits(64) == pytest.approx((3 * (34 + 36) + 4 * 256) * 8 / 7)
    assert all(isinstance(s.key.codec, turboquant.Keys) for s in fit(parse("turboquant-4bit"), samples).layers)


def test_names_and_head_sizes() -> None:
    method = parse("kivi-2:k")
    assert (method.family, method.side, method.code_bits) == ("rival", "k", 2) and isinstance(method.value, Exact)
    for name in ("q4_1", "kivi-2:q", "kivi-2:", "q4_0@pca", "nvfp4:kv"):
        with pytest.raises(ConfigError, match=r"unknown method .* or a rival: fp8, nvfp4, .*kvquant-nuq3"):
            parse(name)
    for name, size in (("q4_0", 80), ("kivi-4", 80), ("nvfp4", 72), ("turboquant-4bit", 96), ("turbo-attn", 80)):
        with pytest.raises(UnsupportedError, match=str(size)):
            parse(name).check(size)
        parse(name).check(64)
    assert math.isclose(parse("kvquant-nuq3").budget(64), 3)


@pytest.mark.slow
def test_vllms_own_kernels_write_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = [sys.executable, "-m", "tests.bench.vllm_kernels", str(tmp_path / "found.pt")]
    subprocess.run(script, env=environment, cwd=Path(__file__).parents[2], check=True, timeout=300)
    found = torch.load(tmp_path / "found.pt")
    x = vllm_kernels.vectors()
    kept = Int4PerTokenHead().encode(x, {})
    assert torch.equal(kept["codes"], found["int4 codes"])
    assert torch.equal(kept["scale"].view(torch.int32) & 15, found["int4 scale"].view(torch.int32) & 15)
    assert torch.allclose(kept["scale"], found["int4 scale"], rtol=1e-5)
    for bits in (4, 3):
        levels = normal_levels(bits) / vllm_kernels.SIZE**0.5
        assert torch.allclose(levels, found[f"levels {bits}"], rtol=2e-3)  # its integrals are sums of 200 terms
        keys, values = turboquant.Keys(bits).encode(x, {}), turboquant.Values(bits).encode(x, {})
        parts = [keys["codes"], keys["length"].unsqueeze(-1), values["codes"], values["ends"]]
        ours = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
        assert (ours == found[f"turboquant {bits}"][..., : ours.shape[-1]]).float().mean() > 0.999
