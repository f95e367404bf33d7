"""Directions of parameters of which this process holds a part: noise is a function of the whole's elements, so it draws its own.

A parameter that is laid out over processes is a `DTensor` (FSDP2, tensor parallelism). What this process holds of it is a plain
tensor in the same memory; its elements are rows that lie somewhere in the whole.
"""

# K rows of D elements that a part has, each a run of the whole's elements; n elements of a tile.

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Directions, Displacement, HeldDisplacement


def is_laid_out(value: Any) -> bool:
    """Whether this is a tensor over several processes."""
    module = sys.modules.get("torch.distributed.tensor")  # who has not imported it has none
    return module is not None and isinstance(value, module.DTensor)


def held(value: Tensor) -> Tensor:
    """What this process holds of a tensor: always the same object; the tensor itself, where it is whole."""
    # `to_local` makes a new Parameter at each call since torch 2.13
    return value._local_tensor if is_laid_out(value) else value  # type: ignore[attr-defined]


def laid_out_as(value: Any, own: Tensor) -> Tensor:
    """`own` as this process' part of a tensor that lies over the processes as `value` does."""
    if not is_laid_out(value):
        return own
    from torch.distributed.tensor import DTensor

    mesh, placements = value.device_mesh, value.placements
    laid: Tensor = DTensor.from_local(own, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
    return laid


@dataclass(frozen=True)
class Part:
    """Which elements of a parameter a tensor holds: its row k, of `width` elements, is the whole's starts_K[k], …

    shape: the whole's. sides: as a matrix of rows of all further dimensions, which rows and columns are held, first and behind the
    last; None where these lie apart.
    """

    starts_K: Tensor  # int64, on the tensor's device
    width: int
    shape: tuple[int, ...] = ()
    sides: tuple[tuple[int, int], tuple[int, int]] | None = None

    @property
    def is_whole(self) -> bool:
        return self.width == math.prod(self.shape)

    def span(self, first: int, last: int, rows: int) -> Part:
        """Of the tensor's rows first to last (exclusive), of so many in its first dimension."""
        if len(self.starts_K) == 1:
            each = self.width // max(rows, 1)
            return Part(self.starts_K + first * each, (last - first) * each)
        return Part(self.starts_K.view(rows, -1)[first:last].flatten(), self.width)

    def of_rows(self, rows_K: Tensor, rows: int) -> Part:
        """Of some rows in the tensor's first dimension, of so many: each of them in one run of elements."""
        if len(self.starts_K) == 1:
            each = self.width // max(rows, 1)
            return Part(self.starts_K + rows_K * each, each)
        starts_RK = self.starts_K.view(rows, -1)
        return Part(starts_RK[rows_K].flatten(), self.width)


def all_of(tensor: Tensor) -> Part:
    """A whole parameter, as a part."""
    start = torch.zeros(1, dtype=torch.int64, device=tensor.device)
    return Part(start, tensor.numel(), tuple(tensor.shape))


def part_of(value: Any) -> Part | None:
    """What this process holds of a tensor; None where that is all of it. Raises ValueError for sums that are still to be made."""
    if not is_laid_out(value) or all(p.is_replicate() for p in value.placements):
        return None
    if any(p.is_partial() for p in value.placements):
        raise ValueError("holds a part of a sum (Partial); redistribute it first")
    own = held(value)
    indices = [_indices(value, dim) for dim in range(value.dim())]
    if tuple(map(len, indices)) != tuple(own.shape):
        raise ValueError(f"has a part of shape {tuple(own.shape)} where its layout says {tuple(map(len, indices))}")
    strides = [math.prod(value.shape[dim + 1 :]) for dim in range(value.dim())]
    width, inner = 1, value.dim()
    while inner and len(indices[inner - 1]) == value.shape[inner - 1]:
        inner -= 1
        width *= value.shape[inner]
    base = 0
    if inner:
        run = _run(indices[inner - 1])
        if run is not None:
            inner -= 1
            width, base = width * (run[1] - run[0]), run[0] * strides[inner]
    starts_K = torch.full((1,), base, dtype=torch.int64, device=own.device)
    for index, stride in zip(indices[:inner], strides, strict=False):
        starts_K = (starts_K[:, None] + index.to(own.device)[None, :] * stride).flatten()
    return Part(starts_K, width, tuple(value.shape), _sides(indices, strides))


def _sides(indices: Sequence[Tensor], strides: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    rows_O, columns_D = indices[0], torch.zeros(1, dtype=torch.int64, device=indices[0].device)
    for index, stride in zip(indices[1:], strides[1:], strict=True):
        columns_D = (columns_D[:, None] + index[None, :] * stride).flatten()
    runs = [_run(rows_O), _run(columns_D)]
    return None if None in runs else (runs[0], runs[1])  # type: ignore[return-value]


def _run(index: Tensor) -> tuple[int, int] | None:
    """The first of these numbers and the one behind the last, where they follow one another."""
    if not len(index):
        return 0, 0
    first = int(index[0])
    follow = torch.arange(first, first + len(index), device=index.device)
    return (first, first + len(index)) if torch.equal(index, follow) else None


def _indices(value: Any, dim: int) -> Tensor:
    """Which of a dimension's entries this process holds: what its layout makes of their numbers."""
    from torch.distributed.tensor import DTensor, Replicate

    numbers = torch.arange(value.shape[dim], device=held(value).device)
    numbers = numbers.view([-1 if d == dim else 1 for d in range(value.dim())])
    here = [p if getattr(p, "dim", None) == dim else Replicate() for p in value.placements]
    whole = DTensor.from_local(numbers, value.device_mesh, [Replicate() for _ in here], run_check=False)
    found: Tensor = whole.redistribute(placements=here).to_local().flatten()
    return found


class ShardedDirections(Directions):
    """Directions of tensors that hold parts of parameters, drawn as one process would draw the whole's.

    parts: by id of the tensor; one that is not named is whole. also: (another object that forwards may read, the tensor it stands
    for).
    """

    scattered = True

    def __init__(
        self,
        groups: Sequence[Sequence[tuple[str, Any]]],
        distribution: str,
        parts: Mapping[int, Part],
        also: Sequence[tuple[Any, Any]] = (),
    ) -> None:
        super().__init__(groups, distribution)
        self.parts = {key: part for key, part in parts.items() if key in self.slots}
        self._also = list(also)  # kept, so that no other object takes their ids
        for other, tensor in also:
            self.slots[id(other)] = self.slots[id(tensor)]

    def whole_shape(self, param: Any) -> tuple[int, ...]:
        part = self.parts.get(id(param))
        return tuple(param.shape) if part is None else part.shape

    def held_sides(self, param: Any) -> tuple[slice, slice] | None:
        part = self.parts.get(id(param))
        if part is None or part.is_whole:
            return None
        if part.sides is None:
            raise ValueError(
                f"parameter {self.slots[id(param)].name!r}: what this process holds of it is no block of rows and columns, which "
                "low-rank directions need; use engine='sequential' with groups=1"
            )
        return slice(*part.sides[0]), slice(*part.sides[1])

    def by_address(self) -> dict[Any, Any]:
        """The tensors that stand for others' objects, by where they are now and their shape."""
        return {(t.data_ptr(), t.shape): t for _, t in self._also if t.numel()}

    def _draw(self, out: Tensor, w: Tensor, part: Part, by: Displacement | HeldDisplacement, param: Any) -> Tensor:
        slot = self.slots[id(param)]
        seeds, coefs = by.on(slot.group, param.device)
        if w.numel():
            shape = len(part.starts_K), part.width
            into = out.view(shape) if out.is_contiguous() else out.new_empty(shape)
            if out.data_ptr() != w.data_ptr():
                into.copy_(
                    w.reshape(shape)
                )  # numpy, by which the CPU draws, would forbid FSDP2 to free what it has gathered
            noise.add_noise_at(into, into, part.starts_K, seeds, coefs, slot.id, self.distribution)
            if not out.is_contiguous():
                out.copy_(into.view(out.shape))
        return out

    def displaced(self, param: Any, by: Displacement | HeldDisplacement, out: Tensor) -> Tensor:
        part = self.parts.get(id(param))
        return super().displaced(param, by, out) if part is None else self._draw(out, param.data, part, by, param)

    def displaced_span(
        self, param: Any, first: int, last: int, by: Displacement | HeldDisplacement, out: Tensor
    ) -> Tensor:
        part = self.parts.get(id(param))
        if part is None:
            return super().displaced_span(param, first, last, by, out)
        return self._draw(out, param.data[first:last], part.span(first, last, len(param)), by, param)

    def displaced_rows(
        self,
        param: Any,
        rows_K: Tensor,
        by: Displacement | HeldDisplacement,
        out: Tensor,
        update: Displacement | HeldDisplacement | None = None,
    ) -> Tensor:
        part = self.parts.get(id(param))
        if part is None:
            return super().displaced_rows(param, rows_K, by, out, update)
        assert update is None, "an update waits with engines that hold whole weights alone"
        return self._draw(out, param.data[rows_K], part.of_rows(rows_K, len(param)), by, param)

    def gradient_tiles(
        self, param: Any, by: Displacement | HeldDisplacement, size: int
    ) -> Iterator[tuple[int, Tensor]]:
        part = self.parts.get(id(param))
        if part is None:
            yield from super().gradient_tiles(param, by, size)
            return
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        for first, piece in _pieces(part, size):
            tile = torch.zeros(len(piece.starts_K) * piece.width, dtype=wide, device=param.device)
            yield first, self._draw(tile, tile, piece, by, param)

    def apply(self, by: Displacement | HeldDisplacement, params: Sequence[Any] | None = None) -> None:
        params = self.params if params is None else params
        super().apply(by, [p for p in params if id(p) not in self.parts])
        for param in params:
            if id(param) in self.parts and not by.is_zero(self.slots[id(param)].group):
                self.displaced(param, by, param.data)

    def apply_each(self, moves: Sequence[Displacement], params: Sequence[Any] | None = None) -> None:
        params = self.params if params is None else params
        super().apply_each(moves, [p for p in params if id(p) not in self.parts])
        for by in moves:
            self.apply(by, [p for p in params if id(p) in self.parts])

    def apply_compensated(
        self,
        by: Displacement | HeldDisplacement,
        residuals: Sequence[Tensor],
        factors: Sequence[float | Tensor] = (),
        params: Sequence[Any] | None = None,
    ) -> None:
        pairs = list(zip(self.params if params is None else params, residuals, strict=True))
        whole = [(p, lost) for p, lost in pairs if id(p) not in self.parts]
        super().apply_compensated(by, [lost for _, lost in whole], factors, [p for p, _ in whole])
        for param, lost in pairs:
            group = self.slots[id(param)].group
            factor = factors[group] if factors else 1.0
            if id(param) not in self.parts or (by.is_zero(group) and factor == 1):
                continue
            flat, lost_n = param.data.view(-1), lost.view(-1)
            for first, moved in self.gradient_tiles(param, by, noise.STEPS_PART):
                at = slice(first, first + moved.numel())
                total = (flat[at].to(moved.dtype) + lost_n[at].to(moved.dtype)) * factor + moved
                flat[at] = total.to(param.dtype)
                lost_n[at] = (total - flat[at].to(moved.dtype)).to(param.dtype)


def _pieces(part: Part, size: int) -> Iterator[tuple[int, Part]]:
    """The part cut into so many elements at the most: (first element of the tensor, piece)."""
    if part.width >= size:
        for row, start in enumerate(part.starts_K):
            for first in range(0, part.width, size):
                yield row * part.width + first, Part(start.view(1) + first, min(size, part.width - first))
        return
    for row in range(0, len(part.starts_K), each := size // max(part.width, 1)):
        yield row * part.width, Part(part.starts_K[row : row + each], part.width)
