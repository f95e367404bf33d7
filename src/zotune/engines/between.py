# mypy: disable-error-code="no-untyped-def,attr-defined"
"""What models compute between their products, on CUDA in one pass each: gates, rotary embeddings, attention over short rows."""

# B rows, H heads (K of keys and values), T tokens, D width of a head, n elements.

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.engines.kernels import INTERPRETED, cdiv, power_of_2

MANY = 1024  # elements a program


@triton.jit
def through_gate(a, GATE: tl.constexpr):
    """gate(a) of float32."""
    if GATE == "silu":
        a = a * tl.sigmoid(a)
    elif GATE == "gelu":
        a = a * 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
    elif GATE == "gelu_tanh":  # tanh(z) = 2·sigmoid(2z) − 1
        a = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    else:
        a = tl.where(a < 0.0, 0.0, a)  # NaN stays
    return a


@triton.jit
def _gated_kernel(y, a, b, n, GATE: tl.constexpr, MANY: tl.constexpr):
    """y ← gate(a)·b, rounded once."""
    at_M = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    a_M = tl.load(a + at_M, mask=at_M < n, other=0.0).to(tl.float32)
    b_M = tl.load(b + at_M, mask=at_M < n, other=0.0).to(tl.float32)
    tl.store(y + at_M, (through_gate(a_M, GATE) * b_M).to(y.dtype.element_ty), mask=at_M < n)


def gated(a: Tensor, b: Tensor, gate: str) -> Tensor:
    """gate(a)·b, computed in float32 and rounded once; a and b contiguous, of one shape and dtype."""
    y = torch.empty_like(a)
    _gated_kernel[(cdiv(a.numel(), MANY),)](y, a, b, a.numel(), GATE=gate, MANY=MANY)
    return y


@triton.jit
def _rotary_kernel(
    q_out, k_out, q, k, cos, sin, n, T, H, K, half, q_b, q_h, q_t, k_b, k_h, k_t, cos_b, cos_t, sin_b, sin_t,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One head of some tokens: (x₁, x₂) ← (x₁·cos₁ − x₂·sin₁, x₂·cos₂ + x₁·sin₂) of its halves. Out: (B, T, heads, D)."""
    head = tl.program_id(1)
    n_B = tl.program_id(0) * BN + tl.arange(0, BN)
    d_B = tl.arange(0, BD)
    row_B, token_B = (n_B // T).to(tl.int64), (n_B % T).to(tl.int64)
    inside = (n_B < n)[:, None] & (d_B < half)[None, :]
    cos_at = cos + row_B[:, None] * cos_b + token_B[:, None] * cos_t + d_B[None, :]
    sin_at = sin + row_B[:, None] * sin_b + token_B[:, None] * sin_t + d_B[None, :]
    if head < H:
        x_at = q + row_B[:, None] * q_b + head * q_h + token_B[:, None] * q_t + d_B[None, :]
        y_at = q_out + ((n_B.to(tl.int64) * H + head) * 2 * half)[:, None] + d_B[None, :]
    else:
        x_at = k + row_B[:, None] * k_b + (head - H) * k_h + token_B[:, None] * k_t + d_B[None, :]
        y_at = k_out + ((n_B.to(tl.int64) * K + head - H) * 2 * half)[:, None] + d_B[None, :]
    left_BB = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    right_BB = tl.load(x_at + half, mask=inside, other=0.0).to(tl.float32)
    low_BB = left_BB * tl.load(cos_at, mask=inside, other=0.0).to(tl.float32)
    low_BB -= right_BB * tl.load(sin_at, mask=inside, other=0.0).to(tl.float32)
    high_BB = right_BB * tl.load(cos_at + half, mask=inside, other=0.0).to(tl.float32)
    high_BB += left_BB * tl.load(sin_at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, low_BB.to(q_out.dtype.element_ty), mask=inside)
    tl.store(y_at + half, high_BB.to(q_out.dtype.element_ty), mask=inside)


def rotary(q_BHTD: Tensor, k_BKTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """x·cos + (−x₂, x₁)·sin for both, computed in float32 and rounded once. cos, sin: (1 or B, T, D); last dimensions contiguous.

    What is given back lies as (B, T, heads, D) in memory.
    """
    (rows, heads, tokens, width), others = q_BHTD.shape, k_BKTD.shape[1]
    q, k = (x.new_empty(rows, tokens, x.shape[1], width).transpose(1, 2) for x in (q_BHTD, k_BKTD))
    many = 32 if rows * tokens >= 4096 else 8
    half = width // 2
    _rotary_kernel[(cdiv(rows * tokens, many), heads + others)](
        q, k, q_BHTD, k_BKTD, cos_BTD, sin_BTD, rows * tokens, tokens, heads, others, half, *q_BHTD.stride()[:3],
        *k_BKTD.stride()[:3], cos_BTD.stride(0) if len(cos_BTD) > 1 else 0, cos_BTD.stride(1),
        sin_BTD.stride(0) if len(sin_BTD) > 1 else 0, sin_BTD.stride(1), BN=many, BD=power_of_2(half),
        num_warps=4 if many * half >= 512 else 1,
    )  # fmt: skip
    return q, k


@triton.jit
def _short_kernel(
    out, q, k, v, scale, T, D, H, GROUP, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    WIDE: tl.constexpr, EXACT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Causal attention of one head of one row, whose scores one program holds. Out: (B, T, H, D)."""
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    t_B, d_B = tl.arange(0, BT), tl.arange(0, BD)
    inside = (t_B < T)[:, None] & (d_B < D)[None, :]
    of_keys = head // GROUP
    q_BB = tl.load(q + row * q_b + head * q_h + t_B[:, None] * q_t + d_B[None, :], mask=inside, other=0.0)
    k_BB = tl.load(k + row * k_b + of_keys * k_h + t_B[:, None] * k_t + d_B[None, :], mask=inside, other=0.0)
    v_BB = tl.load(v + row * v_b + of_keys * v_h + t_B[:, None] * v_t + d_B[None, :], mask=inside, other=0.0)
    if WIDE:
        scores_BB = tl.dot(q_BB.to(tl.float32), tl.trans(k_BB).to(tl.float32), input_precision="ieee")
    elif EXACT:
        scores_BB = tl.dot(q_BB, tl.trans(k_BB), input_precision="ieee")
    else:
        scores_BB = tl.dot(q_BB, tl.trans(k_BB))
    seen = (t_B[None, :] <= t_B[:, None]) & (t_B < T)[None, :]
    scores_BB = tl.where(seen, scores_BB * scale, float("-inf"))
    # a score that is no number stays one: its row is none then
    shares_BB = tl.exp(scores_BB - tl.max(scores_BB, axis=1)[:, None])
    total_B = tl.sum(shares_BB, axis=1)
    if WIDE or EXACT:
        y_BB = tl.dot(shares_BB, v_BB.to(tl.float32), input_precision="ieee")
    else:
        y_BB = tl.dot(shares_BB.to(v_BB.dtype), v_BB)
    y_BB = y_BB / total_B[:, None]
    at = out + ((row * T + t_B[:, None]) * H + head) * D + d_B[None, :]
    tl.store(at, y_BB.to(out.dtype.element_ty), mask=inside)


SHORT, WIDEST_HEAD = 64, 128  # tokens of a row, and the width of a head, that one program holds


def short_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float | None = None) -> Tensor:
    """(B, H, T, D), in memory (B, T, H, D): softmax(scale·q·kᵀ, of each token's past)·v; H is a multiple of K.

    Scores and sums in float32, shares rounded to the values' dtype. T ≤ SHORT, D ≤ WIDEST_HEAD; last dimensions contiguous.
    """
    rows, heads, tokens, width = q_BHTD.shape
    out = q_BHTD.new_empty(rows, tokens, heads, width).transpose(1, 2)
    tall = max(16, power_of_2(tokens))
    _short_kernel[(rows * heads,)](
        out, q_BHTD, k_BKTD, v_BKTD, float(1 / math.sqrt(width) if scale is None else scale), tokens, width, heads,
        heads // k_BKTD.shape[1], *q_BHTD.stride()[:3], *k_BKTD.stride()[:3], *v_BKTD.stride()[:3], WIDE=INTERPRETED,
        EXACT=q_BHTD.dtype == torch.float32, BT=tall, BD=max(16, power_of_2(width)),
        num_warps=4 if tall >= 64 else 2 if tall == 32 else 1,
    )  # fmt: skip
    return out


def serves_attention(q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, is_causal: bool = False) -> bool:
    """Whether `short_attention` computes what torch's attention does of these."""
    if mask is not None or dropout or not is_causal or any(type(x) is not Tensor or x.dim() != 4 for x in (q, k, v)):
        return False
    alike = q.dtype == k.dtype == v.dtype != torch.float64 and k.shape == v.shape and q.shape[0] == k.shape[0]
    one = alike and q.shape[2:] == k.shape[2:] and q.shape[1] % k.shape[1] == 0 and 1 < q.shape[2] <= SHORT
    return bool(one and q.shape[3] <= WIDEST_HEAD and all(x.stride(3) == 1 for x in (q, k, v)))
