"""A model that lies over several processes: what this one holds, what its forwards read, and one loss for all of them.

A weight that tensor parallelism has laid out is read where it lies: a copy of this process' part, displaced, stands in for it, as
the same kind of DTensor. One that FSDP2 gathers is read whole: the copy is of what was gathered, so every process draws what one
process would, and tiles and rows stay small. Updates go to the part that is held. Which elements a part has is known, so all of
this has the bits of one process' noise; of a forward's sums no more than its collectives promise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zotune.directions.shards import Part, ShardedDirections, all_of, held, is_laid_out, part_of
from zotune.engines.scattered import ScatteredEngine, ScatteredLowRank
from zotune.engines.sequential import SequentialEngine
from zotune.engines.writing import Writer
from zotune.errors import OptionError
from zotune.step.choices import AUTO, Choices
from zotune.step.parameters import parameter_groups
from zotune.step.pieces import Sharing
from zotune.workers.group import EVERY

Named = Sequence[Sequence[tuple[str, Any]]]  # (name, tensor), by parameter group

FAR = 1e-3  # times a loss' size: what no order of summation explains, in 16 bits either


class Shards:
    """The layout of an optimizer's parameters: for each that lies over processes, the tensor that this one holds stands in its
    parameter group. False where there is none, and all is as on one device.

    groups: parameter groups with `params` and `names`; the tensors held take the parameters' places. model: the module, by which
    what FSDP2 manages is found; None where nothing lies over processes.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], model: nn.Module | None) -> None:
        self._modules = _gathering(model)
        # by id of a held tensor: its parameter, the tensor, and that which forwards read
        self._source: dict[int, tuple[Any, Tensor, Tensor]] = {}
        self._parts: dict[int, Part] = {}
        self._also: dict[int, list[Any]] = {}
        self._cut = False  # whether a forward reads parts
        self.mesh: Any = None
        gathered = self._gathered(model)
        with torch.no_grad():
            for group in groups:
                pairs = zip(group["names"], group["params"], strict=True)
                group["params"] = [self._take(name, param, gathered.get(id(param), param)) for name, param in pairs]

    def __bool__(self) -> bool:
        return bool(self._source)

    def _take(self, name: str, param: Any, read: Any) -> Any:
        """The tensor held of a parameter, which forwards read as another object."""
        if not is_laid_out(param):
            return param
        if self.mesh is None or param.device_mesh.size() > self.mesh.size():
            self.mesh = param.device_mesh
        self._cut = self._cut or is_laid_out(read)
        own, reading = held(param), held(read)
        try:
            parts = (reading, part_of(read) or all_of(reading)), (own, part_of(param))
        except ValueError as error:
            raise ValueError(f"parameter {name!r} {error}") from None
        for tensor, part in parts:
            if part is not None:
                self._parts[id(tensor)] = part
        self._also[id(reading)] = [read] if read is not reading else []
        self._source[id(own)] = param, own, reading
        return own

    def _gathered(self, model: Any) -> dict[int, Any]:
        """By id of a parameter that FSDP2 manages: what stands for it in a forward, once gathered."""
        found: dict[int, Any] = {}
        if not self._modules:
            return found
        places = [(module, name, param) for module in model.modules() for name, param in module._parameters.items()]
        for module in self._modules:
            module.unshard()
            for owner, name, param in places:
                if param is not None and owner._parameters[name] is not param:
                    found.setdefault(id(param), owner._parameters[name])
            module.reshard()
        return found

    def still(self) -> None:
        """What was gathered before weights were written is not read again. Raises ValueError where others hold the weights now."""
        for module in self._modules:
            module.reshard()
        with torch.no_grad():
            for param, own, _ in self._source.values():
                if held(param).data_ptr() != own.data_ptr():
                    raise ValueError("the model's weights are elsewhere than when the optimizer was made; make it anew")

    def engine(self, named: Named, of: Choices, direction: str) -> SequentialEngine:
        """What evaluates places of these tensors, with a writer for what is held of them."""
        reading = [
            [(name, self._source[id(own)][2] if id(own) in self._source else own) for name, own in g] for g in named
        ]
        also = [(other, tensor) for group in reading for _, tensor in group for other in self._also.get(id(tensor), ())]
        reads = ShardedDirections(reading, direction, self._parts, also)
        writes = ShardedDirections(named, direction, self._parts)
        if of.low_rank:
            return ScatteredLowRank(reads, writes, int(of.rank), of.forward_tokens)
        engine = ScatteredEngine(reads)
        engine.writer = Writer(writes)
        return engine

    # One loss for all.

    def ready(self, loss_of: Callable[[Any], Any], sharing: Sharing, step: int) -> Callable[[Any], Any]:
        """The loss of a step, with the first process' bits in all of them where all see the same rows.

        Every so often its first value is compared before: processes that see other rows are found out.
        """
        self.still()
        if not self or sharing.workers is not None:
            return loss_of
        waiting = [step % EVERY == 0]

        def loss(batch: Any) -> Any:
            found = loss_of(batch)
            if not isinstance(found, Tensor):
                return float(self._agree(torch.tensor(found, dtype=torch.float64), waiting))
            found = found.detach()
            return self._agree(found.full_tensor() if is_laid_out(found) else found, waiting)  # type: ignore[attr-defined]

        return loss

    def _agree(self, found: Tensor, waiting: list[bool]) -> Tensor:
        if waiting.pop() if waiting else False:
            self._compare(found)
        there = found.to(self.mesh.device_type).contiguous()
        bits = there.view(-1).view(torch.uint8)
        for group in self._groups():
            dist.broadcast(bits, group=group, group_src=0)
        return there.to(found.device)

    def _compare(self, found: Tensor) -> None:
        """Raises ValueError in all processes where they have seen other rows."""
        mean = found.double().mean()
        told = torch.stack([torch.full_like(mean, found.numel()), mean, found.double().abs().mean()])
        most = torch.cat([told, -told]).to(self.mesh.device_type)
        for group in self._groups():
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        numbers, high, size, fewest, low, _ = most.tolist()
        if numbers != -fewest or high + low > FAR * size:
            raise ValueError(
                f"the processes that hold the model have seen other losses ({-fewest:.0f} to {numbers:.0f} numbers, "
                f"means {-low:.6g} to {high:.6g}): give all the same batch, or, with FSDP2, each its own rows by "
                "workers=zotune.join(own_rows=True)"
            )

    def _groups(self) -> list[Any]:
        return [self.mesh.get_group(dim) for dim in range(self.mesh.ndim)]

    def refuse(self, of: Choices, sharing: Sharing) -> None:
        """Raise OptionError for what does not go with weights over several processes."""
        if not self:
            return
        sharing.in_step, workers = True, sharing.workers
        more, method = of.enhancements, of.method
        for option, wrong, said in (
            (
                "method",
                method.kind != "zeroth-order" or method.sets > 1 or method.subspace or method.of_lowrank,
                f"method {of.name!r}",
            ),
            ("engine", of.engine not in ("auto", "sequential", "lowrank"), f"engine={of.engine!r}"),
            ("sparsity", more.sparsity is not None, "sparsity"),
            ("hybrid", more.hybrid is not None, "hybrid"),
            ("lr", of.lr == AUTO, "lr='auto'"),
        ):
            if wrong:
                raise OptionError(
                    option, f"{said}: not where the model's weights lie over several processes; {INSTEAD[option]}"
                )
        if workers is None:
            return
        alone = self.mesh.ndim == 1 and not self._cut
        if not (workers.own_rows and alone and self.mesh.size() == workers.size):
            raise OptionError(
                "workers",
                "workers: processes that hold parts of a model have to run each of its forwards together; leave it out, or, where "
                "FSDP2 lays it over all of them, join(own_rows=True)",
            )
        if of.low_rank:
            raise OptionError(
                "workers",
                "workers: with low-rank directions what a process sees in its rows decides which forwards follow; leave it out",
            )


INSTEAD = {
    "method": "use a method of dense or low-rank directions, zo-sgd or zo-adam say",
    "engine": "use engine='auto'",
    "sparsity": "leave it out",
    "hybrid": "leave it out",
    "lr": "give a number",
}


def laid_out(given: Any) -> tuple[list[dict[str, Any]], Shards]:
    """What an optimizer is given as parameter groups, whose `params` are what this process holds, and how they lie.

    Raises ValueError for a parameter that is nowhere (the meta device), and for those over processes without their module.
    """
    model = given if isinstance(given, nn.Module) else None
    for module in _gathering(
        model
    ):  # what a forward has left gathered is given up: the parameters are those that are held
        module.reshard()
    groups = parameter_groups(given)
    params = [(name, param) for group in groups for name, param in zip(group["names"], group["params"], strict=True)]
    nowhere = next((name for name, param in params if param.is_meta), None)
    if nowhere is not None:
        raise ValueError(
            f"parameter {nowhere!r} is on the meta device (device_map keeps it on disk or in the host's memory, or nothing was "
            "loaded): there is nothing to move; load the model where its weights fit, or freeze it"
        )
    over = next((name for name, param in params if is_laid_out(param)), None)
    if over is not None and model is None:
        raise ValueError(
            f"parameter {over!r} lies over several processes: give the optimizer the model itself, ZeroOrderOptimizer(model, …), "
            "which tells what its forwards read"
        )
    return groups, Shards(groups, model)


def refuse_more(params: Sequence[Any]) -> None:
    """Of a parameter group that is added later."""
    if any(map(is_laid_out, params)):
        raise ValueError(
            "a parameter group that lies over several processes: give the model when the optimizer is made"
        )


def _gathering(model: Any) -> list[Any]:
    """The modules whose weights FSDP2 gathers before a forward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has none
    kind = getattr(fsdp, "FSDPModule", None)
    return (
        [m for m in model.modules() if isinstance(m, kind)] if kind is not None and isinstance(model, nn.Module) else []
    )
