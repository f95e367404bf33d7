"""Places: what a step evaluates.

A place is a displacement of θ for some rows of a batch: which rows, which direction, and a sign in {−1, 0, +1}. An estimator says
which places it wants; an engine gives the loss of every row at its places.
"""

# C copies of a batch, B its rows, K directions over them, P places, Q directions of a displacement.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.directions import Displacement, HeldDisplacement


class Place(NamedTuple):
    """Rows first to last (exclusive) of the batch at θ + sign·(the displacement's term of this direction)."""

    first: int
    last: int
    direction: int
    sign: int


class Copy(NamedTuple):
    """All rows of a batch once. Its k-th share of them is at θ + sign·(the displacement's term of direction first + k)."""

    sign: int
    first: int = 0


@dataclass(frozen=True)
class Places:
    """Places as copies of a batch: the rows of each copy are shared out among K directions in the same way.

    at: Σ ε·z of Q directions, of which each place takes one term. copies: in the order of the losses.
    shares: how many of the batch's rows each of a copy's directions has; of one number: one direction has them all.
    """

    at: Displacement | HeldDisplacement
    copies: tuple[Copy, ...]
    shares: tuple[int, ...] = (1,)

    def __len__(self) -> int:
        return len(self.copies) * len(self.shares)

    def of(self, rows: int) -> Iterator[Place]:
        """All places of a batch of so many rows, copy by copy."""
        bounds = list(pairwise(accumulate(self.shares, initial=0))) if len(self.shares) > 1 else [(0, rows)]
        for sign, direction in self.copies:
            for k, (first, last) in enumerate(bounds):
                yield Place(first, last, direction + k, sign)

    @property
    def queries(self) -> int:
        """Directions for the same rows."""
        return len({copy.first for copy in self.copies if copy.sign})

    def some(self, first: int, last: int) -> Places:
        """The copies first to last (exclusive)."""
        return Places(self.at, self.copies[first:last], self.shares)

    def times(self, factor: float) -> Places:
        """The same places so many times as far away."""
        return Places(self.at.times(factor), self.copies, self.shares)

    def displacement(self, copy: Copy) -> Displacement | HeldDisplacement:
        """Where a copy is: the terms of its directions, with its sign; of sign 0 none."""
        if copy.sign == 0:
            return Displacement()
        own = self.at.some(copy.first, copy.first + len(self.shares))
        return own if copy.sign > 0 else own.negated()


def rows_in(batch: Mapping[str, Any]) -> int:
    """Rows of a batch: the smallest first dimension of its tensors; 0 where it holds none."""
    return min((t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.dim()), default=0)


def tokens_in(batch: Mapping[str, Any]) -> int:
    """Numbers of a batch, tokens mostly: what its forward has to carry."""
    return max((t.numel() for t in batch.values() if isinstance(t, Tensor)), default=0)


def repeated(batch: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    """The batch whose rows are the numbers first … last − 1 of its copies, one after the other: row i is row i % B.

    Raises ValueError where a tensor's first dimension cannot be told apart by rows and the cut is within a copy.
    """
    rows = rows_in(batch)
    if first % rows == 0 and last % rows == 0:
        copies = (last - first) // rows
        return {k: t.repeat(copies, *[1] * (t.dim() - 1)) if _has_rows(t) else t for k, t in batch.items()}
    found: dict[str, Any] = {}
    for name, t in batch.items():
        if not _has_rows(t):
            found[name] = t
        elif t.shape[0] % rows:
            raise ValueError(f"{name!r} has {t.shape[0]} entries for {rows} rows")
        else:
            of_rows = t.unflatten(0, (rows, -1))
            runs = [of_rows[a % rows : (b - 1) % rows + 1] for a, b in _runs(first, last, rows)]
            found[name] = torch.cat(runs).flatten(0, 1)
    return found


def _runs(first: int, last: int, rows: int) -> Iterator[tuple[int, int]]:
    """first … last cut where a copy ends."""
    while first < last:
        end = min(last, (first // rows + 1) * rows)
        yield first, end
        first = end


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def as_losses(loss: Any) -> Tensor:
    """(n,): what a loss returned, one number or one a row, detached; a Python number in float64.

    Raises TypeError or ValueError, which name the closure, for what is no loss. The mean of no number would be a NaN, and a step
    with one is skipped: nobody would hear of it.
    """
    if loss is None:
        raise TypeError("the closure returned None; it has to return the loss")
    try:
        found = loss.detach() if isinstance(loss, Tensor) else torch.as_tensor(loss, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"the closure returned a {type(loss).__name__}; it has to return the loss, a number or a tensor"
        ) from None
    if not found.numel():
        raise ValueError("the closure returned an empty tensor; it has to return the loss, of at least one row")
    return found.reshape(-1)
