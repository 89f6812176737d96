"""Methods of the quality lab: what they keep, bit by bit, and what they give back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fraqtl_bench.quality.bases import BASES, matrix, principal_basis, random_basis
from fraqtl_bench.quality.codecs import Coordinates, LayerSample, deserialize, serialize
from fraqtl_bench.quality.fitted import fit_layer
from fraqtl_bench.quality.grids import Float16, Symmetric, pack_bits, packed_bits, unpack_bits
from fraqtl_bench.quality.methods import Method, parse, rank_at, standard_names
from fraqtl_bench.quality.server_codec import read_constants
from fraqtl_kernels import reference
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.pages import PageLayout

HEADS, TOKENS = 3, 48


def vectors(size: int, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """(HEADS, tokens, size) with channels of different size and a mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(HEADS, tokens, size, generator=generator)
    return x * torch.linspace(0.2, 3, size) + torch.linspace(-1, 1, size)


def sample(size: int, seed: int = 0) -> LayerSample:
    query = vectors(size, seed=seed + 1).repeat(2, 1, 1)
    return LayerSample(query, vectors(size, seed=seed + 2), vectors(size, seed=seed + 3))


def everything(size: int) -> list[Method]:
    """The standard set and every basis with every kind."""
    kinds = ["int8-channel", "int4-token", "int3-channel", "int3-token", f"rank{size // 4}", f"rank{size // 2}x3"]
    names = [f"{kind}@{basis}{side}" for kind in kinds for basis in BASES for side in ("", ":k", ":v")]
    return [parse(name) for name in dict.fromkeys([*standard_names(size), *names])]


@pytest.mark.parametrize("size", [64, 80, 128])
def test_claimed_bits_are_the_bytes_of_what_is_kept(size: int) -> None:
    calibration = sample(size)
    x = vectors(size, 7, seed=9)[None]
    for method in everything(size):
        layer = fit_layer(method, calibration)
        for stream in (layer.key, layer.value):
            kept = stream.codec.encode(x, stream.constants)
            assert 8 * len(serialize(kept)) == HEADS * 7 * stream.codec.vector_bits(size), method.name
            constants = 8 * len(serialize(stream.constants))
            assert constants == HEADS * stream.codec.constant_bits(size, stream.constants), method.name


@pytest.mark.parametrize("size", [64, 80])
def test_what_attention_gets_is_made_from_those_bytes_alone(size: int) -> None:
    calibration = sample(size)
    x = vectors(size, 7, seed=9)[None]
    for method in everything(size):
        layer = fit_layer(method, calibration)
        for stream in (layer.key, layer.value):
            kept = stream.codec.encode(x, stream.constants)
            again = deserialize(serialize(kept), kept)
            constants = deserialize(serialize(stream.constants), stream.constants)
            found, expected = stream.codec.decode(again, constants, size), stream.round_trip(x)
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12), method.name  # sums that cancel leave 1e-15


def test_deserialize_takes_all_bytes() -> None:
    kept = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float16)}
    assert len(serialize(kept)) == 7
    with pytest.raises(ValueError, match="8 bytes given, 7 expected"):
        deserialize(serialize(kept) + b"x", kept)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 5, 64])
def test_packing_leaves_no_gaps(bits: int, n: int) -> None:
    codes = torch.randint(0, 2**bits, (4, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert packed.shape == (4, -(-n * bits // 8)) and packed_bits(n, bits) == 8 * packed.shape[1]
    assert torch.equal(unpack_bits(packed, bits, n), codes)


def test_symmetric_grid_by_hand() -> None:
    grid = Symmetric(4, "token")
    kept = grid.encode(torch.tensor([[7.0, -3.4, 0.4, 0.6]]), {})
    assert kept["step"].tolist() == [1.0]
    assert unpack_bits(kept["codes"], 4, 4).tolist() == [[14, 4, 7, 8]]
    assert grid.decode(kept, {}, 4).tolist() == [[7.0, -3.0, 0.0, 1.0]]


def test_steps_per_channel_are_static_and_clip() -> None:
    grid = Symmetric(4, "channel")
    constants = grid.fit(torch.tensor([[[7.0, 70.0], [-3.0, 14.0]]]))
    assert constants["step"].tolist() == [[1.0, 10.0]]
    stored = grid.decode(grid.encode(torch.tensor([[[100.0, 100.0], [2.2, 2.2]]]), constants), constants, 2)
    assert stored.tolist() == [[[7.0, 70.0], [2.0, 0.0]]]


def test_two_bits_leave_three_levels() -> None:
    grid = Symmetric(2, "token")
    x = torch.linspace(-1, 1, 33)[None]
    assert grid.decode(grid.encode(x, {}), {}, 33).unique().tolist() == [-1.0, 0.0, 1.0]


def test_zero_vectors_come_back_as_zero() -> None:
    x = torch.zeros(1, 2, 8)
    for scale in ("token", "channel"):
        grid = Symmetric(4, scale)
        assert not grid.decode(grid.encode(x, grid.fit(x)), grid.fit(x), 8).any()


@pytest.mark.parametrize("kind", BASES)
def test_bases_are_orthonormal(kind: str) -> None:
    codec = Coordinates(kind, Float16(), 16, centered=True, seed=3)
    columns = matrix(kind, codec.fit(sample(64), "key"), 64, torch.device("cpu"))
    assert columns.shape[-2:] == (64, 16)
    assert torch.allclose(columns.mT @ columns, torch.eye(16).expand(len(columns), -1, -1), atol=2e-3)


def test_random_basis_depends_on_the_seed_only() -> None:
    assert torch.equal(random_basis(32, 1), random_basis(32, 1))
    assert not torch.allclose(random_basis(32, 1), random_basis(32, 2))


def test_principal_basis_finds_the_direction_of_most_variance() -> None:
    u = torch.nn.functional.normalize(torch.arange(1.0, 9.0), dim=0)
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(200, 1, generator=generator) * u + torch.randn(200, 8, generator=generator) + 5
    assert abs(float(principal_basis(x[None])[0, :, 0].float() @ u)) > 0.99


def test_rank_reduction_is_the_projection_on_the_largest_directions() -> None:
    calibration = sample(64)
    method = parse("rank16")
    layer = fit_layer(method, calibration)
    key = calibration.key
    mean = key.mean(-2, keepdim=True)
    basis = principal_basis(key)[..., :16].float()
    expected = (key - mean) @ basis @ basis.mT + mean
    assert (layer.key.round_trip(key[None])[0] - expected).norm() / expected.norm() < 2e-3
    # Eckart and Young: no other 16 dimensions lose less
    for other in ("identity", "random", "hadamard"):
        stored = fit_layer(parse(f"rank16@{other}"), calibration).key.round_trip(key[None])[0]
        assert (stored - key).norm() > (expected - key).norm()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [64, 128])
def test_server_formats_give_what_the_reference_reads_from_pages(name: str, size: int) -> None:
    format = FORMATS[name]
    calibration = sample(size)
    layer = fit_layer(parse(name), calibration)
    key, value, query = (x.transpose(0, 1) for x in (calibration.key, calibration.value, calibration.query))
    constants = calibrate(format, key, query, value)
    layout = PageLayout(format, size, 16)
    pool = torch.zeros(3, HEADS, 16, format.bytes_per_token(size), dtype=torch.uint8)
    reference.write(pool, layout, key, value, torch.arange(TOKENS), constants)
    planes = layout.planes(pool)
    for stream, stored, x in (
        (layer.key, reference.stored_keys(planes, format.k, constants), calibration.key),
        (layer.value, reference.stored_values(planes, format.v, constants), calibration.value),
    ):
        by_head = stored.transpose(0, 1).flatten(1, 2).float()
        assert torch.equal(stream.round_trip(x[None])[0], by_head)
        assert stream.codec.vector_bits(size) == 8 * (format.k if x is calibration.key else format.v).bytes(size)


def test_budgets_are_matched() -> None:
    assert rank_at(4, 128) == 32 and rank_at(4, 64) == 16 and rank_at(3, 64, 8) == 24
    assert rank_at(3, 80) == 15 and rank_at(2, 20, 16) is None and rank_at(16, 64) is None
    for size in (64, 128):
        for name in standard_names(size):
            method = parse(name)
            if method.family not in ("server", "baseline"):
                code_bits = method.key.vector_bits(size) if "k" in method.side else method.value.vector_bits(size)
                per_token_scale = 16 if "token" in name else 0
                assert code_bits - per_token_scale == method.budget(size) * size, name
                assert method.budget(size) in (2, 3, 4, 8)


def test_the_standard_set_has_every_kind() -> None:
    names = standard_names(128)
    wanted = ["fp16", "int4-channel", "int2-token", "rank32", "rank32:k", "rank32:v", "rank64x8", "int4-token@pca"]
    assert {*wanted, *FORMATS, "rank32@hadamard", "rank64x8@random"} <= set(names)
    assert len(names) == len(set(names))


def test_names_that_mean_nothing_are_refused() -> None:
    for name in ("int4", "rank", "rank0x", "k4v4@pca", "k8v8+residual", "int4-channel:q", ""):
        with pytest.raises(ConfigError, match="unknown method"):
            parse(name)
    with pytest.raises(ConfigError, match="unknown basis 'fourier': choose one of identity"):
        parse("int4-token@fourier")
    for name in ("int1-token", "int9-channel", "int16-token", "rank8x1"):
        with pytest.raises(ConfigError, match="bits are not possible, give 2 to 8"):
            parse(name)
    with pytest.raises(ConfigError, match="rank 65 is not possible at head size 64: give 1 to 64"):
        parse("rank65").check(64)
    with pytest.raises(ConfigError, match="no pages for head size 48"):
        parse("k4v4").check(48)


def test_constants_of_a_server_are_read_from_its_file(tmp_path: Path) -> None:
    import safetensors.torch

    key, value, query = (x.transpose(0, 1) for x in (vectors(64, seed=1), vectors(64, seed=2), vectors(64, seed=3)))
    made = calibrate(FORMATS["k4v4"], key, query, value)
    names = ["model.layers.0.attn", "model.layers.1.attn"]
    tensors = {f"{n}/{f}": made.tensors()[f].clone() for n in names for f in ("key_center", "key_basis")}
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file(tensors, path, {"layers": json.dumps(names)})
    found = read_constants(path, 2)
    assert len(found) == 2 and found[0]["value"] == {} and set(found[1]["key"]) == {"key_center", "key_basis"}
    assert torch.equal(found[1]["key"]["key_center"], made.key.transform.center)
    with pytest.raises(ConfigError, match="is for 2 layers, the model has 4"):
        read_constants(path, 4)
    path.write_bytes(b"no")
    with pytest.raises(ConfigError, match="is no calibration file"):
        read_constants(path, 2)
