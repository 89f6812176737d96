"""The reference itself, against definitions written out here and properties that must hold."""

import math
from functools import partial

import pytest
import torch

from fraqtl_kernels import reference
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import IDENTITY
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import CPU_HEAD_SIZES, FORMATS, VectorFormat
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.rotation import hadamard
from tests.kernels.conftest import make_batch, make_pool, make_sink_batch, relative_error

QUANTIZED = [name for name, f in FORMATS.items() if f.is_quantized]
VECTORS = [VectorFormat(4), VectorFormat(8), VectorFormat(3), VectorFormat(2), VectorFormat(2, groups=4)]


@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
def test_hadamard_is_orthogonal_with_equal_magnitudes(size: int) -> None:
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_hadamard_refuses_other_orders() -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix of order 72"):
        hadamard(72)


@pytest.mark.parametrize("vector", VECTORS)
def test_quantisation_error_is_at_most_half_a_step(vector: VectorFormat) -> None:
    # Scales stay within the normal numbers of fp16.
    x = torch.randn(200, 96, dtype=torch.float64) * torch.logspace(-2, 3, 200, dtype=torch.float64)[:, None]
    codes, scale = reference.quantize(x, vector)
    error = (reference.dequantize(codes, scale, vector, torch.float64) - x).abs()
    # fp16 rounds the scale by up to 2^-11, which can move the outermost code by as much more.
    step = scale.double().view(200, vector.groups).repeat_interleave(96 // vector.groups, 1)
    assert (error <= step * (0.5 + vector.edge * 2**-11) * 1.0001).all()
    assert codes.min() == 0 and codes.max() == vector.levels


@pytest.mark.parametrize("vector", VECTORS)
def test_zero_tiny_huge_and_broken_vectors(vector: VectorFormat) -> None:
    x = torch.zeros(5, 64)
    x[1, 3], x[2, 5], x[3, 7], x[4, 9] = 1e-9, 1e9, math.nan, math.inf
    values = reference.dequantize(*reference.quantize(x, vector), vector)
    assert torch.equal(values[0], torch.zeros(64))
    assert values[1].abs().max() < 1e-7
    assert values[2].isfinite().all() and values[2].argmax() == 5
    group = slice(0, 64 // vector.groups)
    assert values[3, group].isnan().all() and values[4, group].isnan().all()


@pytest.mark.parametrize("vector", VECTORS)
def test_pack_and_unpack(vector: VectorFormat) -> None:
    codes = torch.randint(0, vector.levels + 1, (7, 3, 80), dtype=torch.uint8)
    packed = reference.pack(codes, vector)
    assert packed.shape[-1] == vector.code_bytes(80)
    assert torch.equal(reference.unpack(packed, vector), codes)


def test_low_nibbles_hold_the_first_half() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(4)
    packed = reference.pack(codes, VectorFormat(4))
    assert torch.equal(packed & 15, codes[:32]) and torch.equal(packed >> 4, codes[32:])


@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
def test_third_bits_stand_behind_the_lower_two(size: int) -> None:
    codes = torch.randint(0, 8, (size,), dtype=torch.uint8)
    packed = reference.pack(codes, VectorFormat(3))
    assert torch.equal(packed[: size // 4], reference.pack(codes & 3, VectorFormat(2)))
    eighth = size // 8
    for i in range(eighth):
        for half in range(2):
            for bit, first in enumerate((i, i + size // 2, i + size // 4, i + 3 * size // 4)):
                stored = packed[size // 4 + i] >> (4 * half + bit) & 1
                assert stored == codes[first + half * eighth] >> 2


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
def test_planes_fill_the_page_without_overlap(name: str, size: int) -> None:
    layout = PageLayout(FORMATS[name], size, 32)
    pool = make_pool(layout, 2, 3)
    pool.zero_()
    planes = layout.planes(pool)
    for plane in (planes.k, planes.v, planes.k_scale, planes.v_scale):
        if plane is not None:
            raw = plane.view(torch.uint8)
            assert not raw.any()  # nothing written yet by another plane
            raw.fill_(1)
    unused = layout.page_bytes - 32 * (layout.format.k.bytes(size) + layout.format.v.bytes(size))
    pages = pool.as_strided((2, 3, layout.page_bytes), (*pool.stride()[:2], 1)).bool()
    assert pages[..., : layout.page_bytes - unused].all() and not pages[..., layout.page_bytes - unused :].any()
    assert (unused > 0) == (size == 512 and layout.format.k.is_scaled)
    assert {layout.v_offset % 16, layout.k_scale_offset % 16, layout.v_scale_offset % 16} == {0}


def test_strange_pools_are_refused() -> None:
    layout = PageLayout(FORMATS["k4v4"], 64, 16)
    with pytest.raises(ValueError, match="must be contiguous"):
        layout.planes(make_pool(layout, 2, 2).transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="does not hold pages"):
        layout.planes(make_pool(PageLayout(FORMATS["k8v8"], 64, 16), 2, 2))


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("k8v8", (0.01, 0.01)),
        ("k8v4", (0.01, 0.12)),
        ("k4v4", (0.12, 0.12)),
        ("k4v3", (0.12, 0.25)),
        ("k3v3", (0.25, 0.25)),
        ("k4v2", (0.12, 0.45)),
        ("k4v4-channel", (0.14, 0.14)),
    ],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_stored_values_are_close_to_what_was_written(name: str, limits: tuple[float, float], calibrated: bool) -> None:
    batch = make_batch(name, seq_lens=(33,), queries=(1,), calibrated=calibrated)
    planes, format, token = batch.layout.planes(batch.pool), batch.layout.format, torch.arange(33)
    place = batch.block_table[0, token // 16].long(), slice(None), token % 16
    keys = reference.stored_keys(planes, format.k, batch.constants)[place]
    values = reference.stored_values(planes, format.v, batch.constants)[place]
    for stored, x, limit in ((keys, batch.key[0], limits[0]), (values, batch.value[0], limits[1])):
        assert 1e-4 < relative_error(stored, x) < limit


def test_a_sink_is_stored_as_well_as_any_key() -> None:
    """Without its own center the error of a key 40 times as large would be 40 times as large."""
    for calibrated, low, high in ((True, 0.5, 3.0), (False, 8.0, 80.0)):
        key = torch.randn(200, 2, 64)
        key[::40] += 40 * torch.randn(2, 64)
        constants = calibrate(FORMATS["k4v4"], key, key, key) if calibrated else IDENTITY
        layout, slots = PageLayout(FORMATS["k4v4"], 64, 16), torch.arange(200)
        pool = make_pool(layout, 13, 2)
        reference.write(pool, layout, key, key, slots, constants)
        stored = reference.stored_keys(layout.planes(pool), layout.format.k, constants)[slots // 16, :, slots % 16]
        error = (stored - key).norm(dim=-1)
        assert low < error[::40].mean() / error[1::40].mean() < high


def test_formats_with_static_scales_ask_for_calibration() -> None:
    layout = PageLayout(FORMATS["k4v4-channel"], 64, 16)
    key = torch.randn(2, 2, 64)
    with pytest.raises(ConfigError, match="needs calibration"):
        reference.write(make_pool(layout, 3, 2), layout, key, key, torch.tensor([0, 1]))


def test_a_sink_takes_its_share_of_the_weights() -> None:
    """Beside the sum of all e^score of the keys as they were written, center and all."""
    batch, sink_logits = make_sink_batch("fp16", seq_lens=(50,), queries=(1,), dtype=torch.float16)
    where = batch.block_table, batch.query_start, batch.seq_lens
    slots = batch.block_table[0, torch.arange(50) // 16].long() * 16 + torch.arange(50) % 16
    reference.write(batch.pool, batch.layout, batch.key[0], batch.value[0], slots)
    attend = partial(reference.paged_attention, batch.query, batch.pool, batch.layout, *where, scale=batch.scale)
    key = batch.key[0].double().repeat_interleave(2, 1)
    total = torch.einsum("hd,khd->hk", batch.query[0].double() * batch.scale, key).logsumexp(-1)
    share = (total - sink_logits.double()).sigmoid()
    assert 0.05 < share.mean() < 0.95
    torch.testing.assert_close(attend(sink_logits=sink_logits), attend() * share[:, None])


def test_attention_of_raw_pages_is_torch_attention() -> None:
    batch = make_batch("fp16", seq_lens=(50,), queries=(50,), dtype=torch.float16)
    out = reference.paged_attention(
        batch.query, batch.pool, batch.layout, batch.block_table, batch.query_start, batch.seq_lens, scale=batch.scale
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        batch.query.double().transpose(0, 1),
        batch.key[0].double().transpose(0, 1).repeat_interleave(2, 0),
        batch.value[0].double().transpose(0, 1).repeat_interleave(2, 0),
        is_causal=True,
    ).transpose(0, 1)
    assert relative_error(out, expected) < 1e-12
