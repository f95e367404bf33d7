"""Which member sits in which slot, and the reads by which a forward's rows see their members' weights.

They are the engine `lowrank`'s: each row is a part, with factors of its own beside one shared product; small parameters are drawn
once a member. Where each has one token, on CUDA, maps that take one x are computed together (`decode/products.py`). What depends on
who sits where is in tensors that stay in their places, where a captured step finds the next ones.
"""

# S seats, M members, G parameter groups.

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zotune.decode.members import Population
from zotune.directions import Displacement, PartsOf
from zotune.engines.factors import Factors
from zotune.engines.lowrank import LowRankReads
from zotune.engines.parts import Parts, kernels_for
from zotune.engines.stacks import Stacks


class MemberWeights:
    """What the members' weights are made of: factors of the matrices, small parameters whole (the unperturbed last).

    Drawn by `draw`, into memory that the next as many members will have.
    """

    at: Displacement
    factors: Factors

    def __init__(self, population: Population, count: int) -> None:
        assert population.engine is not None
        self.population, self.engine, self.count = population, population.engine, count
        self._stacks = Stacks(population.directions, self.engine.factored.dense, count + 1)
        self._parts = PartsOf([*range(count), 0], [1] * count + [0])
        self.biases: dict[int, Any] = {}  # what was added to the product with each weight, when it was last read

    def draw(self, members: Sequence[tuple[int, int]]) -> None:
        self.at = self.population.at(members)
        self.factors = self.engine.factored.drawn(self.at)
        self._stacks.draw(self.at, self._parts)

    @property
    def small(self) -> dict[int, Tensor]:
        """(M + 1, …) of each small parameter."""
        return self._stacks.of

    def reads(self, members: Sequence[int], beside: SeatReads | None = None) -> SeatReads:
        """The mode for a row of each of these, −1 for the unperturbed model.

        beside: of as many rows or more, whose memory it shares.
        """
        reads = SeatReads(self, len(members), beside)
        reads.deal(members)
        return reads


class SeatReads(LowRankReads):
    """The mode of so many rows, whose members may be dealt anew between forwards."""

    def __init__(self, weights: MemberWeights, seats: int, beside: SeatReads | None = None) -> None:
        ones = (1,) * seats
        small = (
            {key: stack.new_empty(seats, *stack.shape[1:]) for key, stack in weights.small.items()}
            if beside is None
            else {key: stack[:seats] for key, stack in beside.stacks.items()}
        )
        super().__init__(weights.engine, weights.at, Parts(ones, ones, ones), small, weights.factors)
        self.weights = weights
        device = weights.engine.directions.params[0].device
        self._seated_S, self._displaced_S = self.parts.tables(device)
        # the x of the last products, how often it had been written, and of other weights than the one that asked bias and product
        self._given: tuple[Any, int, dict[int, tuple[Tensor | None, Tensor]]] = None, 0, {}

    def deal(self, members: Sequence[int]) -> None:
        """The member of each seat. Its sign is in the displacement; a part's is whether it is displaced at all."""
        self.at = self.weights.at
        self.parts.direction_P = tuple(max(member, 0) for member in members)
        self.parts.sign_P = tuple(int(member >= 0) for member in members)
        self._seated_S.copy_(torch.tensor(self.parts.direction_P, dtype=torch.int32))
        self._displaced_S.copy_(torch.tensor(self.parts.sign_P, dtype=torch.float32))
        for (group, dtype), scale_S in self._scales.items():
            scale_S.copy_(self._scales_of(group, dtype))
        last = len(self.at.seeds_Q)
        rows_S = torch.tensor([member if member >= 0 else last for member in members], device=self._seated_S.device)
        for key, stack in self.stacks.items():
            torch.index_select(self.weights.small[key], 0, rows_S, out=stack)

    def _scale(self, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if (group, dtype) not in self._scales:
            self._scales[group, dtype] = self._scales_of(group, dtype)
        return self._scales[group, dtype]

    def _scales_of(self, group: int, dtype: torch.dtype) -> Tensor:
        """(S,): ±ε/√r of each seat's member, 0 where it is not displaced."""
        _, coefs_M = self.at.on(group, self._seated_S.device)
        return (coefs_M[self._seated_S] * self._displaced_S / math.sqrt(self.rank)).to(dtype)

    # One token a seat: all maps that take one x together.

    def _linear(self, input: Tensor, weight: Any, bias: Any = None) -> Any:
        self.weights.biases[id(weight)] = bias
        return super()._linear(input, weight, bias)

    def _product(
        self, x: Tensor, weight: Any, matrix_DO: Tensor, side: int, in_QDR: Tensor, out_QOR: Tensor, bias: Tensor | None
    ) -> Tensor:
        y = self._at_once(x, weight, matrix_DO, side, bias)
        return super()._product(x, weight, matrix_DO, side, in_QDR, out_QOR, bias) if y is None else y

    def _at_once(self, x: Tensor, weight: Any, matrix_DO: Tensor, side: int, bias: Tensor | None) -> Tensor | None:
        """The product of one token a seat, and those of other weights that took the same x in an earlier forward; else None."""
        if not self._single(x):
            return None
        from zotune.decode import products

        last, version, given = self._given
        if last is not None and last() is x and version == x._version and id(weight) in given:
            added, y = given.pop(id(weight))  # whoever has it may write to it
            if added is bias:
                return y
        x_SD, own = x.view(len(x), -1), products.Map(matrix_DO.t(), *self._factors(weight, side), bias)
        if not products.serves(x_SD, own):
            return None
        maps = {id(weight): own}
        for other in self._readers_of(weight, side):
            shift = self._shift(other)
            another = products.Map(other.data, *self._factors(other, side), shift)
            if (shift is None) == (bias is None) and products.serves(x_SD, own, another):
                maps[id(other)] = another
        scale_S = self._scale(self.engine.directions.slots[id(weight)].group, torch.float32, x.device)
        found = products.products(x_SD, [*maps.values()], self._seated_S, scale_S)
        given = {key: (m.bias, y.view(*x.shape[:-1], -1)) for (key, m), y in zip(maps.items(), found, strict=True)}
        self._given = weakref.ref(x), x._version, given
        return given.pop(id(weight))[1]

    def rows(self, ids: Tensor, weight: Any) -> Any:
        if ids.numel() != len(self.parts) or not ids.is_contiguous() or not weight.data.is_contiguous():
            return super().rows(ids, weight)
        if weight.dim() != 2 or kernels_for(weight) is None:
            return super().rows(ids, weight)
        from zotune.decode import products

        scale_S = self._scale(self.engine.directions.slots[id(weight)].group, torch.float32, ids.device)
        y_SD = products.rows(ids.view(-1), weight.data, *self.factors_of(weight), self._seated_S, scale_S)
        return y_SD.view(*ids.shape, -1)

    def gated(self, x: Tensor, a: nn.Module, b: nn.Module, gate: str) -> Tensor | None:
        with torch._C.DisableTorchFunction():
            return self._gated(x, a, b, gate)

    def _gated(self, x: Tensor, a: nn.Module, b: nn.Module, gate: str) -> Tensor | None:
        if not self._single(x) or not all(_is_plain(module) for module in (a, b)):
            return None
        from zotune.decode import products

        weights: list[Any] = [a.weight, b.weight]
        slots = self.engine.directions.slots
        if not all(self.is_param(w) and id(w) in self.factors.of for w in weights):
            return None
        maps = [products.Map(w.data, *self._factors(w, 1)) for w in weights]
        group = slots[id(weights[0])].group
        if group != slots[id(weights[1])].group or maps[0].w.shape != maps[1].w.shape:
            return None
        x_SD = x.view(len(x), -1)
        if not products.serves(x_SD, *maps) or not products.in_one(maps, len(x_SD)) or len(x_SD) > products.MOST_GATED:
            return None
        scale_S = self._scale(group, torch.float32, x.device)
        return products.gated_product(x_SD, maps, gate, self._seated_S, scale_S).view(*x.shape[:-1], -1)

    def _single(self, x: Tensor) -> bool:
        one = x.dim() > 1 and x.numel() == len(self.parts) * x.shape[-1] and x.is_contiguous()
        return one and kernels_for(x) is not None

    def _factors(self, weight: Any, side: int) -> tuple[Tensor, Tensor]:
        """Of x's side, and of the other."""
        both = self.factors_of(weight)
        return both[side], both[1 - side]

    def _readers_of(self, weight: Any, side: int) -> list[Any]:
        """The weights that took the x of this one after it, whose biases are known."""
        readers = self.engine.readers.get((id(weight), side), []) if side == 1 else []
        return [other for other in readers if other is not weight and id(other) in self.weights.biases]

    def _shift(self, weight: Any) -> Tensor | None:
        bias = self.weights.biases[id(weight)]
        stack = self.stack_of(bias)
        return bias if stack is None else stack


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear map without a bias whose call nobody sees."""
    seen = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return type(module) is nn.Linear and module.bias is None and not seen
