"""Both ways of unpacking: the portable one in the interpreter, the PTX one executed here, step by step."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl

from fraqtl_kernels import reference
from fraqtl_kernels.formats import FORMATS, TOP_BITS, VectorFormat
from fraqtl_kernels.gpu.constexprs import word_order, zero_points
from fraqtl_kernels.gpu.kernels import unpack
from tests.kernels.gpu.conftest import DEVICE

FP16, BF16 = torch.float16, torch.bfloat16


def lookup(a: int, b: int, c: int, table: int) -> int:
    """`lop3`: of every three bits, the one of the table that they number."""
    numbers = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
    return sum((table >> number & 1) << i for i, number in enumerate(numbers))


WHOLE = {  # instructions on 32 bits
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "lop3.b32": lookup,
}


def run_ptx(asm: str, words: int | list[int], outputs: int, dtype: torch.dtype) -> list[float]:
    """The 16-bit floats that `asm` leaves in $0, $1, ... for 32-bit inputs. Knows the instructions used, no more."""
    inputs = [words] if isinstance(words, int) else words
    registers: dict[str, int] = {f"${outputs + i}": word for i, word in enumerate(inputs)}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def halves(bits: int) -> torch.Tensor:
        signed = [((bits >> s) & 0xFFFF) - (((bits >> s) & 0x8000) << 1) for s in (0, 16)]
        return torch.tensor(signed, dtype=torch.int16).view(dtype)

    def whole(x: torch.Tensor) -> int:
        low, high = (int(b) & 0xFFFF for b in x.view(torch.int16))
        return low | (high << 16)

    for line in re.findall(r"([a-z0-9.]+) ([^;{]+);", re.sub(r"\.reg[^;]*;", "", asm)):
        op, (target, *names) = line[0], [part.strip() for part in line[1].split(",")]
        args = [value(n) for n in names]
        if op in WHOLE:
            result = WHOLE[op](*args)
        elif op == "prmt.b32":
            data = (args[0] | (args[1] << 32)).to_bytes(8, "little")
            result = int.from_bytes(bytes(data[(args[2] >> (4 * i)) & 7] for i in range(4)), "little")
        elif op == "sub.rn.f16x2" and dtype == FP16:
            result = whole(halves(args[0]) - halves(args[1]))
        elif op == "fma.rn.bf16x2" and dtype == BF16:
            a, b, c = (halves(x).double() for x in args)
            result = whole((a * b + c).to(BF16))
        else:
            raise AssertionError(f"unknown instruction {op}")
        registers[target] = result
    return [float(x) for i in range(outputs) for x in halves(registers[f"${i}"])]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ptx_nibbles(dtype: torch.dtype, symmetric: bool) -> None:
    """Every byte in every place comes out as code + bias, and `zero_points` is where the value is zero."""
    name = f"NIBBLES_{'FP16' if dtype == FP16 else 'BF16'}{'_SYMMETRIC' if symmetric else ''}"
    zeros = zero_points(VectorFormat(4), dtype, symmetric=symmetric, ptx=True)
    for byte in range(256):
        codes = [byte, (byte * 7 + 3) % 256, 255 - byte, (byte * 31) % 256]
        found = run_ptx(getattr(unpack, name).value, int.from_bytes(bytes(codes), "little"), 4, dtype)
        assert [x - zeros[0] for x in found[:4]] == [(c & 15) - 7.5 for c in codes]
        assert [x - zeros[1] for x in found[4:]] == [(c >> 4) - 7.5 for c in codes]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ptx_words(dtype: torch.dtype, symmetric: bool) -> None:
    name = f"WORDS_{'FP16' if dtype == FP16 else 'BF16'}{'_SYMMETRIC' if symmetric else ''}"
    zeros = zero_points(VectorFormat(4), dtype, symmetric=symmetric, ptx=True, words=True)
    for byte in range(256):
        words = [byte | ((byte * 7 + 3) % 256 << 8), 255 - byte | ((byte * 31) % 256 << 8)]
        found = run_ptx(getattr(unpack, name).value, words[0] | (words[1] << 16), 4, dtype)
        for part, zero in enumerate(zeros):
            exact = [((w >> (4 * part)) & 15) - 7.5 for w in words]
            assert [x - zero for x in found[2 * part : 2 * part + 2]] == exact


def test_words_hold_the_dimensions_in_their_order() -> None:
    for size in (64, 80, 96, 128, 256):
        codes = torch.arange(size, dtype=torch.int32) % 16
        words = reference.pack(codes.to(torch.uint8), VectorFormat(4)).view(torch.uint16).int()
        parts = torch.cat([(words >> shift) & 15 for shift in (0, 4, 8, 12)])
        assert torch.equal(parts, codes[word_order(size)]) and word_order(size).unique().numel() == size


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_ptx_pairs(dtype: torch.dtype) -> None:
    asm = unpack.PAIRS_FP16 if dtype == FP16 else unpack.PAIRS_BF16
    zeros = zero_points(VectorFormat(2), dtype, symmetric=True, ptx=True)
    for byte in range(256):
        codes = [byte, (byte * 7 + 3) % 256, 255 - byte, (byte * 31) % 256]
        found = run_ptx(asm.value, int.from_bytes(bytes(codes), "little"), 8, dtype)
        for part, zero in enumerate(zeros):
            parts = [((c >> (2 * part)) & 3) - 1.5 for c in codes]
            assert [x - zero for x in found[4 * part : 4 * part + 4]] == parts


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_ptx_triples(dtype: torch.dtype) -> None:
    """A register of lower bits, one of third bits, and one that says which half of a byte these are in."""
    asm = unpack.TRIPLES_FP16 if dtype == FP16 else unpack.TRIPLES_BF16
    zeros = zero_points(VectorFormat(3), dtype, symmetric=True, ptx=True)
    for byte in range(256):
        lower = [byte, (byte * 7 + 3) % 256, 255 - byte, (byte * 31) % 256]
        upper = [(byte * 113 + 5) % 256, byte, (byte * 57) % 256, 255 - byte]
        chosen = [255 * (byte >> i & 1) for i in range(4)]
        words = [int.from_bytes(bytes(x), "little") for x in (lower, upper, chosen)]
        found = run_ptx(asm.value, words, 8, dtype)
        third = [u >> 4 if c else u & 15 for u, c in zip(upper, chosen, strict=True)]
        for part, (zero, bit) in enumerate(zip(zeros, TOP_BITS, strict=True)):
            codes = [(low >> (2 * part) & 3) + 4 * (top >> bit & 1) for low, top in zip(lower, third, strict=True)]
            assert [x - zero for x in found[4 * part : 4 * part + 4]] == [c - 3.5 for c in codes]


def test_ptx_bytes() -> None:
    zeros = zero_points(VectorFormat(8), FP16, symmetric=True, ptx=True)
    for byte in range(256):
        codes = [byte, 255 - byte, (byte * 7) % 256, 128]
        found = run_ptx(unpack.BYTES_FP16.value, int.from_bytes(bytes(codes), "little"), 2, FP16)
        assert [x - zeros[0] for x in found] == [c - 127.5 for c in codes]


@triton.jit
def _unpack(
    codes,
    third_bits,  # of "triples"
    in_upper_half,
    found,  # (parts, COUNT)
    COUNT: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    DTYPE: tl.constexpr,  # noqa: N803
    SYMMETRIC: tl.constexpr,  # noqa: N803
    PTX: tl.constexpr,  # noqa: N803
):
    at = tl.arange(0, COUNT)
    code = tl.load(codes + at)
    if KIND == "nibbles":
        parts = unpack.unpack_nibbles(code, DTYPE, SYMMETRIC, PTX)
    elif KIND == "words":
        parts = unpack.unpack_words(code, DTYPE, SYMMETRIC, PTX)
    elif KIND == "pairs":
        parts = unpack.unpack_pairs(code, DTYPE, PTX)
    elif KIND == "triples":
        chosen = tl.load(in_upper_half + at) != 0
        parts = unpack.unpack_triples(code, tl.load(third_bits + at), chosen, DTYPE, PTX)
    else:
        parts = (unpack.unpack_bytes(code, DTYPE, PTX),)
    for part in tl.static_range(len(parts)):
        tl.store(found + part * COUNT + at, parts[part])


KINDS = {"nibbles": 4, "words": 4, "triples": 3, "pairs": 2, "bytes": 8}  # and the bits of a code
WAYS = (False, pytest.param(True, marks=pytest.mark.skipif(DEVICE == "cpu", reason="inline PTX needs a GPU")))


def every_register() -> torch.Tensor:
    """(8192,) bytes, four to a register: every byte in every place, between two sorts of neighbors."""
    places, byte = torch.meshgrid(torch.arange(4), torch.arange(256), indexing="ij")
    registers = torch.stack([(byte * factor + 91 * place) % 256 for place, factor in enumerate((31, 7, 113, 57))], -1)
    registers = torch.stack([registers, 255 - registers])
    registers.scatter_(-1, places.expand(2, 4, 256)[..., None], byte.expand(2, 4, 256)[..., None])
    return registers.flatten().to(torch.uint8)


@pytest.mark.parametrize("ptx", WAYS, ids=lambda ptx: "ptx" if ptx else "portable")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_in_every_place(kind: str, symmetric: bool, ptx: bool, dtype: torch.dtype) -> None:
    """On a GPU this runs what the tests above execute step by step."""
    bits, codes = KINDS[kind], every_register()
    numbers = codes.int()
    if kind == "words":
        codes, numbers = codes.view(torch.uint16), codes.view(torch.uint16).int()
    parts = {"words": 4, "triples": 4}.get(kind, 8 // bits)
    found = torch.full((parts, len(codes)), torch.nan, dtype=dtype, device=DEVICE)
    tl_dtype = tl.float16 if dtype == FP16 else tl.bfloat16
    third_bits = torch.randint(0, 256, codes.shape, dtype=torch.uint8)
    in_upper_half = torch.randint(0, 2, codes.shape, dtype=torch.uint8)
    others = third_bits.to(DEVICE), in_upper_half.to(DEVICE)
    _unpack[(1,)](codes.to(DEVICE), *others, found, len(codes), kind, tl_dtype, symmetric, ptx)
    vector = VectorFormat(bits)
    zeros = zero_points(vector, dtype, symmetric=symmetric, ptx=ptx, words=kind == "words")
    for part in range(parts):
        if kind == "triples":
            third = third_bits.int() >> (4 * in_upper_half.int() + TOP_BITS[part]) & 1
            stored = ((numbers >> (2 * part)) & 3) + 4 * third
        else:
            stored = (numbers >> (bits * part)) & vector.levels
        exact = stored - vector.midpoint
        assert torch.equal(found[part].cpu().double() - zeros[part], exact.double())


def test_raw_vectors_have_no_zero_point() -> None:
    assert zero_points(FORMATS["bf16"].k, BF16, symmetric=True, ptx=True) == (0, 0)


def test_the_zero_of_static_codes_needs_no_correction() -> None:
    assert zero_points(FORMATS["k4v4-channel"].v, FP16, symmetric=True, ptx=True) == (0, 0)
