# mypy: disable-error-code="no-untyped-def,attr-defined"
"""What parts with weights of their own need beside a shared product, on CUDA, in one pass each: low-rank terms, adapters, scales
and shifts."""

# P parts, M rows a part, D inputs, N outputs, R rank, Q directions (part p has direction which[p]). Beside an adapter, whose own
# rank is R, F is the directions'.

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.engines.parts import Values

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # there a product of bfloat16 is one of their bits


# Triton's own take microseconds a call, of which a forward without a graph makes hundreds.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next one, n itself if it is."""
    return 1 << (n - 1).bit_length()


@triton.jit
def _inner_kernel(
    t, x, a0, a1, a2, which, scale, P, M, D, stride_p, stride_m,
    S: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """t (S, P, M, R) float32 ← scale·x·A_s: x is read once for the S ≤ 3 weights that take it."""
    part = tl.program_id(0)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    in_M = m_B < M
    x_at = x + part.to(tl.int64) * stride_p + m_B.to(tl.int64)[:, None] * stride_m
    of_part = tl.load(which + part).to(tl.int64) * D * R
    own = tl.load(scale + part)
    for r in tl.static_range(R):
        total0_BB = tl.zeros(
            (BM, BD), dtype=tl.float32
        )  # summed over D at the end: a sum in each turn waits for all warps
        total1_BB = total0_BB
        total2_BB = total0_BB
        for first in range(0, D, BD):
            d_B = first + tl.arange(0, BD)
            x_BB = tl.load(x_at + d_B[None, :], mask=in_M[:, None] & (d_B < D)[None, :], other=0.0).to(tl.float32)
            at_B = of_part + d_B * R + r
            a_B = tl.load(a0 + at_B, mask=d_B < D, other=0.0).to(tl.float32)
            total0_BB += x_BB * a_B[None, :]
            if S > 1:
                a_B = tl.load(a1 + at_B, mask=d_B < D, other=0.0).to(tl.float32)
                total1_BB += x_BB * a_B[None, :]
            if S > 2:
                a_B = tl.load(a2 + at_B, mask=d_B < D, other=0.0).to(tl.float32)
                total2_BB += x_BB * a_B[None, :]
        t_at = t + (part * M + m_B) * R + r
        tl.store(t_at, tl.sum(total0_BB, axis=1) * own, mask=in_M)
        if S > 1:
            tl.store(t_at + P * M * R, tl.sum(total1_BB, axis=1) * own, mask=in_M)
        if S > 2:
            tl.store(t_at + 2 * P * M * R, tl.sum(total2_BB, axis=1) * own, mask=in_M)


@triton.jit
def _outer_kernel(
    y, t, b, which, bias, M, N, bias_p,
    HAS_BIAS: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y (P, M, N) ← t·Bᵀ + bias, rounded once."""
    part = tl.program_id(0)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    n_B = tl.program_id(2) * BN + tl.arange(0, BN)
    inside = (m_B < M)[:, None] & (n_B < N)[None, :]
    own = tl.load(which + part).to(tl.int64)
    total_BB = tl.zeros((BM, BN), dtype=tl.float32)
    for r in tl.static_range(R):
        t_B = tl.load(t + (part * M + m_B) * R + r, mask=m_B < M, other=0.0)
        b_B = tl.load(b + (own * N + n_B) * R + r, mask=n_B < N, other=0.0).to(tl.float32)
        total_BB += t_B[:, None] * b_B[None, :]
    if HAS_BIAS:
        total_BB += tl.load(bias + part.to(tl.int64) * bias_p + n_B, mask=n_B < N, other=0.0).to(tl.float32)[None, :]
    at = y + (part.to(tl.int64) * M + m_B.to(tl.int64)[:, None]) * N + n_B[None, :]
    tl.store(at, total_BB.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_kernel(
    y, x, scale, shift, M, N, eps, scale_p, shift_p, HAS_SHIFT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y (P, M, N) ← (x − mean)/√(var + eps)·scale + shift over the last dimension, of each part its own; BN ≥ N."""
    part = tl.program_id(0).to(tl.int64)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    n_B = tl.arange(0, BN)
    inside = (m_B < M)[:, None] & (n_B < N)[None, :]
    at = (part * M + m_B.to(tl.int64)[:, None]) * N + n_B[None, :]
    x_BB = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    off_BB = tl.where(inside, x_BB - (tl.sum(x_BB, axis=1) / N)[:, None], 0.0)
    y_BB = off_BB * tl.rsqrt(tl.sum(off_BB * off_BB, axis=1) / N + eps)[:, None]
    y_BB *= tl.load(scale + part * scale_p + n_B, mask=n_B < N, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        y_BB += tl.load(shift + part * shift_p + n_B, mask=n_B < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, y_BB.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _shift_kernel(y, shift, M, N, stride_p, stride_m, shift_p, BM: tl.constexpr, BN: tl.constexpr):
    """y (P, M, N) += shift, of each part its own."""
    part = tl.program_id(0).to(tl.int64)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    n_B = tl.program_id(2) * BN + tl.arange(0, BN)
    inside = (m_B < M)[:, None] & (n_B < N)[None, :]
    at = y + part * stride_p + m_B.to(tl.int64)[:, None] * stride_m + n_B[None, :]
    y_BB = tl.load(at, mask=inside, other=0.0)
    shift_B = tl.load(shift + part * shift_p + n_B, mask=n_B < N, other=0.0).to(tl.float32)
    tl.store(at, (y_BB.to(tl.float32) + shift_B[None, :]).to(y_BB.dtype), mask=inside)


def _rows_at_once(parts: int, rows: int) -> int:
    return 16 if parts * rows < 4096 else 32


def add_shift(y_PMN: Tensor, shift_PN: Tensor) -> None:
    """y += shift in place, computed in float32 and rounded once. A vector (N,) serves all parts."""
    parts, rows, wide = y_PMN.shape
    many = _rows_at_once(parts, rows)
    _shift_kernel[(parts, cdiv(rows, many), cdiv(wide, 256))](
        y_PMN, shift_PN, rows, wide, y_PMN.stride(0), y_PMN.stride(1), 0 if shift_PN.dim() == 1 else shift_PN.stride(0),
        BM=many, BN=256,
    )  # fmt: skip


@triton.jit(do_not_specialize=["eps", "offset"])
def _rms_norm_kernel(y, x, scale, M, N, eps, offset, scale_p, BM: tl.constexpr, BN: tl.constexpr):
    """y (P, M, N) ← x/√(mean(x²) + eps)·(scale + offset) over the last dimension, of each part its own; BN ≥ N."""
    part = tl.program_id(0).to(tl.int64)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    n_B = tl.arange(0, BN)
    inside = (m_B < M)[:, None] & (n_B < N)[None, :]
    at = (part * M + m_B.to(tl.int64)[:, None]) * N + n_B[None, :]
    x_BB = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    own_B = tl.load(scale + part * scale_p + n_B, mask=n_B < N, other=0.0).to(tl.float32) + offset
    y_BB = x_BB * tl.rsqrt(tl.sum(x_BB * x_BB, axis=1) / N + eps)[:, None] * own_B[None, :]
    tl.store(y + at, y_BB.to(y.dtype.element_ty), mask=inside)


LONGEST_NORM = 16384  # elements of a row that one program holds


def layer_norm(x_PMN: Tensor, scale_PN: Tensor, shift_PN: Tensor | None, eps: float) -> Tensor:
    """Layer norm with each part's own scale and shift, computed in float32 and rounded once. x is contiguous, N ≤ LONGEST_NORM."""
    parts, rows, wide = x_PMN.shape
    y, padded = torch.empty_like(x_PMN), power_of_2(wide)
    many = max(1, 2048 // padded)
    _layer_norm_kernel[(parts, cdiv(rows, many))](
        y, x_PMN, scale_PN, shift_PN, rows, wide, eps, scale_PN.stride(0), 0 if shift_PN is None else shift_PN.stride(0),
        HAS_SHIFT=shift_PN is not None, BM=many, BN=padded, num_warps=4 if padded <= 4096 else 8,
    )  # fmt: skip
    return y


def rms_norm(x_PMN: Tensor, scale_PN: Tensor, eps: float, offset: float) -> Tensor:
    """RMS norm with each part's own scale, computed in float32 and rounded once. x is contiguous, N ≤ LONGEST_NORM."""
    parts, rows, wide = x_PMN.shape
    y, padded = torch.empty_like(x_PMN), power_of_2(wide)
    many = max(1, 2048 // padded)
    _rms_norm_kernel[(parts, cdiv(rows, many))](
        y, x_PMN, scale_PN, rows, wide, float(eps), float(offset), scale_PN.stride(0),
        BM=many, BN=padded, num_warps=4 if padded <= 4096 else 8,
    )  # fmt: skip
    return y


# A program of `_inner_kernel`: rows of x at once, how much of them, and warps; where there are few rows in all, and many.
FEW_ROWS, INNER_FEW, INNER_MANY = 4096, (2, 1024, 4), (8, 256, 4)
MOST_READERS = 3  # weights that take one x: attention's q, k and v


def low_rank_inner(x_PMD: Tensor, in_SQDR: Sequence[Tensor], which_P: Tensor, scale_P: Tensor) -> Tensor:
    """(S, P, M, R) float32: scale·x·A for each of up to MOST_READERS A (Q, D, R); x's last dimension and A are contiguous."""
    parts, rows, wide = x_PMD.shape
    rank, count = in_SQDR[0].shape[2], len(in_SQDR)
    t = torch.empty(count, parts, rows, rank, dtype=torch.float32, device=x_PMD.device)
    at_once, span, warps = INNER_FEW if parts * rows < FEW_ROWS else INNER_MANY
    _inner_kernel[(parts, cdiv(rows, at_once))](
        t, x_PMD, in_SQDR[0], in_SQDR[min(1, count - 1)], in_SQDR[min(2, count - 1)], which_P, scale_P, parts, rows, wide,
        x_PMD.stride(0), x_PMD.stride(1), S=count, R=rank, BM=at_once, BD=span, num_warps=warps,
    )  # fmt: skip
    return t


def low_rank_outer(
    t_PMR: Tensor, out_QNR: Tensor, which_P: Tensor, bias_PN: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(P, M, N): t·Bᵀ + bias, what a product with the shared weight is added to. A bias (N,) serves all parts."""
    (parts, rows, rank), out = t_PMR.shape, out_QNR.shape[1]
    y = torch.empty(parts, rows, out, dtype=dtype, device=t_PMR.device)
    many, span = (_rows_at_once(parts, rows), 256) if rows > 1 else (1, 1024)
    _outer_kernel[(parts, cdiv(rows, many), cdiv(out, span))](
        y, t_PMR, out_QNR, which_P, bias_PN, rows, out, 0 if bias_PN is None or bias_PN.dim() == 1 else bias_PN.stride(0),
        HAS_BIAS=bias_PN is not None, R=rank, BM=many, BN=span,
    )  # fmt: skip
    return y


@triton.jit
def _values(n_B, d_B, w, u, v, own, N, D, F: tl.constexpr):
    """A tile of W + own·U·Vᵀ, float32: W (N, D), U (N, F), V (D, F); F 0: W alone."""
    in_N, in_D = n_B < N, d_B < D
    at = w + n_B.to(tl.int64)[:, None] * D + d_B[None, :]
    w_BB = tl.load(at, mask=in_N[:, None] & in_D[None, :], other=0.0).to(tl.float32)
    for f in tl.static_range(F):
        u_B = tl.load(u + n_B * F + f, mask=in_N, other=0.0).to(tl.float32) * own
        w_BB += u_B[:, None] * tl.load(v + d_B * F + f, mask=in_D, other=0.0).to(tl.float32)[None, :]
    return w_BB


@triton.jit
def _adapter_inner_kernel(
    t, x, a, u, v, which, scale, P, M, D, EACH, stride_p, stride_m, a_p, R: tl.constexpr, F: tl.constexpr,
    EXACT: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """t (S, P, M, R) float32 ← x·A_pᵀ over each of S slices of D, EACH long; A_p = A + scale_p·U·Vᵀ. x is read once."""
    part, cut = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    r_B = tl.arange(0, BR)
    in_M = m_B < M
    x_at = x + part * stride_p + m_B.to(tl.int64)[:, None] * stride_m
    a += part * a_p
    own = 0.0
    if F > 0:
        own = tl.load(scale + part)
        direction = tl.load(which + part).to(tl.int64)
        u += direction * R * F
        v += direction * D * F
    total_BB = tl.zeros((BM, BR), dtype=tl.float32)
    for first in range(0, EACH, BD):
        d_B = tl.program_id(2) * EACH + first + tl.arange(0, BD)
        x_BB = tl.load(x_at + d_B[None, :], mask=in_M[:, None] & (d_B < D)[None, :], other=0.0)
        a_BB = tl.trans(_values(r_B, d_B, a, u, v, own, R, D, F))
        if EXACT:
            total_BB += tl.dot(x_BB, a_BB, input_precision="ieee")
        else:  # x is narrow itself, A the sum of two such: 16 bits of it in bfloat16
            high_BB = a_BB.to(x_BB.dtype)
            low_BB = (a_BB - high_BB.to(tl.float32)).to(x_BB.dtype)
            if WIDE:
                x_BB, high_BB, low_BB = x_BB.to(tl.float32), high_BB.to(tl.float32), low_BB.to(tl.float32)
            total_BB = tl.dot(x_BB, high_BB, total_BB)
            if SPLIT:
                total_BB = tl.dot(x_BB, low_BB, total_BB)
    t_at = t + ((cut * P + part) * M + m_B.to(tl.int64)[:, None]) * R + r_B[None, :]
    tl.store(t_at, total_BB, mask=in_M[:, None] & (r_B < R)[None, :])


@triton.jit(do_not_specialize=["scaling"])
def _adapter_outer_kernel(
    y, t, b, u, v, which, scale, scaling, P, M, N, b_p, R: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y (P, M, N) += scaling·t·B_pᵀ, rounded once; t is the sum of its S slices, B_p = B + scale_p·U·Vᵀ."""
    part = tl.program_id(0).to(tl.int64)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    n_B = tl.program_id(2) * BN + tl.arange(0, BN)
    r_B = tl.arange(0, BR)
    at = y + (part * M + m_B.to(tl.int64)[:, None]) * N + n_B[None, :]
    inside = (m_B < M)[:, None] & (n_B < N)[None, :]
    y_BB = tl.load(at, mask=inside, other=0.0)
    t_BB = tl.zeros((BM, BR), dtype=tl.float32)
    for cut in tl.static_range(S):
        t_at = t + ((cut * P + part) * M + m_B.to(tl.int64)[:, None]) * R + r_B[None, :]
        t_BB += tl.load(t_at, mask=(m_B < M)[:, None] & (r_B < R)[None, :], other=0.0)
    b += part * b_p
    own = 0.0
    if F > 0:
        own = tl.load(scale + part)
        direction = tl.load(which + part).to(tl.int64)
        u += direction * N * F
        v += direction * R * F
    b_BB = tl.trans(_values(n_B, r_B, b, u, v, own, N, R, F))
    # three products of 11 bits each: float32 but for its last bits
    total_BB = y_BB.to(tl.float32) + tl.dot(t_BB, b_BB, input_precision="tf32x3") * scaling
    tl.store(at, total_BB.to(y_BB.dtype), mask=inside)


WIDEST_ADAPTER = 64  # rank of an adapter that is served
MOST_FACTORS = 16  # rank of directions beside it
ADAPTER_WIDE = 128  # of x at once
FILLED = 256  # programs that fill a GPU of 132 processors; where rows alone make fewer, D is cut into slices
MOST_SLICES = 4


def adapter_inner(x_PMD: Tensor, a: Values) -> Tensor:
    """(S, P, M, R) float32, whose sum over S is x·A_pᵀ. x's last dimension, and A's but for the parts, are contiguous."""
    (parts, rows, wide), rank = x_PMD.shape, a.w.shape[1]
    many, tall = _rows_at_once(parts, rows), max(16, power_of_2(rank))
    programs, steps = parts * cdiv(rows, many), cdiv(wide, ADAPTER_WIDE)
    slices = min(MOST_SLICES, steps, max(1, FILLED // programs))
    each = cdiv(steps, slices) * ADAPTER_WIDE
    t = torch.empty(slices, parts, rows, rank, dtype=torch.float32, device=x_PMD.device)
    _adapter_inner_kernel[(parts, cdiv(rows, many), slices)](
        t, x_PMD, a.w, a.u, a.v, a.which, a.scale, parts, rows, wide, each, x_PMD.stride(0), x_PMD.stride(1),
        a.w.stride(0), R=rank, F=_rank(a), EXACT=x_PMD.dtype == torch.float32,
        SPLIT=a.w.dtype != x_PMD.dtype or a.u is not None, WIDE=INTERPRETED, BM=many, BR=tall, BD=ADAPTER_WIDE, num_warps=4,
    )  # fmt: skip
    return t


def adapter_outer(y_PMN: Tensor, t_SPMR: Tensor, b: Values, scaling: float) -> None:
    """y += scaling·Σ_s t_s·B_pᵀ in place, computed in float32 and rounded once. y is contiguous, and B but for the parts."""
    (slices, parts, rows, rank), out = t_SPMR.shape, y_PMN.shape[2]
    many = _rows_at_once(parts, rows)
    _adapter_outer_kernel[(parts, cdiv(rows, many), cdiv(out, 128))](
        y_PMN, t_SPMR, b.w, b.u, b.v, b.which, b.scale, float(scaling), parts, rows, out, b.w.stride(0),
        R=rank, F=_rank(b), S=slices, BM=many, BN=128, BR=max(16, power_of_2(rank)), num_warps=4,
    )  # fmt: skip


def _rank(values: Values) -> int:
    return 0 if values.u is None else values.u.shape[2]
