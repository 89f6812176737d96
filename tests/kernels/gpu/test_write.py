"""The write kernel against the reference: the same bytes, and nothing else touched."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fraqtl_kernels import reference
from fraqtl_kernels.formats import FORMATS, HEAD_SIZES, VectorFormat
from fraqtl_kernels.gpu.bases import Bases
from fraqtl_kernels.gpu.write import write
from fraqtl_kernels.pages import PageLayout
from tests.kernels.conftest import make_pool
from tests.kernels.gpu.cases import GPU_FORMATS, to_device
from tests.kernels.gpu.conftest import DEVICE

EDGE = 1e-3  # a value this close to the edge of two codes (in steps) may go either way


def written(layout: PageLayout, key: Tensor, value: Tensor, slots: Tensor, centre: Tensor | None = None) -> Tensor:
    """The pool after the kernel has written to it, on the CPU."""
    pool = to_device(make_pool(layout, 7, key.shape[1], padding=64))
    bases = Bases.of(layout.format, layout.head_size, key.dtype, DEVICE, centre)
    write(pool, layout, key.to(DEVICE), value.to(DEVICE), slots.to(DEVICE), bases)
    return pool.cpu() if DEVICE != "cpu" else pool


def check_vectors(x: Tensor, codes: Tensor, scale: Tensor, vector: VectorFormat) -> None:
    """x: (n, D) exact, in the stored basis. codes, scale: what the kernel stored for it."""
    ideal_scale = x.abs().amax(-1) / vector.edge
    assert (
        torch.equal(scale.double(), reference.quantise(x, vector)[1].double())
        or (((scale.double() - ideal_scale).abs() / ideal_scale) < 2**-11 * (1 + EDGE)).all()
    )
    steps = x / scale.double()[:, None] + vector.midpoint
    near_edge = ((steps - steps.floor()) - 0.5).abs() < EDGE
    exact = steps.round().clamp(0, vector.levels).to(torch.uint8)
    assert ((codes == exact) | (near_edge & ((codes.int() - exact.int()).abs() <= 1))).all()
    assert near_edge.double().mean() < 0.01 or vector.bits == 8


def strided(tokens: int, heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as a fused QKV projection gives them: views with a token stride of four tensors."""
    qkv = torch.randn(tokens, 4 * heads * size, dtype=dtype)
    return tuple(qkv[:, i * heads * size : (i + 1) * heads * size].view(tokens, heads, size) for i in (1, 3))


@pytest.mark.parametrize("name", GPU_FORMATS)
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("centred", [False, True])
def test_codes_and_scales(name: str, size: int, centred: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    layout = PageLayout(FORMATS[name], size, 32)
    tokens, heads = 41, 3
    key, value = strided(tokens, heads, size, dtype)
    centre = torch.randn(heads, size) * 3 if centred else None
    slots = torch.randperm(7 * 32)[:tokens]
    slots[[3, 17, 40]] = -1
    pool = written(layout, key, value, slots, centre)
    planes = layout.planes(pool)
    used = slots[slots >= 0]
    shift = 0 if centre is None or not layout.format.k.centred else centre.double()
    for x, vector, plane, scales in (
        (key.double() - shift, layout.format.k, planes.k, planes.k_scale),
        (value.double(), layout.format.v, planes.v, planes.v_scale),
    ):
        stored = plane.transpose(1, 2).flatten(0, 1)[used]
        x = reference.rotate(x[slots >= 0], vector)
        if scales is None:
            assert torch.equal(stored, x.to(dtype).to(vector.raw_dtype))
        else:
            scale = scales.transpose(1, 2).flatten(0, 1)[used].flatten()
            check_vectors(x.flatten(0, 1), reference.unpack(stored, vector).flatten(0, 1), scale, vector)


@pytest.mark.parametrize("name", GPU_FORMATS)
def test_only_given_slots_are_written(name: str) -> None:
    layout = PageLayout(FORMATS[name], 80, 16)
    key, value = strided(5, 2, 80, torch.float16)
    pool = written(layout, key, value, torch.tensor([-1, 16 + 5, -1, 6 * 16 + 15]))  # shorter than the batch
    before = make_pool(layout, 7, 2, padding=64)
    raw, raw_before = (p.as_strided((7, p.stride(0)), (p.stride(0), 1)) for p in (pool, before))
    assert torch.equal(raw[[0, 2, 3, 4, 5]], raw_before[[0, 2, 3, 4, 5]])
    assert torch.equal(raw[:, -64:], raw_before[:, -64:])
    changed = layout.planes((pool != before).to(torch.uint8))
    for plane in (changed.k, changed.v):
        rows = (plane.contiguous().view(torch.uint8) != 0).any(-1).nonzero()
        assert set(map(tuple, rows.tolist())) == {(b, h, o) for b, o in ((1, 5), (6, 15)) for h in (0, 1)}


@pytest.mark.parametrize("name", ["k4v4", "k8v8"])
def test_exact_arithmetic_gives_the_reference_bytes(name: str) -> None:
    """Values that fp32 rotates without rounding: packed bytes and scales equal the reference's, all of them."""
    layout = PageLayout(FORMATS[name], 64, 16)  # 1/sqrt(64) is a power of two
    key, value = (torch.randint(-64, 65, (50, 2, 64)).half() for _ in range(2))
    slots = torch.randperm(7 * 16)[:50]
    theirs = make_pool(layout, 7, 2, padding=64)
    reference.write(theirs, layout, key, value, slots)
    ours, theirs = layout.planes(written(layout, key, value, slots)), layout.planes(theirs)
    assert torch.equal(ours.k_scale.view(torch.int16), theirs.k_scale.view(torch.int16))
    assert torch.equal(ours.v_scale.view(torch.int16), theirs.v_scale.view(torch.int16))
    for a, b, bits in ((ours.k, theirs.k, 4), (ours.v, theirs.v, 4)):
        same = (a == b).double().mean()  # fp32 division rounds ties of the float64 reference away: next to none
        assert same > 0.999, f"{bits}: {same}"


@pytest.mark.parametrize("name", ["k4v4", "k8v8"])
def test_zero_tiny_huge_and_broken_vectors(name: str) -> None:
    layout = PageLayout(FORMATS[name], 64, 16)
    x = torch.zeros(6, 1, 64, dtype=torch.bfloat16)
    x[1, 0, 3], x[2, 0, 5], x[3, 0, 7], x[4, 0, 9], x[5, 0, 9] = 1e-9, 1e9, math.nan, math.inf, -math.inf
    planes = layout.planes(written(layout, x, x, torch.arange(6)))
    stored = reference.stored_keys(planes, layout.format.k), reference.stored_values(planes, layout.format.v)
    for values in (x[0, 0, :6] for x in stored):
        assert torch.equal(values[0], torch.zeros(64, dtype=torch.float64))
        assert values[1].abs().max() < 1e-7
        assert values[2].isfinite().all() and values[2].abs().argmax() == 5
        assert values[3:].isnan().all()
