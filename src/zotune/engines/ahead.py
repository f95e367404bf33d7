"""The copies that a product reads, made while the product before it runs.

Making copies of a weight waits for memory, products for arithmetic. Within a CUDA graph the copies of the next tile are a branch of
their own: the forward before has shown what comes next. Elsewhere they are made when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.engines.following import capturing
from zotune.engines.scratch import Scratch


class Tile(NamedTuple):
    """Rows of a weight that a product reads together; none where something else reads the weight."""

    weight: Any
    first: int = 0
    last: int = 0


class Branch:
    """Kernels beside those of the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def run(self, make: Callable[[Tile, Tensor], None], tile: Tile, copies: Tensor) -> Any:
        """Begins after all that the current stream was given so far. Returns what `join` takes."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            make(tile, copies)
        return self.stream.record_event()

    def join(self, done: Any) -> None:
        """What the current stream is given from now on begins after it."""
        torch.cuda.current_stream(self.stream.device).wait_event(done)


class Ahead:
    """Copies of tiles, (2, rows, D), in the engine's scratch.

    A forward's make(tile, copies) writes them, called in the order of the products, on the branch one tile early. A tile is made
    ahead only where nothing but the product reads its weight before. Memory: two tiles instead of one.
    """

    def __init__(self) -> None:
        self._order: list[Tile] = []  # of the last forward that ended
        self._seen: list[Tile] | None = None  # of this one
        self._branch: Any = None
        self._next: tuple[Tile, Tensor, Any] | None = None  # made or being made: copies, and what `join` takes

    def begin(self, scratch: Scratch, make: Callable[[Tile, Tensor], None]) -> None:
        self.scratch, self.make, self._seen = scratch, make, []

    def end(self) -> None:
        """The forward is over."""
        self._drop()
        if self._seen is not None:
            self._order, self._seen = self._seen, None

    def copies(self, tile: Tile) -> Tensor:
        """The tile's copies, until `give`."""
        index = self._note(tile)
        if self._next is not None and _same(self._next[0], tile):
            (_, copies, done), self._next = self._next, None
            self._branch.join(done)
        else:
            self._drop()
            copies = self._memory(tile)
            self.make(tile, copies)
        self._prepare(index)
        return copies

    def give(self, copies: Tensor) -> None:
        """The product is on its way: what comes to this memory comes after it."""
        self.scratch.give(copies)

    def reads(self, weight: Any) -> None:
        """Something else is about to read the weight on the current stream."""
        self._note(Tile(weight))
        if self._next is not None and self._next[0].weight is weight:
            self._branch.join(self._next[2])

    def made(self, weight: Any) -> int:
        """How many rows of the weight, from the first on, have been made ahead of any product with it."""
        tile = None if self._next is None else self._next[0]
        return tile.last if tile is not None and tile.weight is weight and tile.first == 0 else 0

    def _note(self, tile: Tile) -> int:
        assert self._seen is not None
        self._seen.append(tile)
        return len(self._seen) - 1

    def _prepare(self, index: int) -> None:
        """Begin with the next tile of the order, if this forward has followed it so far."""
        if not self._ahead(index):
            return
        others = []
        for tile in self._order[index + 1 :]:
            if tile.last:
                break
            others.append(tile.weight)
        else:
            return
        if any(weight is tile.weight for weight in others) or not tile.weight.is_contiguous():
            return
        if self._branch is None:
            self._branch = Branch(tile.weight.device)
        copies = self._memory(tile)
        self._next = tile, copies, self._branch.run(self.make, tile, copies)

    def _ahead(self, index: int) -> bool:
        assert self._seen is not None
        return capturing() and index < len(self._order) and _same(self._order[index], self._seen[index])

    def _memory(self, tile: Tile) -> Tensor:
        shape = (2, tile.last - tile.first, tile.weight.shape[1])
        return self.scratch.take(tile.weight.data[:1, :1].expand(*shape[1:]).expand(shape))

    def _drop(self) -> None:
        """What was made ahead is not what is read next."""
        if self._next is not None:
            _, copies, done = self._next
            self._next = None
            self._branch.join(done)
            self.scratch.give(copies)


def _same(one: Tile, other: Tile) -> bool:
    return one.weight is other.weight and one[1:] == other[1:]
