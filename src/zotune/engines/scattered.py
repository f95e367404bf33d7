"""`sequential` and `lowrank` for weights that lie over several processes, each of which displaces what it holds or has gathered."""

# P parts, n rows of what the model computes.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.directions import Displacement, HeldDisplacement
from zotune.directions.shards import ShardedDirections, held, is_laid_out
from zotune.engines.factors import Factored
from zotune.engines.folding import FoldingWriter
from zotune.engines.lowrank import LowRankEngine, LowRankReads
from zotune.engines.parts import PartedReads, Parts, Unfollowed
from zotune.engines.reads import leaves, reads_no_values
from zotune.engines.sequential import PerturbedReads, SequentialEngine


class ScatteredEngine(SequentialEngine):
    """A forward a place, which all processes run together. No whole copy can stand in for a weight that no torch function reads."""

    directions: ShardedDirections

    def _displaced_loss(self, closure: Any, at: Displacement | HeldDisplacement) -> Any:
        with ScatteredReads(self, at):
            return self._run(closure)

    def _unread(self) -> list[torch.nn.Parameter]:
        unread = super()._unread()
        if unread:
            raise ValueError(
                f"{self.directions.slots[id(unread[0])].name} is read by no torch function, or not as this process holds it; "
                "freeze it (requires_grad=False)"
            )
        return unread


class ScatteredReads(PerturbedReads):
    """A weight may also be read as a Parameter made of what this process holds of it, which is known by its place in memory."""

    def __init__(self, engine: ScatteredEngine, at: Displacement | HeldDisplacement) -> None:
        super().__init__(engine, at)
        self._known = _Known(engine.directions)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return super().__torch_function__(func, types, *self._known.among(args, kwargs))


class _Known:
    """What stands for a Parameter that is read, where that was made of what is held of one."""

    def __init__(self, directions: ShardedDirections) -> None:
        self._slots, self._at_address = directions.slots, directions.by_address()

    def among(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = kwargs or {}
        if not self._at_address:
            return args, kwargs
        return tuple(leaves(arg, self._one) for arg in args), {k: leaves(v, self._one) for k, v in kwargs.items()}

    def _one(self, value: Any) -> Any:
        if isinstance(value, torch.nn.Parameter) and id(value) not in self._slots and not is_laid_out(value):
            return self._at_address.get((value.data_ptr(), value.shape), value)
        return value


class ScatteredLowRank(LowRankEngine):
    """Low-rank directions of such weights: factors are drawn whole, and a process multiplies with its part of them.

    A part of x·Wᵀ that a process computes of its part of W, some outputs or a term of their sum, lacks just the same part of
    (x·V)·Uᵀ, so no collective is added. Vectors are displaced when they are read.
    """

    directions: ShardedDirections

    def __init__(
        self, reading: ShardedDirections, writing: ShardedDirections, rank: int = 1, forward_tokens: int | None = None
    ) -> None:
        super().__init__(reading, rank, forward_tokens)
        self.writer = FoldingWriter(Factored(writing, rank))

    def _reads(self, at: Displacement | HeldDisplacement, parts: Parts) -> PartedReads:
        return _LowRankReads(self, at, parts, {}, self.factored.drawn(at))


class _LowRankReads(LowRankReads):
    def __init__(self, engine: ScatteredLowRank, *rest: Any) -> None:
        super().__init__(engine, *rest)
        self._known = _Known(engine.directions)
        self._slots = engine.directions.slots

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = self._known.among(args, kwargs)
        laid_out = next((a for a in (*args, *kwargs.values()) if is_laid_out(a) and id(a) in self._slots), None)
        if laid_out is None or reads_no_values(func):
            return super().__torch_function__(func, types, args, kwargs)
        if func is F.linear:
            return self._laid_out_linear(*args, **kwargs)
        if func is F.embedding:
            return self._laid_out_embedding(*args, **kwargs)
        name = self._slots[id(laid_out)].name
        raise Unfollowed(f"{getattr(func, '__name__', func)} of {name}, which lies over several processes")

    def stack_of(self, value: Any) -> Tensor | None:
        """Made here where it is a parameter without factors: of what is gathered there is nothing before it is read."""
        if id(value) in self._params and id(value) not in self.stacks and id(value) not in self.factors.of:
            self.stacks[id(value)] = torch.stack([self.copy(value, part) for part in range(len(self.parts))])
        return super().stack_of(value)

    def _laid_out_linear(self, input: Any, weight: Any, bias: Any = None) -> Any:
        """Of a DTensor by DTensors: the parts that are here, and how they lie."""
        from torch.distributed.tensor import DTensor, Partial, Shard

        if not (is_laid_out(input) and is_laid_out(weight)):
            raise Unfollowed("a linear map of which some lies over several processes and some does not")
        last, out = input.dim() - 1, list[Any]()
        for x, w in zip(input.placements, weight.placements, strict=True):
            if w.is_replicate() and (x.is_replicate() or (x.is_shard() and 0 < x.dim < last)):
                out.append(x)
            elif w.is_shard(0) and x.is_replicate():
                out.append(Shard(last))
            elif w.is_shard(1) and x.is_shard(last):
                out.append(Partial())
            else:
                raise Unfollowed(f"a linear map laid out as {w} with inputs as {x}")
        x, own = held(input), held(weight)
        y = self.product(x, own, None) if self.is_param(own) else F.linear(x, own)
        coordinate = weight.device_mesh.get_coordinate()
        summed_here = all(c == 0 for c, placement in zip(coordinate, out, strict=True) if placement.is_partial())
        if bias is not None:
            shift = self.stack_of(held(bias))  # read in all processes
            if summed_here:
                y = self.plus_bias(y, held(bias) if shift is None else shift)
        shape = (*input.shape[:-1], weight.shape[0])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y, weight.device_mesh, out, run_check=False, shape=torch.Size(shape), stride=stride)

    def _laid_out_embedding(self, input: Any, weight: Any, *rest: Any, **more: Any) -> Any:
        from torch.distributed.tensor import DTensor, Replicate

        everywhere = [Replicate() for _ in weight.placements]
        found: Any = F.embedding(input, weight, *rest, **more)
        own = held(weight)
        y = held(found.redistribute(placements=everywhere))
        y = y.wait() if hasattr(y, "wait") else y
        ids = held(input.redistribute(placements=everywhere)) if is_laid_out(input) else input
        if not self.is_param(own):
            return found
        if id(own) not in self.factors.of or not self.is_batch(ids):
            raise Unfollowed("a look-up of no batch, or in a table without factors, that lies over several processes")
        y = self._plus_rows(y.clone(), ids, own, *self.factors.whole[id(own)])
        return DTensor.from_local(y, weight.device_mesh, everywhere, run_check=False)
