"""What every update rule shares: state, rounding, a tile of ĝ at a time, or one pass on CUDA.

`Rule.apply` is all that a step does to the weights given the scalars that a run records, so that a replay calls what the
run called; a rule with state is replayed from step 0.
"""

# Q directions, G parameter groups, K directions over a batch's rows, C copies of a batch, n elements of a tile.

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from zotune.record.scalars import float32, shrinkage

if TYPE_CHECKING:
    from torch import Tensor

    from zotune.directions import Directions
    from zotune.record.steps import StepRecord

TILE = 1 << 22  # elements of ĝ at a time
NUMBERS = 8  # the most that a rule's `numbers` are
DECAY = "decay"  # the kernel of θ ← (1 − lr·decay)·θ alone, before an update that is a displacement
STATE_DTYPES = ("float32", "bfloat16", "parameter")
ROUNDINGS = ("nearest", "compensated")

State = MutableMapping[Any, Any]  # parameter → its buffers by name, as torch's Optimizer.state


@dataclass(frozen=True)
class Rule:
    """A rule that reads ĝ element by element: a subclass says what `move` does with a tile of it.

    State: the buffers named, one element a weight, float32 (float64 for float64 weights); with state_dtype "bfloat16" in that,
    with "parameter" in the parameter's own dtype. Arithmetic is never narrower than float32; a weight is rounded once.

    rounding: "nearest", or "compensated": what rounding took from a weight is kept beside it, in the weight's own dtype, and
    added at the next update, w + r ← w + r + Δ. It costs the trainable parameters once more; 16-bit weights then lose no update.
    """

    state_dtype: str = "float32"
    rounding: str = "nearest"

    buffers = ()  # type: tuple[str, ...]
    kernel = ""  # in `zotune.updates.fused`, which does what `move` does; without one, tile by tile everywhere, and no graph of it
    linear = False
    counts = False  # whether `numbers` depends on how many steps were applied
    normalises = False  # whether g is no multiple of d, so that what a direction's rows weigh is multiplied afterwards
    capturable = False  # as part of a CUDA graph: what it decides can be decided on the device
    extra_forwards = 0
    state_copies = 0  # of the trainable parameters
    carries = ()  # type: tuple[str, ...]  # buffers that go along where a subspace is drawn anew, as coordinates in it

    def __init_subclass__(cls) -> None:
        """Another `move` is not what an inherited kernel does; a linear rule moves gradients alone by it."""
        absent: dict[str, Any] = {"kernel": ""} if cls.linear else {"kernel": "", "capturable": False}
        for name, value in absent.items() if "move" in vars(cls) else ():
            if name not in vars(cls):
                setattr(cls, name, value)
        if "move" in vars(cls) and "_by_torch" not in vars(cls):
            cls._by_torch = Rule._by_torch  # type: ignore[method-assign]

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        """The new weights of a tile, in the dtype of the arithmetic; `state` is changed in place. steps: from 1."""
        raise NotImplementedError

    def numbers(self, lr: float, decay: float, steps: int) -> tuple[float, ...]:
        """What the kernel reads beside ĝ: what decay multiplies with, lr as `move` uses it, and the rule's own. steps: from 1."""
        return shrinkage(lr, decay), float32(lr)

    def project(self, d_QK: Tensor, eps: Tensor, losses_CK: Tensor) -> Tensor:
        """(Q, K): the projected gradients g that a run records and the rule works from. d_QK: the estimator's differences.

        Here d/eps. A rule may make them of the losses themselves (all of the step's, in the order of the probes), in other units
        than the gradient's: the record holds what this gives, so a replay needs neither. eps: 0-d, of a parameter group.
        """
        return d_QK / eps  # by a tensor: CUDA multiplies with the reciprocal of a number

    def reach(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        """(n,): about how far a weight may move, in units of |z|: a step is skipped where 16 bits could not hold it.

        g_Q and lr (0-d): float64, on any device, so that a captured step can ask.
        """
        raise NotImplementedError

    @property
    def kept_names(self) -> tuple[str, ...]:
        """The tensors that a parameter's state has: the buffers, and what rounding takes."""
        return (*self.buffers, "residual") if self.rounding == "compensated" else self.buffers

    def reserve(self, params: Sequence[Any], state: State) -> None:
        """The tensors of the parameters' state, zeros where there are none yet."""
        for param in params if self.kept_names else ():
            self.reserve_shape(param, state[param], param.shape)

    def reserve_shape(self, param: Any, own: Any, shape: Sequence[int]) -> None:
        """The same of one parameter whose estimate is of another shape than it is."""
        import torch

        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        kept = {"float32": wide, "bfloat16": torch.bfloat16, "parameter": param.dtype}[self.state_dtype]
        for name in self.kept_names:
            if name not in own:
                dtype = param.dtype if name == "residual" else kept
                own[name] = torch.zeros(tuple(shape), dtype=dtype, device=param.device)

    def count(self, params: Sequence[Any], state: State) -> None:
        """One more update of these parameters."""
        for param in params:
            state[param]["steps"] = state[param].get("steps", 0) + 1

    def apply(self, directions: Any, by: StepRecord, state: State) -> None:
        """One step's update of the parameters of the directions; weights and state change, nothing else."""
        import torch

        from zotune.directions import Displacement

        g_GQ = tuple(tuple(float32(float32(g) / len(g_Q)) for g in g_Q) for g_Q in by.g_GQ)
        mean = Displacement(by.seeds_Q, g_GQ)
        passes = passes_for(directions) if self.kernel else None
        if passes is not None and (steps_G := steps_of(directions, state)) is not None:
            device = directions.params[0].device
            seeds_Q, _ = mean.on(0, device)
            mean_GQ = torch.tensor(g_GQ, dtype=torch.float32, device=device)
            numbers_GN = table(self.numbers_of(by.lr_G, by.decay_G, steps_G)).to(device)
            passes.update_of(self, directions, state).run(seeds_Q, mean_GQ, numbers_GN)
            self.count(directions.params, state)
            return
        for param in directions.params:
            group = directions.slots[id(param)].group
            tiles = directions.gradient_tiles(param, mean, TILE)
            self._update(param, tiles, state[param], by.lr_G[group], by.decay_G[group])

    def numbers_of(
        self, lr_G: Sequence[float], decay_G: Sequence[float], steps_G: Sequence[int]
    ) -> list[tuple[float, ...]]:
        """The `numbers` of each parameter group's next update. steps_G: of those before."""
        return [self.numbers(lr, decay, steps + 1) for lr, decay, steps in zip(lr_G, decay_G, steps_G, strict=True)]

    def descend(self, params: Sequence[Any], gradients: Sequence[Any], lr: float, decay: float, state: State) -> None:
        """The same rule on gradients that back-propagation gave, dense and of the parameters' shape."""
        for param, gradient in zip(params, gradients, strict=True):
            if gradient is None or (self.rounding == "nearest" and self._by_torch(param, gradient, state, lr, decay)):
                continue
            flat = gradient.reshape(-1)
            tiles = ((n, flat[n : n + TILE]) for n in range(0, max(flat.numel(), 1), TILE))
            self._update(param, tiles, state[param], lr, decay)

    def _by_torch(self, param: Any, gradient: Any, state: State, lr: float, decay: float) -> bool:
        """The update by a kernel of torch's, in one pass; False where it has none that does the same, and nothing is updated."""
        return False

    def _update(self, param: Any, tiles: Iterator[tuple[int, Tensor]], own: Any, lr: float, decay: float) -> None:
        import torch

        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        self.reserve([param], {param: own})
        own["steps"] = own.get("steps", 0) + 1
        lost = own["residual"].view(-1) if self.rounding == "compensated" else None
        lr, shrink = float32(lr), shrinkage(lr, decay)
        flat = param.data.reshape(-1)  # a copy only where the parameter is a permuted view
        for first, gradient in tiles:
            part = slice(first, first + gradient.numel())
            state = {name: own[name].view(-1)[part].to(wide) for name in self.buffers}
            w_n = flat[part].to(wide)
            if lost is not None:
                w_n += lost[part].to(wide)
            w_n = self.move(w_n * shrink if shrink != 1 else w_n, gradient.to(wide), state, lr, own["steps"])
            if lr or shrink != 1:  # else not even the sign of a zero changes
                flat[part] = w_n.to(param.dtype)
                if lost is not None:
                    lost[part] = (w_n - flat[part].to(wide)).to(param.dtype)
            for name, value in state.items():
                own[name].view(-1)[part] = value.to(own[name].dtype)
        if not param.data.is_contiguous():
            param.data.copy_(flat.view(param.shape))


def passes_for(directions: Directions) -> Any:
    """`zotune.updates.fused` where Triton draws the noise of all these parameters, on one device; else None."""
    return None if directions.scattered else passes_on({param.device for param in directions.params})


def passes_on(devices: Collection[Any]) -> Any:
    """The same of the devices that parameters are on."""
    from zotune import noise

    if len(devices) != 1 or not hasattr(noise.backend_for(next(iter(devices))), "ManyPlan"):
        return None
    return import_module("zotune.updates.fused")


def table(numbers_G: Sequence[Sequence[float]]) -> Tensor:
    """Each parameter group's numbers as they are sent to a device, (G, NUMBERS) float64."""
    import torch

    return torch.tensor([[*row, *[0.0] * (NUMBERS - len(row))] for row in numbers_G], dtype=torch.float64)


def steps_of(directions: Directions, state: State) -> list[int] | None:
    """How many updates the parameters of each group have had; None where those of one group differ."""
    found_G: list[set[int]] = [set() for _ in range(directions.groups)]
    for param in directions.params:
        found_G[directions.slots[id(param)].group].add(state.get(param, {}).get("steps", 0))
    if any(len(found) > 1 for found in found_G):
        return None
    return [found.pop() if found else 0 for found in found_G]


def shrink(directions: Directions, by: StepRecord) -> None:
    """Decoupled decay, θ ← (1 − lr·decay)·θ."""
    factors = [shrinkage(lr, decay) for lr, decay in zip(by.lr_G, by.decay_G, strict=True)]
    for param in directions.params:
        factor = factors[directions.slots[id(param)].group]
        if factor != 1:
            param.data.mul_(factor)
