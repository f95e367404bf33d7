# mypy: disable-error-code="no-untyped-def,attr-defined"
"""z of a tile, by Triton: what a program draws of its elements. `cuda` writes it into tensors, `zotune.updates.fused` into a rule.

The arithmetic is that of `zotune.noise.cpu`, names included.
"""

# Q pairs. A tile is (T, E): T groups of E neighbours that share their words.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

NORMAL_GROUP = 4  # elements: one block's two Box–Muller pairs
SIGN_GROUP = 16  # elements: two 16-byte accesses of 16-bit weights; each of 8 groups draws the words of 128 signs

TL_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

_P0 = tl.constexpr(0.06971611827611923)
_P1 = tl.constexpr(-0.11479733884334564)
_P2 = tl.constexpr(0.11685419827699661)
_P3 = tl.constexpr(-0.12425687164068222)
_P4 = tl.constexpr(0.14249058067798615)
_P5 = tl.constexpr(-0.1666780263185501)
_P6 = tl.constexpr(0.20000715553760529)
_P7 = tl.constexpr(-0.2499999701976776)
_P8 = tl.constexpr(0.3333333134651184)
_S0 = tl.constexpr(-75.401611328125)
_S1 = tl.constexpr(81.59254455566406)
_S2 = tl.constexpr(-41.3416633605957)
_S3 = tl.constexpr(6.2831854820251465)
_C0 = tl.constexpr(59.22016906738281)
_C1 = tl.constexpr(-85.4428482055664)
_C2 = tl.constexpr(64.93931579589844)
_C3 = tl.constexpr(-19.739208221435547)
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_SQRT_HALF = tl.constexpr(0x3F3504F3)
_24 = tl.constexpr(2.0**-24)


@triton.jit
def _words(seed, pid, block):
    """Four uint32 words of each int64 block."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = ((block >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + pid.to(tl.uint32, bitcast=True), zero, 10)


@triton.jit
def _pair(radius_word, turn_word):
    """A Box–Muller pair of two words."""
    u = ((radius_word >> 8).to(tl.int32) + 1).to(tl.float32) * _24
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - _SQRT_HALF) >> 23
    x = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = _P0 * x + _P1
    p = p * x + _P2
    p = p * x + _P3
    p = p * x + _P4
    p = p * x + _P5
    p = p * x + _P6
    p = p * x + _P7
    p = p * x + _P8
    square = x * x
    exponent = e.to(tl.float32)
    low = (p * square * x + exponent * _LN2_LOW) - 0.5 * square
    r = tl.sqrt_rn(-2.0 * ((x + low) + exponent * _LN2_HIGH))
    turn = (turn_word >> 8).to(tl.int32)
    quarter = (turn + (1 << 21)) >> 22
    t = (turn - (quarter << 22)).to(tl.float32) * _24
    square = t * t
    sine = (((_S0 * square + _S1) * square + _S2) * square + _S3) * t
    cosine = (((_C0 * square + _C1) * square + _C2) * square + _C3) * square + 1.0
    odd = (quarter & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where(((quarter + 1) & 2) != 0, -x, x)
    y = tl.where((quarter & 2) != 0, -y, y)
    return r * x, r * y


@triton.jit
def draw(seed, pid, group_T, GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr):
    """(T, E) float32: elements E·group, … of z."""
    if GAUSSIAN:
        x0, x1, x2, x3 = _words(seed, pid, group_T)
        z0, z1 = _pair(x0, x1)
        z2, z3 = _pair(x2, x3)
        return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (T, E))
    else:
        element_T = group_T * E
        x0, x1, x2, x3 = _words(seed, pid, element_T // 128)
        k = (element_T % 128) // 32
        word_T = tl.where(k == 0, x0, tl.where(k == 1, x1, tl.where(k == 2, x2, x3)))
        bit_TE = (element_T % 32).to(tl.uint32)[:, None] + tl.arange(0, E)[None, :].to(tl.uint32)
        return 1.0 - 2.0 * ((word_T[:, None] >> bit_TE) & 1).to(tl.float32)


@triton.jit
def scaled(coef, seed, pid, group_T, GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr):
    """(T, E): coef·z in coef's dtype; of signs in float32 by the sign bit of coef alone."""
    wide: tl.constexpr = coef.dtype
    if GAUSSIAN or wide == tl.float64:
        scaled_TE = coef * draw(seed, pid, group_T, GAUSSIAN, E, T).to(wide)
    else:
        element_T = group_T * E
        x0, x1, x2, x3 = _words(seed, pid, element_T // 128)
        k = (element_T % 128) // 32
        word_T = tl.where(k == 0, x0, tl.where(k == 1, x1, tl.where(k == 2, x2, x3)))
        left_TE = 31 - (element_T % 32).to(tl.int32)[:, None] - tl.arange(0, E)[None, :]  # brings the bit to the front
        sign_TE = (word_T[:, None] << left_TE.to(tl.uint32)) & 0x80000000
        scaled_TE = (coef.to(tl.uint32, bitcast=True) ^ sign_TE).to(tl.float32, bitcast=True)
    return scaled_TE


@triton.jit
def displaced(
    w_TE, group_T, seeds, coefs, Q: tl.constexpr, pid, GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr
):
    """w + Σ_q coefs[q]·z(seeds[q]), rounded once; w itself where every coefficient is zero."""
    wide: tl.constexpr = tl.float64 if w_TE.dtype == tl.float64 else tl.float32
    total_TE = tl.zeros((T, E), dtype=wide)
    nonzero = 0
    for q in range(Q):
        coef = tl.load(coefs + q).to(wide)
        total_TE += scaled(coef, tl.load(seeds + q), pid, group_T, GAUSSIAN, E, T)
        nonzero += (coef != 0).to(tl.int32)
    return tl.where(nonzero != 0, (w_TE.to(wide) + total_TE).to(w_TE.dtype), w_TE)


def tile_of(direction: str, size: int) -> dict[str, Any]:
    """What the kernels take of a tile of so many elements."""
    gaussian = direction == "gaussian"
    group = NORMAL_GROUP if gaussian else SIGN_GROUP
    return {"GAUSSIAN": gaussian, "E": group, "T": size // group}


def signed(pid: int) -> int:
    """The same 32 bits as Triton takes them."""
    return pid - (1 << 32) if pid >> 31 else pid
