"""One forward a probe; every read of a trainable parameter sees a perturbed copy.

The weights themselves are never perturbed. While the loss runs, a `TorchFunctionMode` hands each torch function
that reads a trainable parameter a copy in reused scratch, θ + εz, drawn as it is needed and given up when the function
returns. Following the reads instead of the modules makes tied weights, weights read outside the module that owns them
(DeBERTa's relative embeddings, `nn.MultiheadAttention`), and modules nobody has heard of right without a case for each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.scratch import Scratch

logger = logging.getLogger(__name__)

# A weight over this is read in tiles of its rows where the function allows it.
TILE_BYTES = 16 << 20

# Properties of a tensor that give its values. The others (shape, dtype, device, …) say nothing of them.
_VALUES = {"data", "T", "mT", "H", "mH", "real"}
_NO_VALUES = {
    "__set__",
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    "element_size",
    "is_floating_point",
    "nelement",
}


class SequentialEngine:
    """L(θ + displacement) for any closure and any module.

    Scratch: the largest parameter that a single function reads. An embedding look-up draws only the rows it uses, a linear
    map over `TILE_BYTES` goes by tiles of its rows.
    """

    name = "sequential"

    def __init__(self, directions: Directions) -> None:
        self.directions = directions
        self.scratch = Scratch()
        self.forwards = 0
        self._seen: set[int] = set()
        self._unread: list[torch.nn.Parameter] | None = None  # unknown until a first loss has run

    def loss(self, closure: Callable[[], Any], at: Displacement | HeldDisplacement) -> Any:
        """What the closure returns where every trainable parameter reads θ + displacement.

        The weights are as they were whether or not the closure raises.
        """
        with torch.no_grad():
            if len(at.seeds_Q) == 0:
                return self._run(closure)
            result = self._displaced_loss(closure, at)
            if self._unread is None:
                self._unread = [p for p in self.directions.params if id(p) not in self._seen]
                if self._unread:
                    # Never read through a torch function: unused, or read by a kernel of someone's own. Copies that
                    # stand in for the weights during the whole forward are right for both; this loss lacked them.
                    names = [self.directions.slots[id(p)].name for p in self._unread]
                    logger.warning(
                        "%d trainable parameters are not read by any torch function (first: %s): "
                        "they are perturbed as whole copies during each forward",
                        len(names),
                        names[0],
                    )
                    result = self._displaced_loss(closure, at)
            return result

    def both(
        self,
        loss: Callable[[Any], Any],
        batch: Any,
        at: Displacement | HeldDisplacement,
        shares: tuple[int, ...] | None = None,
    ) -> tuple[Any, Any]:
        """What loss(batch) is at θ + displacement and at θ − displacement. Dropout draws the same masks in both.

        shares: where the displacement has several directions, how many of the batch's rows each has.
        """
        return self._separate(loss, batch, at, shares)

    def _separate(
        self,
        loss: Callable[[Any], Any],
        batch: Any,
        at: Displacement | HeldDisplacement,
        shares: tuple[int, ...] | None = None,
    ) -> tuple[Any, Any]:
        assert shares is None
        redraw = same_draws(self.directions.params)
        plus = self.loss(lambda: loss(batch), at)
        redraw()
        return plus, self.loss(lambda: loss(batch), at.negated())

    def apply(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        """θ ← θ + displacement. at_once: as `lowrank` has it."""
        self.directions.apply(by)

    def apply_compensated(
        self,
        by: Displacement | HeldDisplacement,
        residuals: Sequence[Tensor],
        factors: Sequence[float | Tensor] = (),
        at_once: int = 1,
    ) -> None:
        """θ + r ← factor·(θ + r) + displacement, see `Directions.apply_compensated`."""
        self.directions.apply_compensated(by, residuals, factors)

    def apply_each(self, moves: Sequence[Displacement], at_once: int = 1) -> None:
        """`apply` of one after the other, to the bit, with fewer passes over the weights."""
        self.directions.apply_each(moves)

    # Updates that wait for the next read of the weights, where an engine has such.

    holds = False

    def hold(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        """`apply`, at the latest when the weights are next read by this engine, or by `settle`."""
        self.apply(by, at_once)

    def settle(self) -> None:
        """Apply what `hold` left."""

    def arm(self, count: int) -> None:
        """Before a captured step, which takes what `hold` left of `count` directions from where it is on the device."""

    def drop(self) -> None:
        """Give up what `hold` or `arm` left."""

    def replayed(self) -> None:
        """A captured step was replayed: what it wrote into buffers is not what the host left there."""

    def _run(self, closure: Callable[[], Any]) -> Any:
        self.forwards += 1
        return closure()

    def _displaced_loss(self, closure: Callable[[], Any], at: Displacement | HeldDisplacement) -> Any:
        with self._stand_ins(at), _PerturbedReads(self, at):
            return self._run(closure)

    @contextmanager
    def _stand_ins(self, at: Displacement | HeldDisplacement) -> Iterator[None]:
        swapped: list[tuple[torch.nn.Parameter, Tensor]] = []
        try:
            for param in self._unread or ():
                own = param.data
                copy = self.directions.displaced(param, at, torch.empty_like(own))
                swapped.append((param, own))
                param.data = copy
            yield
        finally:
            for param, own in swapped:
                param.data = own


class Through:
    """Directions whose displacements are applied by an engine, which may have a faster way, or directions of its own."""

    def __init__(self, engine: SequentialEngine, pairs: int, hold: bool = False) -> None:
        self.engine, self.pairs, self.hold = engine, pairs, hold
        self.params, self.slots = engine.directions.params, engine.directions.slots

    def apply(self, by: Displacement | HeldDisplacement) -> None:
        (self.engine.hold if self.hold else self.engine.apply)(by, self.pairs)

    def apply_compensated(
        self, by: Displacement | HeldDisplacement, residuals: Sequence[Tensor], factors: Sequence[Any] = ()
    ) -> None:
        self.engine.apply_compensated(by, residuals, factors, self.pairs)


class _PerturbedReads(TorchFunctionMode):
    def __init__(self, engine: SequentialEngine, at: Displacement | HeldDisplacement) -> None:
        super().__init__()
        self.engine, self.at = engine, at
        stand_ins = {id(p) for p in engine._unread or ()}
        self.read = {key for key in engine.directions.slots if key not in stand_ins}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._reads(args) and not (kwargs and self._reads(tuple(kwargs.values()))):
            return func(*args, **kwargs)
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
            key = id(arg)
            if key in self.read:
                if key not in copies:
                    self.engine._seen.add(key)
                    copies[key] = directions.displaced(arg, self.at, scratch.take(arg))
                return copies[key]
            return arg

        result = func(*(leaves(a, substitute) for a in args), **{k: leaves(v, substitute) for k, v in kwargs.items()})
        alive = {t.untyped_storage().data_ptr() for t in _tensors(result)}
        for copy in copies.values():
            if copy.untyped_storage().data_ptr() in alive:
                scratch.forget(copy)  # a view of the copy goes on: its memory is no longer ours to reuse
            else:
                scratch.give(copy)
        return result

    def _tiled_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """A product with a weight over TILE_BYTES (a head, mostly), a tile of its rows at a time; None for others."""
        size = weight.numel() * weight.element_size()
        if id(weight) not in self.read or size <= TILE_BYTES or weight.dim() != 2:
            return None
        directions, scratch = self.engine.directions, self.engine.scratch
        self.engine._seen.add(id(weight))
        if bias is not None and id(bias) in self.read:
            self.engine._seen.add(id(bias))
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
        self.engine._seen.add(id(weight))
        rows_K = input.reshape(-1)
        out = torch.empty((rows_K.numel(), *weight.shape[1:]), dtype=weight.dtype, device=weight.device)
        self.engine.directions.displaced_rows(weight, rows_K.long(), self.at, out)  # type: ignore[arg-type]
        return out.view(*input.shape, *weight.shape[1:])


def leaves(value: Any, substitute: Callable[[Any], Any]) -> Any:
    """The value with `substitute` of each leaf of its lists and tuples.

    A function of its own: a closure that calls itself is a reference cycle, and what it holds, copies of weights here, would stay
    until the garbage collector comes.
    """
    if type(value) in (list, tuple):
        return type(value)(leaves(inner, substitute) for inner in value)
    return substitute(value)


def reads_no_values(func: Any) -> bool:
    """Whether a torch function asks a tensor for its shape and the like alone."""
    name = getattr(func, "__name__", "")
    return name in _NO_VALUES or (name == "__get__" and getattr(func.__self__, "__name__", "") not in _VALUES)


class same_draws:
    """Called before each probe but the first: torch's generators go back to where they were when this was made."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._cpu: Tensor | None = None  # while a graph is captured there is nothing to look at
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        self._cpu = torch.get_rng_state()
        self._cuda = {
            i: torch.cuda.get_rng_state(i) for i in sorted({p.device.index or 0 for p in params if p.is_cuda})
        }

    def __call__(self) -> None:
        if self._cpu is not None:
            torch.set_rng_state(self._cpu)
            for i, state in self._cuda.items():
                torch.cuda.set_rng_state(state, i)

    def needed(self) -> bool:
        """Whether somebody has drawn since."""
        return self._cpu is not None and not (
            torch.equal(self._cpu, torch.get_rng_state())
            and all(torch.equal(state, torch.cuda.get_rng_state(i)) for i, state in self._cuda.items())
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
