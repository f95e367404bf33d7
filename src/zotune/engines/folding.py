"""Low-rank updates folded into the weights: W += Σ c·U·Vᵀ/√r, one product for each parameter and many directions at once."""

# Q directions, R rank, O and D the two sides of a parameter.

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from zotune.directions import Displacement, HeldDisplacement, joined
from zotune.engines.factors import Factored, Factors, sides
from zotune.engines.parts import kernels_for
from zotune.engines.writing import Writer

MOST_AT_ONCE = 1024  # rank of an update that is folded in one pass over a parameter
FOLDS_ROOM = 256 << 20  # bytes of the factors of folds that one pass takes
LAUNCH = 65_535  # parts of one launch that draws factors


class FoldingWriter(Writer):
    """θ ← θ + Σ c·U·Vᵀ/√r + Σ c·z, as many directions summed before rounding as a step (or its part) has: `at_once`."""

    def __init__(self, factored: Factored) -> None:
        super().__init__(factored.directions)
        self.factored, self.rank = factored, factored.rank
        self._many: dict[Any, Any] = {}

    def apply(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        """One product for each factored parameter and so many directions at once.

        Where that is more than a forward's, the factors of one parameter at a time are drawn.
        """
        self._apply(by, at_once, {})

    def apply_compensated(
        self,
        by: Displacement | HeldDisplacement,
        residuals: Sequence[Tensor],
        factors: Sequence[float | Tensor] = (),
        at_once: int = 1,
    ) -> None:
        if any(isinstance(factor, Tensor) or factor != 1 for factor in factors):
            raise ValueError(
                "rounding='compensated': engine lowrank does not decay weights beside it; leave weight_decay at 0"
            )
        self._apply(by, at_once, {id(p): lost for p, lost in zip(self.directions.params, residuals, strict=True)})

    def _apply(self, by: Displacement | HeldDisplacement, at_once: int, lost: dict[int, Tensor]) -> None:
        """lost: what rounding took, by parameter, where that is kept."""
        each = min(at_once, max(1, MOST_AT_ONCE // self.rank))
        for first in range(0, len(by.seeds_Q), each):
            some = by.some(first, first + each)
            self._fold_each(some, lost)
            if lost:
                self.directions.apply_compensated(
                    some, [lost[id(p)] for p in self.factored.dense], params=self.factored.dense
                )
            else:
                self.directions.apply(some, self.factored.dense)

    def apply_each(self, moves: Sequence[Displacement], at_once: int = 1) -> None:
        """`apply` of one after the other, to the bit; on CUDA a tile of a weight takes many before the next tile is read."""
        found, each = (
            [kernels_for(p, "fold_kernels") for p in self.factored.params],
            min(at_once, max(1, MOST_AT_ONCE // self.rank)),
        )
        if not found or None in found or self.directions.scattered:
            for by in moves:
                self.apply(by, at_once)
            return
        folds = [by.some(n, n + each) for by in moves for n in range(0, len(by.seeds_Q), each)]
        for _, some in groupby(folds, key=lambda by: len(by.seeds_Q)):  # how a fold is summed depends on its length
            self._folded(found[0], list(some))
        self.directions.apply_each(folds, self.factored.dense)

    def _folded(self, kernels: Any, folds: Sequence[Displacement]) -> None:
        """The factored parameters take folds of one length."""
        each = len(folds[0].seeds_Q)
        largest = max((sum(sides(p)) * p.element_size() for p in self.factored.params), default=1)
        many = max(1, min(FOLDS_ROOM // (each * largest * self.rank), LAUNCH // each, len(folds)))
        count = many * each * largest * self.rank
        room = {p.dtype: p.data.new_empty(count // p.element_size()) for p in self.factored.params}
        for first in range(0, len(folds), many):
            by = joined(folds[first : first + many])
            for param in self.factored.params:
                drawn = Factors(self.factored, len(by.seeds_Q), [param], room[param.dtype])
                drawn.draw(by)
                scaled_Q = by.on(self.directions.slots[id(param)].group, param.device)[1] / math.sqrt(self.rank)
                kernels.folds(param.data.view(param.shape[0], -1), *drawn.of[id(param)], scaled_Q.view(-1, each))

    def _fold_each(self, by: Displacement | HeldDisplacement, lost: dict[int, Tensor]) -> None:
        """One product for each factored parameter; on CUDA, where the factors of all are at hand, one launch for all of a kind."""
        scaled: dict[int, Tensor] = {}
        together: dict[tuple[int, torch.dtype, bool], list[Any]] = {}
        held = self.factored.has_room_for(len(by.seeds_Q))
        for param, drawn in self.factored.in_turn(by):
            if not param.numel():  # a process that holds nothing of it
                continue
            group, kernels = self.directions.slots[id(param)].group, kernels_for(param, "fold_kernels")
            if group not in scaled:
                scaled[group] = by.on(group, param.device)[1] / math.sqrt(self.rank)
            matrix = param.data.view(param.shape[0], -1)
            mine = None if id(param) not in lost else lost[id(param)].view(matrix.shape)
            if kernels is not None and held and type(drawn) is Factors:  # all at once in memory
                one = kernels.Fold(matrix, *drawn.of[id(param)], mine)
                together.setdefault((group, param.dtype, one.even), []).append(one)
            else:
                fold = _fold if kernels is None else kernels.fold
                u_QOR, v_QDR = drawn.of[id(param)]
                fold(matrix, u_QOR, v_QDR, scaled[group], mine)
        for kind, some in together.items():
            if kind not in self._many:
                self._many[kind] = kernels_for(some[0].matrix_ND, "fold_kernels").FoldMany()
            self._many[kind].run(some, scaled[kind[0]])


def _fold(matrix_OD: Tensor, u_QOR: Tensor, v_QDR: Tensor, scaled_Q: Tensor, lost_OD: Tensor | None = None) -> None:
    """W += Σ_q scaled_q·U_q·V_qᵀ, the sum in float32 (float64 for float64 weights) and rounded once.

    lost: added first, then what rounding took; neither changes where all scales are 0.
    """
    wide = torch.float64 if matrix_OD.dtype == torch.float64 else torch.float32
    if lost_OD is not None and not bool(scaled_Q.any()):
        return
    left = (u_QOR * scaled_Q.to(wide).view(-1, 1, 1)).permute(1, 0, 2).flatten(1)
    add_product(matrix_OD, left, v_QDR.to(wide).permute(0, 2, 1).flatten(0, 1), lost_OD)


def add_product(matrix_OD: Tensor, left_OK: Tensor, right_KD: Tensor, lost_OD: Tensor | None = None) -> None:
    """W += left·right, rounded once. left and right: float32, float64 for float64 weights. lost: see `_fold`."""
    wide = left_OK.dtype
    if lost_OD is None and matrix_OD.dtype == wide:
        matrix_OD.addmm_(left_OK, right_KD)
        return
    rows = max(1, (16 << 20) // (4 * matrix_OD.shape[1]))
    for first in range(0, len(matrix_OD), rows):
        part = slice(first, first + rows)
        total = matrix_OD[part].to(wide)
        if lost_OD is not None:
            total = total + lost_OD[part].to(wide)
        total = torch.addmm(total, left_OK[part], right_KD)
        matrix_OD[part] = total.to(matrix_OD.dtype)
        if lost_OD is not None:
            lost_OD[part] = (total - matrix_OD[part].to(wide)).to(matrix_OD.dtype)
