"""A displacement of the weights as what it is made from: seeds and coefficients.

    θ + Σ_q coefs[g][q] · z(seeds[q])

Q directions, G parameter groups: a direction is one z over all parameters, its coefficient may differ by group
(each group has its own lr and eps). No z is held here; `zotune.noise` draws it where it is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune import noise

FEW = 1 << 20  # elements of a parameter up to which its update shares a launch with others


@dataclass(frozen=True)
class Displacement:
    """Σ_q coefs_GQ[g][q]·z(seeds_Q[q]); units of the weights. An empty one is no displacement."""

    seeds_Q: tuple[int, ...] = ()
    coefs_GQ: tuple[tuple[float, ...], ...] = ()
    _held: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert all(len(coefs_Q) == len(self.seeds_Q) for coefs_Q in self.coefs_GQ)

    def is_zero(self, group: int) -> bool:
        return not self.seeds_Q or not any(self.coefs_GQ[group])

    def on(self, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Seeds (Q,) int64 and coefficients (Q,) float32 on the device: one copy a displacement, not one a parameter."""
        key = (group, device)
        if key not in self._held:
            seeds = torch.tensor([signed(seed) for seed in self.seeds_Q], dtype=torch.int64, device=device)
            self._held[key] = seeds, torch.tensor(self.coefs_GQ[group], dtype=torch.float32, device=device)
        return self._held[key]

    def some(self, first: int, last: int) -> Displacement:
        """The directions first to last (exclusive)."""
        if first == 0 and last >= len(self.seeds_Q):
            return self
        return Displacement(self.seeds_Q[first:last], tuple(coefs_Q[first:last] for coefs_Q in self.coefs_GQ))

    def filled(self, count: int) -> Displacement:
        """As many directions, the further ones with coefficients of zero, which add nothing."""
        none = count - len(self.seeds_Q)
        if none <= 0:
            return self
        return Displacement(self.seeds_Q + (0,) * none, tuple(coefs_Q + (0.0,) * none for coefs_Q in self.coefs_GQ))

    def negated(self) -> Displacement:
        return self.times(-1)

    def times(self, factor: float) -> Displacement:
        return Displacement(self.seeds_Q, tuple(tuple(factor * c for c in coefs_Q) for coefs_Q in self.coefs_GQ))

    def on_parts(self, device: torch.device, parts: PartsOf, groups: int) -> tuple[Tensor, Tensor]:
        """The direction of each part, with its sign: seeds (P, 1) and coefficients (groups, P, 1)."""
        if parts not in self._held:
            held = [self.on(g, device) for g in range(groups)]
            self._held[parts] = _on_parts(held[0][0], [coefs_Q for _, coefs_Q in held], parts)
        return self._held[parts]

    def together(self, device: torch.device, groups: int) -> tuple[Tensor, Tensor]:
        """All directions as one part's: seeds (1, Q) and coefficients (groups, 1, Q)."""
        held = [self.on(g, device) for g in range(groups)]
        return held[0][0][None], torch.stack([coefs_Q for _, coefs_Q in held])[:, None]


def joined(moves: Sequence[Displacement]) -> Displacement:
    """The directions of all of them, in a row."""
    return Displacement(
        tuple(seed for by in moves for seed in by.seeds_Q),
        tuple(
            tuple(itertools.chain.from_iterable(coefs)) for coefs in zip(*(by.coefs_GQ for by in moves), strict=True)
        ),
    )


@dataclass(frozen=True)
class HeldDisplacement:
    """A displacement whose numbers are on the device already, where a captured graph finds new ones at each replay."""

    seeds_Q: Tensor
    coefs_GQ: Sequence[Tensor]

    def is_zero(self, group: int) -> bool:
        return False  # a zero coefficient is found on the device

    def on(self, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.seeds_Q, self.coefs_GQ[group]

    def some(self, first: int, last: int) -> HeldDisplacement:
        return HeldDisplacement(self.seeds_Q[first:last], [coefs_Q[first:last] for coefs_Q in self.coefs_GQ])

    def negated(self) -> HeldDisplacement:
        return self.times(-1)

    def times(self, factor: float) -> HeldDisplacement:
        return HeldDisplacement(self.seeds_Q, [factor * coefs_Q for coefs_Q in self.coefs_GQ])

    def on_parts(self, device: torch.device, parts: PartsOf, groups: int) -> tuple[Tensor, Tensor]:
        return _on_parts(self.seeds_Q, self.coefs_GQ, parts)

    def together(self, device: torch.device, groups: int) -> tuple[Tensor, Tensor]:
        return self.seeds_Q[None], torch.stack(list(self.coefs_GQ))[:, None]


class PartsOf:
    """Which of a displacement's directions each of P parts takes, and with which sign (−1, 0 or +1).

    Its tables stay on a device as long as it lives, so that a captured graph finds them.
    """

    def __init__(self, direction_P: Sequence[int], sign_P: Sequence[int]) -> None:
        self.direction_P, self.sign_P = tuple(direction_P), tuple(sign_P)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.direction_P)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(P,) int32 directions and (P,) float32 signs."""
        if device not in self._tables:
            directions = torch.tensor(self.direction_P, dtype=torch.int32, device=device)
            self._tables[device] = directions, torch.tensor(self.sign_P, dtype=torch.float32, device=device)
        return self._tables[device]


def _on_parts(seeds_Q: Tensor, coefs_GQ: Sequence[Tensor], parts: PartsOf) -> tuple[Tensor, Tensor]:
    which_P, sign_P = parts.tables(seeds_Q.device)
    coefs_GP = torch.stack([sign_P * coefs_Q[which_P] for coefs_Q in coefs_GQ])
    return seeds_Q[which_P][:, None].contiguous(), coefs_GP[:, :, None].contiguous()


def signed(seed: int) -> int:
    """The int64 with the bits of a 64-bit seed."""
    return seed - (1 << 64) if seed >> 63 else seed


@dataclass(frozen=True)
class Slot:
    """Where a trainable parameter stands: its qualified name, noise id and parameter group."""

    name: str
    id: int
    group: int


class Directions:
    """Draws the displacements of a fixed set of parameters.

    params: groups of (qualified name, parameter). The name, not the order, decides the noise, so one parameter
    draws the same z in any grouping. Raises ValueError where two names have one id.
    """

    masked = False  # whether some elements may be zero in every direction
    scattered = False  # whether some of the tensors are parts of parameters

    def __init__(
        self, groups: Sequence[Sequence[tuple[str, torch.nn.Parameter]]], distribution: str = "gaussian"
    ) -> None:
        self.distribution = distribution
        self.groups = len(groups)
        self._compensated: dict[Any, noise.ManyCompensated] = {}
        self._together: dict[tuple[int, ...], noise.Many] = {}
        self.update: tuple[Any, Any] | None = (
            None  # the last of `zotune.updates.fused` over these parameters, by where they were
        )
        self.params: list[torch.nn.Parameter] = []
        self.slots: dict[int, Slot] = {}
        ids = noise.parameter_ids([name for group in groups for name, _ in group])
        for g, group in enumerate(groups):
            for name, param in group:
                self.params.append(param)
                self.slots[id(param)] = Slot(name, ids[name], g)

    def displaced(self, param: torch.nn.Parameter, by: Displacement | HeldDisplacement, out: Tensor) -> Tensor:
        """out ← param + displacement, rounded once to param's dtype. out may be param's own data."""
        slot = self.slots[id(param)]
        seeds, coefs = by.on(slot.group, param.device)
        noise.add_noise(out, param.data, seeds, coefs, slot.id, self.distribution)
        return out

    def displaced_span(
        self, param: torch.nn.Parameter, first: int, last: int, by: Displacement | HeldDisplacement, out: Tensor
    ) -> Tensor:
        """out ← the rows first to last (exclusive) of param + displacement."""
        slot = self.slots[id(param)]
        seeds, coefs = by.on(slot.group, param.device)
        start = first * math.prod(param.shape[1:])
        noise.add_noise(out, param.data[first:last], seeds, coefs, slot.id, self.distribution, start)
        return out

    def displaced_both(
        self,
        param: torch.nn.Parameter,
        first: int,
        last: int,
        by: Displacement | HeldDisplacement,
        plus: Tensor,
        minus: Tensor,
        update: Displacement | HeldDisplacement | None = None,
    ) -> None:
        """plus, minus ← the rows first to last (exclusive) of param ± a displacement of one direction.

        update: a displacement that these rows take first, on the same read of them; param is contiguous then.
        """
        slot = self.slots[id(param)]
        seeds, coefs = by.on(slot.group, param.device)
        start = first * math.prod(param.shape[1:])
        own = None if update is None else update.on(slot.group, param.device)
        noise.add_noise_both(plus, minus, param.data[first:last], seeds, coefs, slot.id, self.distribution, start, own)

    def displaced_rows(
        self,
        param: torch.nn.Parameter,
        rows_K: Tensor,
        by: Displacement | HeldDisplacement,
        out: Tensor,
        update: Displacement | HeldDisplacement | None = None,
    ) -> Tensor:
        """out (K, D…) ← the named rows of param + displacement; nothing else of param is read.

        update: a displacement that param is still to take; the rows are those of after it, param stays.
        """
        slot = self.slots[id(param)]
        seeds, coefs = by.on(slot.group, param.device)
        own = None if update is None else update.on(slot.group, param.device)
        noise.add_noise_rows(out, param.data, rows_K, seeds, coefs, slot.id, self.distribution, own)
        return out

    def whole_shape(self, param: torch.nn.Parameter) -> tuple[int, ...]:
        """Of the parameter, also where `param` is the part of it that this process holds."""
        return tuple(param.shape)

    def held_sides(self, param: torch.nn.Parameter) -> tuple[slice, slice] | None:
        """Which rows and columns of the parameter, as a matrix, `param` is; None where it is all of it."""
        return None

    def kept(self, param: torch.nn.Parameter, first: int, count: int) -> Tensor | None:
        """(n,) bool, False where elements first, first + 1, … are zero in every direction; None where none is."""
        return None

    def gradient_tiles(
        self, param: torch.nn.Parameter, by: Displacement | HeldDisplacement, size: int
    ) -> Iterator[tuple[int, Tensor]]:
        """The displacement itself, without the weights, tile by tile: (first element, 1-D float32 or float64 tensor).

        A tile's memory is the next one's.
        """
        slot, count = self.slots[id(param)], param.numel()
        seeds, coefs = by.on(slot.group, param.device)
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        tile = torch.empty(min(size, count), dtype=wide, device=param.device)
        for first in range(0, count, size):
            part = tile[: min(size, count - first)].zero_()
            self._add(part, part, seeds, coefs, param, first)
            yield first, part

    def _add(
        self, out: Tensor, w: Tensor, seeds: Tensor, coefs: Tensor, param: torch.nn.Parameter, start: int = 0
    ) -> None:
        """out ← w + noise, where w is the parameter from an element on, or stands for it."""
        noise.add_noise(out, w, seeds, coefs, self.slots[id(param)].id, self.distribution, start)

    def apply(self, by: Displacement | HeldDisplacement, params: Sequence[torch.nn.Parameter] | None = None) -> None:
        """θ ← θ + displacement, in place, one pass over each parameter (of these); on CUDA small ones share a launch."""
        params = self.params if params is None else params
        some = [p for p in params if not by.is_zero(self.slots[id(p)].group)]
        few = _sharing([p for p in some if p.is_cuda])
        if few:
            seeds_1Q, coefs_G1Q = by.together(few[0].device, self.groups)
            self._many(few).draw(seeds_1Q.contiguous(), coefs_G1Q.contiguous())
        together = {id(p) for p in few}
        for param in some:
            if id(param) not in together:
                self.displaced(param, by, param.data)

    def apply_each(self, moves: Sequence[Displacement], params: Sequence[torch.nn.Parameter] | None = None) -> None:
        """`apply` of one displacement after the other, each rounded, in one pass over each parameter (of these)."""
        width = max((len(by.seeds_Q) for by in moves), default=0)
        if width == 0:
            return
        by = joined([by.filled(width) for by in moves])
        for param in self.params if params is None else params:
            slot = self.slots[id(param)]
            seeds_SQ, coefs_SQ = (t.view(-1, width) for t in by.on(slot.group, param.device))
            noise.add_noise_steps(param.data, seeds_SQ, coefs_SQ, slot.id, self.distribution)

    def apply_compensated(
        self,
        by: Displacement | HeldDisplacement,
        residuals: Sequence[Tensor],
        factors: Sequence[float | Tensor] = (),
        params: Sequence[torch.nn.Parameter] | None = None,
    ) -> None:
        """θ + r ← factor·(θ + r) + displacement, θ rounded and r what that took; r as θ (of these) in shape and dtype, in order.

        factors: as `noise.add_noise_compensated` has them, by parameter group.
        """
        pairs = list(zip(self.params if params is None else params, residuals, strict=True))
        if self.params and self.params[0].is_cuda:  # one tensor a group, not one a parameter
            fill = partial(torch.full, (), dtype=torch.float32, device=self.params[0].device)
            factors = [f if isinstance(f, Tensor) else fill(fill_value=f) for f in factors or [1.0] * self.groups]
            pairs = self._compensate_few(pairs, by, factors)
        for param, lost in pairs:
            slot = self.slots[id(param)]
            factor = factors[slot.group] if factors else 1.0
            if isinstance(factor, Tensor) or not by.is_zero(slot.group) or factor != 1:
                seeds, coefs = by.on(slot.group, param.device)
                noise.add_noise_compensated(param.data, lost, seeds, coefs, slot.id, self.distribution, factor)

    def _compensate_few(
        self,
        pairs: list[tuple[torch.nn.Parameter, Tensor]],
        by: Displacement | HeldDisplacement,
        factors: Sequence[Any],
    ) -> list[tuple[torch.nn.Parameter, Tensor]]:
        """Small parameters take theirs by one launch: each sums all directions in turn. Returns the others."""
        together = {id(p) for p in _sharing([p for p, lost in pairs if lost.is_contiguous()])}
        few = [pair for pair in pairs if id(pair[0]) in together]
        if not few or not len(by.seeds_Q):
            return pairs
        key = tuple(t.data_ptr() for pair in few for t in pair)
        if key not in self._compensated:
            items = [noise.Item(p.data, r, self.slots[id(p)].id, self.slots[id(p)].group) for p, r in few]
            self._compensated[key] = noise.ManyCompensated(items, self.distribution)  # a graph may hold its tables
        seeds_1Q, coefs_G1Q = by.together(few[0][0].device, self.groups)
        factors_G = torch.stack([factor.float() for factor in factors])
        self._compensated[key].add(seeds_1Q[0].contiguous(), coefs_G1Q[:, 0].contiguous(), factors_G)
        return [pair for pair in pairs if id(pair[0]) not in together]

    def _many(self, params: Sequence[torch.nn.Parameter]) -> noise.Many:
        """These parameters as one launch; made anew where one of them has moved in memory."""
        key = tuple(p.data_ptr() for p in params)
        if key not in self._together:
            items = [noise.Item(p.data, p.data, self.slots[id(p)].id, self.slots[id(p)].group) for p in params]
            self._together = {key: noise.Many(items, self.distribution)}
        return self._together[key]


def _sharing(params: Sequence[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Those of them that share a launch: small, in a row in memory, on one device."""
    few = [p for p in params if p.numel() <= FEW and p.is_contiguous()]
    return [p for p in few if p.device == few[0].device]
