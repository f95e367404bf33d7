"""Low-rank directions: z = U·Vᵀ/√r beside one shared product with W, which is never copied or perturbed.

    y = x·Wᵀ ± ε·(x·V)·Uᵀ/√r

so each row of a batch, or group of rows, can have any number of directions of its own, all in one forward over copies of the
batch, and each its coefficient from its own losses. Vectors keep a dense z.

Sources: GRZO, arXiv 2606.02857 (a direction per row); EGGROLL, arXiv 2511.16652.
"""

# P parts, Q directions, R rank, O and D the two sides of a parameter, n rows of what the model computes.

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.factors import Factored, Factors
from zotune.engines.folding import FoldingWriter
from zotune.engines.following import FollowingEngine
from zotune.engines.parts import PartedReads, Parts, Unfollowed, Values, kernels_for
from zotune.engines.places import Copy, Places
from zotune.engines.stacks import Stacks


class LowRankEngine(FollowingEngine):
    """The losses at places of low-rank directions, of which a batch's rows may have many, each its own.

    rank: r, see `Factored`.
    """

    name = "lowrank"

    def __init__(self, directions: Directions, rank: int = 1, forward_tokens: int | None = None) -> None:
        super().__init__(directions, forward_tokens=forward_tokens)
        self.factored = Factored(directions, rank)
        self.writer = FoldingWriter(self.factored)
        self._stacks: dict[int, Stacks] = {}  # by the number of parts
        # weights that take one x, by the first and its side
        self.readers: dict[tuple[int, int], list[torch.nn.Parameter]] = {}

    def losses(self, loss: Callable[[Any], Any], batch: Any, places: Places) -> Tensor:
        try:
            return super().losses(loss, batch, places)
        except Unfollowed as error:
            raise ValueError(f"engine lowrank: {error}; try engine='dual' or 'sequential' with groups=1") from None

    def loss(self, closure: Callable[[], Any], at: Displacement | HeldDisplacement) -> Any:
        """What the closure returns at θ + displacement, of one direction (or none)."""
        if len(at.seeds_Q) == 0:
            return super().loss(closure, at)
        return self._alone(closure, Places(at, (Copy(1),)), Copy(1))

    def _copy_loss(self, closure: Callable[[], Any], places: Places, copy: Copy) -> Any:
        return self._alone(closure, places, copy) if copy.sign else self.loss(closure, Displacement())

    def _alone(self, closure: Callable[[], Any], places: Places, copy: Copy) -> Any:
        """The loss of one copy of a batch, by a forward over the batch itself."""
        _, parts = self._layout(
            Places(places.at, (Copy(copy.sign),), places.shares), sum(places.shares), 0, sum(places.shares)
        )
        at = places.at.some(copy.first, copy.first + len(places.shares))
        with torch.no_grad(), self._reads(at, parts) as mode:
            result = self._run(closure)
        if self.unread is None:
            self._all_read(mode)
        return result

    def replayed(self) -> None:
        self.factored.forget()

    def _reads(self, at: Displacement | HeldDisplacement, parts: Parts) -> PartedReads:
        if len(parts) not in self._stacks:
            self._stacks[len(parts)] = Stacks(self.directions, self.factored.dense, len(parts))
        stacks = self._stacks[len(parts)]
        stacks.draw(at, parts)
        return LowRankReads(self, at, parts, stacks.of, self.factored.drawn(at))


class LowRankReads(PartedReads):
    special = PartedReads.special | {torch.addmm: "_addmm"}

    def __init__(
        self,
        engine: LowRankEngine,
        at: Displacement | HeldDisplacement,
        parts: Parts,
        stacks: dict[int, Tensor],
        factors: Factors,
    ) -> None:
        super().__init__(parts, engine.moving, stacks)
        self.engine, self.at, self.factors, self.rank = engine, at, factors, engine.factored.rank
        self._scales: dict[tuple[int, torch.dtype], Tensor] = {}
        # the x of the last product, how often it had been written, and scale·x·in by weight
        self._last: tuple[Any, int, dict[int, Tensor]] = None, 0, {}
        self._readers: list[Any] = []
        self._side = 0

    def _scale(self, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(P,): ±ε/√r of each part."""
        key = (group, dtype)
        if key not in self._scales:
            _, coefs_GP1 = self.at.on_parts(device, self.parts, self.engine.directions.groups)
            self._scales[key] = (coefs_GP1[group, :, 0] / math.sqrt(self.rank)).to(dtype)
        return self._scales[key]

    def factors_of(self, weight: Any) -> tuple[Tensor, Tensor]:
        """U (…, O, R) and V (…, D, R)."""
        u_QOR, v_QDR = self.factors.of[id(weight)]
        return u_QOR, v_QDR

    def entry_of(self, device: torch.device) -> Tensor:
        """(P,) int32: which entry of the factor on x's side is each part's. That of the other side is its direction's."""
        return self.parts.tables(device)[0]

    def copy(self, param: Any, part: int) -> Tensor:
        if id(param) not in self.factors.of:
            return self._dense(param, part)
        u_QOR, v_QDR = self.factors.of[id(param)]
        own = self.parts.direction_P[part]
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        u, v = u_QOR[own].to(wide), v_QDR[own].to(wide)
        scale = self._scale(self.engine.directions.slots[id(param)].group, wide, u.device)[part]
        return (param.data.view(len(u), -1).to(wide) + scale * (u @ v.t())).to(param.dtype).view(param.shape)

    def _dense(self, param: Any, part: int) -> Tensor:
        """The part's values of a parameter without factors, where no stack of them was drawn."""
        own, sign = self.parts.direction_P[part], self.parts.sign_P[part]
        if not sign:
            return param.data
        by = self.at.some(own, own + 1)
        return self.engine.directions.displaced(param, by if sign > 0 else by.negated(), torch.empty_like(param.data))

    def values_of(self, param: Tensor) -> Values | None:
        if id(param) not in self.factors.of or not self.is_param(param):
            return super().values_of(param)
        scale_P = self._scale(self.engine.directions.slots[id(param)].group, torch.float32, param.device)
        which_P, _ = self.parts.tables(param.device)
        return Values(param.data.expand(len(self.parts), *param.shape), *self.factors_of(param), scale_P, which_P)

    def product(self, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
        u_QOR, v_QDR = self.factors_of(weight)
        return self._product(x, weight, weight.data.t(), 1, v_QDR, u_QOR, bias)

    def _addmm(self, bias: Any, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
        """GPT-2's Conv1D: x·W with W (D, O), so that U is on the input's side."""
        if id(weight) not in self.factors.of or not self.is_param(weight) or not self.is_batch(x) or out is not None:
            return NotImplemented
        if beta != 1 or alpha != 1:
            return NotImplemented
        shift = self.stack_of(bias)
        if shift is None and self.is_parted(bias):
            return NotImplemented
        u_QOR, v_QDR = self.factors_of(weight)
        return self._product(x, weight, weight.data, 0, u_QOR, v_QDR, bias if shift is None else shift)

    def _product(
        self, x: Tensor, weight: Any, matrix_DO: Tensor, side: int, in_QDR: Tensor, out_QOR: Tensor, bias: Tensor | None
    ) -> Tensor:
        """(n, …, O): x·W + scale·(x·in)·outᵀ + bias, each part with its own factors and bias. side: of the weight, x's."""
        group = self.engine.directions.slots[id(weight)].group
        kernels = kernels_for(x) if self.parts.equal and x.dtype == weight.dtype else None
        if kernels is not None:
            # The low-rank term and the bias are written first, and the library adds its product to them: no pass of their own.
            t_PMR = self._inner(kernels, x, weight, side, self._scale(group, torch.float32, x.device))
            which_P, _ = self.parts.tables(x.device)
            y = kernels.low_rank_outer(t_PMR, out_QOR, which_P, bias, x.dtype).view(-1, out_QOR.shape[1])
            torch.addmm(y, x.reshape(-1, x.shape[-1]), matrix_DO, out=y)
            return y.view(*x.shape[:-1], -1)
        y = torch.nn.functional.linear(x, matrix_DO.t())
        self._add_by_products(y, x, in_QDR, out_QOR, self._scale(group, y.dtype, y.device))
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
            ins = [self.factors_of(w)[side] for w in some]
            t_SPMR = kernels.low_rank_inner(x_PMD, ins, self.entry_of(x.device), scale_P)
            found |= {id(w): t_PMR for w, t_PMR in zip(some, t_SPMR, strict=True)}
        return found[id(weight)]

    def _add_by_products(self, y: Tensor, x: Tensor, in_QDR: Tensor, out_QOR: Tensor, scale_P: Tensor) -> None:
        which_P, _ = self.parts.tables(y.device)
        # contiguous (P, R, O): a product with a transposed view may round otherwise
        x, in_PDR, out_PRO = x.to(y.dtype), in_QDR.to(y.dtype)[self.entry_of(y.device)], out_QOR.to(y.dtype).mT[which_P]
        out_PRO = out_PRO.contiguous()
        if self.parts.equal:  # under autocast x and the factors may be wider than y
            x_PMD, y_PMO = (self.parts.by_part(t).flatten(1, -2) for t in (x, y))
        else:  # parts of different sizes: each row (of the batch) with factors of its own
            x_PMD, y_PMO = (t.view(t.shape[0], -1, t.shape[-1]) for t in (x, y))
            in_PDR, out_PRO, scale_P = (self.parts.rows_of(t, x.shape[0]) for t in (in_PDR, out_PRO, scale_P))
        if len(scale_P) == 1:
            y_PMO[0].addmm_(x_PMD[0] @ in_PDR[0] * scale_P, out_PRO[0])
            return
        y_PMO.baddbmm_(torch.bmm(x_PMD, in_PDR) * scale_P[:, None, None], out_PRO)

    def rows(self, ids: Tensor, weight: Any) -> Any:
        return self._plus_rows(
            torch.nn.functional.embedding(ids, weight.data), ids, weight, *self.factors.of[id(weight)]
        )

    def _plus_rows(self, y: Tensor, ids: Tensor, weight: Any, u_QOR: Tensor, v_QDR: Tensor) -> Any:
        """A look-up's rows y, changed in place, and each part's term of them."""
        if v_QDR.shape[1] != y.shape[-1]:
            return NotImplemented
        n, which_P = len(ids), self.parts.tables(ids.device)[0]
        part_n = self.parts.rows_of(which_P, n)
        scale_P = self._scale(self.engine.directions.slots[id(weight)].group, y.dtype, y.device)
        scale_n = self.parts.rows_of(scale_P, n)
        flat_nM = ids.reshape(n, -1)
        picked_nMR = u_QOR[part_n[:, None], flat_nM] * scale_n[:, None, None]
        y.view(n, -1, y.shape[-1]).baddbmm_(picked_nMR, v_QDR[part_n].transpose(1, 2))
        return y
