"""Directions in a subspace: z = P·u·Qᵀ of each matrix beside one shared product with W, which is never copied or perturbed.

    y = x·Wᵀ ± ε·((x·Q)·uᵀ)·Pᵀ

P and Q (`zotune.directions.subspaces`) are kept for many steps, so that the products with them are shared by all places of a
forward; u, the core, is each direction's own. Vectors, and what has a side no longer than the rank, keep a dense z, which is a
core of their own shape. An update is the rule's move of the core, Δ, and one product for each matrix, rounded once:

    W ← W + step·P·Δ·Qᵀ
"""

# P parts, Q directions, R rank, O and D the two sides of a matrix, a and b those of its core, n rows of what the model computes.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.directions.subspaces import Subspace, drawn, principal
from zotune.engines.factors import Factored, sides
from zotune.engines.inputs import Tokens, read_inputs
from zotune.engines.lowrank import LowRankEngine, LowRankReads
from zotune.engines.parts import PartedReads, Parts, Values
from zotune.engines.stacks import Stacks
from zotune.engines.writing import Writer

TILE_BYTES = 16 << 20  # of a matrix whose sum with an update is made at a time


class Bases(NamedTuple):
    """P (O, R) and Q (D, R) of a matrix, in its dtype; None: the identity."""

    left: Tensor | None
    right: Tensor | None

    def oriented(self, core: Tensor) -> Tensor:
        """(…, a, b): u, of the core as it is drawn and kept, or the other way round."""
        return core.mT if self.right is None else core


class Cores(Factored):
    """u of each matrix for so many directions, and the bases that it is between.

    u is noise of the parameter NAME.U, or of NAME.V where Q is the identity; the bases are of the others of the two.
    """

    def __init__(self, directions: Directions, subspace: Subspace, rank: int) -> None:
        self.subspace = subspace
        inside = [p for p in directions.params if p.dim() > 1 and self._fits(p, rank)]
        super().__init__(directions, rank, [] if subspace.inputs else inside)
        chosen = {id(p) for p in inside}
        self.dense = [] if subspace.inputs else [p for p in directions.params if id(p) not in chosen]
        self.bases: dict[int, Bases] = {}
        self.turned: int | None = None
        self._source: dict[int, Tensor] = {}  # in the optimizer's state, of bases of inputs

    def _fits(self, param: Tensor, rank: int) -> bool:
        rows, columns = sides(param)
        return (self.subspace.left is None or rank < rows) and (self.subspace.right is None or rank < columns)

    def sides_of(self, param: torch.nn.Parameter) -> tuple[tuple[int, int], ...]:
        """Length and noise id of the core, which is (O, R) or (R, R), or (D, R) of u's transpose where Q is the identity."""
        (rows, columns), (u, v) = sides(param), self.ids_of(param)
        left, right = self.bases[id(param)]
        if right is None:
            return ((columns, v),)
        return ((rows if left is None else self.rank, u),)

    def look(self, state: Any, loss: Callable[[Any], Any] | None, batches: Sequence[Any]) -> int:
        """The bases of the maps' inputs, once: of the first batch, or as the state has them. Returns the forwards that it took."""
        forwards = 0
        if not self._kept(state):
            if loss is None:
                raise ValueError("directions along a model's inputs: a step needs its rows")

            def see(weight: Any, side: int, x: Tensor, tokens: Tokens) -> bool:
                if (inputs_nD := tokens.of(x)) is None:
                    return False
                found[id(weight)] = principal(inputs_nD.nan_to_num(0, 0, 0), self.rank)
                return True

            found: dict[int, Tensor] = {}
            side = read_inputs(self.directions, loss, batches[0], see)
            for param in (p for p in self.directions.params if id(p) in side):
                state[param]["basis"], state[param]["side"] = found[id(param)], side[id(param)]
            forwards = 1
        kept = self._kept(state)
        for param in kept:
            basis = state[param]["basis"]
            if self._source.get(id(param)) is not basis:  # of a state that was loaded another
                self._source[id(param)], mine = basis, basis.to(param.dtype)
                self.bases[id(param)] = Bases(None, mine) if state[param]["side"] else Bases(mine, None)
        self.params[:] = kept
        return forwards

    def _kept(self, state: Any) -> list[torch.nn.Parameter]:
        return [p for p in self.directions.params if p in state and "basis" in state[p]]

    def turn(self, step: int, seed: int, state: Any, carried: Sequence[str]) -> None:
        """The bases of a step of the run of that seed. carried: buffers of the state that go along where they are new."""
        turn = self.subspace.turn(step)
        if turn == self.turned or self.subspace.inputs:
            return
        for param in self.params:
            own = state[param]
            now, of = self._bases_of(param, seed, turn), own.get("turn", turn)  # the turn that the state is of
            if carried and of != turn:
                before = self.bases[id(param)] if self.turned == of else self._bases_of(param, seed, of)
                self._carry(before, now, own, carried)
            own["turn"] = turn
            held = self.bases.setdefault(id(param), now)
            for mine, new in zip(held, now, strict=True):
                if mine is not None and new is not None:
                    mine.copy_(new)  # graphs read it where it is
        self.turned = turn

    def _bases_of(self, param: torch.nn.Parameter, seed: int, turn: int) -> Bases:
        found = []
        for kind, side, pid in zip(
            (self.subspace.left, self.subspace.right), sides(param), self.ids_of(param), strict=True
        ):
            basis = None if kind is None else drawn(kind, side, self.rank, seed, turn, pid, param.device)
            found.append(None if basis is None else basis.to(param.dtype))
        return Bases(*found)

    def _carry(self, before: Bases, now: Bases, own: Any, names: Sequence[str]) -> None:
        """m ← m·(QᵀQ′)/D for a normal Q, the same without D for an orthonormal one; P likewise from the left."""
        for name in names:
            moved = now.oriented(own[name])
            wide = torch.float64 if moved.dtype == torch.float64 else torch.float32
            moved = moved.to(wide)
            for old, new, kind, transposed in (
                (before.left, now.left, self.subspace.left, True),
                (before.right, now.right, self.subspace.right, False),
            ):
                if old is not None and new is not None:
                    map_RR = old.to(wide).mT @ new.to(wide) / (len(old) if kind == "normal" else 1)
                    moved = map_RR.mT @ moved if transposed else moved @ map_RR
            own[name].copy_(now.oriented(moved))


class SubspaceEngine(LowRankEngine):
    """`LowRankEngine` of directions that stay in a subspace."""

    factored: Cores

    def __init__(
        self, directions: Directions, subspace: Subspace, rank: int, forward_tokens: int | None = None
    ) -> None:
        super().__init__(directions, rank, forward_tokens)
        self.factored = Cores(directions, subspace, rank)
        self.writer = SubspaceWriter(self.factored)

    @property
    def moving(self) -> Sequence[torch.nn.Parameter]:
        return [*self.factored.params, *self.factored.dense]

    def _reads(self, at: Displacement | HeldDisplacement, parts: Parts) -> PartedReads:
        if len(parts) not in self._stacks:
            self._stacks[len(parts)] = Stacks(self.directions, self.factored.dense, len(parts))
        stacks = self._stacks[len(parts)]
        stacks.draw(at, parts)
        return _SubspaceReads(self, at, parts, stacks.of, self.factored.drawn(at))


class _SubspaceReads(LowRankReads):
    engine: SubspaceEngine

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rank = 1  # z is P·u·Qᵀ as it is, not over √r

    def _core(self, weight: Any) -> Tensor:
        """(Q, a, b)."""
        return self.engine.factored.bases[id(weight)].oriented(self.factors.of[id(weight)][0])

    def copy(self, param: Any, part: int) -> Tensor:
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        core_ab = self._core(param)[self.parts.direction_P[part]].to(wide)
        scale = self._scale(self.engine.directions.slots[id(param)].group, wide, core_ab.device)[part]
        move = _between(self.engine.factored.bases[id(param)], core_ab)
        return (param.data.view(move.shape).to(wide) + scale * move).to(param.dtype).view(param.shape)

    def values_of(self, param: Tensor) -> Values | None:
        """None of a matrix in the subspace: the kernels of adapters know two factors, and here are three."""
        inside = id(param) in self.engine.factored.bases and self.is_param(param)
        return None if inside else super().values_of(param)

    def product(self, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
        left, right = self.engine.factored.bases[id(weight)]
        y = torch.nn.functional.linear(x, weight.data)
        return self._with_term(y, x, weight, right, self._core(weight).mT, left, bias)

    def _product(
        self, x: Tensor, weight: Any, matrix_DO: Tensor, side: int, in_QDR: Tensor, out_QOR: Tensor, bias: Tensor | None
    ) -> Tensor:
        raise AssertionError("of two factors alone")

    def _addmm(self, bias: Any, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
        if id(weight) not in self.engine.factored.bases or not self.is_param(weight) or not self.is_batch(x):
            return NotImplemented
        shift = self.stack_of(bias)
        if beta != 1 or alpha != 1 or out is not None or (shift is None and self.is_parted(bias)):
            return NotImplemented
        left, right = self.engine.factored.bases[id(weight)]
        y = x @ weight.data
        return self._with_term(y, x, weight, left, self._core(weight), right, bias if shift is None else shift)

    def _with_term(
        self, y: Tensor, x: Tensor, weight: Any, into: Tensor | None, core_Qab: Tensor, out: Tensor | None, bias: Any
    ) -> Tensor:
        """y + scale·((x·into)·core)·outᵀ + bias, each part with its own core: (n, …, O), y changed in place."""
        scale_P = self._scale(self.engine.directions.slots[id(weight)].group, y.dtype, y.device)
        core_Pab = core_Qab.to(y.dtype)[self.parts.tables(y.device)[0]] * scale_P[:, None, None]
        t = x.to(y.dtype)  # under autocast it may be wider
        t = t if into is None else t @ into.to(y.dtype)
        if self.parts.equal:
            t_PMa = self.parts.by_part(t).flatten(1, -2)
        else:  # parts of different sizes: each row (of the batch) with a core of its own
            t_PMa, core_Pab = t.view(t.shape[0], -1, t.shape[-1]), self.parts.rows_of(core_Pab, t.shape[0])
        if out is None:
            y.view(*t_PMa.shape[:2], -1).baddbmm_(t_PMa, core_Pab)
        else:
            y.add_((torch.bmm(t_PMa, core_Pab) @ out.to(y.dtype).mT).view(y.shape))
        return y if bias is None else self.plus_bias(y, bias)

    def rows(self, ids: Tensor, weight: Any) -> Any:
        y = torch.nn.functional.embedding(ids, weight.data)
        left, right = self.engine.factored.bases[id(weight)]
        n, flat_nM = len(ids), ids.reshape(len(ids), -1)
        part_n = self.parts.rows_of(self.parts.tables(ids.device)[0], n)
        scale_P = self._scale(self.engine.directions.slots[id(weight)].group, y.dtype, y.device)
        scale_n11 = self.parts.rows_of(scale_P, n)[:, None, None]
        core_Qab = self._core(weight).to(y.dtype)
        own = core_Qab[part_n[:, None], flat_nM] if left is None else core_Qab[part_n]
        picked = own if left is None else torch.bmm(left.to(y.dtype)[flat_nM], own)
        move = picked if right is None else picked @ right.to(y.dtype).mT
        if move.shape[-1] != y.shape[-1]:
            return NotImplemented
        return y.add_((scale_n11 * move).view(y.shape))


def _between(bases: Bases, core_ab: Tensor) -> Tensor:
    """(O, D): P·u·Qᵀ."""
    left, right = bases
    move = core_ab if left is None else left.to(core_ab.dtype) @ core_ab
    return move if right is None else move @ right.to(core_ab.dtype).mT


class SubspaceWriter(Writer):
    """The rule's move of each core, through its bases into the weights."""

    def __init__(self, cores: Cores) -> None:
        super().__init__(cores.directions)
        self.cores = cores

    @property
    def _moving(self) -> list[Any]:
        return [*self.cores.params, *self.cores.dense]

    def reserve(self, rule: Any, state: Any) -> None:
        """The tensors of the rule's state, of the cores' shapes."""
        for param in self._moving:
            rule.reserve_shape(param, state[param], self._shape(param))

    def _shape(self, param: Any) -> tuple[int, ...]:
        inside = id(param) in self.cores.bases
        return (self.cores.sides_of(param)[0][0], self.cores.rank) if inside else tuple(param.shape)

    def move(
        self,
        rule: Any,
        seeds_Q: Tensor,
        mean_GQ: Sequence[Tensor],
        numbers_GN: Sequence[Any],
        state: Any,
        goes: Tensor | None = None,
    ) -> None:
        """One step: ĝ = Σ_q mean_GQ[group][q]·u_q of each core, mean_GQ float32.

        numbers: what decay multiplies with, lr, and the number of the update from 1; of a graph a tensor that is filled anew.
        goes (0-d, of a graph): unless it is true nothing changes.
        """
        self.reserve(rule, state)
        for param in self._moving:
            slot, own = self.directions.slots[id(param)], state[param]
            inside, shape = id(param) in self.cores.bases, self._shape(param)
            wide = torch.float64 if param.dtype == torch.float64 else torch.float32
            pid = self.cores.sides_of(param)[0][1] if inside else slot.id
            g = torch.zeros(shape, dtype=wide, device=param.device)
            noise.add_noise(g, g, seeds_Q, mean_GQ[slot.group], pid, self.directions.distribution)
            shrink, lr, steps = numbers_GN[slot.group]
            before = {name: own[name] for name in rule.buffers}
            kept = {name: value.to(wide, copy=True) for name, value in before.items()}
            delta = rule.move(torch.zeros_like(g), g, kept, lr, steps)
            for name, value in kept.items():
                before[name].copy_(
                    value if goes is None else torch.where(goes, value.to(before[name].dtype), before[name])
                )
            if goes is None and not lr and shrink == 1:
                continue  # not even the sign of a zero changes
            if inside:
                self._add(param, delta, shrink, goes)
            else:
                _into(param.data, param.data.to(wide) * shrink + delta, goes)

    def _add(self, param: Any, delta: Tensor, shrink: Any, goes: Tensor | None) -> None:
        """W ← shrink·W + step·P·Δ·Qᵀ, a tile of rows at a time."""
        left, right = self.cores.bases[id(param)]
        step = self.cores.subspace.step
        core_ab = self.cores.bases[id(param)].oriented(delta) * (1 / self.cores.rank if step is None else step)
        matrix, wide = param.data.view(sides(param)), core_ab.dtype
        across = core_ab if right is None else right.to(wide).mT if left is None else core_ab @ right.to(wide).mT
        along = core_ab if left is None else left
        rows = max(1, TILE_BYTES // (core_ab.element_size() * matrix.shape[1]))
        for first in range(0, len(matrix), rows):
            part = slice(first, first + rows)
            _into(matrix[part], torch.addmm(matrix[part].to(wide) * shrink, along[part].to(wide), across), goes)


def _into(w: Tensor, new: Tensor, goes: Tensor | None) -> None:
    """w ← new, rounded; as it was unless it goes."""
    w.copy_(new if goes is None else torch.where(goes, new.to(w.dtype), w))
