# mypy: disable-error-code="no-untyped-def,attr-defined"
"""What parts with weights of their own need beside a shared product, on CUDA, in one pass each: low-rank terms, scales and shifts,
and the fold of low-rank updates into the weights."""

# P parts, M rows a part, D inputs, N outputs, R rank, G directions (part p has direction p % G).

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _inner_kernel(t, x, a, scale, M, D, G, stride_p, stride_m, R: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """t (P, M, R) float32 ← scale·x·A."""
    part = tl.program_id(0)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    in_M = m_B < M
    x_at = x + part.to(tl.int64) * stride_p + m_B.to(tl.int64)[:, None] * stride_m
    a_at = a + (part % G).to(tl.int64) * D * R
    own = tl.load(scale + part)
    for r in tl.static_range(R):
        total_B = tl.zeros((BM,), dtype=tl.float32)
        for first in range(0, D, BD):
            d_B = first + tl.arange(0, BD)
            x_BB = tl.load(x_at + d_B[None, :], mask=in_M[:, None] & (d_B < D)[None, :], other=0.0).to(tl.float32)
            a_B = tl.load(a_at + d_B * R + r, mask=d_B < D, other=0.0).to(tl.float32)
            total_B += tl.sum(x_BB * a_B[None, :], axis=1)
        tl.store(t + (part * M + m_B) * R + r, total_B * own, mask=in_M)


@triton.jit
def _outer_kernel(
    y, t, b, bias, M, N, G, stride_p, stride_m, bias_p,
    HAS_BIAS: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y (P, M, N) += t·Bᵀ + bias, rounded once."""
    part = tl.program_id(0)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    n_B = tl.program_id(2) * BN + tl.arange(0, BN)
    inside = (m_B < M)[:, None] & (n_B < N)[None, :]
    at = y + part.to(tl.int64) * stride_p + m_B.to(tl.int64)[:, None] * stride_m + n_B[None, :]
    y_BB = tl.load(at, mask=inside, other=0.0)
    total_BB = y_BB.to(tl.float32)
    for r in tl.static_range(R):
        t_B = tl.load(t + (part * M + m_B) * R + r, mask=m_B < M, other=0.0)
        b_B = tl.load(b + ((part % G).to(tl.int64) * N + n_B) * R + r, mask=n_B < N, other=0.0).to(tl.float32)
        total_BB += t_B[:, None] * b_B[None, :]
    if HAS_BIAS:
        total_BB += tl.load(bias + part.to(tl.int64) * bias_p + n_B, mask=n_B < N, other=0.0).to(tl.float32)[None, :]
    tl.store(at, total_BB.to(y_BB.dtype), mask=inside)


@triton.jit
def _affine_kernel(
    y, scale, shift, M, N, stride_p, stride_m, scale_p, shift_p,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y (P, M, N) ← y·scale + shift, of each part its own."""
    part = tl.program_id(0).to(tl.int64)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    n_B = tl.program_id(2) * BN + tl.arange(0, BN)
    inside = (m_B < M)[:, None] & (n_B < N)[None, :]
    at = y + part * stride_p + m_B.to(tl.int64)[:, None] * stride_m + n_B[None, :]
    y_BB = tl.load(at, mask=inside, other=0.0)
    total_BB = y_BB.to(tl.float32)
    if HAS_SCALE:
        total_BB *= tl.load(scale + part * scale_p + n_B, mask=n_B < N, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        total_BB += tl.load(shift + part * shift_p + n_B, mask=n_B < N, other=0.0).to(tl.float32)[None, :]
    tl.store(at, total_BB.to(y_BB.dtype), mask=inside)


def _rows_at_once(parts: int, rows: int) -> int:
    return 16 if parts * rows < 4096 else 32


def affine(y_PMN: Tensor, scale_PN: Tensor | None, shift_PN: Tensor | None) -> None:
    """y ← y·scale + shift in place, computed in float32 and rounded once. A vector (N,) serves all parts."""
    parts, rows, wide = y_PMN.shape
    many = _rows_at_once(parts, rows)
    strides = [0 if v is None or v.dim() == 1 else v.stride(0) for v in (scale_PN, shift_PN)]
    _affine_kernel[(parts, triton.cdiv(rows, many), triton.cdiv(wide, 256))](
        y_PMN, scale_PN, shift_PN, rows, wide, y_PMN.stride(0), y_PMN.stride(1), *strides,
        HAS_SCALE=scale_PN is not None, HAS_SHIFT=shift_PN is not None, BM=many, BN=256,
    )  # fmt: skip


def add_low_rank(
    y_PMN: Tensor, x_PMD: Tensor, a_GDR: Tensor, b_GNR: Tensor, scale_P: Tensor, bias_PN: Tensor | None = None
) -> None:
    """y += scale·(x·A)·Bᵀ + bias in place; the last dimension of x and y is contiguous, A and B are contiguous."""
    parts, rows, wide = x_PMD.shape
    out, rank, groups = y_PMN.shape[2], a_GDR.shape[2], len(a_GDR)
    t = torch.empty(parts, rows, rank, dtype=torch.float32, device=x_PMD.device)
    few = 4 if parts * rows < 4096 else 16
    _inner_kernel[(parts, triton.cdiv(rows, few))](
        t, x_PMD, a_GDR, scale_P, rows, wide, groups, x_PMD.stride(0), x_PMD.stride(1), R=rank, BM=few, BD=512
    )
    many = _rows_at_once(parts, rows)
    _outer_kernel[(parts, triton.cdiv(rows, many), triton.cdiv(out, 256))](
        y_PMN, t, b_GNR, bias_PN, rows, out, groups, y_PMN.stride(0), y_PMN.stride(1),
        0 if bias_PN is None or bias_PN.dim() == 1 else bias_PN.stride(0),
        HAS_BIAS=bias_PN is not None, R=rank, BM=many, BN=256,
    )  # fmt: skip


@triton.jit
def _folded(
    w_BB, n_B, d_B, u, v, scales, N, D, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of W + Σ_g scales[g]·U_g·V_gᵀ, rounded once."""
    k_K = tl.arange(0, K)
    group_K, rank_K = k_K // R, k_K % R
    there = k_K < G * R
    scale_K = tl.load(scales + group_K, mask=there, other=0.0)
    u_at = u + (group_K[None, :].to(tl.int64) * N + n_B[:, None]) * R + rank_K[None, :]
    u_BK = tl.load(u_at, mask=(n_B < N)[:, None] & there[None, :], other=0.0).to(tl.float32) * scale_K[None, :]
    v_at = v + (group_K[:, None].to(tl.int64) * D + d_B[None, :]) * R + rank_K[:, None]
    v_KB = tl.load(v_at, mask=there[:, None] & (d_B < D)[None, :], other=0.0).to(tl.float32)
    total_BB = tl.dot(u_BK, v_KB, input_precision=PRECISION)
    nonzero = tl.sum((scale_K != 0).to(tl.int32), axis=0)
    return tl.where(nonzero != 0, (w_BB.to(tl.float32) + total_BB).to(w_BB.dtype), w_BB)


@triton.jit(do_not_specialize=["S"])
def _fold_kernel(
    w, u, v, scales, S, N, D, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """W (N, D) takes S folds one after the other, each rounded."""
    n_B = tl.program_id(0) * BN + tl.arange(0, BN)
    d_B = tl.program_id(1) * BD + tl.arange(0, BD)
    at = w + n_B.to(tl.int64)[:, None] * D + d_B[None, :]
    inside = (n_B < N)[:, None] & (d_B < D)[None, :]
    w_BB = tl.load(at, mask=inside, other=0.0)
    for _ in range(S):
        w_BB = _folded(w_BB, n_B, d_B, u, v, scales, N, D, G, R, K, PRECISION)
        u += G * R * N
        v += G * R * D
        scales += G
    tl.store(at, w_BB, mask=inside)


def fold(matrix_ND: Tensor, u_GNR: Tensor, v_GDR: Tensor, scales_G: Tensor) -> None:
    """W += Σ_g scales_g·U_g·V_gᵀ in place, one pass over W."""
    folds(matrix_ND, u_GNR, v_GDR, scales_G[None])


def folds(matrix_ND: Tensor, u_SNR: Tensor, v_SDR: Tensor, scales_SG: Tensor) -> None:
    """S folds one after the other in one pass over W, to the bit as one by one. u, v: (S·G, …), fold by fold."""
    (out, wide), (steps, groups), rank = matrix_ND.shape, scales_SG.shape, u_SNR.shape[2]
    # tf32 keeps 11 bits of each factor, more than 16-bit weights keep of the sum
    precision = "ieee" if matrix_ND.dtype == torch.float32 else "tf32"
    _fold_kernel[(triton.cdiv(out, 64), triton.cdiv(wide, 128))](
        matrix_ND, u_SNR, v_SDR, scales_SG, steps, out, wide, G=groups, R=rank,
        K=max(16, triton.next_power_of_2(groups * rank)), PRECISION=precision, BN=64, BD=128,
    )  # fmt: skip
