"""Directions that each reach one of K random sets of the elements: z = √K·ε on its set, zero on the others.

An element's set is a function of the run's seed, its parameter and its number, so nothing is stored and every element has one: its
word w of the stream of masks (`zotune.noise.kept`) is in [k/K, (k + 1)/K)·2³². A direction's set is named by the lowest byte of its
seed, so that a record of seeds and coefficients is enough. With variance 1 an element, as z of the whole has.

Source: CoPES, arXiv 2608.02391.
"""

# Q directions, K sets, n elements.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Displacement, HeldDisplacement, signed
from zotune.directions.masks import MaskedDirections

BYTE = 0xFF
MOST_SETS = BYTE + 1


def seed_in(seed: int, which: int) -> int:
    """The seed whose lowest byte names that set."""
    return seed & ~BYTE | which


class PartitionedDirections(MaskedDirections):
    """sets: K. seed: of the run, which deals the elements out."""

    def __init__(
        self, groups: Sequence[Sequence[tuple[str, torch.nn.Parameter]]], distribution: str, sets: int, seed: int
    ) -> None:
        super().__init__(groups, distribution)
        self.sets, self._seed = sets, signed(noise.step_seed(seed, 0, BYTE))

    def kept(self, param: torch.nn.Parameter, first: int, count: int) -> Tensor | None:
        return None  # each element by some direction

    def set_of(self, param: torch.nn.Parameter, first: int, count: int) -> Tensor:
        """(n,) int64: the set of elements first, first + 1, … of a parameter."""
        seed_1 = torch.full((1,), self._seed, dtype=torch.int64, device=param.device)
        pid, found = self.slots[id(param)].id, torch.zeros(count, dtype=torch.int64, device=param.device)
        for k in range(1, self.sets):
            found += noise.kept(count, seed_1, pid, k / self.sets, first)
        return found

    def displaced_rows(
        self,
        param: torch.nn.Parameter,
        rows_K: Tensor,
        by: Displacement | HeldDisplacement,
        out: Tensor,
        update: Displacement | HeldDisplacement | None = None,
    ) -> Tensor:
        assert update is None
        seed_1 = torch.full((1,), self._seed, dtype=torch.int64, device=param.device)
        slot, width = self.slots[id(param)], math.prod(param.shape[1:])
        set_KD = torch.zeros(len(rows_K), width, dtype=torch.int64, device=param.device)
        for k in range(1, self.sets):
            set_KD += noise.kept_rows(rows_K, width, seed_1, slot.id, k / self.sets)
        seeds, coefs = by.on(slot.group, param.device)
        out.copy_(param.data[rows_K])
        moved = torch.empty_like(out)
        for inside, own in self._by_set(set_KD.view(out.shape), seeds, coefs):
            noise.add_noise_rows(moved, param.data, rows_K, seeds, own, slot.id, self.distribution)
            torch.where(inside, moved, out, out=out)
        return out

    def apply_each(self, moves: Sequence[Displacement], params: Sequence[torch.nn.Parameter] | None = None) -> None:
        for by in moves:
            self.apply(by, params)

    def _add(
        self, out: Tensor, w: Tensor, seeds: Tensor, coefs: Tensor, param: torch.nn.Parameter, start: int = 0
    ) -> None:
        # out may be w: each element is written by the pass of its own set alone
        slot, sets_n = self.slots[id(param)], self.set_of(param, start, w.numel())
        moved = torch.empty_like(w)
        if out is not w:
            out.copy_(w)
        for inside, own in self._by_set(sets_n.view(w.shape), seeds, coefs):
            noise.add_noise(moved, w, seeds, own, slot.id, self.distribution, start)
            torch.where(inside, moved, out, out=out)

    def _by_set(self, sets: Tensor, seeds_Q: Tensor, coefs_Q: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Where each set's directions reach, and their coefficients there, zeros for the others. Of one direction once."""
        scaled_Q, which_Q = coefs_Q * math.sqrt(self.sets), seeds_Q & BYTE
        if len(seeds_Q) == 1:
            return [(sets == which_Q, scaled_Q)]
        return [(sets == k, torch.where(which_Q == k, scaled_Q, torch.zeros_like(scaled_Q))) for k in range(self.sets)]
