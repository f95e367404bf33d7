# mypy: disable-error-code="no-untyped-def,attr-defined"
"""A decode step's products, on CUDA: of all maps of one x, shared weights, each slot's low-rank terms, biases, a gate.

They are small: what takes their time is launches, and what one of these writes for the next. Several small maps are one launch: a
program that has rows of x in its hands for the shared product takes their inner products with the slots' own factors on the way.
Of others the shared product is the library's, which cuts a long sum among processors, and the terms of all of them are one launch.
Where a direction has many rows (`engines/kernels.py`), the terms are what the library's product adds to.
"""

# S slots, D inputs, N outputs, R rank, Q directions (slot s has direction which[s]).

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.engines.between import through_gate
from zotune.engines.kernels import INTERPRETED, cdiv, power_of_2


class Map(NamedTuple):
    """y = x·Wᵀ + scale·(x·V)·Uᵀ + bias. w: (N, D), contiguous or a transposed one of these. v: (Q, D, R), u: (Q, N, R), contiguous.

    bias: (N,), or (S, N) of each slot its own.
    """

    w: Tensor
    v: Tensor
    u: Tensor
    bias: Tensor | None = None


@triton.jit
def _plus_dot(total_BB, x_BB, w_BB, EXACT: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        total_BB = tl.dot(x_BB.to(tl.float32), w_BB.to(tl.float32), total_BB, input_precision="ieee")
    elif EXACT:
        total_BB = tl.dot(x_BB, w_BB, total_BB, input_precision="ieee")
    else:
        total_BB = tl.dot(x_BB, w_BB, total_BB)
    return total_BB


@triton.jit
def _products_kernel(
    x, which, scale, S, D, x_s, w_n, w_d,
    y0, w0, v0, u0, bias0, N0, bias0_s, y1, w1, v1, u1, bias1, N1, bias1_s, y2, w2, v2, u2, bias2, N2, bias2_s,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A tile of one of up to three maps of x, whose tiles follow each other: y (S, N) ← `Map`, summed in float32, rounded once."""
    tile = tl.program_id(1)
    y, w, v, u, bias, N, bias_s = y0, w0, v0, u0, bias0, N0, bias0_s
    if tile >= tl.cdiv(N0, BN):
        tile -= tl.cdiv(N0, BN)
        y, w, v, u, bias, N, bias_s = y1, w1, v1, u1, bias1, N1, bias1_s
        if tile >= tl.cdiv(N1, BN):
            tile -= tl.cdiv(N1, BN)
            y, w, v, u, bias, N, bias_s = y2, w2, v2, u2, bias2, N2, bias2_s
    s_B, n_B, d_B = tl.program_id(0) * BS + tl.arange(0, BS), tile * BN + tl.arange(0, BN), tl.arange(0, BD)
    inside = (s_B < S)[:, None] & (n_B < N)[None, :]
    own_B = tl.load(scale + s_B, mask=s_B < S, other=0.0)
    of_B = tl.load(which + s_B, mask=s_B < S, other=0).to(tl.int64)
    row_B = s_B.to(tl.int64)
    x_at = x + (row_B * x_s)[:, None] + d_B[None, :]
    w_at = w + (n_B.to(tl.int64) * w_n)[None, :] + (d_B * w_d)[:, None]
    v_at, u_at = v + (of_B * D * R)[:, None] + (d_B * R)[None, :], u + (of_B * N * R)[:, None] + (n_B * R)[None, :]
    total_BB = tl.zeros((BS, BN), tl.float32)
    terms_BB = tl.zeros((BS, BN), tl.float32)
    if HAS_BIAS:
        terms_BB += tl.load(bias + (row_B * bias_s)[:, None] + n_B[None, :], mask=inside, other=0.0).to(tl.float32)
    for r in tl.static_range(R):
        u_BB = tl.load(u_at + r, mask=inside, other=0.0)  # asked for before it is needed: nobody else reads it
        inner_BB = tl.zeros((BS, BD), tl.float32)
        for first in range(0, D, BD):
            in_x = (s_B < S)[:, None] & (first + d_B < D)[None, :]
            x_BB = tl.load(x_at + first, mask=in_x, other=0.0)
            v_BB = tl.load(v_at + first * R + r, mask=in_x, other=0.0)
            inner_BB += x_BB.to(tl.float32) * v_BB.to(tl.float32)
            if r == 0:
                in_w = (first + d_B < D)[:, None] & (n_B < N)[None, :]
                w_BB = tl.load(w_at + first * w_d, mask=in_w, other=0.0)
                total_BB = _plus_dot(total_BB, x_BB, w_BB, EXACT, WIDE)
        terms_BB += (tl.sum(inner_BB, axis=1) * own_B)[:, None] * u_BB.to(tl.float32)
    y_at = y + (row_B * N)[:, None] + n_B[None, :]
    tl.store(y_at, (total_BB + terms_BB).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_products_kernel(
    y, x, which, scale, S, D, N, x_s, w_n, w_d, wa, va, ua, wb, vb, ub,
    GATE: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y (S, N) ← gate(a)·b of two maps of x, summed in float32, rounded once."""
    s_B, n_B, d_B = tl.program_id(0) * BS + tl.arange(0, BS), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BD)
    inside = (s_B < S)[:, None] & (n_B < N)[None, :]
    own_B = tl.load(scale + s_B, mask=s_B < S, other=0.0)
    of_B = tl.load(which + s_B, mask=s_B < S, other=0).to(tl.int64)
    row_B = s_B.to(tl.int64)
    x_at = x + (row_B * x_s)[:, None] + d_B[None, :]
    w_at = (n_B.to(tl.int64) * w_n)[None, :] + (d_B * w_d)[:, None]
    v_at, u_at = (of_B * D * R)[:, None] + (d_B * R)[None, :], (of_B * N * R)[:, None] + (n_B * R)[None, :]
    a_BB = tl.zeros((BS, BN), tl.float32)
    b_BB = tl.zeros((BS, BN), tl.float32)
    more_a_BB = tl.zeros((BS, BN), tl.float32)
    more_b_BB = tl.zeros((BS, BN), tl.float32)
    for r in tl.static_range(R):
        ua_BB = tl.load(ua + u_at + r, mask=inside, other=0.0)
        ub_BB = tl.load(ub + u_at + r, mask=inside, other=0.0)
        inner_a_BB = tl.zeros((BS, BD), tl.float32)
        inner_b_BB = tl.zeros((BS, BD), tl.float32)
        for first in range(0, D, BD):
            in_x = (s_B < S)[:, None] & (first + d_B < D)[None, :]
            x_BB = tl.load(x_at + first, mask=in_x, other=0.0)
            va_BB = tl.load(va + v_at + first * R + r, mask=in_x, other=0.0)
            vb_BB = tl.load(vb + v_at + first * R + r, mask=in_x, other=0.0)
            inner_a_BB += x_BB.to(tl.float32) * va_BB.to(tl.float32)
            inner_b_BB += x_BB.to(tl.float32) * vb_BB.to(tl.float32)
            if r == 0:
                in_w = (first + d_B < D)[:, None] & (n_B < N)[None, :]
                wa_BB = tl.load(wa + w_at + first * w_d, mask=in_w, other=0.0)
                wb_BB = tl.load(wb + w_at + first * w_d, mask=in_w, other=0.0)
                a_BB = _plus_dot(a_BB, x_BB, wa_BB, EXACT, WIDE)
                b_BB = _plus_dot(b_BB, x_BB, wb_BB, EXACT, WIDE)
        more_a_BB += (tl.sum(inner_a_BB, axis=1) * own_B)[:, None] * ua_BB.to(tl.float32)
        more_b_BB += (tl.sum(inner_b_BB, axis=1) * own_B)[:, None] * ub_BB.to(tl.float32)
    y_BB = through_gate(a_BB + more_a_BB, GATE) * (b_BB + more_b_BB)
    tl.store(y + (row_B * N)[:, None] + n_B[None, :], y_BB.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _terms_kernel(
    x, which, scale, D, x_s,
    y0, v0, u0, bias0, N0, bias0_s, y1, v1, u1, bias1, N1, bias1_s, y2, v2, u2, bias2, N2, bias2_s,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A slot's tile of one of up to three maps of x: y (S, N) += scale·(x·V)·Uᵀ + bias, in float32, rounded once."""
    slot, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    y, v, u, bias, N, bias_s = y0, v0, u0, bias0, N0, bias0_s
    if tile >= tl.cdiv(N0, BN):
        tile -= tl.cdiv(N0, BN)
        y, v, u, bias, N, bias_s = y1, v1, u1, bias1, N1, bias1_s
        if tile >= tl.cdiv(N1, BN):
            tile -= tl.cdiv(N1, BN)
            y, v, u, bias, N, bias_s = y2, v2, u2, bias2, N2, bias2_s
    n_B, d_B = tile * BN + tl.arange(0, BN), tl.arange(0, BD)
    of, own = tl.load(which + slot).to(tl.int64), tl.load(scale + slot)
    total_B = tl.load(y + slot * N + n_B, mask=n_B < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total_B += tl.load(bias + slot * bias_s + n_B, mask=n_B < N, other=0.0).to(tl.float32)
    for r in tl.static_range(R):
        u_B = tl.load(u + (of * N + n_B) * R + r, mask=n_B < N, other=0.0).to(tl.float32)
        inner_B = tl.zeros((BD,), tl.float32)
        for first in range(0, D, BD):
            x_B = tl.load(x + slot * x_s + first + d_B, mask=first + d_B < D, other=0.0).to(tl.float32)
            v_B = tl.load(v + (of * D + first + d_B) * R + r, mask=first + d_B < D, other=0.0).to(tl.float32)
            inner_B += x_B * v_B
        total_B += (tl.sum(inner_B, axis=0) * own) * u_B
    tl.store(y + slot * N + n_B, total_B.to(y.dtype.element_ty), mask=n_B < N)


MOST_RANK = 4  # each further one reads x again
# What the kernels of whole products are faster for, by their times and the library's on an H200 (docs/log.md, 2026-12-01): elements
# of all maps of one x, slots, and slots where two of them meet in a gate.
LARGEST, MOST_SLOTS, MOST_GATED = 1 << 21, 256, 64
PROCESSORS = 132
# Slots and outputs of a program, from many of them to few. Not 64 slots: such products are asynchronous on Hopper, and Triton 3.7
# loads the next rows of an x that something else reads too over those that a product under way still reads.
TILES = (32, 64), (16, 64), (16, 32)


def serves(x_SD: Tensor, *maps: Map) -> bool:
    """Whether the kernels take these maps of x (S, D), whose last dimension is contiguous."""
    small = all(m.u.shape[2] <= MOST_RANK for m in maps)
    added = [x_SD if m.bias is None else m.bias for m in maps]
    alike = all(t.dtype == x_SD.dtype and t.stride(-1) == 1 for t in (x_SD, *added))
    alike = alike and all(m.w.dtype == x_SD.dtype and min(m.w.shape) > 1 for m in maps)
    laid = all(m.w.is_contiguous() or m.w.t().is_contiguous() for m in maps)
    return small and alike and laid and len({m.w.stride() for m in maps}) == 1


def in_one(maps: Sequence[Map], slots: int) -> bool:
    """Whether one launch for all of these maps is faster than the library's products and a launch for their terms."""
    return len(maps) > 1 and slots <= MOST_SLOTS and sum(m.w.numel() for m in maps) <= LARGEST


def _tiles(slots: int, outs: Sequence[int], size: int, maps: int = 1) -> dict[str, int]:
    """Of a program: slots, outputs and inputs at once, and how it runs. size: bytes of an element. maps: of one program."""
    for many, wide in TILES:
        if cdiv(slots, many) * sum(cdiv(out, wide) for out in outs) >= PROCESSORS:
            break
    # few rows wait for memory alone, and ask for much of it at once; many have registers for little
    inputs, stages, warps = (128, 6 - maps, 4) if many == 16 else (128, 3, 8)
    return {"BS": many, "BN": wide, "BD": inputs * 2 // max(2, size), "num_stages": stages, "num_warps": warps}


def _rest(y_SN: Tensor, of: Map) -> tuple[object, ...]:
    """What a kernel is told of a map behind its output and its weight; in the place of a bias that it lacks any tensor stands."""
    bias, each = (y_SN, 0) if of.bias is None else (of.bias, 0 if of.bias.dim() == 1 else of.bias.stride(0))
    return of.v, of.u, bias, len(of.w), each


def _three(told: Sequence[tuple[object, ...]]) -> list[object]:
    """Of three maps in a row; where there are fewer the last stands for those that no tile is of."""
    return [one for i in range(3) for one in told[min(i, len(told) - 1)]]


def products(x_SD: Tensor, maps: Sequence[Map], which_S: Tensor, scale_S: Tensor) -> list[Tensor]:
    """(S, N) of each of one to three maps of x, all with a bias or none: x·Wᵀ + scale·(x·V)·Uᵀ + bias. See `serves`.

    Sums and inner products are float32's; what is given back is rounded once, behind a product of the library's twice.
    """
    (slots, wide), first = x_SD.shape, maps[0]
    if not in_one(maps, slots):
        return _with_terms(x_SD, maps, which_S, scale_S)
    found = [torch.empty(slots, len(m.w), dtype=x_SD.dtype, device=x_SD.device) for m in maps]
    given = _three([(y, m.w, *_rest(y, m)) for y, m in zip(found, maps, strict=True)])
    tiles = _tiles(slots, [len(m.w) for m in maps], x_SD.element_size())
    _products_kernel[(cdiv(slots, tiles["BS"]), sum(cdiv(len(m.w), tiles["BN"]) for m in maps))](
        x_SD, which_S, scale_S, slots, wide, x_SD.stride(0), *first.w.stride(), *given, R=first.u.shape[2],
        HAS_BIAS=first.bias is not None, EXACT=x_SD.dtype == torch.float32, WIDE=INTERPRETED, **tiles,
    )  # fmt: skip
    return found


def _with_terms(x_SD: Tensor, maps: Sequence[Map], which_S: Tensor, scale_S: Tensor) -> list[Tensor]:
    (slots, wide), first = x_SD.shape, maps[0]
    found = [torch.mm(x_SD, m.w.t()) for m in maps]
    given = _three([(y, *_rest(y, m)) for y, m in zip(found, maps, strict=True)])
    across, span = 256 if max(len(m.w) for m in maps) <= 2048 else 1024, min(2048, power_of_2(wide))
    _terms_kernel[(slots, sum(cdiv(len(m.w), across) for m in maps))](
        x_SD, which_S, scale_S, wide, x_SD.stride(0), *given, R=first.u.shape[2], HAS_BIAS=first.bias is not None, BN=across,
        BD=span,
    )  # fmt: skip
    return found


def gated_product(x_SD: Tensor, maps: Sequence[Map], gate: str, which_S: Tensor, scale_S: Tensor) -> Tensor:
    """(S, N): gate(a(x))·b(x) of two maps without a bias. gate: of `gating.GATES`. Computed in float32, rounded once."""
    (slots, wide), (a, b) = x_SD.shape, maps
    out = len(a.w)
    y = torch.empty(slots, out, dtype=x_SD.dtype, device=x_SD.device)
    tiles = _tiles(slots, [out], x_SD.element_size(), maps=2)
    _gated_products_kernel[(cdiv(slots, tiles["BS"]), cdiv(out, tiles["BN"]))](
        y, x_SD, which_S, scale_S, slots, wide, out, x_SD.stride(0), *a.w.stride(), a.w, a.v, a.u, b.w, b.v, b.u, GATE=gate,
        R=a.u.shape[2], EXACT=x_SD.dtype == torch.float32, WIDE=INTERPRETED, **tiles,
    )  # fmt: skip
    return y


@triton.jit
def _rows_kernel(y, ids, w, u, v, which, scale, N, D, R: tl.constexpr, BD: tl.constexpr):
    """y (S, D) ← a row of W (N, D) + scale·U·Vᵀ, rounded once; u: (Q, N, R), v: (Q, D, R)."""
    slot = tl.program_id(0).to(tl.int64)
    d_B = tl.program_id(1) * BD + tl.arange(0, BD)
    row, of, own = tl.load(ids + slot).to(tl.int64), tl.load(which + slot).to(tl.int64), tl.load(scale + slot)
    y_B = tl.load(w + row * D + d_B, mask=d_B < D, other=0.0).to(tl.float32)
    for r in tl.static_range(R):
        share = tl.load(u + (of * N + row) * R + r).to(tl.float32) * own
        y_B += share * tl.load(v + (of * D + d_B) * R + r, mask=d_B < D, other=0.0).to(tl.float32)
    tl.store(y + slot * D + d_B, y_B.to(y.dtype.element_ty), mask=d_B < D)


def rows(ids_S: Tensor, w_ND: Tensor, u_QNR: Tensor, v_QDR: Tensor, which_S: Tensor, scale_S: Tensor) -> Tensor:
    """(S, D): of each slot's table W + scale·U·Vᵀ the row of its id, in float32, rounded once. All are contiguous."""
    (slots,), (out, wide) = ids_S.shape, w_ND.shape
    y = torch.empty(slots, wide, dtype=w_ND.dtype, device=w_ND.device)
    span = min(1024, power_of_2(wide))
    _rows_kernel[(slots, cdiv(wide, span))](
        y, ids_S, w_ND, u_QNR, v_QDR, which_S, scale_S, out, wide, R=u_QNR.shape[2], BD=span
    )
    return y
