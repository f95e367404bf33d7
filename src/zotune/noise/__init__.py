"""z = noise(seed, parameter, element): a function, not a stream.

Definition 1. Philox4x32-10 (Salmon et al. 2011, Random123) with the 64-bit seed as key (low word, high word) and the
counter (block low, block high, parameter id, stream). The block counts within the whole, unsharded parameter in row-major
order, so device, dtype, shard, order and batch of parameters change nothing:

    gaussian    element i: block i // 4, lane i % 4. Words x0…x3 make two Box–Muller pairs, (x0, x1) and (x2, x3):
                u = ((x0 >> 8) + 1)·2⁻²⁴, t = (x1 >> 8)·2⁻²⁴, (z0, z1) = √(−2 ln u)·(cos 2πt, sin 2πt).
    rademacher  element i: block i // 128, word (i % 128) // 32, bit i % 32; +1 where the bit is 0, −1 where it is 1.

Three backends draw it: `reference` (plain torch), `cpu` (numba), `cuda` (Triton). They agree bit for bit on signs and to
1e-6 on normals. The environment variable ZOTUNE_NOISE_BACKEND names one to use everywhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOISE_VERSION = 1
DIRECTIONS = ("gaussian", "rademacher")
BACKENDS = ("reference", "cpu", "cuda")

STEPS_PART = 1 << 17  # elements that take many steps in a row

_WORD = 0xFFFFFFFF


class Stream(IntEnum):
    """The last counter word: draws for different purposes never meet."""

    NOISE = 0
    MASK = 1
    ROUNDING = 2
    SEED = 3
    SAMPLE = 4


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in plain integers: four 32-bit words of a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _WORD, (a >> 32) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def step_seed(run_seed: int, step: int, query: int = 0, row: int = 0) -> int:
    """The 64-bit seed of one direction: the first two words of Philox at counter (step, query, row, SEED), key run_seed.

    run_seed: taken modulo 2⁶⁴. step, query, row: below 2³².
    """
    low, high, _, _ = philox((step, query, row, Stream.SEED), (run_seed & _WORD, run_seed >> 32 & _WORD))
    return low | high << 32


def parameter_id(name: str) -> int:
    """32 bits of a parameter's qualified name: the first four bytes, low first, of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def parameter_ids(names: Iterable[str]) -> dict[str, int]:
    """The ids of all names. Raises ValueError where two names share one: they would draw the same noise."""
    ids: dict[str, int] = {}
    owner: dict[int, str] = {}
    for name in names:
        ids[name] = parameter_id(name)
        other = owner.setdefault(ids[name], name)
        if other != name:
            raise ValueError(f"parameters {other!r} and {name!r} share the noise id {ids[name]}; rename one of them")
    return ids


def backend_for(device: torch.device) -> Any:
    """The module that draws on a device: numba on the CPU, Triton on CUDA where it is installed, else the reference."""
    name = os.environ.get("ZOTUNE_NOISE_BACKEND") or _default_backend(device.type)
    if name not in BACKENDS:
        raise ValueError(f"ZOTUNE_NOISE_BACKEND={name!r}: choose from {', '.join(BACKENDS)}")
    return _module(name)


@cache
def _default_backend(device: str) -> str:
    if device == "cpu":
        return "cpu"
    return "cuda" if device == "cuda" and find_spec("triton") else "reference"


@cache
def _module(name: str) -> Any:
    return import_module(f"zotune.noise.{name}")


def fill(out: Tensor, seed: int, pid: int, direction: str, start: int = 0) -> None:
    """out ← z[start : start + n]. out: 1-D float32."""
    import torch

    seeds = torch.tensor([seed - (1 << 64) if seed >> 63 else seed], dtype=torch.int64, device=out.device)
    one = torch.ones(1, device=out.device)
    add_noise(out, torch.zeros_like(out), seeds, one, pid, direction, start)


def kept(count: int, seed_1: Tensor, pid: int, sparsity: float, start: int = 0) -> Tensor:
    """(count,) bool, False for a fraction `sparsity` of the elements start, start + 1, … of a parameter.

    Element i is left out where its word (block i // 4, word i % 4, stream MASK) is under sparsity·2³², rounded. seed_1: (1,) int64,
    the seed's bit pattern, on the device that is to have the result; kernels read it there.
    """
    result: Tensor = backend_for(seed_1.device).kept(count, seed_1, pid, min(round(sparsity * 2**32), _WORD), start)
    return result


def kept_rows(rows_K: Tensor, width: int, seed_1: Tensor, pid: int, sparsity: float) -> Tensor:
    """(K, width) bool: `kept` of the rows named (int64) of a parameter with so many elements a row."""
    backend = backend_for(rows_K.device)
    result: Tensor = backend.kept_rows(rows_K, width, seed_1, pid, min(round(sparsity * 2**32), _WORD))
    return result


def add_noise(
    out: Tensor, w: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str, start: int = 0
) -> None:
    """out ← w + Σ_q coefs_Q[q]·z(seeds_Q[q])[start : start + n], summed in order of q and rounded once to w's dtype.

    w: any shape, float32, bfloat16, float16 or float64; element i of it in row-major order is element start + i of the
    parameter. out: the same shape and dtype, w itself or another tensor. seeds_Q: (Q,) int64, the seeds' bit patterns;
    coefs_Q: (Q,) float32 (float64 is used in full with float64 weights); both on w's device, where kernels read them.
    The sum is in float32 (float64 for float64 weights), rounded to nearest even. A zero coefficient adds nothing at all:
    where all are zero, out is w bit for bit.
    """
    backend_for(w.device).add_noise(out, w, seeds_Q, coefs_Q, pid, direction, start)


def add_noise_steps(w: Tensor, seeds_SQ: Tensor, coefs_SQ: Tensor, pid: int, direction: str) -> None:
    """w ← w + Σ_q coefs[s][q]·z(seeds[s][q]) for one step s after the other, in place, each rounded as `add_noise` rounds it.

    A part of w that stays in cache takes all steps before the next part is touched.
    """
    backend = backend_for(w.device)
    if hasattr(backend, "add_noise_steps") and w.is_contiguous():
        backend.add_noise_steps(w, seeds_SQ, coefs_SQ, pid, direction)
        return
    flat = w.view(-1) if w.is_contiguous() else w.reshape(-1)
    for first in range(0, flat.numel(), STEPS_PART):
        part = flat[first : first + STEPS_PART]
        for seeds_Q, coefs_Q in zip(seeds_SQ, coefs_SQ, strict=True):
            backend.add_noise(part, part, seeds_Q, coefs_Q, pid, direction, first)
    if not w.is_contiguous():
        w.copy_(flat.view(w.shape))


def add_noise_compensated(
    w: Tensor,
    residual: Tensor,
    seeds_Q: Tensor,
    coefs_Q: Tensor,
    pid: int,
    direction: str,
    factor: float | Tensor = 1.0,
) -> None:
    """t = factor·(w + residual) + Σ_q coefs_Q[q]·z(seeds_Q[q]), then w ← t rounded and residual ← t − w, rounded; in place.

    residual: as w in shape and dtype. Sums in float32 (float64 for float64 weights). Nothing changes where all coefficients are
    zero and factor is 1. factor: a number, or 0-d float32 on w's device, where kernels read it.
    """
    import torch

    backend = backend_for(w.device)
    if hasattr(backend, "add_noise_compensated") and w.is_contiguous():
        backend.add_noise_compensated(w, residual, seeds_Q, coefs_Q, pid, direction, factor)
        return
    if factor == 1 and not bool(coefs_Q.any()):
        return
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    flat, lost = w.reshape(-1), residual.view(-1)
    for first in range(0, flat.numel(), STEPS_PART):
        part = slice(first, first + STEPS_PART)
        total = (flat[part].to(wide) + lost[part].to(wide)) * factor
        backend.add_noise(total, total, seeds_Q, coefs_Q, pid, direction, first)
        flat[part] = total.to(w.dtype)
        lost[part] = (total - flat[part].to(wide)).to(w.dtype)
    if not w.is_contiguous():
        w.copy_(flat.view(w.shape))


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
    """out (K, D…) ← the rows rows_K (int64) of w + Σ_q coefs_Q[q]·z(seeds_Q[q]), for w (R, D…); no other row is read.

    update: seeds and coefficients of an `add_noise` that w is still to have; the rows are those of after it, w stays.
    """
    backend_for(w.device).add_noise_rows(out, w, rows_K, seeds_Q, coefs_Q, pid, direction, update)


def add_noise_at(
    out: Tensor, w: Tensor, starts_K: Tensor, seeds_Q: Tensor, coefs_Q: Tensor, pid: int, direction: str
) -> None:
    """out (K, D) ← w (K, D) + Σ_q coefs_Q[q]·z(seeds_Q[q]) as `add_noise` has it, for rows that lie anywhere in a parameter.

    Row k of w is the parameter's elements starts_K[k] … starts_K[k] + D − 1; int64, on w's device. Both contiguous; out may be w.
    """
    backend_for(w.device).add_noise_at(out, w, starts_K, seeds_Q, coefs_Q, pid, direction)


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
    """plus, minus ← w ± coef_1·z(seed_1)[start : start + n]: the two copies of `add_noise`, w read once, z drawn once.

    update: seeds and coefficients of an `add_noise` that w takes first, in place and rounded, on the same read; the copies are
    of what is stored. w is contiguous then.
    """
    backend_for(w.device).add_noise_both(plus, minus, w, seed_1, coef_1, pid, direction, start, update)


@dataclass(frozen=True)
class Item:
    """A tensor of `add_noise_many`: w (n elements, or None for zeros), where its parts go, its parameter id and its group.

    out: P·n elements in a row, part after part; w itself where P is 1 and the sum is to stay in place.
    """

    out: Tensor
    w: Tensor | None
    pid: int
    group: int = 0


class _Planned:
    """Items that stay where they are in memory as long as this object is used, and what a backend has to know of them."""

    def __init__(self, items: Sequence[Item], direction: str) -> None:
        self.items, self.direction = list(items), direction
        self._plan: Any = None

    def _plan_of(self, backend: Any) -> Any:
        """A launch over all of them; None where the backend takes one tensor after the other."""
        if self._plan is None and hasattr(backend, "ManyPlan"):
            self._plan = backend.ManyPlan(self.items, self.direction)
        return self._plan


class Many(_Planned):
    """`add_noise` for many small tensors at once: one launch on CUDA.

    out_p ← w + Σ_q coefs_GPQ[group][p][q]·z(seeds_PQ[p][q]) for each item and part p.
    """

    def draw(self, seeds_PQ: Tensor, coefs_GPQ: Tensor) -> None:
        """seeds_PQ: (P, Q) int64; coefs_GPQ: (G, P, Q) float32; both contiguous, on the items' device."""
        if not self.items:
            return
        backend = backend_for(self.items[0].out.device)
        if (plan := self._plan_of(backend)) is not None:
            plan.draw(seeds_PQ, coefs_GPQ)
            return
        parts = len(seeds_PQ)
        for item in self.items:
            out_Pn = item.out.view(parts, -1)
            w = out_Pn.new_zeros(out_Pn.shape[1]) if item.w is None else item.w.detach().reshape(-1)
            for out_n, seeds_Q, coefs_Q in zip(out_Pn, seeds_PQ, coefs_GPQ[item.group], strict=True):
                backend.add_noise(out_n, w, seeds_Q, coefs_Q, item.pid, self.direction)


class ManyCompensated(_Planned):
    """`add_noise_compensated` for many small tensors at once, to the same bits: one launch on CUDA.

    Of an item out is a weight and w what rounding took from it, both contiguous.
    """

    def add(self, seeds_Q: Tensor, coefs_GQ: Tensor, factors_G: Tensor) -> None:
        """seeds_Q: (Q,) int64; coefs_GQ, factors_G: by parameter group, float32; all contiguous, on the items' device."""
        if not self.items:
            return
        if (plan := self._plan_of(backend_for(self.items[0].out.device))) is not None:
            plan.add_compensated(seeds_Q, coefs_GQ, factors_G)
            return
        for item in self.items:
            lost: Any = item.w
            factor = float(factors_G[item.group])
            add_noise_compensated(item.out, lost, seeds_Q, coefs_GQ[item.group], item.pid, self.direction, factor)
