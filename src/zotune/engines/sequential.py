"""One forward a place; every read of a trainable parameter sees a perturbed copy.

The weights themselves are never perturbed. While the loss runs, a `TorchFunctionMode` hands each torch function
that reads a trainable parameter a copy in reused scratch, θ + εz, drawn as it is needed and given up when the function
returns. Following the reads instead of the modules makes tied weights, weights read outside the module that owns them
(DeBERTa's relative embeddings, `nn.MultiheadAttention`), and modules nobody has heard of right without a case for each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.directions.shards import held, is_laid_out, laid_out_as
from zotune.engines.attended import attended
from zotune.engines.places import Copy, Places, as_losses
from zotune.engines.reads import leaves, reads_no_values, same_draws, tensors_in
from zotune.engines.scratch import Scratch
from zotune.engines.writing import Writer
from zotune.errors import InputError

logger = logging.getLogger(__name__)

# A weight over this is read in tiles of its rows where the function allows it.
TILE_BYTES = 16 << 20


class SequentialEngine:
    """The loss at any place, for any closure and any module, by a forward of its own: an `Engine` (see `zotune.engines`).

    Scratch: the largest parameter that a single function reads. An embedding look-up draws only the rows it uses, a linear
    map over `TILE_BYTES` goes by tiles of its rows. seen: ids of the parameters that a function has read. unread: those that none
    has by the end of the first loss; None before it.
    """

    name = "sequential"

    def __init__(self, directions: Directions) -> None:
        self.directions = directions
        self.writer = Writer(directions)
        self.scratch = Scratch()
        self.forwards = 0
        self.seen: set[int] = set()
        self.unread: list[torch.nn.Parameter] | None = None

    def loss(self, closure: Callable[[], Any], at: Displacement | HeldDisplacement) -> Any:
        """What the closure returns where every trainable parameter reads θ + displacement.

        The weights are as they were whether or not the closure raises.
        """
        self.writer.ready()
        with torch.no_grad():
            if len(at.seeds_Q) == 0:
                return self._run(closure)
            result = self._displaced_loss(closure, at)
            if self.unread is None:
                self.unread = self._unread()
                if self.unread:
                    refuse_unread(self.unread, self.directions)
                    # Never read through a torch function: unused, or read by a kernel of someone's own. Copies that
                    # stand in for the weights during the whole forward are right for both; this loss lacked them.
                    names = [self.directions.slots[id(p)].name for p in self.unread]
                    logger.warning(
                        "%d trainable parameters are not read by any torch function (first: %s): "
                        "they are perturbed as whole copies during each forward",
                        len(names),
                        names[0],
                    )
                    result = self._displaced_loss(closure, at)
            return result

    def _unread(self) -> list[torch.nn.Parameter]:
        return [p for p in self.directions.params if id(p) not in self.seen]

    def losses(self, loss: Callable[[Any], Any], batch: Any, places: Places) -> Tensor:
        """A forward a copy of the batch: see `zotune.engines.Engine`."""
        return self._apart(loss, batch, places)

    def overlook(self, loss: Callable[[Any], Any], batch: Any, places: Places) -> None:
        """Nothing: directions follow from seeds alone."""

    def replayed(self) -> None:
        """A captured step was replayed: what it wrote into buffers is not what the host left there."""

    def _apart(self, loss: Callable[[Any], Any], batch: Any, places: Places) -> Tensor:
        redraw = same_draws(self.directions.params)
        found: list[Tensor] = []
        for copy in places.copies:
            if found:
                redraw()
            found.append(as_losses(self._copy_loss(partial(loss, batch), places, copy)))
        return torch.stack(found)

    def _copy_loss(self, closure: Callable[[], Any], places: Places, copy: Copy) -> Any:
        """What the loss of the whole batch is where its rows have the directions of one copy."""
        assert len(places.shares) == 1
        return self.loss(closure, places.displacement(copy))

    def _run(self, closure: Callable[[], Any]) -> Any:
        self.forwards += 1
        return closure()

    def _displaced_loss(self, closure: Callable[[], Any], at: Displacement | HeldDisplacement) -> Any:
        with self._stand_ins(at), PerturbedReads(self, at):
            return self._run(closure)

    @contextmanager
    def _stand_ins(self, at: Displacement | HeldDisplacement) -> Iterator[None]:
        swapped: list[tuple[torch.nn.Parameter, Tensor]] = []
        try:
            for param in self.unread or ():
                own = param.data
                copy = self.directions.displaced(param, at, torch.empty_like(own))
                swapped.append((param, own))
                param.data = copy
            yield
        finally:
            for param, own in swapped:
                param.data = own


def refuse_unread(unread: list[torch.nn.Parameter], directions: Directions) -> None:
    """A copy of a weight for a whole forward cannot be made of one that is not there before its block runs."""
    for param in unread:
        if hasattr(param, "streamed"):
            raise InputError(
                f"--max-gpu-memory: {directions.slots[id(param)].name} streams, and no torch function reads it; "
                "leave the option out"
            )


class PerturbedReads(TorchFunctionMode):
    def __init__(self, engine: SequentialEngine, at: Displacement | HeldDisplacement) -> None:
        super().__init__()
        self.engine, self.at = engine, at
        stand_ins = {id(p) for p in engine.unread or ()}
        self.read = {key for key in engine.directions.slots if key not in stand_ins}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._reads(args) and not (kwargs and self._reads(tuple(kwargs.values()))):
            return attended(func, args, kwargs)
        if reads_no_values(func):
            return func(*args, **kwargs)
        if func is F.linear and (product := self._tiled_linear(*args, **kwargs)) is not None:
            return product
        if func is F.embedding and (rows := self._embedding_rows(*args, **kwargs)) is not None:
            return rows
        return self._call_with_copies(func, args, kwargs)

    def _reads(self, args: tuple[Any, ...]) -> bool:
        read = self.read
        for arg in args:
            if id(arg) in read:
                return True
            if type(arg) in (list, tuple) and any(id(inner) in read for inner in arg):
                return True
        return False

    def _call_with_copies(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        directions, scratch = self.engine.directions, self.engine.scratch
        copies: dict[int, Tensor] = {}

        def substitute(arg: Any) -> Any:
            if id(arg) in self.read:
                own = held(arg)
                key = id(own)
                if key not in copies:
                    self.engine.seen.add(key)
                    copies[key] = directions.displaced(own, self.at, scratch.take(own))  # type: ignore[arg-type]
                return laid_out_as(arg, copies[key])
            return arg

        result = func(*(leaves(a, substitute) for a in args), **{k: leaves(v, substitute) for k, v in kwargs.items()})
        alive = {held(t).untyped_storage().data_ptr() for t in tensors_in(result)}
        for copy in copies.values():
            if copy.untyped_storage().data_ptr() in alive:
                scratch.forget(copy)  # a view of the copy goes on: its memory is no longer ours to reuse
            else:
                scratch.give(copy)
        return result

    def _tiled_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """A product with a weight over TILE_BYTES (a head, mostly), a tile of its rows at a time; None for others."""
        size = weight.numel() * weight.element_size()
        if id(weight) not in self.read or size <= TILE_BYTES or weight.dim() != 2 or is_laid_out(weight):
            return None
        directions, scratch = self.engine.directions, self.engine.scratch
        self.engine.seen.add(id(weight))
        if bias is not None and id(bias) in self.read:
            self.engine.seen.add(id(bias))
            bias = directions.displaced(bias, self.at, torch.empty_like(bias))  # type: ignore[arg-type]
        rows = -(-weight.shape[0] // -(-size // TILE_BYTES))
        copy = scratch.take(weight[:rows])
        products = []
        for first in range(0, weight.shape[0], rows):
            last = min(first + rows, weight.shape[0])
            tile = directions.displaced_span(weight, first, last, self.at, copy[: last - first])  # type: ignore[arg-type]
            products.append(F.linear(input, tile, None if bias is None else bias[first:last]))
        scratch.give(copy)
        return torch.cat(products, dim=-1)

    def _embedding_rows(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor | None:
        """The rows that a look-up uses, perturbed; None where the whole table costs less or is renormalised."""
        if max_norm is not None or id(weight) not in self.read or input.numel() > weight.shape[0]:
            return None
        if is_laid_out(weight):
            return None
        self.engine.seen.add(id(weight))
        rows_K = input.reshape(-1)
        out = torch.empty((rows_K.numel(), *weight.shape[1:]), dtype=weight.dtype, device=weight.device)
        self.engine.directions.displaced_rows(weight, rows_K.long(), self.at, out)  # type: ignore[arg-type]
        return out.view(*input.shape, *weight.shape[1:])
