"""Directions from the rows' own inputs: ΔW = ε·u·vᵀ of each linear map, for one row and place alone.

v is of the row (`zotune.engines.inputs`), the same at all its places: one more forward a batch, at θ, tells it. u is noise of
the parameter `NAME.U`. All else that trains stays as it is. The update is one product a map,

    W ← W + Σ_i (Σ_q c_iq·u_iq)·v_iᵀ,

rounded once. It is no function of seeds and scalars: who wants it again needs the rows.
"""

# P parts, Q directions of a step (queries × rows), N its rows, O and D the two sides of a map.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.factors import Factored, sides
from zotune.engines.folding import add_product
from zotune.engines.inputs import AnswerTokens, InputVectors
from zotune.engines.lowrank import LowRankEngine, LowRankReads
from zotune.engines.parts import PartedReads, Parts, Values
from zotune.engines.places import Places, rows_in
from zotune.engines.writing import Writer


class OwnInputsEngine(LowRankEngine):
    """`LowRankEngine` of rank 1 whose v are the rows' own. A step's places give each row of a batch a direction of its own."""

    def __init__(self, directions: Directions, forward_tokens: int | None = None) -> None:
        super().__init__(directions, 1, forward_tokens)
        self.inputs = InputVectors(directions)
        self.factored = Outputs(directions, self.inputs)
        self.writer = OwnInputsWriter(self.factored)

    @property
    def moving(self) -> Sequence[torch.nn.Parameter]:
        return self.inputs.maps

    def losses(self, loss: Callable[[Any], Any], batch: Any, places: Places) -> Tensor:
        self.overlook(loss, batch, places)
        return super().losses(loss, batch, places)

    def overlook(self, loss: Callable[[Any], Any], batch: Any, places: Places) -> None:
        """v of these rows, by a forward at θ."""
        rows = rows_in(batch) if isinstance(batch, Mapping) else len(places.shares)
        if places.shares != (1,) * rows:
            raise ValueError("directions from the rows' own inputs: each row has its own; use groups='batch'")
        first = min((copy.first for copy in places.copies if copy.sign), default=0)
        rows_of_step = len(places.at.seeds_Q) // max(1, places.queries)
        self.inputs.look(lambda: self._run(lambda: loss(batch)), AnswerTokens(batch, rows), first, rows_of_step)

    def loss(self, closure: Callable[[], Any], at: Displacement | HeldDisplacement) -> Any:
        if len(at.seeds_Q):
            raise ValueError("directions from the rows' own inputs displace each row by itself: ask for `losses`")
        return super().loss(closure, at)

    def _reads(self, at: Displacement | HeldDisplacement, parts: Parts) -> PartedReads:
        return _OwnInputsReads(self, at, parts, {}, self.factored.drawn(at))


class Outputs(Factored):
    """u (Q, O, 1) of each map, on the side of its outputs."""

    def __init__(self, directions: Directions, inputs: InputVectors) -> None:
        super().__init__(directions, 1, inputs.maps)  # which are found in a first forward
        self.inputs = inputs

    def sides_of(self, param: torch.nn.Parameter) -> tuple[tuple[int, int], ...]:
        return ((sides(param)[1 - self.inputs.side[id(param)]], self.ids_of(param)[0]),)


class _OwnInputsReads(LowRankReads):
    engine: OwnInputsEngine

    def factors_of(self, weight: Any) -> tuple[Tensor, Tensor]:
        (u_QO1,), v_BD1 = self.factors.of[id(weight)], self.engine.inputs.of_batch(weight)
        return (u_QO1, v_BD1) if self.engine.inputs.side[id(weight)] else (v_BD1, u_QO1)

    def entry_of(self, device: torch.device) -> Tensor:
        return self.parts.firsts(device)

    def copy(self, param: Any, part: int) -> Tensor:
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        (u_QO1,), v_BD1 = self.factors.of[id(param)], self.engine.inputs.of_batch(param)
        u_O1, v_D1 = u_QO1[self.parts.direction_P[part]].to(wide), v_BD1[self.parts.first_P[part]].to(wide)
        move = self._scale(self.engine.directions.slots[id(param)].group, wide, u_O1.device)[part] * (u_O1 @ v_D1.t())
        moved: Tensor = param.data.to(wide) + (move if self.engine.inputs.side[id(param)] else move.t())
        return moved.to(param.dtype)

    def values_of(self, param: Tensor) -> Values | None:
        """None of a map: u and v have entries of their own, which the kernels of adapters do not tell apart."""
        return None if self.is_param(param) else super().values_of(param)

    def rows(self, ids: Tensor, weight: Any) -> Any:
        return NotImplemented


class OwnInputsWriter(Writer):
    """The update, of the step whose places were evaluated last."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__(outputs.directions)
        self.outputs = outputs

    def apply(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        outputs, inputs, count = self.outputs, self.outputs.inputs, len(by.seeds_Q)
        if count == 0:
            return
        if inputs.rows == 0 or count % inputs.rows:
            raise ValueError(
                "directions from the rows' own inputs: only a step whose losses were evaluated can be applied"
            )
        for param, drawn in outputs.in_turn(by):
            v_ND = inputs.of_step[id(param)][..., 0]
            wide = torch.float64 if param.dtype == torch.float64 else torch.float32
            c_QN1 = by.on(self.directions.slots[id(param)].group, param.device)[1].to(wide).view(-1, inputs.rows, 1)
            sum_NO = (drawn.of[id(param)][0].view(len(c_QN1), inputs.rows, -1) * c_QN1).sum(0)
            left, right = (sum_NO, v_ND.to(wide)) if inputs.side[id(param)] else (v_ND.to(wide), sum_NO)
            add_product(param.data, left.t(), right)

    def apply_compensated(
        self,
        by: Displacement | HeldDisplacement,
        residuals: Sequence[Tensor],
        factors: Sequence[float | Tensor] = (),
        at_once: int = 1,
    ) -> None:
        raise ValueError("rounding='compensated': not of directions from the rows' own inputs; use 'nearest'")

    def apply_each(self, moves: Sequence[Displacement], at_once: int = 1) -> None:
        raise ValueError("directions from the rows' own inputs: recorded steps need the rows that they were of")
