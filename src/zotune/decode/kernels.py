# mypy: disable-error-code="no-untyped-def,attr-defined"
"""What a decode step does beside the model's products, on CUDA: attention to the slots' keys and values, and tokens chosen.

Attention of one token a slot reads each key and value once for all query heads that share them, and no column behind the slot's
own: transformers' reads, and with grouped heads may copy, all that were allotted, under a mask.
"""

# S slots, H heads of keys and values, G query heads that share one, L columns, D width of a head, n rows, V vocabulary, C pieces of
# it, E ends.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.decode.choosing import choose
from zotune.engines.kernels import INTERPRETED

if TYPE_CHECKING:
    from zotune.decode.board import Board

WIDEST_HEAD, MOST_SHARING = 256, 64
ANY = 1 << 30  # columns of a window that never ends


@triton.jit
def _logits(raw, scaling, softcap, CAPPED: tl.constexpr):
    """Scores by the exponential of 2: cap·tanh(s/cap) where there is a cap; tanh(x) = 1 − 2/(e²ˣ + 1) is right for any x."""
    scores = raw * scaling
    if CAPPED:
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * 1.4426950408889634) / softcap) + 1.0))
    return scores * 1.4426950408889634  # log₂ e


@triton.jit(do_not_specialize=["scaling", "softcap", "window"])
def _attend_kernel(
    out, q, k, v, keys, values, at, scaling, softcap, window, q_s, q_h, k_s, k_h, v_s, v_h, cache_s, cache_h,
    G, D, CAPPED: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr, BG: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out (S, H·G, D) ← softmax(q·Kᵀ)·V of a slot and head; the slot's new key and value are written, and not read again."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.load(at + slot).to(tl.int32)
    g_B, l_B, d_B = tl.arange(0, BG), tl.arange(0, BL), tl.arange(0, BD)
    in_D, in_GD = d_B < D, (g_B < G)[:, None] & (d_B < D)[None, :]
    q_GD = tl.load(q + slot * q_s + (head * G + g_B)[:, None] * q_h + d_B[None, :], mask=in_GD, other=0.0)
    k_D = tl.load(k + slot * k_s + head * k_h + d_B, mask=in_D, other=0.0)
    v_D = tl.load(v + slot * v_s + head * v_h + d_B, mask=in_D, other=0.0)
    here = slot * cache_s + head * cache_h
    tl.store(keys + here + last * D + d_B, k_D, mask=in_D)
    tl.store(values + here + last * D + d_B, v_D, mask=in_D)
    most_G = tl.sum(q_GD.to(tl.float32) * k_D.to(tl.float32)[None, :], axis=1)
    most_G = _logits(most_G, scaling, softcap, CAPPED)
    total_G = tl.full((BG,), 1.0, tl.float32)
    sum_GD = tl.zeros((BG, BD), tl.float32) + v_D.to(tl.float32)[None, :]
    for start in range(tl.maximum(last - window + 1, 0), last, BL):
        in_L = start + l_B < last
        at_L = here + (start + l_B) * D
        k_DL = tl.load(keys + at_L[None, :] + d_B[:, None], mask=in_L[None, :] & in_D[:, None], other=0.0)
        if WIDE:
            raw_GL = tl.dot(q_GD.to(tl.float32), k_DL.to(tl.float32))
        else:
            raw_GL = tl.dot(q_GD, k_DL, input_precision="ieee" if EXACT else "tf32")
        scores_GL = tl.where(in_L[None, :], _logits(raw_GL, scaling, softcap, CAPPED), float("-inf"))
        higher_G = tl.maximum(most_G, tl.max(scores_GL, axis=1))
        shares_GL = tl.exp2(scores_GL - higher_G[:, None])
        shrink_G = tl.exp2(most_G - higher_G)
        total_G = total_G * shrink_G + tl.sum(shares_GL, axis=1)
        v_LD = tl.load(values + at_L[:, None] + d_B[None, :], mask=in_L[:, None] & in_D[None, :], other=0.0)
        if WIDE:
            sum_GD = sum_GD * shrink_G[:, None] + tl.dot(shares_GL, v_LD.to(tl.float32))
        else:
            shares_GL = shares_GL.to(v_LD.dtype)
            sum_GD = sum_GD * shrink_G[:, None] + tl.dot(shares_GL, v_LD, input_precision="ieee" if EXACT else "tf32")
        most_G = higher_G
    out_GD = out + (slot * tl.num_programs(1) + head) * G * D + g_B[:, None] * D + d_B[None, :]
    tl.store(out_GD, (sum_GD / total_G[:, None]).to(out.dtype.element_ty), mask=in_GD)


def attend(
    q_SHD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    keys_SHLD: Tensor,
    values_SHLD: Tensor,
    at_S: Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """(S, H·G, D): each slot's query heads attend to its columns up to at, of which the last is written here, from k and v.

    q: (S, H·G, D), head by head of the keys. at: (S,) int64, this token's column. window: how many of the last columns are seen.
    The sums are float32's. The last dimension of q, k and v, and keys and values of a slot's head, are contiguous; D ≤ WIDEST_HEAD,
    G ≤ MOST_SHARING.
    """
    (slots, heads, _, wide), sharing = keys_SHLD.shape, q_SHD.shape[1] // keys_SHLD.shape[1]
    out = torch.empty(q_SHD.shape, dtype=q_SHD.dtype, device=q_SHD.device)
    padded = max(16, triton.next_power_of_2(wide))
    size = padded * q_SHD.element_size()
    columns = 64 if size <= 256 else 32 if size <= 512 else 16  # three stages of them have to fit
    _attend_kernel[(slots, heads)](
        out, q_SHD, k_SHD, v_SHD, keys_SHLD, values_SHLD, at_S, float(scaling), float(softcap or 0.0), window or ANY,
        q_SHD.stride(0), q_SHD.stride(1), k_SHD.stride(0), k_SHD.stride(1), v_SHD.stride(0), v_SHD.stride(1),
        keys_SHLD.stride(0), keys_SHLD.stride(1), sharing, wide, CAPPED=bool(softcap), WIDE=INTERPRETED,
        EXACT=q_SHD.element_size() == 4, BG=max(16, triton.next_power_of_2(sharing)), BL=columns, BD=padded, num_warps=4,
    )  # fmt: skip
    return out


PIECE = 8192  # logits of a program


@triton.jit(do_not_specialize=["temperature"])
def _best_kernel(
    tops, scores, tokens, logits, noise, temperature, V, logits_n, DRAWN: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """Of a piece of a row: the highest logit, ∞ for NaN, and the token with the highest score ℓ/T + noise, or ℓ."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v_B = piece * BV + tl.arange(0, BV)
    x_B = tl.load(logits + row * logits_n + v_B, mask=v_B < V, other=float("-inf")).to(tl.float32)
    x_B = tl.where(x_B != x_B, float("inf"), x_B)
    to = row * tl.num_programs(1) + piece
    tl.store(tops + to, tl.max(x_B, axis=0))
    if DRAWN:
        x_B = x_B / temperature + tl.load(noise + row * V + v_B, mask=v_B < V, other=0.0)
    tl.store(scores + to, tl.max(x_B, axis=0))
    tl.store(tokens + to, piece * BV + tl.argmax(x_B, axis=0))


@triton.jit
def _write_kernel(
    tops, scores, tokens, C, slots, ends, E, pad, token, at, start, count, limit, alive, finished, finite, written, K,
    BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """What `Board.write` does to a slot, from the best of each piece."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    c_B, e_B = tl.arange(0, BC), tl.arange(0, BE)
    best = tl.argmax(tl.load(scores + row * C + c_B, mask=c_B < C, other=float("-inf")), axis=0)
    chosen = tl.load(tokens + row * C + best)
    top = tl.max(tl.load(tops + row * C + c_B, mask=c_B < C, other=float("-inf")), axis=0)
    was = tl.load(alive + slot) != 0
    at_end = tl.max((tl.load(ends + e_B, mask=e_B < E, other=-1) == chosen).to(tl.int32), axis=0) != 0
    ended, going = was & at_end, was & (at_end == 0)
    written_at = tl.load(count + slot)
    tl.store(written + slot * K + tl.minimum(written_at, K - 1), chosen, mask=going)
    now = written_at + going.to(tl.int64)
    goes_on = going & (now < tl.load(limit + slot))
    tl.store(finite + slot, 0, mask=was & (tl.abs(top) == float("inf")))
    tl.store(finished + slot, 1, mask=ended)
    tl.store(count + slot, now)
    tl.store(alive + slot, goes_on.to(tl.uint8))
    tl.store(token + slot, tl.where(going, chosen, pad))
    tl.store(at + slot, tl.where(goes_on, tl.load(start + slot) + now - 1, 0))


def write(board: Board, slots_n: Tensor, logits_nV: Tensor, gumbel_nV: Tensor | None) -> None:
    """`Board.write`, by two kernels: the best of each piece of a row, then the best of these and what comes of it for the slot."""
    settings, (rows, words) = board.settings, logits_nV.shape
    if gumbel_nV is not None and (settings.top_k is not None or settings.top_p is not None):
        tops_nC = logits_nV.amax(-1, keepdim=True).float()
        tops_nC = tops_nC.masked_fill(tops_nC.isnan(), float("inf"))
        scores_nC, tokens_nC = tops_nC, choose(logits_nV, settings, gumbel_nV)[:, None]
    else:
        pieces = triton.cdiv(words, PIECE)
        tops_nC, scores_nC = torch.empty(2, rows, pieces, device=logits_nV.device)
        tokens_nC = torch.empty(rows, pieces, dtype=torch.int64, device=logits_nV.device)
        _best_kernel[(rows, pieces)](
            tops_nC, scores_nC, tokens_nC, logits_nV, gumbel_nV, float(settings.temperature), words, logits_nV.stride(0),
            DRAWN=gumbel_nV is not None, BV=PIECE, num_warps=8,
        )  # fmt: skip
    pieces, ends = tokens_nC.shape[1], len(board.ends)
    _write_kernel[(rows,)](
        tops_nC, scores_nC, tokens_nC, pieces, slots_n, board.ends, ends, settings.pad, board.token_S, board.slots.at_S,
        board.start_S, board.count_S, board.limit_S, *(t.view(torch.uint8) for t in (board.alive_S, board.finished_S)),
        board.finite_S.view(torch.uint8), board.written_SK, board.written_SK.shape[1],
        BC=triton.next_power_of_2(pieces), BE=triton.next_power_of_2(max(1, ends)), num_warps=1,
    )  # fmt: skip
