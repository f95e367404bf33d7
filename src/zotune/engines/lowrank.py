"""Low-rank directions: z = U·Vᵀ/√r beside one shared product with W, which is never copied or perturbed.

    y = x·Wᵀ ± ε·(x·V)·Uᵀ/√r

so each row of a batch, or group of rows, can have a direction of its own, and its own coefficient from its own two losses, in
one forward over the doubled batch. The factors of a parameter NAME of shape (O, …) with D elements a row are noise of the
parameters `NAME.U` (O·r elements) and `NAME.V` (D·r), rounded to the weights' dtype; vectors keep a dense z.

Sources: GRZO, arXiv 2606.02857 (a direction per row); EGGROLL, arXiv 2511.16652.
"""

# P parts, G directions, R rank, O and D the two sides of a parameter, n rows of what the model computes.

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Directions, Displacement, HeldDisplacement, joined
from zotune.engines.following import FollowingEngine, capturing
from zotune.engines.parts import PartedReads, Parts, Unfollowed, Values, kernels_for
from zotune.engines.sequential import same_draws
from zotune.engines.stacks import Stacks

MOST_AT_ONCE = 128  # rank of an update that is folded in one pass over a parameter
FOLDS_ROOM = 256 << 20  # bytes of the factors of folds that one pass takes
LAUNCH = 65_535  # parts of one launch that draws factors


class LowRankEngine(FollowingEngine):
    """Losses under G low-rank directions, each for its own rows: row i of B under direction i·G // B.

    rank: r. Vectors, and whatever has a side no longer than r, take a dense z of the directions' distribution.
    """

    name = "lowrank"

    def __init__(self, directions: Directions, rank: int = 1) -> None:
        super().__init__(directions)
        self.rank = rank
        self.factored = [p for p in directions.params if p.dim() > 1 and rank < min(_sides(p))]
        chosen = {id(p) for p in self.factored}
        self.dense = [p for p in directions.params if id(p) not in chosen]
        names = {directions.slots[id(p)].name for p in directions.params}
        own = [f"{directions.slots[id(p)].name}.{side}" for p in self.factored for side in "UV"]
        self._ids = noise.parameter_ids([*names, *own])
        self._stacks: dict[int, Stacks] = {}
        self._factors: dict[int, _Factors] = {}  # by the number of directions that probes have
        self.readers: dict[
            tuple[int, int], list[torch.nn.Parameter]
        ] = {}  # weights that take one x, by the first and its side
        self._folds: dict[int, list[_Factors]] = {}  # by the number folded at once, one a factored parameter

    def both(
        self,
        loss: Callable[[Any], Any],
        batch: Any,
        at: Displacement | HeldDisplacement,
        shares: tuple[int, ...] | None = None,
    ) -> tuple[Any, Any]:
        try:
            return super().both(loss, batch, at, shares)
        except Unfollowed as error:
            raise ValueError(f"engine lowrank: {error}; try engine='dual' or 'sequential' with groups=1") from None

    def loss(
        self, closure: Callable[[], Any], at: Displacement | HeldDisplacement, shares: tuple[int, ...] = (1,)
    ) -> Any:
        """What the closure returns at θ + displacement. shares: rows of each direction, where there are several."""
        if len(at.seeds_Q) == 0:
            return super().loss(closure, at)
        with torch.no_grad(), self._reads(at, shares, 1) as mode:
            result = self._run(closure)
        if len(mode.seen) < len(self.directions.params) and self._unread is None:
            unread = next(p for p in self.directions.params if id(p) not in mode.seen)
            raise Unfollowed(f"{self.directions.slots[id(unread)].name} is read by no torch function")
        return result

    def _separate(
        self,
        loss: Callable[[Any], Any],
        batch: Any,
        at: Displacement | HeldDisplacement,
        shares: tuple[int, ...] | None = None,
    ) -> tuple[Any, Any]:
        redraw = same_draws(self.directions.params)
        plus = self.loss(lambda: loss(batch), at, shares or (1,))
        redraw()
        return plus, self.loss(lambda: loss(batch), at.negated(), shares or (1,))

    def replayed(self) -> None:
        """The graph has drawn into the buffers that probes use."""
        for factors in self._factors.values():
            factors.forget()

    def _reads(self, at: Displacement | HeldDisplacement, shares: tuple[int, ...], copies: int) -> PartedReads:
        groups = len(at.seeds_Q)
        parts = copies * groups
        if parts not in self._stacks:
            self._stacks[parts] = Stacks(self.directions, self.dense, parts)
        signs = (1, -1)[:copies]
        self._stacks[parts].draw(at, signs)
        return _LowRankReads(self, at, Parts(shares * copies), self._stacks[parts], self._drawn(at), signs)

    def _drawn(self, at: Displacement | HeldDisplacement) -> _Factors:
        groups = len(at.seeds_Q)
        if groups not in self._factors:
            self._factors[groups] = _Factors(self, groups)
        self._factors[groups].draw(at)
        return self._factors[groups]

    def apply(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        """θ ← θ + Σ c·U·Vᵀ/√r + Σ c·z: one product for each factored parameter and so many directions at once.

        Where that is more than a probe's, the factors of one parameter at a time are drawn.
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
            held = self._drawn(some) if len(some.seeds_Q) in self._factors or not self._factors else None
            if held is None and (count := len(some.seeds_Q)) not in self._folds:
                largest = max((sum(_sides(p)) for p in self.factored), default=0)
                room = {p.dtype: p.data.new_empty(count * largest * self.rank) for p in self.factored}
                self._folds[count] = [_Factors(self, count, [p], room[p.dtype]) for p in self.factored]
            scaled: dict[int, Tensor] = {}
            for i, param in enumerate(self.factored):
                slot = self.directions.slots[id(param)]
                if some.is_zero(slot.group):
                    continue
                drawn = held
                if drawn is None:
                    drawn = self._folds[len(some.seeds_Q)][i]
                    drawn.draw(some, again=True)
                if slot.group not in scaled:
                    scaled[slot.group] = some.on(slot.group, param.device)[1] / math.sqrt(self.rank)
                self._fold(param, drawn, scaled[slot.group], lost.get(id(param)))
            if lost:
                self.directions.apply_compensated(some, [lost[id(p)] for p in self.dense], params=self.dense)
            else:
                self.directions.apply(some, self.dense)

    def apply_each(self, moves: Sequence[Displacement], at_once: int = 1) -> None:
        """`apply` of one after the other, to the bit; on CUDA a tile of a weight takes many before the next tile is read."""
        found, each = [kernels_for(p) for p in self.factored], min(at_once, max(1, MOST_AT_ONCE // self.rank))
        if not found or None in found:
            for by in moves:
                self.apply(by, at_once)
            return
        folds = [by.some(n, n + each) for by in moves for n in range(0, len(by.seeds_Q), each)]
        for _, some in groupby(folds, key=lambda by: len(by.seeds_Q)):  # how a fold is summed depends on its length
            self._folded(found[0], list(some))
        self.directions.apply_each(folds, self.dense)

    def _folded(self, kernels: Any, folds: Sequence[Displacement]) -> None:
        """The factored parameters take folds of one length."""
        each = len(folds[0].seeds_Q)
        largest = max((sum(_sides(p)) * p.element_size() for p in self.factored), default=1)
        many = max(1, min(FOLDS_ROOM // (each * largest * self.rank), LAUNCH // each, len(folds)))
        count = many * each * largest * self.rank
        room = {p.dtype: p.data.new_empty(count // p.element_size()) for p in self.factored}
        for first in range(0, len(folds), many):
            by = joined(folds[first : first + many])
            for param in self.factored:
                drawn = _Factors(self, len(by.seeds_Q), [param], room[param.dtype])
                drawn.draw(by)
                scaled_Q = by.on(self.directions.slots[id(param)].group, param.device)[1] / math.sqrt(self.rank)
                kernels.folds(param.data.view(param.shape[0], -1), *drawn.of[id(param)], scaled_Q.view(-1, each))

    def _fold(self, param: torch.nn.Parameter, drawn: _Factors, scaled_G: Tensor, lost: Tensor | None) -> None:
        matrix = param.data.view(param.shape[0], -1)
        fold = _fold if (kernels := kernels_for(param)) is None else kernels.fold
        fold(matrix, *drawn.of[id(param)], scaled_G, None if lost is None else lost.view(matrix.shape))

    def ids_of(self, param: torch.nn.Parameter) -> tuple[int, int]:
        name = self.directions.slots[id(param)].name
        return self._ids[f"{name}.U"], self._ids[f"{name}.V"]


class _Factors:
    """U (G, O, R) and V (G, D, R) of every factored parameter for G directions, in buffers that are used again."""

    def __init__(
        self,
        engine: LowRankEngine,
        groups: int,
        params: list[torch.nn.Parameter] | None = None,
        memory: Tensor | None = None,
    ) -> None:
        """params: of these alone; in the memory given, which others may use between a draw and the next."""
        self.of: dict[int, tuple[Tensor, Tensor]] = {}
        items, first = [], 0
        self._device = engine.directions.params[0].device
        for param in engine.factored if params is None else params:
            pair = []
            for side, pid in zip(_sides(param), engine.ids_of(param), strict=True):
                count = groups * side * engine.rank
                out = param.data.new_empty(count) if memory is None else memory[first : first + count]
                first += count
                items.append(noise.Item(out.view(groups, -1), None, pid))
                pair.append(out.view(groups, side, engine.rank))
            self.of[id(param)] = pair[0], pair[1]
        self._many = noise.Many(items, engine.directions.distribution)
        self._held: Any = None

    def draw(self, at: Displacement | HeldDisplacement, again: bool = False) -> None:
        """Nothing where the last draw was of the same seeds, unless again: the update wants what the probes had."""
        if isinstance(at, Displacement) and self._held == at.seeds_Q and not capturing() and not again:
            return
        seeds_G, _ = at.on(0, self._device)
        ones = torch.ones(1, len(seeds_G), 1, device=self._device)
        self._many.draw(seeds_G[:, None].contiguous(), ones)
        self._held = at.seeds_Q if isinstance(at, Displacement) else None

    def forget(self) -> None:
        """What is in the buffers is no longer what was last drawn."""
        self._held = None


class _LowRankReads(PartedReads):
    special = PartedReads.special | {torch.addmm: "_addmm"}

    def __init__(
        self,
        engine: LowRankEngine,
        at: Displacement | HeldDisplacement,
        parts: Parts,
        stacks: Stacks,
        factors: _Factors,
        signs: tuple[int, ...],
    ) -> None:
        super().__init__(parts, engine.directions.params, stacks.of)
        self.engine, self.at, self.factors, self.signs = engine, at, factors, signs
        self._scales: dict[tuple[int, torch.dtype], Tensor] = {}
        # the x of the last product, how often it had been written, and scale·x·in by weight
        self._last: tuple[Any, int, dict[int, Tensor]] = None, 0, {}
        self._readers: list[Any] = []
        self._side = 0

    def _scale(self, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(P,): ±ε/√r of each part."""
        key = (group, dtype)
        if key not in self._scales:
            _, coefs_GP1 = self.at.by_part(device, self.signs, self.engine.directions.groups)
            self._scales[key] = (coefs_GP1[group, :, 0] / math.sqrt(self.engine.rank)).to(dtype)
        return self._scales[key]

    def copy(self, param: Any, part: int) -> Tensor:
        u_GOR, v_GDR = self.factors.of[id(param)]
        group = part % len(u_GOR)
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        u, v = u_GOR[group].to(wide), v_GDR[group].to(wide)
        scale = self._scale(self.engine.directions.slots[id(param)].group, wide, u.device)[part]
        return (param.data.view(len(u), -1).to(wide) + scale * (u @ v.t())).to(param.dtype).view(param.shape)

    def values_of(self, param: Tensor) -> Values | None:
        if id(param) not in self.factors.of or not self.is_param(param):
            return super().values_of(param)
        scale_P = self._scale(self.engine.directions.slots[id(param)].group, torch.float32, param.device)
        return Values(param.data.expand(len(self.parts.rows_P), *param.shape), *self.factors.of[id(param)], scale_P)

    def product(self, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
        u_GOR, v_GDR = self.factors.of[id(weight)]
        return self._product(x, weight, weight.data.t(), 1, v_GDR, u_GOR, bias)

    def _addmm(self, bias: Any, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
        """GPT-2's Conv1D: x·W with W (D, O), so that U is on the input's side."""
        if id(weight) not in self.factors.of or not self.is_param(weight) or not self.is_batch(x) or out is not None:
            return NotImplemented
        if beta != 1 or alpha != 1:
            return NotImplemented
        shift = self.stack_of(bias)
        if shift is None and self._is_parted(bias):
            return NotImplemented
        u_GOR, v_GDR = self.factors.of[id(weight)]
        return self._product(x, weight, weight.data, 0, u_GOR, v_GDR, bias if shift is None else shift)

    def _product(
        self, x: Tensor, weight: Any, matrix_DO: Tensor, side: int, in_GDR: Tensor, out_GOR: Tensor, bias: Tensor | None
    ) -> Tensor:
        """(n, …, O): x·W + scale·(x·in)·outᵀ + bias, each part with its own factors and bias. side: of the weight, x's."""
        group = self.engine.directions.slots[id(weight)].group
        kernels = kernels_for(x) if self.parts.equal and x.dtype == weight.dtype else None
        if kernels is not None:
            # The low-rank term and the bias are written first, and the library adds its product to them: no pass of their own.
            t_PMR = self._inner(kernels, x, weight, side, self._scale(group, torch.float32, x.device))
            y = kernels.low_rank_outer(t_PMR, out_GOR, bias, x.dtype).view(-1, out_GOR.shape[1])
            torch.addmm(y, x.reshape(-1, x.shape[-1]), matrix_DO, out=y)
            return y.view(*x.shape[:-1], -1)
        y = torch.nn.functional.linear(x, matrix_DO.t())
        self._add_by_products(y, x, in_GDR, out_GOR, self._scale(group, y.dtype, y.device))
        return y if bias is None else self.plus_bias(y, bias)

    def _inner(self, kernels: Any, x: Tensor, weight: Any, side: int, scale_P: Tensor) -> Tensor:
        """scale·x·in, made at once for the weights that took the same x in an earlier forward."""
        held, version, found = self._last
        if held is None or held() is not x or version != x._version:
            readers = self.engine.readers.setdefault((id(weight), side), [weight])
            found = {}
            self._last = weakref.ref(x), x._version, found
            self._readers, self._side = readers, side
        if id(weight) not in found:
            some = self._readers if self._readers[0] is weight else [weight]
            room = side == self._side and len(self._readers) < kernels.MOST_READERS
            if room and id(weight) not in map(id, self._readers):
                slots, first = self.engine.directions.slots, self._readers[0]
                if first.dtype == weight.dtype and slots[id(first)].group == slots[id(weight)].group:
                    self._readers.append(weight)
            x_PMD = self.parts.by_part(x).flatten(1, -2)
            if x_PMD.stride(-1) != 1:  # a transposed x, whose parts have a row each
                x_PMD = x_PMD.contiguous()
            ins = [self.factors.of[id(w)][side] for w in some]
            t_SPMR = kernels.low_rank_inner(x_PMD, ins, scale_P)
            found |= {id(w): t_PMR for w, t_PMR in zip(some, t_SPMR, strict=True)}
        return found[id(weight)]

    def _add_by_products(self, y: Tensor, x: Tensor, in_GDR: Tensor, out_GOR: Tensor, scale_P: Tensor) -> None:
        copies = len(scale_P) // len(in_GDR)
        x, in_GDR, out_GOR = (t.to(y.dtype) for t in (x, in_GDR, out_GOR))  # under autocast they may be wider
        if self.parts.equal:
            x_PMD, y_PMO = (self.parts.by_part(t).flatten(1, -2) for t in (x, y))
            in_PDR, out_PRO = in_GDR.repeat(copies, 1, 1), out_GOR.transpose(1, 2).repeat(copies, 1, 1)
        else:  # parts of different sizes: each row (of the batch) with factors of its own
            x_PMD, y_PMO = (t.view(t.shape[0], -1, t.shape[-1]) for t in (x, y))
            in_PDR = self.parts.rows_of(in_GDR.repeat(copies, 1, 1), x.shape[0])
            out_PRO = self.parts.rows_of(out_GOR.transpose(1, 2).repeat(copies, 1, 1), x.shape[0])
            scale_P = self.parts.rows_of(scale_P, x.shape[0])
        if len(scale_P) == 1:
            y_PMO[0].addmm_(x_PMD[0] @ in_PDR[0] * scale_P, out_PRO[0])
            return
        y_PMO.baddbmm_(torch.bmm(x_PMD, in_PDR) * scale_P[:, None, None], out_PRO)

    def rows(self, ids: Tensor, weight: Any) -> Any:
        y = torch.nn.functional.embedding(ids, weight.data)
        u_GOR, v_GDR = self.factors.of[id(weight)]
        if v_GDR.shape[1] != y.shape[-1]:
            return NotImplemented
        groups, (n, *_) = len(u_GOR), ids.shape
        each = self.parts.slices(n)
        part_n = torch.cat([torch.full((s.stop - s.start,), p % groups, device=ids.device) for p, s in enumerate(each)])
        scale_P = self._scale(self.engine.directions.slots[id(weight)].group, y.dtype, y.device)
        scale_n = self.parts.rows_of(scale_P, n)
        flat_nM = ids.reshape(n, -1)
        picked_nMR = u_GOR[part_n[:, None], flat_nM] * scale_n[:, None, None]
        y.view(n, -1, y.shape[-1]).baddbmm_(picked_nMR, v_GDR[part_n].transpose(1, 2))
        return y


def _sides(param: Tensor) -> tuple[int, int]:
    return param.shape[0], param.numel() // max(1, param.shape[0])


def _fold(matrix_OD: Tensor, u_GOR: Tensor, v_GDR: Tensor, scaled_G: Tensor, lost_OD: Tensor | None = None) -> None:
    """W += Σ_g scaled_g·U_g·V_gᵀ, the sum in float32 (float64 for float64 weights) and rounded once.

    lost: added first, then what rounding took; neither changes where all scales are 0.
    """
    wide = torch.float64 if matrix_OD.dtype == torch.float64 else torch.float32
    left = (u_GOR * scaled_G.to(wide).view(-1, 1, 1)).permute(1, 0, 2).flatten(1)
    right = v_GDR.to(wide).permute(0, 2, 1).flatten(0, 1)
    if lost_OD is None and matrix_OD.dtype == wide:
        matrix_OD.addmm_(left, right)
        return
    if lost_OD is not None and not bool(scaled_G.any()):
        return
    rows = max(1, (16 << 20) // (4 * matrix_OD.shape[1]))
    for first in range(0, len(matrix_OD), rows):
        part = slice(first, first + rows)
        total = matrix_OD[part].to(wide)
        if lost_OD is not None:
            total = total + lost_OD[part].to(wide)
        total = torch.addmm(total, left[part], right)
        matrix_OD[part] = total.to(matrix_OD.dtype)
        if lost_OD is not None:
            lost_OD[part] = (total - matrix_OD[part].to(wide)).to(matrix_OD.dtype)
