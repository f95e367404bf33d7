# mypy: disable-error-code="no-untyped-def,attr-defined"
"""The noise on CUDA, by Triton: a program draws what its elements need and forgets it.

Seeds and coefficients are read from memory, so that a captured graph can be replayed with new ones. What z is stands in
`zotune.noise.drawing`. With TRITON_INTERPRET=1 the kernels run on the CPU, for tests.
"""

# Q pairs, K rows, D elements a row. A tile is (T, E): T groups of E neighbours that share their words.

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.noise import Item, Stream
from zotune.noise.drawing import TL_DTYPE, displaced, scaled, signed, tile_of

TILE = 2048  # elements a program
BOTH_TILE, BOTH_WARPS = 2048, 4  # the same, and its warps, where both copies are made
MANY_TILE = 1024  # the same where many small tensors share a launch


@triton.jit(do_not_specialize=["pid"])
def _add_kernel(
    out,
    w,
    n,
    group,
    shift,
    seeds,
    coefs,
    Q: tl.constexpr,
    pid,
    GAUSSIAN: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
):
    """Element i of w is element E·group − shift + i of the parameter."""
    step_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    at_TE = step_T[:, None] * E + tl.arange(0, E)[None, :] - shift
    inside = (at_TE >= 0) & (at_TE < n)
    w_TE = tl.load(w + at_TE, mask=inside, other=0.0)
    tl.store(out + at_TE, displaced(w_TE, group + step_T, seeds, coefs, Q, pid, GAUSSIAN, E, T), mask=inside)


@triton.jit(do_not_specialize=["pid"])
def _rows_kernel(
    out, w, rows, D, seeds, coefs, Q: tl.constexpr, update_seeds, update_coefs, U: tl.constexpr, pid,
    GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """U: pairs of the update that the rows take first; 0 for none."""
    start = tl.load(rows + tl.program_id(0)) * D
    group = start // E
    step_T = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    at_TE = step_T[:, None] * E + tl.arange(0, E)[None, :] - (start - group * E)
    inside = (at_TE >= 0) & (at_TE < D)
    w_TE = tl.load(w + start + at_TE, mask=inside, other=0.0)
    if U > 0:
        w_TE = displaced(w_TE, group + step_T, update_seeds, update_coefs, U, pid, GAUSSIAN, E, T)
    into = out + tl.program_id(0).to(tl.int64) * D + at_TE
    tl.store(into, displaced(w_TE, group + step_T, seeds, coefs, Q, pid, GAUSSIAN, E, T), mask=inside)


@triton.jit(do_not_specialize=["pid", "tiles"])
def _at_kernel(
    out, w, starts, D, tiles, seeds, coefs, Q: tl.constexpr, pid,
    GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Row k of w is elements starts[k], … of the parameter; w's rows lie one after the other, and have so many tiles."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.load(starts + row)
    group = start // E
    step_T = (tl.program_id(0) % tiles).to(tl.int64) * T + tl.arange(0, T)
    at_TE = step_T[:, None] * E + tl.arange(0, E)[None, :] - (start - group * E)
    inside = (at_TE >= 0) & (at_TE < D)
    here_TE = row * D + at_TE
    w_TE = tl.load(w + here_TE, mask=inside, other=0.0)
    tl.store(out + here_TE, displaced(w_TE, group + step_T, seeds, coefs, Q, pid, GAUSSIAN, E, T), mask=inside)


@triton.jit(do_not_specialize=["pid"])
def _both_kernel(
    plus, minus, w, n, group, shift, seed, coef, update_seeds, update_coefs, U: tl.constexpr, pid,
    GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """U: pairs of the update that w takes first, in place; 0 for none."""
    step_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    at_TE = step_T[:, None] * E + tl.arange(0, E)[None, :] - shift
    inside = (at_TE >= 0) & (at_TE < n)
    # a product reads the copies next: they are to stay in cache, and the weight to make room for them
    w_TE = tl.load(w + at_TE, mask=inside, other=0.0, eviction_policy="evict_first")
    if U > 0:
        w_TE = displaced(w_TE, group + step_T, update_seeds, update_coefs, U, pid, GAUSSIAN, E, T)
        tl.store(w + at_TE, w_TE, mask=inside, cache_modifier=".cs")
    wide: tl.constexpr = tl.float64 if w_TE.dtype == tl.float64 else tl.float32
    moved_TE = scaled(tl.load(coef).to(wide), tl.load(seed), pid, group + step_T, GAUSSIAN, E, T)
    w_wide = w_TE.to(wide)
    tl.store(plus + at_TE, (w_wide + moved_TE).to(w_TE.dtype), mask=inside, eviction_policy="evict_last")
    tl.store(minus + at_TE, (w_wide - moved_TE).to(w_TE.dtype), mask=inside, eviction_policy="evict_last")


@triton.jit(do_not_specialize=["pid", "S"])
def _steps_kernel(
    w, n, seeds, coefs, S, Q: tl.constexpr, pid, GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr
):
    """S steps of a tile, each rounded."""
    step_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    at_TE = step_T[:, None] * E + tl.arange(0, E)[None, :]
    inside = at_TE < n
    w_TE = tl.load(w + at_TE, mask=inside, other=0.0)
    for s in range(S):
        w_TE = displaced(w_TE, step_T, seeds + s * Q, coefs + s * Q, Q, pid, GAUSSIAN, E, T)
    tl.store(w + at_TE, w_TE, mask=inside)


@triton.jit
def _compensated(
    w,
    lost,
    n,
    seeds,
    coefs,
    factor,
    Q: tl.constexpr,
    pid,
    step_T,
    GAUSSIAN: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
):
    """A tile of w + lost ← factor·(w + lost) + Σ_q coefs[q]·z(seeds[q]): w rounded, lost what that took."""
    at_TE = step_T[:, None] * E + tl.arange(0, E)[None, :]
    inside = at_TE < n
    w_TE = tl.load(w + at_TE, mask=inside, other=0.0)
    lost_TE = tl.load(lost + at_TE, mask=inside, other=0.0)
    wide: tl.constexpr = tl.float64 if w_TE.dtype == tl.float64 else tl.float32
    before_TE = (w_TE.to(wide) + lost_TE.to(wide)) * factor
    total_TE = tl.zeros((T, E), dtype=wide)
    moves = factor != 1.0
    for q in range(Q):
        coef = tl.load(coefs + q).to(wide)
        total_TE += scaled(coef, tl.load(seeds + q), pid, step_T, GAUSSIAN, E, T)
        moves = moves | (coef != 0)
    total_TE += before_TE
    new_TE = tl.where(moves, total_TE.to(w_TE.dtype), w_TE)
    tl.store(w + at_TE, new_TE, mask=inside)
    rest_TE = (total_TE - new_TE.to(wide)).to(w_TE.dtype)
    tl.store(lost + at_TE, tl.where(moves, rest_TE, lost_TE), mask=inside)


@triton.jit(do_not_specialize=["pid"])
def _compensated_kernel(
    w, lost, n, seeds, coefs, factor_at, Q: tl.constexpr, pid, GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr
):
    step_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    _compensated(w, lost, n, seeds, coefs, tl.load(factor_at), Q, pid, step_T, GAUSSIAN, E, T)


@triton.jit
def _many_compensated_kernel(
    tile_item, tile_first, ws, losts, sizes, pids, groups, seeds, coefs, factors,
    Q: tl.constexpr, DTYPE: tl.constexpr, GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Tile t: elements tile_first[t]·E, … of item tile_item[t]. coefs (G, Q) and factors (G,) by its group."""
    item = tl.load(tile_item + tl.program_id(0))
    step_T = tl.load(tile_first + tl.program_id(0)) + tl.arange(0, T)
    w = tl.load(ws + item).to(tl.pointer_type(DTYPE))
    lost = tl.load(losts + item).to(tl.pointer_type(DTYPE))
    group = tl.load(groups + item)
    _compensated(
        w, lost, tl.load(sizes + item), seeds, coefs + group * Q, tl.load(factors + group), Q, tl.load(pids + item),
        step_T, GAUSSIAN, E, T,
    )  # fmt: skip


@triton.jit
def _many_kernel(
    tile_item,
    tile_first,
    outs,
    ws,
    sizes,
    pids,
    groups,
    seeds,
    coefs,
    P: tl.constexpr,
    Q: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_W: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
):
    """Tile t of part p: elements tile_first[t]·E, … of item tile_item[t]."""
    item = tl.load(tile_item + tl.program_id(0))
    part = tl.program_id(1)
    n = tl.load(sizes + item)
    pid = tl.load(pids + item)
    step_T = tl.load(tile_first + tl.program_id(0)) + tl.arange(0, T)
    at_TE = step_T[:, None] * E + tl.arange(0, E)[None, :]
    inside = at_TE < n
    out = tl.load(outs + item).to(tl.pointer_type(DTYPE)) + part * n
    if HAS_W:
        w_TE = tl.load(tl.load(ws + item).to(tl.pointer_type(DTYPE)) + at_TE, mask=inside, other=0.0)
    else:
        w_TE = tl.zeros((T, E), dtype=DTYPE)
    own = coefs + (tl.load(groups + item) * P + part) * Q
    tl.store(out + at_TE, displaced(w_TE, step_T, seeds + part * Q, own, Q, pid, GAUSSIAN, E, T), mask=inside)


@triton.jit(do_not_specialize=["pid", "edge"])
def _kept_kernel(out, n, block, shift, seeds, pid, edge, STREAM: tl.constexpr, T: tl.constexpr):
    """Element i of out is element 4·block − shift + i of the parameter."""
    step_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    low = ((block + step_T) & 0xFFFFFFFF).to(tl.uint32)
    high = (((block + step_T) >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    x0, x1, x2, x3 = tl.philox(tl.load(seeds), low, high, zero + pid.to(tl.uint32, bitcast=True), zero + STREAM, 10)
    word_TE = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (T, 4))
    at_TE = step_T[:, None] * 4 + tl.arange(0, 4)[None, :] - shift
    tl.store(out + at_TE, word_TE >= edge.to(tl.uint32, bitcast=True), mask=(at_TE >= 0) & (at_TE < n))


@triton.jit(do_not_specialize=["pid", "edge"])
def _kept_rows_kernel(out, rows, n, D, seeds, pid, edge, STREAM: tl.constexpr, SIZE: tl.constexpr):
    """out (K, D), a word an element: the rows of a look-up are few."""
    at_S = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    index_S = tl.load(rows + at_S // D, mask=at_S < n, other=0) * D + at_S % D
    low = ((index_S // 4) & 0xFFFFFFFF).to(tl.uint32)
    high = (((index_S // 4) >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    x0, x1, x2, x3 = tl.philox(tl.load(seeds), low, high, zero + pid.to(tl.uint32, bitcast=True), zero + STREAM, 10)
    lane_S = index_S % 4
    word_S = tl.where(lane_S < 2, tl.where(lane_S == 0, x0, x1), tl.where(lane_S == 2, x2, x3))
    tl.store(out + at_S, word_S >= edge.to(tl.uint32, bitcast=True), mask=at_S < n)


def kept(count: int, seed_1: Tensor, pid: int, edge: int, start: int) -> Tensor:
    """See `zotune.noise.kept`; edge: words under it are left out."""
    out = torch.empty(count, dtype=torch.bool, device=seed_1.device)
    if count:
        grid = (triton.cdiv(count + start % 4, TILE),)
        _kept_kernel[grid](
            out, count, start // 4, start % 4, seed_1, signed(pid), signed(edge), STREAM=int(Stream.MASK), T=TILE // 4
        )
    return out


def kept_rows(rows_K: Tensor, width: int, seed_1: Tensor, pid: int, edge: int) -> Tensor:
    """See `zotune.noise.kept_rows`."""
    out = torch.empty(len(rows_K), width, dtype=torch.bool, device=seed_1.device)
    if out.numel():
        _kept_rows_kernel[(triton.cdiv(out.numel(), TILE),)](
            out, rows_K, out.numel(), width, seed_1, signed(pid), signed(edge), STREAM=int(Stream.MASK), SIZE=TILE
        )
    return out


def add_noise(
    out: Tensor, w: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str, start: int = 0
) -> None:
    """See `zotune.noise.add_noise`."""
    if w.numel() == 0:
        return
    w_flat, tile = w.detach().reshape(-1).contiguous(), tile_of(direction, TILE)  # no copy where w lies in order
    out_flat = out.detach().view(-1) if out.is_contiguous() else torch.empty_like(w_flat)
    shift = start % tile["E"]
    grid = (triton.cdiv(w_flat.numel() + shift, TILE),)
    group = start // tile["E"]
    _add_kernel[grid](
        out_flat, w_flat, w_flat.numel(), group, shift, seeds_Q, coefs_Q, len(seeds_Q), signed(pid), **tile
    )
    if not out.is_contiguous():
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
    """See `zotune.noise.add_noise_rows`. out is contiguous."""
    width, tile = prod(w.shape[1:]), tile_of(direction, TILE)
    if len(rows_K) == 0 or width == 0:
        return
    grid = (len(rows_K), triton.cdiv(width + tile["E"] - 1, TILE))
    _rows_kernel[grid](
        out,
        w.detach().contiguous(),
        rows_K,
        width,
        seeds_Q,
        coefs_Q,
        len(seeds_Q),
        *_first(update),
        signed(pid),
        **tile,
    )


def add_noise_at(
    out: Tensor, w: Tensor, starts_K: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str
) -> None:
    """See `zotune.noise.add_noise_at`."""
    width, tile = w.shape[1], tile_of(direction, TILE)
    if w.numel():
        tiles = triton.cdiv(width + tile["E"] - 1, TILE)
        grid = (len(starts_K) * tiles,)
        _at_kernel[grid](
            out, w.detach(), starts_K.contiguous(), width, tiles, seeds_Q, coefs_Q, len(seeds_Q), signed(pid), **tile
        )


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
    """See `zotune.noise.add_noise_both`. plus and minus are contiguous."""
    if w.numel() == 0:
        return
    assert update is None or w.is_contiguous()
    w_flat, tile = w.detach().reshape(-1).contiguous(), tile_of(direction, BOTH_TILE)
    shift = start % tile["E"]
    grid = (triton.cdiv(w_flat.numel() + shift, BOTH_TILE),)
    _both_kernel[grid](
        plus,
        minus,
        w_flat,
        w_flat.numel(),
        start // tile["E"],
        shift,
        seed_1,
        coef_1,
        *_first(update),
        signed(pid),
        **tile,
        num_warps=BOTH_WARPS,
    )


def _first(update: tuple[Tensor, Tensor] | None) -> tuple[Any, Any, int]:
    """Of an update that comes first: what the kernels take, none as no pairs."""
    return (None, None, 0) if update is None else (*update, len(update[0]))


def add_noise_steps(w: Tensor, seeds_SQ: Tensor, coefs_SQ: Tensor, pid: int, direction: str) -> None:
    """See `zotune.noise.add_noise_steps`. w is contiguous."""
    if w.numel() == 0 or len(seeds_SQ) == 0:
        return
    steps, queries = seeds_SQ.shape
    grid = (triton.cdiv(w.numel(), TILE),)
    _steps_kernel[grid](w, w.numel(), seeds_SQ, coefs_SQ, steps, queries, signed(pid), **tile_of(direction, TILE))


def add_noise_compensated(
    w: Tensor, residual: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str, factor: float | Tensor
) -> None:
    """See `zotune.noise.add_noise_compensated`. w and residual are contiguous."""
    if w.numel() == 0:
        return
    if not isinstance(factor, Tensor):
        factor = torch.full((), factor, dtype=torch.float32, device=w.device)
    grid = (triton.cdiv(w.numel(), TILE),)
    _compensated_kernel[grid](
        w, residual, w.numel(), seeds_Q, coefs_Q, factor, len(seeds_Q), signed(pid), **tile_of(direction, TILE)
    )


class ManyPlan:
    """What a launch over many tensors has to know of them, on the device; items of one dtype share a launch."""

    def __init__(self, items: Sequence[Item], direction: str) -> None:
        self.tile = tile_of(direction, MANY_TILE)
        kinds: dict[Any, list[Item]] = {}
        for item in items:
            kinds.setdefault((item.out.dtype, item.w is not None), []).append(item)
        self.launches = [(dtype, has_w, self._tables(items)) for (dtype, has_w), items in kinds.items()]

    def _tables(self, items: Sequence[Item]) -> tuple[Tensor, ...]:
        groups_a_tile = self.tile["T"]
        sizes, tile_item, tile_first = [], [], []
        for i, item in enumerate(items):
            n = item.out.shape[-1] if item.w is None else item.w.numel()
            assert item.out.is_contiguous()
            assert item.w is None or item.w.is_contiguous()
            sizes.append(n)
            for first in range(0, triton.cdiv(n, self.tile["E"]), groups_a_tile):
                tile_item.append(i)
                tile_first.append(first)
        device = items[0].out.device
        return (
            torch.tensor(tile_item, dtype=torch.int32, device=device),
            torch.tensor(tile_first, dtype=torch.int64, device=device),
            torch.tensor([item.out.data_ptr() for item in items], dtype=torch.int64, device=device),
            torch.tensor([0 if t.w is None else t.w.data_ptr() for t in items], dtype=torch.int64, device=device),
            torch.tensor(sizes, dtype=torch.int64, device=device),
            torch.tensor([signed(item.pid) for item in items], dtype=torch.int32, device=device),
            torch.tensor([item.group for item in items], dtype=torch.int32, device=device),
        )

    def add_compensated(self, seeds_Q: Tensor, coefs_GQ: Tensor, factors_G: Tensor) -> None:
        """Of items whose w is what rounding took."""
        for dtype, _, (tile_item, tile_first, outs, losts, sizes, pids, groups) in self.launches:
            _many_compensated_kernel[(len(tile_item),)](
                tile_item, tile_first, outs, losts, sizes, pids, groups, seeds_Q, coefs_GQ, factors_G, Q=len(seeds_Q),
                DTYPE=TL_DTYPE[dtype], **self.tile,
            )  # fmt: skip

    def draw(self, seeds_PQ: Tensor, coefs_GPQ: Tensor) -> None:
        parts, queries = seeds_PQ.shape
        for dtype, has_w, tables in self.launches:
            _many_kernel[(len(tables[0]), parts)](
                *tables,
                seeds_PQ,
                coefs_GPQ,
                P=parts,
                Q=queries,
                DTYPE=TL_DTYPE[dtype],
                HAS_W=has_w,
                **self.tile,
            )
