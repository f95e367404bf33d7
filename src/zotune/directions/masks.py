"""Directions that leave elements out: masks at random, of the smallest weights, or of those of least weight times input."""

# n elements of a parameter, O outputs and I inputs of a linear map.

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Directions, Displacement, HeldDisplacement, signed
from zotune.directions.calibration import Norms, by_output, chunk_of, scores
from zotune.errors import InputError
from zotune.record.scalars import float32

logger = logging.getLogger(__name__)

CHUNK = 1 << 20  # elements masked at a time
IN_A_LAYER = re.compile(r"(^|\.)\d+\.")  # a qualified name that has the number of a layer


class Mask:
    """Which elements of a parameter a step's directions reach.

    Random: element i of a parameter is left out where its word of the mask's stream is under sparsity·2³²; the seed is that of the
    step at which the mask was drawn, so nothing is stored. Magnitude: the least |θ| at that step, one byte an element, in
    the optimizer's state. Wanda: the least |W_oi|·‖x_i‖₂ of each output o of a linear map within the layers, over some rows
    of data; with scope "global", of all these maps together. As in its paper embeddings, norms, biases and the head have no
    mask. State as for magnitude. Sources: arXiv 2402.11592, section 5; Wanda, arXiv 2306.11695.
    """

    def __init__(
        self, sparsity: float, seed: int, kind: str = "random", scope: str = "layer", refresh: int | None = None
    ) -> None:
        """sparsity: the fraction left out. refresh: steps until a mask is drawn anew; None keeps the first."""
        self.sparsity, self.seed, self.kind, self.scope, self.refresh = sparsity, seed, kind, scope, refresh
        self.drawn: int | None = None
        self.state: MutableMapping[Any, Any] = {}
        self.version = 0  # grows where a mask is not written into the places of the one before
        self._seeds: dict[torch.device, Tensor] = {}

    def at(
        self, step: int, named: Mapping[str, Any], state: MutableMapping[Any, Any], norms: Callable[[int], Norms]
    ) -> None:
        """The mask of a step; weights are read, and `norms` called, at the steps that draw one."""
        self.state, self.drawn = state, step // self.refresh * self.refresh if self.refresh else 0
        seed = signed(noise.step_seed(self.seed, self.drawn))
        for seed_1 in self._seeds.values():
            seed_1.fill_(seed)
        key, params = "sparsity" if self.kind == "random" else "kept", list(named.values())
        if any(key not in state[p] for p in params) or (step == self.drawn and self.kind != "random"):
            if self.kind == "wanda":
                self._weigh(named, norms(self.drawn))
            else:
                self._measure(params)

    def keep(self, param: Any, pid: int, first: int, count: int) -> Tensor | None:
        """(n,) bool: True where elements first, first + 1, … are perturbed. None: all of them are."""
        own = self.state[param]
        if self.kind != "random":
            return None if own["kept"] is None else own["kept"][first : first + count]
        return noise.kept(count, self._seed_on(param.device), pid, own["sparsity"], first)

    def keep_rows(self, param: Any, pid: int, rows_K: Tensor) -> Tensor | None:
        """(K, D) bool: the same of the rows named."""
        own, width = self.state[param], param[0].numel()
        if self.kind != "random":
            return None if own["kept"] is None else own["kept"].view(-1, width)[rows_K]
        return noise.kept_rows(rows_K, width, self._seed_on(param.device), pid, own["sparsity"])

    def _seed_on(self, device: torch.device) -> Tensor:
        """(1,) int64, the mask's seed: always in the same place, where a graph reads that of the mask of its step."""
        if device not in self._seeds:
            seed = signed(noise.step_seed(self.seed, self.drawn or 0))
            self._seeds[device] = torch.tensor([seed], dtype=torch.int64, device=device)
        return self._seeds[device]

    def _write(self, param: Any, key: str, value: Any) -> None:
        """A mask's part for a parameter, into the tensor of the one before where there is one."""
        own = self.state[param]
        if isinstance(value, Tensor) and isinstance(own.get(key), Tensor):
            own[key].copy_(value)
        elif key not in own or (own[key] is not value and own[key] != value):
            own[key] = value
            self.version += 1

    def _measure(self, params: Sequence[Any]) -> None:
        for tensors in [list(params)] if self.scope == "global" else [[p] for p in params]:
            if self.kind == "random" and self.scope == "layer":
                self._write(tensors[0], "sparsity", self.sparsity)
                continue
            edge, ties = smallest([p.data for p in tensors], int(self.sparsity * sum(p.numel() for p in tensors)))
            for param in tensors:
                left_out, ties = _under(_bits(param.data), edge, ties)
                kept = ~left_out
                if self.kind == "magnitude":
                    self._write(param, "kept", kept)
                else:
                    self._write(param, "sparsity", 1 - int(kept.sum()) / max(kept.numel(), 1))

    def _weigh(self, named: Mapping[str, Any], norms: Norms) -> None:
        """Wanda's mask. Of equal scores the first are left out."""
        inside = [name for name, p in named.items() if IN_A_LAYER.search(name) and p.dim() > 1]
        maps = [(named[name], norms[name]) for name in inside if name in norms]
        if not maps:
            raise InputError(
                "mask='wanda': no trained parameter is the weight of a linear map within a numbered layer; "
                "use mask='magnitude'"
            )
        if len(maps) < len(inside):
            unread = next(name for name in inside if name not in norms)
            logger.warning(
                "mask wanda: %d of %d matrices within the layers are read by no linear map, so they have no mask (first: %s)",
                len(inside) - len(maps), len(inside), unread,
            )  # fmt: skip
        empty = next((name for name in inside if not bool(named[name].any())), None)
        if empty is not None:
            raise InputError(
                f"mask='wanda': {empty} is all zero, so its scores tell no weight from another (LoRA starts so); "
                "use mask='random'"
            )
        masked = {id(param) for param, _ in maps}
        for param in named.values():
            if id(param) not in masked:
                self._write(param, "kept", None)
        edge, ties = 0, 0
        if self.scope == "global":
            edge, ties = smallest(_Scores(maps), int(self.sparsity * sum(p.numel() for p, _ in maps)))
        for param, norm in maps:
            kept = torch.ones(param.shape, dtype=torch.bool, device=param.device)
            rows = by_output(kept, norm).split(chunk_of(param, norm))
            for kept_oI, scores_oI in zip(rows, scores(param, norm), strict=True):
                if self.scope == "global":
                    left_out, ties = _under(_bits(scores_oI), edge, ties)
                    kept_oI.copy_(~left_out.view(scores_oI.shape))
                else:
                    least = scores_oI.argsort(dim=1, stable=True)[:, : int(self.sparsity * scores_oI.shape[1])]
                    kept_oI.scatter_(1, least, False)
            self._write(param, "kept", kept.view(-1))


class _Scores:
    """Wanda's scores of some weights, made anew each time they are gone through."""

    def __init__(self, maps: Sequence[tuple[Any, Tensor]]) -> None:
        self.maps = maps

    def __iter__(self) -> Iterator[Tensor]:
        for param, norm in self.maps:
            yield from scores(param, norm)


def _under(bits: Tensor, edge: int, ties: int) -> tuple[Tensor, int]:
    """(n,) bool: what is under the edge, and the first `ties` at it; and how many of these are still to come."""
    equal = bits == edge
    also = equal & (equal.cumsum(0) <= ties)
    return (bits < edge) | also, ties - int(also.sum())


def smallest(tensors: Iterable[Tensor], k: int) -> tuple[int, int]:
    """(edge, ties): the k smallest |x| are those whose float32 bits are under edge, and `ties` of those at it.

    Two passes of counting, 16 bits each: no sort, no copy but of one tensor at a time. They are gone through twice.
    """
    if k <= 0:
        return 0, 0
    edge = 0
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for tensor in tensors:
            bits = _bits(tensor)
            if shift == 0:
                bits = bits[bits >> 16 == edge >> 16]
            counts += torch.bincount(bits >> shift & 0xFFFF, minlength=1 << 16).cpu()
        reached = counts.cumsum(0)
        place = int(torch.searchsorted(reached, k))
        k -= int(reached[place - 1]) if place else 0
        edge |= place << shift
    return edge, k


def _bits(tensor: Tensor) -> Tensor:
    """(n,) int32: the bits of |x| in float32, in the order of |x|."""
    return tensor.detach().reshape(-1).abs().float().view(torch.int32)


class MaskedDirections(Directions):
    """Directions that are zero where a mask says so: a weight that is left out keeps its bits."""

    mask: Mask
    masked = True

    def kept(self, param: torch.nn.Parameter, first: int, count: int) -> Tensor | None:
        return self.mask.keep(param, self.slots[id(param)].id, first, count)

    def displaced(self, param: torch.nn.Parameter, by: Displacement | HeldDisplacement, out: Tensor) -> Tensor:
        return self._masked(param, param.data, 0, by, out)

    def displaced_span(
        self, param: torch.nn.Parameter, first: int, last: int, by: Displacement | HeldDisplacement, out: Tensor
    ) -> Tensor:
        return self._masked(param, param.data[first:last], first * param[0].numel(), by, out)

    def displaced_rows(
        self,
        param: torch.nn.Parameter,
        rows_K: Tensor,
        by: Displacement | HeldDisplacement,
        out: Tensor,
        update: Displacement | HeldDisplacement | None = None,
    ) -> Tensor:
        super().displaced_rows(param, rows_K, by, out, update)
        keep_KD = self.mask.keep_rows(param, self.slots[id(param)].id, rows_K)
        return out if keep_KD is None else out.copy_(torch.where(keep_KD.view(out.shape), out, param.data[rows_K]))

    def apply(self, by: Displacement | HeldDisplacement, params: Sequence[torch.nn.Parameter] | None = None) -> None:
        for param in self.params if params is None else params:
            if not by.is_zero(self.slots[id(param)].group):
                self.displaced(param, by, param.data)

    def apply_compensated(
        self,
        by: Displacement | HeldDisplacement,
        residuals: Sequence[Tensor],
        factors: Sequence[float | Tensor] = (),
        params: Sequence[torch.nn.Parameter] | None = None,
    ) -> None:
        """As `Directions.apply_compensated`, by tiles; decay reaches every weight, as it does elsewhere."""
        for param, lost in zip(self.params if params is None else params, residuals, strict=True):
            group = self.slots[id(param)].group
            factor = factors[group] if factors else 1.0
            if not isinstance(factor, Tensor):  # as a graph has it, for float64 weights too
                factor = float32(factor)
            flat, lost_n = param.data.reshape(-1), lost.view(-1)
            for first, moved in self.gradient_tiles(param, by, CHUNK):
                part = slice(first, first + moved.numel())
                total = (flat[part].to(moved.dtype) + lost_n[part].to(moved.dtype)) * factor + moved
                rounded = total.to(param.dtype)
                moves = (moved != 0) | (factor != 1)  # a tie that was rounded once is not rounded again
                lost_n[part] = torch.where(moves, (total - rounded.to(moved.dtype)).to(param.dtype), lost_n[part])
                flat[part] = torch.where(moves, rounded, flat[part])
            if not param.data.is_contiguous():
                param.data.copy_(flat.view(param.shape))

    def _masked(
        self, param: torch.nn.Parameter, w: Tensor, start: int, by: Displacement | HeldDisplacement, out: Tensor
    ) -> Tensor:
        seeds, coefs = by.on(self.slots[id(param)].group, param.device)
        flat = w.reshape(-1)
        into = out.view(-1) if out.is_contiguous() else torch.empty_like(flat)
        for first in range(0, flat.numel(), CHUNK):
            part = slice(first, min(first + CHUNK, flat.numel()))
            self._add(into[part], flat[part], seeds, coefs, param, start + first)
        if not out.is_contiguous():
            out.copy_(into.view(out.shape))
        return out

    def _add(
        self, out: Tensor, w: Tensor, seeds: Tensor, coefs: Tensor, param: torch.nn.Parameter, start: int = 0
    ) -> None:
        moved = torch.empty_like(w)
        super()._add(moved, w, seeds, coefs, param, start)
        keep = self.kept(param, start, w.numel())
        if keep is None:
            out.copy_(moved)
        else:
            torch.where(keep, moved, w, out=out)
