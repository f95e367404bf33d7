"""The definition in plain torch, for any device: readable, slow, and what the other backends are checked against."""

# Q pairs, n elements of a chunk, K rows, D elements a row.

from __future__ import annotations

import math

import torch
from torch import Tensor

from zotune.noise import Stream

CHUNK = 1 << 20  # elements drawn at a time: never a whole tensor of noise
_WORD = 0xFFFFFFFF


def _wide_product(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 × 32-bit product. int64 is signed, so the constant is taken in halves of 16 bits."""
    by_low, by_high = x * (constant & 0xFFFF), x * (constant >> 16)
    low = by_low + ((by_high & 0xFFFF) << 16)
    return (by_high >> 16) + (low >> 32), low & _WORD


def words(block_n: Tensor, seed: int, pid: int, stream: int = Stream.NOISE) -> Tensor:
    """(n, 4) words, as int64, of Philox4x32-10 at each block."""
    c0, c1 = block_n & _WORD, (block_n >> 32) & _WORD
    c2, c3 = torch.full_like(c0, pid), torch.full_like(c0, int(stream))
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _wide_product(c0, 0xD2511F53)
        high2, low2 = _wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=-1)


def normals(index: Tensor, seed: int, pid: int) -> Tensor:
    """Float32 standard normals of the elements named, computed in float64."""
    lane = index % 4
    words_n4 = words(index // 4, seed, pid)
    first = (lane // 2 * 2).unsqueeze(-1)
    u = ((words_n4.gather(-1, first).squeeze(-1) >> 8) + 1).double() * 2.0**-24
    t = (words_n4.gather(-1, first + 1).squeeze(-1) >> 8).double() * 2.0**-24
    radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * t
    return (radius * torch.where(lane % 2 == 0, torch.cos(angle), torch.sin(angle))).float()


def signs(index: Tensor, seed: int, pid: int) -> Tensor:
    """Float32 ±1 of the elements named."""
    words_n4 = words(index // 128, seed, pid)
    word = words_n4.gather(-1, (index % 128 // 32).unsqueeze(-1)).squeeze(-1)
    return (1 - 2 * ((word >> (index % 32)) & 1)).float()


def kept(count: int, seed_1: Tensor, pid: int, edge: int, start: int) -> Tensor:
    """See `zotune.noise.kept`; edge: words under it are left out."""
    return _kept(torch.arange(start, start + count, device=seed_1.device), seed_1, pid, edge)


def kept_rows(rows_K: Tensor, width: int, seed_1: Tensor, pid: int, edge: int) -> Tensor:
    """See `zotune.noise.kept_rows`."""
    return _kept(rows_K[:, None] * width + torch.arange(width, device=rows_K.device), seed_1, pid, edge)


def _kept(index: Tensor, seed_1: Tensor, pid: int, edge: int) -> Tensor:
    words_n4 = words(index // 4, int(seed_1), pid, Stream.MASK)
    return words_n4.gather(-1, (index % 4).unsqueeze(-1)).squeeze(-1) >= edge


DRAW = {"gaussian": normals, "rademacher": signs}


def _displaced(w: Tensor, index: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str) -> Tensor:
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    total = torch.zeros(index.shape, dtype=wide, device=w.device)
    nonzero = False
    for seed, coef in zip(seeds_Q.tolist(), coefs_Q.tolist(), strict=True):
        if coef != 0:
            nonzero = True
            total += coef * DRAW[direction](index, seed, pid).to(wide)
    return (w.to(wide) + total).to(w.dtype) if nonzero else w


def add_noise(
    out: Tensor, w: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str, start: int = 0
) -> None:
    """See `zotune.noise.add_noise`."""
    w_flat = w.reshape(-1)
    contiguous = out.is_contiguous()
    out_flat = out.view(-1) if contiguous else torch.empty_like(w_flat)
    for first in range(0, w_flat.numel(), CHUNK):
        part = slice(first, min(first + CHUNK, w_flat.numel()))
        index = torch.arange(start + part.start, start + part.stop, device=w.device)
        out_flat[part] = _displaced(w_flat[part], index, seeds_Q, coefs_Q, pid, direction)
    if not contiguous:
        out.copy_(out_flat.view(w.shape))


def add_noise_rows(
    out: Tensor,
    w: Tensor,
    rows_K: Tensor,
    seeds_Q: Tensor,
    coefs_Q: Tensor,
    pid: int,
    direction: str,
    update: tuple[Tensor, Tensor] | None = None,
) -> None:
    """See `zotune.noise.add_noise_rows`."""
    width = math.prod(w.shape[1:])
    index_KD = rows_K[:, None] * width + torch.arange(width, device=w.device)
    picked_KD = w[rows_K].reshape(len(rows_K), width)
    if update is not None:
        picked_KD = _displaced(picked_KD, index_KD, *update, pid, direction)
    out.copy_(_displaced(picked_KD, index_KD, seeds_Q, coefs_Q, pid, direction).view(out.shape))


def add_noise_at(
    out: Tensor, w: Tensor, starts_K: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str
) -> None:
    """See `zotune.noise.add_noise_at`."""
    index_KD = starts_K[:, None] + torch.arange(w.shape[1], device=w.device)
    out.copy_(_displaced(w, index_KD, seeds_Q, coefs_Q, pid, direction))


def add_noise_both(
    plus: Tensor,
    minus: Tensor,
    w: Tensor,
    seed_1: Tensor,
    coef_1: Tensor,
    pid: int,
    direction: str,
    start: int = 0,
    update: tuple[Tensor, Tensor] | None = None,
) -> None:
    """See `zotune.noise.add_noise_both`."""
    if update is not None:
        add_noise(w, w, *update, pid, direction, start)
    add_noise(plus, w, seed_1, coef_1, pid, direction, start)
    add_noise(minus, w, seed_1, -coef_1, pid, direction, start)
