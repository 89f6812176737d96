"""From packed codes to 16-bit floats that a tensor core takes: a portable way and an inline-PTX way.

Both return the code plus a constant ("bias"), exactly. The kernels never subtract the zero point
per element; they take it out of the sums. For a row of weights w and codes c

    Σ w (c - midpoint) = Σ w (c + bias) - (midpoint + bias) · Σ w

and `constexprs.zero_points` gives midpoint + bias. The PTX way sets the bits of a float whose unit in the last
place is 1 around the code (a "magic number", Kim et al., arXiv 2211.10017): per 8 nibbles 2 byte
permutations, 4 three-input logic operations and the subtractions that keep the constant small. A bias
adds rounding noise to the sum that it is taken out of, so values (summed over the whole context) are
centered to c - 8, and keys (summed over D numbers) only where the bias would be 1024.

Inline PTX acts on the codes of one 32-bit register; no result depends on how a tile is laid out over threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Bytes b0..b3 of $4 -> halves (b0, b1), (b2, b3): $0, $1 low nibbles, $2, $3 high nibbles.
# 0x6400 is 1024 with the nibble in bits 0..3, 0x5400 is 64 with the nibble in bits 4..7.
_NIBBLES_FP16 = """{
    .reg .b32 a, b, m;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    mov.b32 m, 0x64086408;
    lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $1, b, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $2, a, 0x00f000f0, 0x54005400, 0xea;
    lop3.b32 $3, b, 0x00f000f0, 0x54005400, 0xea;
    sub.rn.f16x2 $0, $0, m;
    sub.rn.f16x2 $1, $1, m;
"""
_SYMMETRIC_HIGH_FP16 = """
    mov.b32 m, 0x54805480;
    sub.rn.f16x2 $2, $2, m;
    sub.rn.f16x2 $3, $3, m;
"""
# 0x43 as the upper byte is bf16 128 with the nibble in bits 0..3. No sub.bf16x2 before sm_90: x · 1 - 136.
_NIBBLES_BF16 = """{
    .reg .b32 a, b, m, o;
    shr.u32 b, $4, 4;
    and.b32 a, $4, 0x0f0f0f0f;
    and.b32 b, b, 0x0f0f0f0f;
    prmt.b32 $0, a, 0x43434343, 0x4140;
    prmt.b32 $1, a, 0x43434343, 0x4342;
    prmt.b32 $2, b, 0x43434343, 0x4140;
    prmt.b32 $3, b, 0x43434343, 0x4342;
"""
_SYMMETRIC_BF16 = """
    mov.b32 m, 0xc308c308;
    mov.b32 o, 0x3f803f80;
    fma.rn.bf16x2 $0, $0, o, m;
    fma.rn.bf16x2 $1, $1, o, m;
    fma.rn.bf16x2 $2, $2, o, m;
    fma.rn.bf16x2 $3, $3, o, m;
"""
# Two words of four nibbles, $4 -> halves (word 0, word 1) of nibble 0 in $0, of nibble 1 in $1 and so on.
_WORDS_FP16 = """{
    .reg .b32 b, m;
    shr.u32 b, $4, 8;
    mov.b32 m, 0x64086408;
    lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $1, $4, 0x00f000f0, 0x54005400, 0xea;
    lop3.b32 $2, b, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $3, b, 0x00f000f0, 0x54005400, 0xea;
    sub.rn.f16x2 $0, $0, m;
    sub.rn.f16x2 $2, $2, m;
"""
_SYMMETRIC_ODD_FP16 = """
    mov.b32 m, 0x54805480;
    sub.rn.f16x2 $1, $1, m;
    sub.rn.f16x2 $3, $3, m;
"""
_WORDS_BF16 = """{
    .reg .b32 a, b, c, m, o;
    shr.u32 a, $4, 4;
    shr.u32 b, $4, 8;
    shr.u32 c, $4, 12;
    lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $1, a, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $2, b, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $3, c, 0x000f000f, 0x43004300, 0xea;
"""
# Bytes of codes in a to d -> bf16 128 + code in $0 to $7, less what -m holds
_WIDENED = """
    prmt.b32 $0, a, 0x43434343, 0x4140;
    prmt.b32 $1, a, 0x43434343, 0x4342;
    prmt.b32 $2, b, 0x43434343, 0x4140;
    prmt.b32 $3, b, 0x43434343, 0x4342;
    prmt.b32 $4, c, 0x43434343, 0x4140;
    prmt.b32 $5, c, 0x43434343, 0x4342;
    prmt.b32 $6, d, 0x43434343, 0x4140;
    prmt.b32 $7, d, 0x43434343, 0x4342;
    mov.b32 o, 0x3f803f80;
    fma.rn.bf16x2 $0, $0, o, m;
    fma.rn.bf16x2 $1, $1, o, m;
    fma.rn.bf16x2 $2, $2, o, m;
    fma.rn.bf16x2 $3, $3, o, m;
    fma.rn.bf16x2 $4, $4, o, m;
    fma.rn.bf16x2 $5, $5, o, m;
    fma.rn.bf16x2 $6, $6, o, m;
    fma.rn.bf16x2 $7, $7, o, m;
}"""


def _less(*biases: str) -> str:
    """The end of what leaves four pairs of fp16 in $0 to $7: each pair less a bias."""
    lines = (
        f"mov.b32 m, {bias}; sub.rn.f16x2 ${i}, ${i}, m; sub.rn.f16x2 ${i + 1}, ${i + 1}, m;"
        for i, bias in zip(range(0, 8, 2), biases, strict=True)
    )
    return "\n".join(lines) + "\n}"


# Four 2-bit codes a byte, in fp16: bits 0..1 below 1024, 2..3 below 256, 4..5 below 64, 6..7 below 16.
_PAIRS_FP16 = """{
    .reg .b32 a, b, m;
    prmt.b32 a, $8, 0, 0x4140;
    prmt.b32 b, $8, 0, 0x4342;
    lop3.b32 $0, a, 0x00030003, 0x64006400, 0xea;
    lop3.b32 $1, b, 0x00030003, 0x64006400, 0xea;
    lop3.b32 $2, a, 0x000c000c, 0x5c005c00, 0xea;
    lop3.b32 $3, b, 0x000c000c, 0x5c005c00, 0xea;
    lop3.b32 $4, a, 0x00300030, 0x54005400, 0xea;
    lop3.b32 $5, b, 0x00300030, 0x54005400, 0xea;
    lop3.b32 $6, a, 0x00c000c0, 0x4c004c00, 0xea;
    lop3.b32 $7, b, 0x00c000c0, 0x4c004c00, 0xea;
""" + _less("0x64026402", "0x5c085c08", "0x54205420", "0x4c804c80")
# And in bf16: 128 + code, less 130.
_PAIRS_BF16 = (
    """{
    .reg .b32 a, b, c, d, m, o;
    shr.u32 b, $8, 2;
    shr.u32 c, $8, 4;
    shr.u32 d, $8, 6;
    and.b32 a, $8, 0x03030303;
    and.b32 b, b, 0x03030303;
    and.b32 c, c, 0x03030303;
    and.b32 d, d, 0x03030303;
    mov.b32 m, 0xc302c302;
"""
    + _WIDENED
)
# 3-bit codes: their lower two bits as above in $8, the third bits of two times four codes in $9. $10 is 0xff in the
# bytes whose codes have theirs in the upper half of the byte. Those of the four codes, from the lowest bit, belong to
# the first, third, second and fourth: so two shifts put them above the lower two in fp16.
_TRIPLES_FP16 = """{
    .reg .b32 a, b, c, d, m, n;
    shr.u32 n, $9, 4;
    lop3.b32 m, $9, 0x0f0f0f0f, $10, 0x40;
    lop3.b32 n, n, 0x0f0f0f0f, $10, 0x80;
    or.b32 n, n, m;
    prmt.b32 a, $8, 0, 0x4140;
    prmt.b32 b, $8, 0, 0x4342;
    prmt.b32 c, n, 0, 0x4140;
    prmt.b32 d, n, 0, 0x4342;
    shl.b32 c, c, 2;
    shl.b32 d, d, 2;
    lop3.b32 $0, c, 0x00040004, 0x64006400, 0xea;
    lop3.b32 $1, d, 0x00040004, 0x64006400, 0xea;
    lop3.b32 $2, c, 0x00100010, 0x5c005c00, 0xea;
    lop3.b32 $3, d, 0x00100010, 0x5c005c00, 0xea;
    shl.b32 c, c, 3;
    shl.b32 d, d, 3;
    lop3.b32 $4, c, 0x00400040, 0x54005400, 0xea;
    lop3.b32 $5, d, 0x00400040, 0x54005400, 0xea;
    lop3.b32 $6, c, 0x01000100, 0x4c004c00, 0xea;
    lop3.b32 $7, d, 0x01000100, 0x4c004c00, 0xea;
    lop3.b32 $0, a, 0x00030003, $0, 0xea;
    lop3.b32 $1, b, 0x00030003, $1, 0xea;
    lop3.b32 $2, a, 0x000c000c, $2, 0xea;
    lop3.b32 $3, b, 0x000c000c, $3, 0xea;
    lop3.b32 $4, a, 0x00300030, $4, 0xea;
    lop3.b32 $5, b, 0x00300030, $5, 0xea;
    lop3.b32 $6, a, 0x00c000c0, $6, 0xea;
    lop3.b32 $7, b, 0x00c000c0, $7, 0xea;
""" + _less("0x64046404", "0x5c105c10", "0x54405440", "0x4d004d00")
# And in bf16: 128 + code, less 132.
_TRIPLES_BF16 = (
    """{
    .reg .b32 a, b, c, d, m, n, o;
    shr.u32 n, $9, 4;
    lop3.b32 m, $9, 0x0f0f0f0f, $10, 0x40;
    lop3.b32 n, n, 0x0f0f0f0f, $10, 0x80;
    or.b32 n, n, m;
    shr.u32 b, $8, 2;
    shr.u32 c, $8, 4;
    shr.u32 d, $8, 6;
    and.b32 a, $8, 0x03030303;
    and.b32 b, b, 0x03030303;
    and.b32 c, c, 0x03030303;
    and.b32 d, d, 0x03030303;
    shl.b32 m, n, 2;
    lop3.b32 a, m, 0x04040404, a, 0xea;
    lop3.b32 b, n, 0x04040404, b, 0xea;
    shl.b32 m, n, 1;
    lop3.b32 c, m, 0x04040404, c, 0xea;
    shr.u32 m, n, 1;
    lop3.b32 d, m, 0x04040404, d, 0xea;
    mov.b32 m, 0xc304c304;
"""
    + _WIDENED
)
# 8-bit codes in fp16: 1024 + c, less 1152. (bf16 has too few bits for the trick: the portable way serves it.)
_BYTES_FP16 = """{
    .reg .b32 m;
    mov.b32 m, 0x64806480;
    prmt.b32 $0, $2, 0x64646464, 0x4140;
    prmt.b32 $1, $2, 0x64646464, 0x4342;
    sub.rn.f16x2 $0, $0, m;
    sub.rn.f16x2 $1, $1, m;
}"""

NIBBLES_FP16 = tl.constexpr(_NIBBLES_FP16 + "}")
NIBBLES_FP16_SYMMETRIC = tl.constexpr(_NIBBLES_FP16 + _SYMMETRIC_HIGH_FP16 + "}")
NIBBLES_BF16 = tl.constexpr(_NIBBLES_BF16 + "}")
NIBBLES_BF16_SYMMETRIC = tl.constexpr(_NIBBLES_BF16 + _SYMMETRIC_BF16 + "}")
WORDS_FP16 = tl.constexpr(_WORDS_FP16 + "}")
WORDS_FP16_SYMMETRIC = tl.constexpr(_WORDS_FP16 + _SYMMETRIC_ODD_FP16 + "}")
WORDS_BF16 = tl.constexpr(_WORDS_BF16 + "}")
WORDS_BF16_SYMMETRIC = tl.constexpr(_WORDS_BF16 + _SYMMETRIC_BF16 + "}")
PAIRS_FP16 = tl.constexpr(_PAIRS_FP16)
PAIRS_BF16 = tl.constexpr(_PAIRS_BF16)
TRIPLES_FP16 = tl.constexpr(_TRIPLES_FP16)
TRIPLES_BF16 = tl.constexpr(_TRIPLES_BF16)
BYTES_FP16 = tl.constexpr(_BYTES_FP16)
FOUR_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r")
EIGHT_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r")


@triton.jit
def unpack_nibbles(codes, DTYPE: tl.constexpr, SYMMETRIC: tl.constexpr, PTX: tl.constexpr):
    """uint8 tile of any shape -> (low nibbles, high nibbles) in DTYPE, plus the bias of `zero_points`."""
    if PTX:
        if DTYPE == tl.float16:
            asm: tl.constexpr = NIBBLES_FP16_SYMMETRIC if SYMMETRIC else NIBBLES_FP16
            low, high = tl.inline_asm_elementwise(
                asm, FOUR_REGISTERS, [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
        else:
            asm16: tl.constexpr = NIBBLES_BF16_SYMMETRIC if SYMMETRIC else NIBBLES_BF16
            low, high = tl.inline_asm_elementwise(
                asm16, FOUR_REGISTERS, [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
    else:
        low = (codes & 15).to(tl.float32).to(DTYPE)
        high = (codes >> 4).to(tl.float32).to(DTYPE)
    return low, high


@triton.jit
def unpack_words(words, DTYPE: tl.constexpr, SYMMETRIC: tl.constexpr, PTX: tl.constexpr):
    """uint16 tile of any shape -> its four nibbles from low to high in DTYPE, plus the bias of `zero_points`."""
    if PTX:
        if DTYPE == tl.float16:
            asm: tl.constexpr = WORDS_FP16_SYMMETRIC if SYMMETRIC else WORDS_FP16
            return tl.inline_asm_elementwise(
                asm, FOUR_REGISTERS, [words], dtype=(tl.float16,) * 4, is_pure=True, pack=2
            )
        else:
            asm16: tl.constexpr = WORDS_BF16_SYMMETRIC if SYMMETRIC else WORDS_BF16
            return tl.inline_asm_elementwise(
                asm16, FOUR_REGISTERS, [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
            )
    else:
        shifted = (words & 15, (words >> 4) & 15, (words >> 8) & 15, words >> 12)
        return [x.to(tl.float32).to(DTYPE) for x in shifted]


@triton.jit
def unpack_pairs(codes, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """uint8 tile of any shape -> its four 2-bit codes from low to high in DTYPE, plus the bias of `zero_points`."""
    if PTX:
        if DTYPE == tl.float16:
            return tl.inline_asm_elementwise(
                PAIRS_FP16, EIGHT_REGISTERS, [codes], dtype=(tl.float16,) * 4, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                PAIRS_BF16, EIGHT_REGISTERS, [codes], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=4
            )
    else:
        shifted = (codes & 3, (codes >> 2) & 3, (codes >> 4) & 3, codes >> 6)
        return [x.to(tl.float32).to(DTYPE) for x in shifted]


@triton.jit
def unpack_triples(lower, upper, in_upper_half, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The four 3-bit codes of every column from their 2-bit codes and their third bits, as `unpack_pairs`.

    lower, upper: uint8 tiles of any shape, the third bits in the order of `formats.TOP_BITS`. in_upper_half: of the
    same shape, whether a column's third bits are in the upper half of its byte of `upper`.
    """
    if PTX:
        chosen = tl.where(in_upper_half, 255, 0).to(tl.uint8)
        constraints: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r"
        if DTYPE == tl.float16:
            return tl.inline_asm_elementwise(
                TRIPLES_FP16, constraints, [lower, upper, chosen], dtype=(tl.float16,) * 4, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                TRIPLES_BF16, constraints, [lower, upper, chosen], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=4
            )
    else:
        upper = tl.where(in_upper_half, upper >> 4, upper)
        first, second = (lower & 3) | ((upper & 1) << 2), ((lower >> 2) & 3) | (upper & 4)
        third, fourth = ((lower >> 4) & 3) | ((upper & 2) << 1), (lower >> 6) | ((upper & 8) >> 1)
        return [x.to(tl.float32).to(DTYPE) for x in (first, second, third, fourth)]


@triton.jit
def unpack_bytes(codes, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """uint8 tile of any shape -> DTYPE, plus the bias of `zero_points`."""
    if PTX and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(BYTES_FP16, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return codes.to(tl.float32).to(DTYPE)
