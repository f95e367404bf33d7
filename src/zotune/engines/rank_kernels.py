# mypy: disable-error-code="no-untyped-def,attr-defined"
"""y += scale·(x·A)·Bᵀ with factors of their own for each part, on CUDA, in two launches and without intermediate copies."""

# P parts, M rows a part, D inputs, O outputs, R rank, G directions (part p has direction p % G).

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
    y, t, b, M, N, G, stride_p, stride_m, R: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr
):  # fmt: skip
    """y (P, M, O) += t·Bᵀ."""
    part = tl.program_id(0)
    m_B = tl.program_id(1) * BM + tl.arange(0, BM)
    o_B = tl.program_id(2) * BO + tl.arange(0, BO)
    inside = (m_B < M)[:, None] & (o_B < N)[None, :]
    at = y + part.to(tl.int64) * stride_p + m_B.to(tl.int64)[:, None] * stride_m + o_B[None, :]
    y_BB = tl.load(at, mask=inside, other=0.0)
    total_BB = y_BB.to(tl.float32)
    for r in tl.static_range(R):
        t_B = tl.load(t + (part * M + m_B) * R + r, mask=m_B < M, other=0.0)
        b_B = tl.load(b + ((part % G).to(tl.int64) * N + o_B) * R + r, mask=o_B < N, other=0.0).to(tl.float32)
        total_BB += t_B[:, None] * b_B[None, :]
    tl.store(at, total_BB.to(y_BB.dtype), mask=inside)


def add_low_rank(y_PMO: Tensor, x_PMD: Tensor, a_GDR: Tensor, b_GOR: Tensor, scale_P: Tensor) -> None:
    """y += scale·(x·A)·Bᵀ in place; the last dimension of x and y is contiguous, A and B are contiguous."""
    parts, rows, wide = x_PMD.shape
    out, rank, groups = y_PMO.shape[2], a_GDR.shape[2], len(a_GDR)
    t = torch.empty(parts, rows, rank, dtype=torch.float32, device=x_PMD.device)
    few = 4 if parts * rows < 4096 else 16
    _inner_kernel[(parts, triton.cdiv(rows, few))](
        t, x_PMD, a_GDR, scale_P, rows, wide, groups, x_PMD.stride(0), x_PMD.stride(1), R=rank, BM=few, BD=512
    )
    many = 16 if parts * rows < 4096 else 32
    _outer_kernel[(parts, triton.cdiv(rows, many), triton.cdiv(out, 256))](
        y_PMO, t, b_GOR, rows, out, groups, y_PMO.stride(0), y_PMO.stride(1), R=rank, BM=many, BO=256
    )


@triton.jit
def _fold_kernel(
    w, u, v, scales, N, D, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """W (N, D) += Σ_g scales[g]·U_g·V_gᵀ, rounded once. K: G·R rounded up to what a product takes."""
    n_B = tl.program_id(0) * BN + tl.arange(0, BN)
    d_B = tl.program_id(1) * BD + tl.arange(0, BD)
    k_K = tl.arange(0, K)
    group_K, rank_K = k_K // R, k_K % R
    there = k_K < G * R
    scale_K = tl.load(scales + group_K, mask=there, other=0.0)
    u_at = u + (group_K[None, :].to(tl.int64) * N + n_B[:, None]) * R + rank_K[None, :]
    u_BK = tl.load(u_at, mask=(n_B < N)[:, None] & there[None, :], other=0.0).to(tl.float32) * scale_K[None, :]
    v_at = v + (group_K[:, None].to(tl.int64) * D + d_B[None, :]) * R + rank_K[:, None]
    v_KB = tl.load(v_at, mask=there[:, None] & (d_B < D)[None, :], other=0.0).to(tl.float32)
    total_BB = tl.dot(u_BK, v_KB, input_precision=PRECISION)
    at = w + n_B.to(tl.int64)[:, None] * D + d_B[None, :]
    inside = (n_B < N)[:, None] & (d_B < D)[None, :]
    w_BB = tl.load(at, mask=inside, other=0.0)
    nonzero = tl.sum((scale_K != 0).to(tl.int32), axis=0)
    moved_BB = (w_BB.to(tl.float32) + total_BB).to(w_BB.dtype)
    tl.store(at, tl.where(nonzero != 0, moved_BB, w_BB), mask=inside)


def fold(matrix_ND: Tensor, u_GNR: Tensor, v_GDR: Tensor, scales_G: Tensor) -> None:
    """W += Σ_g scales_g·U_g·V_gᵀ in place, one pass over W."""
    (out, wide), (groups, _, rank) = matrix_ND.shape, u_GNR.shape
    # tf32 keeps 11 bits of each factor, more than 16-bit weights keep of the sum
    precision = "ieee" if matrix_ND.dtype == torch.float32 else "tf32"
    _fold_kernel[(triton.cdiv(out, 64), triton.cdiv(wide, 128))](
        matrix_ND, u_GNR, v_GDR, scales_G, out, wide, G=groups, R=rank,
        K=max(16, triton.next_power_of_2(groups * rank)), PRECISION=precision, BN=64, BD=128,
    )  # fmt: skip
