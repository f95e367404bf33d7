# mypy: disable-error-code="no-untyped-def,attr-defined"
"""The fold of low-rank updates into the weights, on CUDA: of one matrix, of one many times, and of many in one launch."""

# N outputs, D inputs, R rank, Q directions, S folds.

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.engines.following import capturing
from zotune.engines.kernels import INTERPRETED


@triton.jit
def _products(
    n_B, d_B, u, v, scales, N, D, QR, R: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """A tile of Σ_q scales[q]·U_q·V_qᵀ, float32, and how many scales are not 0; k runs over directions and ranks.

    TERMS: directions times rank, where they are added one by one; 0: by products, whose tile lies otherwise than the weights'.
    """
    total_BB = tl.zeros((BN, BD), dtype=tl.float32)
    nonzero = 0
    if TERMS > 0:
        for k in tl.static_range(TERMS):
            scale = tl.load(scales + k // R)
            nonzero += (scale != 0).to(tl.int32)
            u_B = tl.load(u + (k // R * N + n_B) * R + k % R, mask=n_B < N, other=0.0).to(tl.float32) * scale
            v_B = tl.load(v + (k // R * D + d_B) * R + k % R, mask=d_B < D, other=0.0).to(tl.float32)
            total_BB += u_B[:, None] * v_B[None, :]
    else:
        for first in range(0, QR, BK):
            k_K = first + tl.arange(0, BK)
            group_K, rank_K = (k_K // R).to(tl.int64), k_K % R
            scale_K = tl.load(scales + group_K, mask=k_K < QR, other=0.0)
            nonzero += tl.sum((scale_K != 0).to(tl.int32), axis=0)
            u_at = u + (group_K[None, :] * N + n_B[:, None]) * R + rank_K[None, :]
            u_BK = (
                tl.load(u_at, mask=(n_B < N)[:, None] & (k_K < QR)[None, :], other=0.0).to(tl.float32)
                * scale_K[None, :]
            )
            v_at = v + (group_K[:, None] * D + d_B[None, :]) * R + rank_K[:, None]
            v_KB = tl.load(v_at, mask=(k_K < QR)[:, None] & (d_B < D)[None, :], other=0.0)
            if SPLIT:  # v is bfloat16 itself, scale·u the sum of two: 16 bits of it
                high_BK = u_BK.to(tl.bfloat16)
                low_BK = (u_BK - high_BK.to(tl.float32)).to(tl.bfloat16)
                if WIDE:
                    total_BB += tl.dot(high_BK.to(tl.float32), v_KB.to(tl.float32))
                    total_BB += tl.dot(low_BK.to(tl.float32), v_KB.to(tl.float32))
                else:
                    total_BB = tl.dot(high_BK, v_KB, total_BB)
                    total_BB = tl.dot(low_BK, v_KB, total_BB)
            else:
                total_BB += tl.dot(u_BK, v_KB.to(tl.float32), input_precision="ieee" if EXACT else "tf32")
    return total_BB, nonzero


@triton.jit
def _fold_tile(
    w, lost, u, v, scales, S, N, D, Q, n_B, d_B, R: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    EXACT: tl.constexpr, COMPENSATED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """A tile of W (N, D) takes S folds one after the other, each rounded; lost, where there is one, keeps what that took."""
    at = n_B.to(tl.int64)[:, None] * D + d_B[None, :]
    inside = (n_B < N)[:, None] & (d_B < D)[None, :]
    w_BB = tl.load(w + at, mask=inside, other=0.0)
    lost_BB = w_BB
    if COMPENSATED:
        lost_BB = tl.load(lost + at, mask=inside, other=0.0)
    for _ in range(S):
        total_BB, nonzero = _products(n_B, d_B, u, v, scales, N, D, Q * R, R, SPLIT, WIDE, EXACT, BN, BD, BK, TERMS)
        total_BB += w_BB.to(tl.float32)
        if COMPENSATED:
            total_BB += lost_BB.to(tl.float32)
        moved_BB = total_BB.to(w_BB.dtype)
        if COMPENSATED:
            rest_BB = (total_BB - moved_BB.to(tl.float32)).to(w_BB.dtype)
            lost_BB = tl.where(nonzero != 0, rest_BB, lost_BB)
        w_BB = tl.where(nonzero != 0, moved_BB, w_BB)
        u += Q * N * R
        v += Q * D * R
        scales += Q
    if COMPENSATED:
        tl.store(lost + at, lost_BB, mask=inside)
    tl.store(w + at, w_BB, mask=inside)


@triton.jit(do_not_specialize=["S"])
def _fold_kernel(
    w, lost, u, v, scales, S, N, D, Q, R: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
    COMPENSATED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    n_B = tl.program_id(0) * BN + tl.arange(0, BN)
    d_B = tl.program_id(1) * BD + tl.arange(0, BD)
    _fold_tile(w, lost, u, v, scales, S, N, D, Q, n_B, d_B, R, SPLIT, WIDE, EXACT, COMPENSATED, BN, BD, BK, TERMS)


@triton.jit
def _fold_many_kernel(
    where, sides, matrix_of, like, scales, Q, R: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
    COMPENSATED: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """A fold of each of many matrices. where: of each the addresses of W, U, V and lost; sides: N, D and its first tile.

    EVEN: all sides and addresses are multiples of 16, so that accesses are wide.
    """
    matrix = tl.load(matrix_of + tl.program_id(0))
    N, D = tl.load(sides + 3 * matrix), tl.load(sides + 3 * matrix + 1)
    w = tl.load(where + 4 * matrix).to(tl.pointer_type(like.dtype.element_ty))
    lost = tl.load(where + 4 * matrix + 3).to(tl.pointer_type(like.dtype.element_ty))
    u = tl.load(where + 4 * matrix + 1).to(tl.pointer_type(like.dtype.element_ty))
    v = tl.load(where + 4 * matrix + 2).to(tl.pointer_type(like.dtype.element_ty))
    if EVEN:
        N, D = tl.multiple_of(N, 16), tl.multiple_of(D, 16)
        w, lost = tl.multiple_of(w, 16), tl.multiple_of(lost, 16)
        u, v = tl.multiple_of(u, 16), tl.multiple_of(v, 16)
    tile = tl.program_id(0) - tl.load(sides + 3 * matrix + 2)
    across = tl.cdiv(D, BD)
    n_B = tile // across * BN + tl.arange(0, BN)
    d_B = tile % across * BD + tl.arange(0, BD)
    _fold_tile(w, lost, u, v, scales, 1, N, D, Q, n_B, d_B, R, SPLIT, WIDE, EXACT, COMPENSATED, BN, BD, BK, TERMS)


FEW_TERMS = 4  # directions times rank up to which they are added one by one
FOLD_FEW, FOLD_MANY = (32, 128, 4), (64, 128, 4)  # a tile, and its warps


def fold(matrix_ND: Tensor, u_QNR: Tensor, v_QDR: Tensor, scales_Q: Tensor, lost_ND: Tensor | None = None) -> None:
    """W += Σ_q scales_q·U_q·V_qᵀ in place, one pass over W. lost: added first, then what rounding took."""
    folds(matrix_ND, u_QNR, v_QDR, scales_Q[None], lost_ND)


def folds(matrix_ND: Tensor, u_SNR: Tensor, v_SDR: Tensor, scales_SQ: Tensor, lost_ND: Tensor | None = None) -> None:
    """S folds one after the other in one pass over W, to the bit as one by one. u, v: (S·Q, …), fold by fold."""
    (out, wide), (steps, count), rank = matrix_ND.shape, scales_SQ.shape, u_SNR.shape[2]
    side, across, warps, how = _fold_plan(matrix_ND.dtype, count, rank)
    _fold_kernel[(triton.cdiv(out, side), triton.cdiv(wide, across))](
        matrix_ND, lost_ND, u_SNR, v_SDR, scales_SQ, steps, out, wide, count, COMPENSATED=lost_ND is not None,
        BN=side, BD=across, num_warps=warps, **how,
    )  # fmt: skip


def _fold_plan(dtype: torch.dtype, count: int, rank: int) -> tuple[int, int, int, dict[str, Any]]:
    """A tile, its warps, and how its sums are taken."""
    # float16 takes tf32: 11 bits of each factor, as many as its weights keep
    split, exact = dtype == torch.bfloat16, dtype == torch.float32
    terms = count * rank if count * rank <= FEW_TERMS else 0
    how = {"R": rank, "SPLIT": split, "WIDE": INTERPRETED, "EXACT": exact, "TERMS": terms}
    return *(FOLD_FEW if terms else FOLD_MANY), how | {"BK": 16 if count * rank <= 16 else 32}


class Fold(NamedTuple):
    """W += Σ_q scales_q·U_q·V_qᵀ, of one matrix. lost: as in `fold`. All contiguous."""

    matrix_ND: Tensor
    u_QNR: Tensor
    v_QDR: Tensor
    lost_ND: Tensor | None = None

    @property
    def where(self) -> tuple[int, ...]:
        """Addresses."""
        three = self.matrix_ND, self.u_QNR, self.v_QDR
        return *(t.data_ptr() for t in three), 0 if self.lost_ND is None else self.lost_ND.data_ptr()

    @property
    def even(self) -> bool:
        """Whether sides and addresses are multiples of 16, so that accesses are wide."""
        return all(n % 16 == 0 for n in (*self.where, *self.matrix_ND.shape))


class FoldMany:
    """Folds of many matrices of one dtype, all even or all not, in one launch, to the bit as `fold` of each: small ones alone leave
    most of a card idle.

    The tables that say where everything is are on the device; a captured graph finds those that it has used where they were.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}
        self._in_graphs: dict[Any, Any] = {}

    def run(self, some: Sequence[Fold], scales_Q: Tensor) -> None:
        first, (count, _, rank) = some[0], some[0].u_QNR.shape
        side, across, warps, how = _fold_plan(first.matrix_ND.dtype, count, rank)
        where = tuple(one.where for one in some)
        tables = self._in_graphs.get(where) or self._kept.pop(where, None) or _tables(some, where, side, across)
        if capturing():
            self._in_graphs[where] = tables
        else:
            self._kept[where] = tables
            if len(self._kept) > KEPT_TABLES:
                del self._kept[next(iter(self._kept))]
        addresses, sides, matrix_of = tables
        _fold_many_kernel[(len(matrix_of),)](
            addresses, sides, matrix_of, first.matrix_ND, scales_Q, count, COMPENSATED=first.lost_ND is not None, EVEN=first.even,
            BN=side, BD=across, num_warps=warps, **how,
        )  # fmt: skip


def _tables(
    some: Sequence[Fold], where: tuple[tuple[int, ...], ...], side: int, across: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Addresses, sides and first tile of each matrix; the matrix of each tile."""
    device, shapes = some[0].matrix_ND.device, [tuple(one.matrix_ND.shape) for one in some]
    tiles = [triton.cdiv(out, side) * triton.cdiv(wide, across) for out, wide in shapes]
    firsts = [0, *accumulate(tiles)]
    sides = [(*shape, start) for shape, start in zip(shapes, firsts, strict=False)]
    matrix_of = torch.arange(len(some), dtype=torch.int32).repeat_interleave(torch.tensor(tiles))
    return (
        torch.tensor(where, device=device),
        torch.tensor(sides, dtype=torch.int32, device=device),
        matrix_of.to(device),
    )


KEPT_TABLES = 256  # of weights that stream, as many as layers and places of theirs
