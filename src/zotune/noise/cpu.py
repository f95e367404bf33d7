# mypy: disable-error-code="no-untyped-def,attr-defined"
"""The noise on the CPU, by numba: loops that LLVM turns into vector code, over chunks that stay in the first cache.

Every chunk is computed whole and at a fixed alignment, also where only a part of it is wanted, so that an element has the
same bits in every shard, slice and thread count.
"""

# Loops run over blocks b of a chunk; words of a chunk lie in one array a lane (structure of arrays).

from __future__ import annotations

import contextlib
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import numba
import numpy as np
import torch
from numba import float32, int32, njit, prange, uint32, uint64
from torch import Tensor

from zotune.noise import Stream

# torch's OpenMP threads spin for a while after each operation and starve threads of any other kind; numba's own OpenMP
# layer gets along with them. The choice is the user's where they made one, and numba's where there is no such layer.
if numba.config.THREADING_LAYER == "default" and find_spec("numba.np.ufunc.omppool"):
    with contextlib.suppress(ImportError):
        import_module("numba.np.ufunc.omppool")
        numba.config.THREADING_LAYER = "omp"

CHUNK = 2048  # elements: 512 blocks of normals, 16 blocks of signs
THREADED = 1 << 16  # elements from which a second thread pays
STAGED = 1 << 20  # elements at a time where torch does the conversion

_NORMAL_BLOCKS, _SIGN_BLOCKS = CHUNK // 4, CHUNK // 128
_MUL0, _MUL1, _HALF = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57), np.uint64(32)
_KEY0, _KEY1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_f = np.float32

# ln(1 + x) = x − x²/2 + x³·P(x) on [√½ − 1, √2 − 1], the relative error of P under 9e-8 (Chebyshev fit).
_P = tuple(
    _f(c)
    for c in (
        0.06971611827611923,
        -0.11479733884334564,
        0.11685419827699661,
        -0.12425687164068222,
        0.14249058067798615,
        -0.1666780263185501,
        0.20000715553760529,
        -0.2499999701976776,
        0.3333333134651184,
    )
)
_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7, _P8 = _P
# sin 2πt = t·S(t²), cos 2πt = C(t²) on [−1/8, 1/8] turns, absolute errors under 3e-9 and 5e-11 (Chebyshev fits).
_S0, _S1, _S2, _S3 = _f(-75.401611328125), _f(81.59254455566406), _f(-41.3416633605957), _f(6.2831854820251465)
_C0, _C1, _C2, _C3 = _f(59.22016906738281), _f(-85.4428482055664), _f(64.93931579589844), _f(-19.739208221435547)
_LN2_HIGH, _LN2_LOW = _f(0.693359375), _f(-2.12194440e-4)  # ln 2; the first part times an exponent is exact
_SQRT_HALF = np.int32(0x3F3504F3)  # bits of √½
_24 = _f(2.0**-24)


@njit(inline="always")
def _round(c0, c1, c2, c3, k0, k1):
    a = uint64(c0) * _MUL0
    b = uint64(c2) * _MUL1
    return uint32(b >> _HALF) ^ c1 ^ k0, uint32(b), uint32(a >> _HALF) ^ c3 ^ k1, uint32(a)


@njit(nogil=True, cache=True)
def _words(x0, x1, x2, x3, blocks, first, pid, stream, seed):
    for b in range(blocks):
        block = first + uint64(b)
        c0, c1, c2, c3 = uint32(block), uint32(block >> _HALF), pid, stream
        k0, k1 = uint32(seed), uint32(seed >> _HALF)
        # written out, since a loop in here would keep the one around it from becoming vector code
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0, k1 = uint32(k0 + _KEY0), uint32(k1 + _KEY1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0, k1 = uint32(k0 + _KEY0), uint32(k1 + _KEY1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0, k1 = uint32(k0 + _KEY0), uint32(k1 + _KEY1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0, k1 = uint32(k0 + _KEY0), uint32(k1 + _KEY1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0, k1 = uint32(k0 + _KEY0), uint32(k1 + _KEY1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0, k1 = uint32(k0 + _KEY0), uint32(k1 + _KEY1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0, k1 = uint32(k0 + _KEY0), uint32(k1 + _KEY1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0, k1 = uint32(k0 + _KEY0), uint32(k1 + _KEY1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0, k1 = uint32(k0 + _KEY0), uint32(k1 + _KEY1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        x0[b] = c0
        x1[b] = c1
        x2[b] = c2
        x3[b] = c3


@njit(nogil=True, cache=True)
def _add_normals(total, coef, radius_words, turn_words, lane, u, m, r):
    """total[4b + lane], total[4b + lane + 1] += coef times the Box–Muller pair of block b."""
    u_bits, m_bits = u.view(np.int32), m.view(np.int32)
    for b in range(_NORMAL_BLOCKS):
        u[b] = float32(int32(radius_words[b] >> uint32(8)) + int32(1)) * _24
    for b in range(_NORMAL_BLOCKS):  # u = 2^e·m with m in [√½, √2)
        e = (u_bits[b] - _SQRT_HALF) >> int32(23)
        m_bits[b] = u_bits[b] - (e << int32(23))
        r[b] = float32(e)
    for b in range(_NORMAL_BLOCKS):
        x, e = m[b] - _f(1), r[b]
        p = _P0
        p = p * x + _P1
        p = p * x + _P2
        p = p * x + _P3
        p = p * x + _P4
        p = p * x + _P5
        p = p * x + _P6
        p = p * x + _P7
        p = p * x + _P8
        square = x * x
        low = (p * square * x + e * _LN2_LOW) - _f(0.5) * square
        r[b] = np.sqrt(_f(-2) * ((x + low) + e * _LN2_HIGH))
    for b in range(_NORMAL_BLOCKS):
        turn = int32(turn_words[b] >> uint32(8))
        quarter = (turn + int32(1 << 21)) >> int32(22)
        t = float32(turn - (quarter << int32(22))) * _24
        square = t * t
        sine = (((_S0 * square + _S1) * square + _S2) * square + _S3) * t
        cosine = (((_C0 * square + _C1) * square + _C2) * square + _C3) * square + _f(1)
        odd = (quarter & int32(1)) != int32(0)
        x = sine if odd else cosine
        y = cosine if odd else sine
        if ((quarter + int32(1)) & int32(2)) != int32(0):
            x = -x
        if (quarter & int32(2)) != int32(0):
            y = -y
        total[4 * b + lane] += coef * (r[b] * x)
        total[4 * b + lane + 1] += coef * (r[b] * y)


@njit(inline="always")
def _in_order(word, x0, x1, x2, x3):
    for b in range(_SIGN_BLOCKS):
        word[4 * b], word[4 * b + 1], word[4 * b + 2], word[4 * b + 3] = x0[b], x1[b], x2[b], x3[b]


@njit(nogil=True, cache=True)
def _add_signs(total, coef, x0, x1, x2, x3, word):
    _in_order(word, x0, x1, x2, x3)
    for k in range(4 * _SIGN_BLOCKS):
        bits = word[k]
        for j in range(32):
            total[32 * k + j] += coef * float32(int32(1) - (int32((bits >> uint32(j)) & uint32(1)) << int32(1)))


@njit(nogil=True, cache=True)
def _buffers(total, gaussian, coefs):
    """Room for a chunk's words, and, for one direction of signs alone, ±its coefficient for all signs that a byte can hold.

    Then what `_look_up` moves, as it moves it: a view costs more than a chunk should.
    """
    words, word = np.empty((4, _NORMAL_BLOCKS), np.uint32), np.empty(4 * _SIGN_BLOCKS, np.uint32)
    table = np.empty((256 if not gaussian and coefs.size == 1 and coefs[0] != _f(0) else 0, 8), np.float32)
    for byte in range(table.shape[0]):
        for j in range(8):
            table[byte, j] = -coefs[0] if (byte >> j) & 1 else coefs[0]
    views = total.view(np.uint64), table.view(np.uint64), word.view(np.uint8)
    return words, word, np.empty((3, _NORMAL_BLOCKS), np.float32), views


@njit(inline="always")
def _look_up(pairs, table, signs):
    """total ← ±coef, what `_add_signs` adds to zeros: eight elements a byte, moved as four pairs."""
    for k in range(signs.size):
        byte = np.intp(signs[k])
        for j in range(4):
            pairs[4 * k + j] = table[byte, j]


@njit(nogil=True, cache=True)
def _sum(total, chunk, seeds, coefs, pid, gaussian, buffers):
    """total ← Σ_q coefs[q]·z(seeds[q]) over the elements of a chunk."""
    words, word, floats, (pairs, table, signs) = buffers
    x0, x1, x2, x3 = words[0], words[1], words[2], words[3]
    if table.size:
        _words(x0, x1, x2, x3, _SIGN_BLOCKS, uint64(chunk * _SIGN_BLOCKS), pid, uint32(0), seeds[0])
        _in_order(word, x0, x1, x2, x3)
        _look_up(pairs, table, signs)
        return
    total[:] = _f(0)
    for q in range(seeds.size):
        if coefs[q] == _f(0):
            continue
        if gaussian:
            _words(x0, x1, x2, x3, _NORMAL_BLOCKS, uint64(chunk * _NORMAL_BLOCKS), pid, uint32(0), seeds[q])
            _add_normals(total, coefs[q], x0, x1, 0, floats[0], floats[1], floats[2])
            _add_normals(total, coefs[q], x2, x3, 2, floats[0], floats[1], floats[2])
        else:
            _words(x0, x1, x2, x3, _SIGN_BLOCKS, uint64(chunk * _SIGN_BLOCKS), pid, uint32(0), seeds[q])
            _add_signs(total, coefs[q], x0, x1, x2, x3, word)


# Elements [first, last) of w, which are elements start + first, … of the parameter.


@njit(nogil=True, cache=True)
def _add_float32(out, w, first, last, start, seeds, coefs, pid, gaussian):
    total = np.empty(CHUNK, np.float32)
    buffers = _buffers(total, gaussian, coefs)
    for chunk in range((start + first) // CHUNK, (start + last + CHUNK - 1) // CHUNK):
        _sum(total, chunk, seeds, coefs, pid, gaussian, buffers)
        shift = chunk * CHUNK - start  # element j of the chunk is element shift + j of w
        low, high = max(0, first - shift), min(CHUNK, last - shift)
        # slices, since an index that might be negative keeps a loop from becoming vector code
        to, here, part = out[shift + low : shift + high], w[shift + low : shift + high], total[low:high]
        for j in range(part.size):
            to[j] = here[j] + part[j]


@njit(nogil=True, cache=True)
def _move_float32(out, w, first, last, start, seeds, coefs, pid, gaussian):
    """`_add_float32` where out is w. A loop over two names of one place would not become vector code."""
    total = np.empty(CHUNK, np.float32)
    buffers = _buffers(total, gaussian, coefs)
    for chunk in range((start + first) // CHUNK, (start + last + CHUNK - 1) // CHUNK):
        _sum(total, chunk, seeds, coefs, pid, gaussian, buffers)
        shift = chunk * CHUNK - start
        low, high = max(0, first - shift), min(CHUNK, last - shift)
        here, part = w[shift + low : shift + high], total[low:high]
        for j in range(part.size):
            here[j] += part[j]


@njit(nogil=True, cache=True)
def _add_bfloat16(out, w, first, last, start, seeds, coefs, pid, gaussian):
    """out and w as their bits, uint16."""
    total, wide = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    buffers = _buffers(total, gaussian, coefs)
    total_bits, wide_bits = total.view(np.uint32), wide.view(np.uint32)
    for chunk in range((start + first) // CHUNK, (start + last + CHUNK - 1) // CHUNK):
        _sum(total, chunk, seeds, coefs, pid, gaussian, buffers)
        shift = chunk * CHUNK - start
        low, high = max(0, first - shift), min(CHUNK, last - shift)
        to, here = out[shift + low : shift + high], w[shift + low : shift + high]
        for j in range(here.size):
            wide_bits[j] = uint32(here[j]) << uint32(16)
        for j in range(here.size):
            total[j] = wide[j] + total[low + j]
        for j in range(here.size):
            bits = total_bits[j]
            nearest = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)  # ties to even
            is_nan = (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000)  # which rounding could carry to infinity
            to[j] = np.uint16(uint32(0x7FC0) if is_nan else nearest)


@njit(nogil=True, cache=True)
def _only_sum(out, w, first, last, start, seeds, coefs, pid, gaussian):
    """out ← the sum itself, float32; w is not read."""
    total = np.empty(CHUNK, np.float32)
    buffers = _buffers(total, gaussian, coefs)
    for chunk in range((start + first) // CHUNK, (start + last + CHUNK - 1) // CHUNK):
        _sum(total, chunk, seeds, coefs, pid, gaussian, buffers)
        shift = chunk * CHUNK - start
        low, high = max(0, first - shift), min(CHUNK, last - shift)
        out[shift + low : shift + high] = total[low:high]


@njit(nogil=True, cache=True)
def _both_float32(plus, minus, w, first, last, start, update_seeds, update_coefs, seeds, coefs, pid, gaussian):
    """The update first, in place, where it has pairs."""
    total = np.empty(CHUNK, np.float32)
    moves, buffers = _buffers(total, gaussian, update_coefs), _buffers(total, gaussian, coefs)
    for chunk in range((start + first) // CHUNK, (start + last + CHUNK - 1) // CHUNK):
        shift = chunk * CHUNK - start
        low, high = max(0, first - shift), min(CHUNK, last - shift)
        here, part = w[shift + low : shift + high], total[low:high]
        if update_seeds.size:
            _sum(total, chunk, update_seeds, update_coefs, pid, gaussian, moves)
            for j in range(part.size):
                here[j] += part[j]
        _sum(total, chunk, seeds, coefs, pid, gaussian, buffers)
        up, down = plus[shift + low : shift + high], minus[shift + low : shift + high]
        for j in range(part.size):
            up[j] = here[j] + part[j]
        for j in range(part.size):
            down[j] = here[j] - part[j]


@njit(parallel=True, nogil=True, cache=True)
def _both_over_threads(cuts, plus, minus, w, start, update_seeds, update_coefs, seeds, coefs, pid, gaussian):
    for k in prange(cuts.size - 1):
        first, last = cuts[k], cuts[k + 1]
        _both_float32(plus, minus, w, first, last, start, update_seeds, update_coefs, seeds, coefs, pid, gaussian)


@njit(nogil=True, cache=True)
def _kept(out, start, seed, pid, stream, edge):
    """out[i] ← whether the word of element start + i is at least edge."""
    words = np.empty((4, _NORMAL_BLOCKS), np.uint32)
    x0, x1, x2, x3 = words[0], words[1], words[2], words[3]
    for chunk in range(start // CHUNK, (start + out.size + CHUNK - 1) // CHUNK):
        _words(x0, x1, x2, x3, _NORMAL_BLOCKS, uint64(chunk * _NORMAL_BLOCKS), pid, stream, seed)
        shift = chunk * CHUNK - start
        for j in range(max(0, -shift), min(CHUNK, out.size - shift)):
            out[shift + j] = words[j & 3, j >> 2] >= edge


_NONE = torch.empty(0, dtype=torch.int64), torch.empty(0)  # no pairs


def _parallel(kernel: Any) -> Any:
    @njit(parallel=True, nogil=True, cache=True)
    def over(cuts, out, w, start, seeds, coefs, pid, gaussian):
        for k in prange(cuts.size - 1):
            kernel(out, w, cuts[k], cuts[k + 1], start, seeds, coefs, pid, gaussian)

    return over


_PARALLEL = {kernel: _parallel(kernel) for kernel in (_add_float32, _move_float32, _add_bfloat16, _only_sum)}


def _over_threads(kernel: Any, n: int, start: int, out: Any, w: Any, *rest: Any) -> None:
    """The kernel over [0, n), cut at chunk borders among as many threads as torch uses."""
    cuts = _cuts(n, start)
    if len(cuts) == 2:
        kernel(out, w, 0, n, start, *rest)
        return
    numba.set_num_threads(len(cuts) - 1)
    _PARALLEL[kernel](cuts, out, w, start, *rest)


def _cuts(n: int, start: int) -> Any:
    """Borders of the threads' parts of [0, n), at whole chunks of the parameter."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, n // THREADED + 1)
    inner = [-(-(start + n * k // threads) // CHUNK) * CHUNK - start for k in range(1, threads)]
    return np.array([0, *(min(n, max(0, cut)) for cut in inner), n])


def _add_flat(out: Tensor, w: Tensor, seeds: Any, coefs: Any, pid: int, direction: str, start: int) -> None:
    """1-D contiguous out and w."""
    n, tail = w.numel(), (np.uint32(pid), direction == "gaussian")
    narrow = coefs.astype(np.float32)
    if w.dtype == torch.float32:
        kernel = _move_float32 if out.data_ptr() == w.data_ptr() else _add_float32
        _over_threads(kernel, n, start, out.numpy(), w.numpy(), seeds, narrow, *tail)
    elif w.dtype == torch.bfloat16:
        bits_out, bits_w = out.view(torch.uint16).numpy(), w.view(torch.uint16).numpy()
        _over_threads(_add_bfloat16, n, start, bits_out, bits_w, seeds, narrow, *tail)
    else:  # torch converts float16, and adds in float64
        for first in range(0, n, STAGED):
            part = slice(first, min(n, first + STAGED))
            staged = torch.empty(part.stop - part.start)
            if w.dtype == torch.float16:
                _over_threads(
                    _only_sum, len(staged), start + first, staged.numpy(), staged.numpy(), seeds, narrow, *tail
                )
                out[part] = (w[part].float() + staged).half()
                continue
            total = torch.zeros(len(staged), dtype=torch.float64)
            for q in np.flatnonzero(coefs):
                one = np.ones(1, np.float32)
                _over_threads(
                    _only_sum, len(staged), start + first, staged.numpy(), staged.numpy(), seeds[q : q + 1], one, *tail
                )
                total += float(coefs[q]) * staged.double()
            out[part] = w[part] + total


def kept(count: int, seed_1: Tensor, pid: int, edge: int, start: int) -> Tensor:
    """See `zotune.noise.kept`; edge: words under it are left out."""
    out = np.empty(count, np.bool_)
    _kept(out, start, seed_1.numpy().view(np.uint64)[0], np.uint32(pid), np.uint32(Stream.MASK), np.uint32(edge))
    return torch.from_numpy(out)


def kept_rows(rows_K: Tensor, width: int, seed_1: Tensor, pid: int, edge: int) -> Tensor:
    """See `zotune.noise.kept_rows`."""
    rows = [kept(width, seed_1, pid, edge, row * width) for row in rows_K.tolist()]
    return torch.stack(rows) if rows else torch.empty(0, width, dtype=torch.bool)


def add_noise(
    out: Tensor, w: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str, start: int = 0
) -> None:
    """See `zotune.noise.add_noise`."""
    seeds, coefs = seeds_Q.numpy().view(np.uint64), coefs_Q.numpy()
    if not coefs.any():
        out.copy_(w)
        return
    flat = w.detach().reshape(-1)  # a copy only where w is a permuted view
    if out.is_contiguous():
        _add_flat(out.detach().view(-1), flat, seeds, coefs, pid, direction, start)
    else:
        result = torch.empty_like(flat)
        _add_flat(result, flat, seeds, coefs, pid, direction, start)
        out.copy_(result.view(w.shape))


def add_noise_at(
    out: Tensor, w: Tensor, starts_K: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str
) -> None:
    """See `zotune.noise.add_noise_at`."""
    seeds, coefs = seeds_Q.numpy().view(np.uint64), coefs_Q.numpy()
    if not coefs.any():
        out.copy_(w)
        return
    for out_D, w_D, start in zip(out.detach(), w.detach(), starts_K.tolist(), strict=True):
        _add_flat(out_D, w_D, seeds, coefs, pid, direction, start)


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
    assert update is None or w.is_contiguous()
    if update is not None and not bool(update[1].any()):
        update = None
    if w.dtype != torch.float32:
        if update is not None:
            add_noise(w, w, *update, pid, direction, start)
        add_noise(plus, w, seed_1, coef_1, pid, direction, start)
        add_noise(minus, w, seed_1, -coef_1, pid, direction, start)
        return
    n = w.numel()
    arrays = [t.detach().reshape(-1).numpy() for t in (plus, minus, w)]
    pairs = [(seeds.numpy().view(np.uint64), coefs.numpy()) for seeds, coefs in (update or _NONE, (seed_1, coef_1))]
    tail = (start, *pairs[0], *pairs[1], np.uint32(pid), direction == "gaussian")
    cuts = _cuts(n, start)
    if len(cuts) == 2:
        _both_float32(*arrays, 0, n, *tail)  # type: ignore[call-arg]
    else:
        numba.set_num_threads(len(cuts) - 1)
        _both_over_threads(cuts, *arrays, *tail)  # type: ignore[call-arg]


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
    width = prod(w.shape[1:])
    picked_KD = w.detach()[rows_K].reshape(-1, width)
    for some_seeds, some_coefs in (update or _NONE, (seeds_Q, coefs_Q)):
        seeds, coefs = some_seeds.numpy().view(np.uint64), some_coefs.numpy()
        if coefs.any():
            for picked_D, row in zip(picked_KD, rows_K.tolist(), strict=True):
                _add_flat(picked_D, picked_D, seeds, coefs, pid, direction, row * width)
    out.copy_(picked_KD.view(out.shape))
