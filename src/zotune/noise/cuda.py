# mypy: disable-error-code="no-untyped-def,attr-defined"
"""The noise on CUDA, by Triton: a program draws what its elements need and forgets it.

Seeds and coefficients are read from memory, so that a captured graph can be replayed with new ones. The arithmetic is that of
`zotune.noise.cpu`, names included. With TRITON_INTERPRET=1 the kernels run on the CPU, for tests.
"""

# Q pairs, K rows, D elements a row. A tile is (G, E): G groups of E neighbours that share their words.

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.noise import Item, Stream

NORMAL_GROUP = 4  # elements: one block's two Box–Muller pairs
SIGN_GROUP = (
    16  # elements: two 16-byte accesses of 16-bit weights; the words of 128 signs are drawn by each of 8 groups
)
TILE = 2048  # elements a program
BOTH_TILE, BOTH_WARPS = 2048, 4  # the same, and its warps, where both copies are made
MANY_TILE = 1024  # the same where many small tensors share a launch

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
def _draw(seed, pid, group_G, GAUSSIAN: tl.constexpr, E: tl.constexpr, G: tl.constexpr):
    """(G, E) float32: elements E·group, … of z."""
    if GAUSSIAN:
        x0, x1, x2, x3 = _words(seed, pid, group_G)
        z0, z1 = _pair(x0, x1)
        z2, z3 = _pair(x2, x3)
        return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (G, E))
    else:
        element_G = group_G * E
        x0, x1, x2, x3 = _words(seed, pid, element_G // 128)
        k = (element_G % 128) // 32
        word_G = tl.where(k == 0, x0, tl.where(k == 1, x1, tl.where(k == 2, x2, x3)))
        bit_GE = (element_G % 32).to(tl.uint32)[:, None] + tl.arange(0, E)[None, :].to(tl.uint32)
        return 1.0 - 2.0 * ((word_G[:, None] >> bit_GE) & 1).to(tl.float32)


@triton.jit
def _scaled(coef, seed, pid, group_G, GAUSSIAN: tl.constexpr, E: tl.constexpr, G: tl.constexpr):
    """(G, E): coef·z in coef's dtype; of signs in float32 by the sign bit of coef alone."""
    wide: tl.constexpr = coef.dtype
    if GAUSSIAN or wide == tl.float64:
        scaled_GE = coef * _draw(seed, pid, group_G, GAUSSIAN, E, G).to(wide)
    else:
        element_G = group_G * E
        x0, x1, x2, x3 = _words(seed, pid, element_G // 128)
        k = (element_G % 128) // 32
        word_G = tl.where(k == 0, x0, tl.where(k == 1, x1, tl.where(k == 2, x2, x3)))
        left_GE = 31 - (element_G % 32).to(tl.int32)[:, None] - tl.arange(0, E)[None, :]  # brings the bit to the front
        sign_GE = (word_G[:, None] << left_GE.to(tl.uint32)) & 0x80000000
        scaled_GE = (coef.to(tl.uint32, bitcast=True) ^ sign_GE).to(tl.float32, bitcast=True)
    return scaled_GE


@triton.jit
def _displaced(
    w_GE, group_G, seeds, coefs, Q: tl.constexpr, pid, GAUSSIAN: tl.constexpr, E: tl.constexpr, G: tl.constexpr
):
    """w + Σ_q coefs[q]·z(seeds[q]), rounded once; w itself where every coefficient is zero."""
    wide: tl.constexpr = tl.float64 if w_GE.dtype == tl.float64 else tl.float32
    total_GE = tl.zeros((G, E), dtype=wide)
    nonzero = 0
    for q in range(Q):
        coef = tl.load(coefs + q).to(wide)
        total_GE += _scaled(coef, tl.load(seeds + q), pid, group_G, GAUSSIAN, E, G)
        nonzero += (coef != 0).to(tl.int32)
    return tl.where(nonzero != 0, (w_GE.to(wide) + total_GE).to(w_GE.dtype), w_GE)


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
    G: tl.constexpr,
):
    """Element i of w is element E·group − shift + i of the parameter."""
    step_G = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    at_GE = step_G[:, None] * E + tl.arange(0, E)[None, :] - shift
    inside = (at_GE >= 0) & (at_GE < n)
    w_GE = tl.load(w + at_GE, mask=inside, other=0.0)
    tl.store(out + at_GE, _displaced(w_GE, group + step_G, seeds, coefs, Q, pid, GAUSSIAN, E, G), mask=inside)


@triton.jit(do_not_specialize=["pid"])
def _rows_kernel(
    out, w, rows, D, seeds, coefs, Q: tl.constexpr, update_seeds, update_coefs, U: tl.constexpr, pid,
    GAUSSIAN: tl.constexpr, E: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """U: pairs of the update that the rows take first; 0 for none."""
    start = tl.load(rows + tl.program_id(0)) * D
    group = start // E
    step_G = tl.program_id(1).to(tl.int64) * G + tl.arange(0, G)
    at_GE = step_G[:, None] * E + tl.arange(0, E)[None, :] - (start - group * E)
    inside = (at_GE >= 0) & (at_GE < D)
    w_GE = tl.load(w + start + at_GE, mask=inside, other=0.0)
    if U > 0:
        w_GE = _displaced(w_GE, group + step_G, update_seeds, update_coefs, U, pid, GAUSSIAN, E, G)
    into = out + tl.program_id(0).to(tl.int64) * D + at_GE
    tl.store(into, _displaced(w_GE, group + step_G, seeds, coefs, Q, pid, GAUSSIAN, E, G), mask=inside)


@triton.jit(do_not_specialize=["pid"])
def _both_kernel(
    plus, minus, w, n, group, shift, seed, coef, update_seeds, update_coefs, U: tl.constexpr, pid,
    GAUSSIAN: tl.constexpr, E: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """U: pairs of the update that w takes first, in place; 0 for none."""
    step_G = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    at_GE = step_G[:, None] * E + tl.arange(0, E)[None, :] - shift
    inside = (at_GE >= 0) & (at_GE < n)
    # a product reads the copies next: they are to stay in cache, and the weight to make room for them
    w_GE = tl.load(w + at_GE, mask=inside, other=0.0, eviction_policy="evict_first")
    if U > 0:
        w_GE = _displaced(w_GE, group + step_G, update_seeds, update_coefs, U, pid, GAUSSIAN, E, G)
        tl.store(w + at_GE, w_GE, mask=inside, cache_modifier=".cs")
    wide: tl.constexpr = tl.float64 if w_GE.dtype == tl.float64 else tl.float32
    moved_GE = _scaled(tl.load(coef).to(wide), tl.load(seed), pid, group + step_G, GAUSSIAN, E, G)
    w_wide = w_GE.to(wide)
    tl.store(plus + at_GE, (w_wide + moved_GE).to(w_GE.dtype), mask=inside, eviction_policy="evict_last")
    tl.store(minus + at_GE, (w_wide - moved_GE).to(w_GE.dtype), mask=inside, eviction_policy="evict_last")


@triton.jit(do_not_specialize=["pid", "S"])
def _steps_kernel(
    w, n, seeds, coefs, S, Q: tl.constexpr, pid, GAUSSIAN: tl.constexpr, E: tl.constexpr, G: tl.constexpr
):
    """S steps of a tile, each rounded."""
    step_G = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    at_GE = step_G[:, None] * E + tl.arange(0, E)[None, :]
    inside = at_GE < n
    w_GE = tl.load(w + at_GE, mask=inside, other=0.0)
    for s in range(S):
        w_GE = _displaced(w_GE, step_G, seeds + s * Q, coefs + s * Q, Q, pid, GAUSSIAN, E, G)
    tl.store(w + at_GE, w_GE, mask=inside)


@triton.jit(do_not_specialize=["pid"])
def _compensated_kernel(
    w, lost, n, seeds, coefs, factor_at, Q: tl.constexpr, pid, GAUSSIAN: tl.constexpr, E: tl.constexpr, G: tl.constexpr
):
    """w + lost ← factor·(w + lost) + Σ_q coefs[q]·z(seeds[q]): w rounded, lost what that took."""
    factor = tl.load(factor_at)
    step_G = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    at_GE = step_G[:, None] * E + tl.arange(0, E)[None, :]
    inside = at_GE < n
    w_GE = tl.load(w + at_GE, mask=inside, other=0.0)
    lost_GE = tl.load(lost + at_GE, mask=inside, other=0.0)
    wide: tl.constexpr = tl.float64 if w_GE.dtype == tl.float64 else tl.float32
    before_GE = (w_GE.to(wide) + lost_GE.to(wide)) * factor
    total_GE = tl.zeros((G, E), dtype=wide)
    moves = factor != 1.0
    for q in range(Q):
        coef = tl.load(coefs + q).to(wide)
        total_GE += _scaled(coef, tl.load(seeds + q), pid, step_G, GAUSSIAN, E, G)
        moves = moves | (coef != 0)
    total_GE += before_GE
    new_GE = tl.where(moves, total_GE.to(w_GE.dtype), w_GE)
    tl.store(w + at_GE, new_GE, mask=inside)
    rest_GE = (total_GE - new_GE.to(wide)).to(w_GE.dtype)
    tl.store(lost + at_GE, tl.where(moves, rest_GE, lost_GE), mask=inside)


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
    G: tl.constexpr,
):
    """Tile t of part p: elements tile_first[t]·E, … of item tile_item[t]."""
    item = tl.load(tile_item + tl.program_id(0))
    part = tl.program_id(1)
    n = tl.load(sizes + item)
    pid = tl.load(pids + item)
    step_G = tl.load(tile_first + tl.program_id(0)) + tl.arange(0, G)
    at_GE = step_G[:, None] * E + tl.arange(0, E)[None, :]
    inside = at_GE < n
    out = tl.load(outs + item).to(tl.pointer_type(DTYPE)) + part * n
    if HAS_W:
        w_GE = tl.load(tl.load(ws + item).to(tl.pointer_type(DTYPE)) + at_GE, mask=inside, other=0.0)
    else:
        w_GE = tl.zeros((G, E), dtype=DTYPE)
    own = coefs + (tl.load(groups + item) * P + part) * Q
    tl.store(out + at_GE, _displaced(w_GE, step_G, seeds + part * Q, own, Q, pid, GAUSSIAN, E, G), mask=inside)


@triton.jit(do_not_specialize=["pid", "edge"])
def _kept_kernel(out, n, block, shift, seeds, pid, edge, STREAM: tl.constexpr, G: tl.constexpr):
    """Element i of out is element 4·block − shift + i of the parameter."""
    step_G = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    low = ((block + step_G) & 0xFFFFFFFF).to(tl.uint32)
    high = (((block + step_G) >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    x0, x1, x2, x3 = tl.philox(tl.load(seeds), low, high, zero + pid.to(tl.uint32, bitcast=True), zero + STREAM, 10)
    word_GE = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (G, 4))
    at_GE = step_G[:, None] * 4 + tl.arange(0, 4)[None, :] - shift
    tl.store(out + at_GE, word_GE >= edge.to(tl.uint32, bitcast=True), mask=(at_GE >= 0) & (at_GE < n))


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


def _shape(direction: str, tile: int = TILE) -> dict[str, Any]:
    gaussian = direction == "gaussian"
    group = NORMAL_GROUP if gaussian else SIGN_GROUP
    return {"GAUSSIAN": gaussian, "E": group, "G": tile // group}


def _signed(pid: int) -> int:
    return pid - (1 << 32) if pid >> 31 else pid


def kept(count: int, seed_1: Tensor, pid: int, edge: int, start: int) -> Tensor:
    """See `zotune.noise.kept`; edge: words under it are left out."""
    out = torch.empty(count, dtype=torch.bool, device=seed_1.device)
    if count:
        grid = (triton.cdiv(count + start % 4, TILE),)
        _kept_kernel[grid](
            out, count, start // 4, start % 4, seed_1, _signed(pid), _signed(edge), STREAM=int(Stream.MASK), G=TILE // 4
        )
    return out


def kept_rows(rows_K: Tensor, width: int, seed_1: Tensor, pid: int, edge: int) -> Tensor:
    """See `zotune.noise.kept_rows`."""
    out = torch.empty(len(rows_K), width, dtype=torch.bool, device=seed_1.device)
    if out.numel():
        _kept_rows_kernel[(triton.cdiv(out.numel(), TILE),)](
            out, rows_K, out.numel(), width, seed_1, _signed(pid), _signed(edge), STREAM=int(Stream.MASK), SIZE=TILE
        )
    return out


def add_noise(
    out: Tensor, w: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str, start: int = 0
) -> None:
    """See `zotune.noise.add_noise`."""
    if w.numel() == 0:
        return
    w_flat, tile = w.detach().reshape(-1).contiguous(), _shape(direction)  # no copy where w lies in order
    out_flat = out.detach().view(-1) if out.is_contiguous() else torch.empty_like(w_flat)
    shift = start % tile["E"]
    grid = (triton.cdiv(w_flat.numel() + shift, TILE),)
    group = start // tile["E"]
    _add_kernel[grid](
        out_flat, w_flat, w_flat.numel(), group, shift, seeds_Q, coefs_Q, len(seeds_Q), _signed(pid), **tile
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
    width, tile = prod(w.shape[1:]), _shape(direction)
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
        _signed(pid),
        **tile,
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
    w_flat, tile = w.detach().reshape(-1).contiguous(), _shape(direction, BOTH_TILE)
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
        _signed(pid),
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
    _steps_kernel[grid](w, w.numel(), seeds_SQ, coefs_SQ, steps, queries, _signed(pid), **_shape(direction))


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
        w, residual, w.numel(), seeds_Q, coefs_Q, factor, len(seeds_Q), _signed(pid), **_shape(direction)
    )


_TL_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


class ManyPlan:
    """What a launch over many tensors has to know of them, on the device; items of one dtype share a launch."""

    def __init__(self, items: Sequence[Item], direction: str) -> None:
        self.tile = _shape(direction) | {"G": MANY_TILE // _shape(direction)["E"]}
        kinds: dict[Any, list[Item]] = {}
        for item in items:
            kinds.setdefault((item.out.dtype, item.w is not None), []).append(item)
        self.launches = [(dtype, has_w, self._tables(items)) for (dtype, has_w), items in kinds.items()]

    def _tables(self, items: Sequence[Item]) -> tuple[Tensor, ...]:
        groups_a_tile = self.tile["G"]
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
            torch.tensor([_signed(item.pid) for item in items], dtype=torch.int32, device=device),
            torch.tensor([item.group for item in items], dtype=torch.int32, device=device),
        )

    def draw(self, seeds_PQ: Tensor, coefs_GPQ: Tensor) -> None:
        parts, queries = seeds_PQ.shape
        for dtype, has_w, tables in self.launches:
            _many_kernel[(len(tables[0]), parts)](
                *tables,
                seeds_PQ,
                coefs_GPQ,
                P=parts,
                Q=queries,
                DTYPE=_TL_DTYPE[dtype],
                HAS_W=has_w,
                **self.tile,
            )
