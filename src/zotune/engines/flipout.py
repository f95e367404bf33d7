"""A direction for each row out of one: z_i = U∘(r_i·s_iᵀ), U normal and shared by the rows of a step, r_i and s_i signs of row i.

    y_i = x_i·Wᵀ ± ε·r_i∘((s_i∘x_i)·Uᵀ)

so all rows share the product with U, and each has a direction of full rank that is uncorrelated with the others'. The update is

    W ← W + U∘(Σ_i c_i·r_i·s_iᵀ)

one product of the signs for each matrix, rounded once. A vector is a matrix of one column. U is noise of the parameter under the
seed of the step's first direction, r_i and s_i are those of NAME.U and NAME.V under the row's own.

Sources: Flipout, Wen et al., arXiv 1803.04386; GRZO, arXiv 2606.02857.
"""

# P parts, Q directions (rows), O and D the two sides of a parameter, n rows of what the model computes.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.factors import Factored, sides
from zotune.engines.lowrank import LowRankEngine, LowRankReads
from zotune.engines.parts import PartedReads, Parts, Values
from zotune.engines.places import Places
from zotune.engines.writing import Writer

TILE_BYTES = 16 << 20  # of U that is drawn at a time


class FlipoutEngine(LowRankEngine):
    """The losses at places of directions that share one normal draw."""

    factored: Signs

    def __init__(self, directions: Directions, forward_tokens: int | None = None) -> None:
        super().__init__(directions, 1, forward_tokens)
        self.factored = Signs(directions)
        self.writer = FlipoutWriter(self.factored)
        self.base: Displacement | HeldDisplacement = Displacement()  # the step's first direction, whose seed U has

    def losses(self, loss: Callable[[Any], Any], batch: Any, places: Places) -> Tensor:
        self.base = places.at.some(0, 1)
        return super().losses(loss, batch, places)

    def loss(self, closure: Callable[[], Any], at: Displacement | HeldDisplacement) -> Any:
        self.base = at.some(0, 1)
        return super().loss(closure, at)

    def _reads(self, at: Displacement | HeldDisplacement, parts: Parts) -> PartedReads:
        return _FlipoutReads(self, at, parts, self.factored.drawn(at))


class Signs(Factored):
    """r (Q, O, 1) and s (Q, D, 1) of every parameter, and U by tiles."""

    def __init__(self, directions: Directions) -> None:
        super().__init__(directions, 1, [p for p in directions.params if p.dim()])
        self.distribution = "rademacher"

    def shared(
        self, param: torch.nn.Parameter, base: Displacement | HeldDisplacement
    ) -> Iterator[tuple[slice, Tensor]]:
        """U, so many of its rows at a time (rows, D), in the parameter's dtype: which, and a tile that is the next one's too."""
        slot, (rows, width) = self.directions.slots[id(param)], sides(param)
        seed_1, _ = base.on(slot.group, param.device)
        each = max(1, TILE_BYTES // max(1, width * param.element_size()))
        tile, one = param.data.new_empty(min(each, rows), width), torch.ones(1, device=param.device)
        for first in range(0, rows, each):
            some = tile[: min(each, rows - first)].zero_()
            noise.add_noise(some, some, seed_1, one, slot.id, self.directions.distribution, first * width)
            yield slice(first, first + len(some)), some

    def shared_rows(self, param: torch.nn.Parameter, rows_K: Tensor, base: Displacement | HeldDisplacement) -> Tensor:
        """(K, D): the named rows of U alone."""
        slot = self.directions.slots[id(param)]
        seed_1, _ = base.on(slot.group, param.device)
        out, one = param.data.new_empty(len(rows_K), sides(param)[1]), torch.ones(1, device=param.device)
        nothing = param.data.new_zeros(1, 1).expand(sides(param))
        noise.add_noise_rows(out, nothing, rows_K, seed_1, one, slot.id, self.directions.distribution)
        return out


class _FlipoutReads(LowRankReads):
    engine: FlipoutEngine

    def __init__(self, engine: FlipoutEngine, at: Displacement | HeldDisplacement, parts: Parts, factors: Any) -> None:
        PartedReads.__init__(self, parts, engine.moving, {})
        self.engine, self.at, self.factors, self.rank = engine, at, factors, 1
        self._scales: dict[tuple[int, torch.dtype], Tensor] = {}
        for param in engine.factored.params:
            if param.dim() == 1:
                self.stacks[id(param)] = torch.stack([self.copy(param, part) for part in range(len(parts))])

    def _signs(self, param: Any) -> tuple[Tensor, Tensor]:
        """r (P, O) and s (P, D) of each part."""
        which_P = self.parts.tables(param.device)[0]
        r_QO1, s_QD1 = self.factors.of[id(param)]
        return r_QO1[which_P, :, 0], s_QD1[which_P, :, 0]

    def copy(self, param: Any, part: int) -> Tensor:
        own = self.parts.direction_P[part]
        r_O1, s_D1 = (t[own] for t in self.factors.of[id(param)])
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        scale = self._scale(self.engine.directions.slots[id(param)].group, wide, param.device)[part]
        moved = param.data.view(sides(param)).to(wide)
        moved = moved if moved.data_ptr() != param.data.data_ptr() else moved.clone()
        for some, u in self.engine.factored.shared(param, self.engine.base):
            moved[some] += scale * u.to(wide) * r_O1[some].to(wide) * s_D1[:, 0].to(wide)
        return moved.to(param.dtype).view(param.shape)

    def values_of(self, param: Tensor) -> Values | None:
        """None of a matrix: its parts' values are no product of two factors."""
        inside = param.dim() > 1 and self.is_param(param)
        return None if inside else PartedReads.values_of(self, param)

    def product(self, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
        return self._flipped(torch.nn.functional.linear(x, weight.data), x, weight, 1, bias)

    def _addmm(self, bias: Any, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
        if not self.is_param(weight) or not self.is_batch(x) or out is not None or beta != 1 or alpha != 1:
            return NotImplemented
        shift = self.stack_of(bias)
        if shift is None and self.is_parted(bias):
            return NotImplemented
        return self._flipped(x @ weight.data, x, weight, 0, bias if shift is None else shift)

    def _flipped(self, y: Tensor, x: Tensor, weight: Any, side: int, bias: Any) -> Tensor:
        """y + scale·out∘((in∘x)·U) + bias, each part with its own signs, y changed in place. side: of the weight, x's."""
        signs, n = self._signs(weight), x.shape[0]
        scale_P = self._scale(self.engine.directions.slots[id(weight)].group, y.dtype, y.device)
        into, out = signs[side].to(y.dtype), signs[1 - side].to(y.dtype) * scale_P[:, None]
        if self.parts.equal:
            x_PMD, y_PMO = (self.parts.by_part(t).flatten(1, -2) for t in (x.to(y.dtype), y))
        else:  # parts of different sizes: each row (of the batch) with signs of its own
            x_PMD, y_PMO = (t.view(n, -1, t.shape[-1]) for t in (x.to(y.dtype), y))
            into, out = self.parts.rows_of(into, n), self.parts.rows_of(out, n)
        x_PMD, total = x_PMD * into[:, None], None
        for some, u in self.engine.factored.shared(weight, self.engine.base):
            if side:
                y_PMO[..., some] += out[:, None, some] * (x_PMD @ u.mT.to(y.dtype))
            else:
                term = x_PMD[..., some] @ u.to(y.dtype)
                total = term if total is None else total + term
        if total is not None:
            y_PMO += out[:, None] * total
        return y if bias is None else self.plus_bias(y, bias)

    def rows(self, ids: Tensor, weight: Any) -> Any:
        if weight.dim() != 2:
            return NotImplemented
        y = torch.nn.functional.embedding(ids, weight.data)
        r_PO, s_PD = self._signs(weight)
        n, flat_nM = len(ids), ids.reshape(len(ids), -1)
        part_n = torch.arange(len(self.parts), device=ids.device)
        part_n = self.parts.rows_of(part_n, n)
        scale_P = self._scale(self.engine.directions.slots[id(weight)].group, y.dtype, y.device)
        u_nMD = self.engine.factored.shared_rows(weight, flat_nM.flatten(), self.engine.base).view(*flat_nM.shape, -1)
        sign_nM = (r_PO[part_n[:, None], flat_nM] * scale_P[part_n, None]).to(y.dtype)
        return y.add_((sign_nM[..., None] * u_nMD.to(y.dtype) * s_PD[part_n, None].to(y.dtype)).view(y.shape))


class FlipoutWriter(Writer):
    """θ ← θ + U∘(Σ c_i·r_i·s_iᵀ), of all directions of one step, which share their U."""

    def __init__(self, signs: Signs) -> None:
        super().__init__(signs.directions)
        self.signs = signs

    def apply(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        signs = self.signs
        if not len(by.seeds_Q):
            return
        for param, drawn in signs.in_turn(by):
            wide = torch.float64 if param.dtype == torch.float64 else torch.float32
            r_QO, s_QD = (t[..., 0].to(wide) for t in drawn.of[id(param)])
            c_Q = by.on(self.directions.slots[id(param)].group, param.device)[1].to(wide)
            left_OQ, matrix = (r_QO * c_Q[:, None]).mT, param.data.view(sides(param))
            moves = c_Q.any()  # of a step that a graph skips, not even the sign of a zero changes
            for some, u in signs.shared(param, by.some(0, 1)):
                new = torch.addcmul(matrix[some].to(wide), u.to(wide), left_OQ[some] @ s_QD).to(param.dtype)
                matrix[some] = torch.where(moves, new, matrix[some])

    def apply_compensated(
        self,
        by: Displacement | HeldDisplacement,
        residuals: Sequence[Tensor],
        factors: Sequence[float | Tensor] = (),
        at_once: int = 1,
    ) -> None:
        raise ValueError("rounding='compensated': not of directions that share a draw; use 'nearest'")

    def apply_each(self, moves: Sequence[Displacement], at_once: int = 1) -> None:
        for by in moves:
            self.apply(by)
