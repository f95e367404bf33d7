"""Directions along what linear maps are given: z = a·(Q·b)ᵀ of each, rank 1, Q an orthonormal basis that follows its inputs.

One forward a step, at θ, tells each map's inputs H, and Q moves by a step of subspace iteration:

    Q ← qf(Q + (0.3/n)·Hᵀ(H·Q)),    z = a·(Q_active·b)ᵀ·√(O·D)/(‖a‖·‖b‖)

Q has 128 columns, of which a step's directions take the first 48, which have followed H the longest, and 16 that are drawn from
the others. a and b are noise of NAME.U and NAME.V. All else that trains stays as it is.

Source: AIM-ZO, as read by others; the numbers are its authors'.
"""

# Q directions, D and O what a map takes and gives, C columns of its basis, A of them active, n tokens.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.directions.subspaces import BASES, drawn, orthonormal
from zotune.engines.factors import Factored, Factors, sides
from zotune.engines.folding import FoldingWriter
from zotune.engines.inputs import Tokens, read_inputs
from zotune.engines.lowrank import LowRankEngine

COLUMNS, LEADING, ACTIVE = 128, 48, 64
STRIDE = 0.3  # of a step of subspace iteration


class TrackedEngine(LowRankEngine):
    """`LowRankEngine` of rank 1 whose directions are along the maps' inputs."""

    factored: Tracked

    def __init__(self, directions: Directions, forward_tokens: int | None = None) -> None:
        super().__init__(directions, 1, forward_tokens)
        self.factored = Tracked(directions)
        self.writer = FoldingWriter(self.factored)

    @property
    def moving(self) -> Sequence[torch.nn.Parameter]:
        return self.factored.params


class Tracked(Factored):
    """a and Q·b of each map; which maps those are is found in a first forward. Bases are kept in the optimizer's state, (D, C)."""

    def __init__(self, directions: Directions) -> None:
        super().__init__(directions, 1, [])
        self.side: dict[int, int] = {}  # of the map that takes x
        self.active: dict[int, Tensor] = {}  # (D, A), where graphs find it

    def turn(self, step: int, seed: int, state: Any, loss: Callable[[Any], Any] | None, batches: Sequence[Any]) -> None:
        """The bases of a step, which follow the inputs of its batches."""
        if loss is None:
            raise ValueError("directions along a model's inputs: a step needs its rows")
        moves: dict[int, Tensor] = {}
        count: dict[int, int] = {}

        def follow(weight: Any, side: int, x: Tensor, tokens: Tokens) -> bool:
            h_nD = tokens.of(x)
            if h_nD is None:
                return False
            own = state[weight]
            if "basis" not in own:
                pid, wide = self.ids_of(weight)[side], h_nD.shape[1]
                own["basis"] = drawn("orthonormal", wide, min(COLUMNS, wide), seed, 0, pid, weight.device)
            basis_DC = own["basis"].to(h_nD.dtype)
            move_DC = h_nD.mT @ (h_nD @ basis_DC)
            moves[id(weight)] = moves[id(weight)] + move_DC if id(weight) in moves else move_DC
            count[id(weight)] = count.get(id(weight), 0) + len(h_nD)
            return True

        for batch in batches:
            side = read_inputs(self.directions, loss, batch, follow)
            if not self.params:
                self.side = side
                self.params += [p for p in self.directions.params if id(p) in side]
        for param in self.params:
            if id(param) in moves:
                basis_DC = state[param]["basis"]
                moved = basis_DC + STRIDE / max(1, count[id(param)]) * moves[id(param)].nan_to_num(0, 0, 0).float()
                basis_DC.copy_(orthonormal(moved))
            self._activate(param, state[param]["basis"], step, seed)

    def _activate(self, param: torch.nn.Parameter, basis_DC: Tensor, step: int, seed: int) -> None:
        columns = basis_DC.shape[1]
        active, leading = min(ACTIVE, columns), min(LEADING, columns)
        rest = torch.empty(columns - leading)
        if len(rest):
            noise.fill(rest, noise.step_seed(seed, step, BASES), 0, "gaussian")
        chosen = leading + rest.argsort(stable=True)[: active - leading].sort().values
        index = torch.cat([torch.arange(leading), chosen]).to(basis_DC.device)
        if id(param) not in self.active:
            self.active[id(param)] = torch.empty(len(basis_DC), active, dtype=param.dtype, device=param.device)
        self.active[id(param)].copy_(basis_DC[:, index])

    def sides_of(self, param: torch.nn.Parameter) -> tuple[tuple[int, int], ...]:
        """Of what is drawn: a, and b of the active columns, on the side of x."""
        lengths, side = list(sides(param)), self.side[id(param)]
        lengths[side] = self.active[id(param)].shape[1]
        return tuple(zip(lengths, self.ids_of(param), strict=True))

    def made(self, count: int, params: list[torch.nn.Parameter] | None = None, memory: Tensor | None = None) -> Factors:
        return _Along(self, count, params, memory)


class _Along(Factors):
    """The factors a·√O/‖a‖ and Q·b·√D/‖b‖, made of what is drawn."""

    def __init__(self, of: Tracked, count: int, params: list[torch.nn.Parameter] | None, memory: Tensor | None) -> None:
        super().__init__(of, count, params, memory)
        self._tracked = of
        self._raw, self.of = self.of, {}
        for param in of.params if params is None else params:
            self.of[id(param)] = tuple(param.data.new_empty(count, side, 1) for side in sides(param))

    def draw(self, at: Displacement | HeldDisplacement, again: bool = False) -> None:
        super().draw(at, again)
        for key, raw in self._raw.items():
            side, basis_DA = self._tracked.side[key], self._tracked.active[key]
            for i, (out, drawn_Qs1) in enumerate(zip(self.of[key], raw, strict=True)):
                wide = torch.float64 if out.dtype == torch.float64 else torch.float32
                unit = drawn_Qs1.to(wide)
                unit = unit / torch.linalg.vector_norm(unit, dim=1, keepdim=True)
                out.copy_((basis_DA.to(wide) @ unit if i == side else unit) * out.shape[1] ** 0.5)
