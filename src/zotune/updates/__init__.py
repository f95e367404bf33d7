"""Update rules: projected gradients → what becomes of the weights.

A rule that is linear in the directions (`Linear`) is a list of coefficients, and no tensor of noise or gradient is ever made. The
others read ĝ = (1/Q) Σ_q g_q·z_q element by element: it is drawn a tile at a time, whatever Q, and given up.

`Rule.apply` is all that a step does to the weights given the scalars that a run records, so that a replay calls what the
run called; a rule with state is replayed from step 0.

On CUDA the rules that read ĝ run as `zotune.updates.fused` has them, one pass a parameter. What a step decides from its losses is
written twice here, for the host and (`…_on_device`) for a captured graph, to the same bits.
"""

# Q queries, G parameter groups, n elements of a tile.

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from zotune.record.trajectory import coefficient, float32, shrinkage

if TYPE_CHECKING:
    from torch import Tensor

    from zotune.directions import Directions, Displacement, HeldDisplacement

TILE = 1 << 22  # elements of ĝ at a time
NUMBERS = 8  # the most that a rule's `numbers` are
DECAY = "decay"  # the kernel of θ ← (1 − lr·decay)·θ alone, before an update that is a displacement
STATE_DTYPES = ("float32", "bfloat16", "parameter")
ROUNDINGS = ("nearest", "compensated")

State = MutableMapping[Any, Any]  # parameter → its buffers by name, as torch's Optimizer.state


@dataclass(frozen=True)
class Scalars:
    """What a step knows once its losses are: seeds of its directions, g, lr and decay by parameter group, and a choice."""

    seeds_Q: tuple[int, ...]
    g_GQ: tuple[tuple[float, ...], ...]
    lr_G: tuple[float, ...]
    decay_G: tuple[float, ...]
    choice: int = 0


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
    kernel = ""  # in `zotune.updates.fused`, which does what `move` does; without one, tile by tile everywhere
    linear = False
    counts = False  # whether `numbers` depends on how many steps were applied
    capturable = False  # as part of a CUDA graph: what it decides can be decided on the device
    extra_forwards = 0
    state_copies = 0  # of the trainable parameters

    def __init_subclass__(cls) -> None:
        """Another `move` is not what an inherited kernel does."""
        for name, absent in (("kernel", ""), ("capturable", False)):
            if "move" in vars(cls) and name not in vars(cls):
                setattr(cls, name, absent)
        if "move" in vars(cls) and "_by_torch" not in vars(cls):
            cls._by_torch = Rule._by_torch  # type: ignore[method-assign]

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        """The new weights of a tile, in the dtype of the arithmetic; `state` is changed in place. steps: from 1."""
        raise NotImplementedError

    def numbers(self, lr: float, decay: float, steps: int) -> tuple[float, ...]:
        """What the kernel reads beside ĝ: what decay multiplies with, lr as `move` uses it, and the rule's own. steps: from 1."""
        return shrinkage(lr, decay), float32(lr)

    def reach(self, g_Q: Sequence[float], lr: float) -> list[float]:
        """About how far a weight may move, in units of |z|: a step is skipped where 16 bits could not hold it."""
        raise NotImplementedError

    def reach_on_device(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        """The same numbers to the bit, 1-D, from (Q,) and 0-d float64 tensors."""
        raise NotImplementedError

    @property
    def kept_names(self) -> tuple[str, ...]:
        """The tensors that a parameter's state has: the buffers, and what rounding takes."""
        return (*self.buffers, "residual") if self.rounding == "compensated" else self.buffers

    def reserve(self, params: Sequence[Any], state: State) -> None:
        """The tensors of the parameters' state, zeros where there are none yet."""
        import torch

        for param in params if self.kept_names else ():
            own, wide = state[param], torch.float64 if param.dtype == torch.float64 else torch.float32
            kept = {"float32": wide, "bfloat16": torch.bfloat16, "parameter": param.dtype}[self.state_dtype]
            for name in self.kept_names:
                if name not in own:
                    dtype = param.dtype if name == "residual" else kept
                    own[name] = torch.zeros(param.shape, dtype=dtype, device=param.device)

    def count(self, params: Sequence[Any], state: State) -> None:
        """One more update of these parameters, where the rule counts them."""
        for param in () if self.linear else params:
            state[param]["steps"] = state[param].get("steps", 0) + 1

    def apply(self, directions: Directions, by: Scalars, state: State) -> None:
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
            numbers_GN = self.table(by.lr_G, by.decay_G, steps_G).to(device)
            passes.update_of(self, directions, state).run(seeds_Q, mean_GQ, numbers_GN)
            self.count(directions.params, state)
            return
        for param in directions.params:
            group = directions.slots[id(param)].group
            tiles = directions.gradient_tiles(param, mean, TILE)
            self._update(param, tiles, state[param], by.lr_G[group], by.decay_G[group])

    def table(self, lr_G: Sequence[float], decay_G: Sequence[float], steps_G: Sequence[int]) -> Tensor:
        """The `numbers` of each parameter group's next update, (G, NUMBERS) float64. steps_G: of those before."""
        import torch

        rows = [self.numbers(lr, decay, steps + 1) for lr, decay, steps in zip(lr_G, decay_G, steps_G, strict=True)]
        return torch.tensor([[*row, *[0.0] * (NUMBERS - len(row))] for row in rows], dtype=torch.float64)

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


@dataclass(frozen=True)
class Linear(Rule):
    """A rule whose update is Σ_q c_q·z_q: a list of coefficients; no state, no tensor."""

    linear = True

    def coefficients(self, g_Q: Sequence[float], lr: float) -> list[float]:
        raise NotImplementedError

    def coefficients_on_device(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        """The same numbers to the bit, (Q,) float32, from (Q,) and 0-d float64 tensors."""
        raise NotImplementedError

    def reach_on_device(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return self.coefficients_on_device(g_Q, lr)

    def reach(self, g_Q: Sequence[float], lr: float) -> list[float]:
        return self.coefficients(g_Q, lr)

    def displacement(self, by: Scalars) -> Displacement:
        """The update as a displacement."""
        from zotune.directions import Displacement

        return Displacement(
            by.seeds_Q,
            tuple(tuple(self.coefficients(g_Q, lr)) for g_Q, lr in zip(by.g_GQ, by.lr_G, strict=True)),
        )

    def apply(self, directions: Directions, by: Scalars, state: State) -> None:
        if self.rounding == "compensated":
            factors = [shrinkage(lr, decay) for lr, decay in zip(by.lr_G, by.decay_G, strict=True)]
            self.displace(directions, self.displacement(by), state, factors)
        else:
            shrink(directions, by)
            self.displace(directions, self.displacement(by), state)

    def displace(
        self, directions: Any, by: Displacement | HeldDisplacement, state: State, factors: Sequence[float | Tensor] = ()
    ) -> None:
        """θ ← factor·θ + displacement, rounded as the rule rounds; factors by parameter group where rounding is compensated."""
        if self.rounding == "compensated":
            self.reserve(directions.params, state)
            directions.apply_compensated(by, [state[param]["residual"] for param in directions.params], factors)
        else:
            directions.apply(by)


def passes_for(directions: Directions) -> Any:
    """`zotune.updates.fused` where Triton draws the noise of all these parameters, on one device; else None."""
    from zotune import noise

    devices = {param.device for param in directions.params}
    if len(devices) != 1 or not hasattr(noise.backend_for(devices.pop()), "ManyPlan"):
        return None
    return import_module("zotune.updates.fused")


def steps_of(directions: Directions, state: State) -> list[int] | None:
    """How many updates the parameters of each group have had; None where those of one group differ."""
    found_G: list[set[int]] = [set() for _ in range(directions.groups)]
    for param in directions.params:
        found_G[directions.slots[id(param)].group].add(state.get(param, {}).get("steps", 0))
    if any(len(found) > 1 for found in found_G):
        return None
    return [found.pop() if found else 0 for found in found_G]


def shrink(directions: Directions, by: Scalars) -> None:
    """Decoupled decay, θ ← (1 − lr·decay)·θ."""
    factors = [shrinkage(lr, decay) for lr, decay in zip(by.lr_G, by.decay_G, strict=True)]
    for param in directions.params:
        factor = factors[directions.slots[id(param)].group]
        if factor != 1:
            param.data.mul_(factor)


@dataclass(frozen=True)
class Sgd(Linear):
    """c_q = −lr·g_q / Q, so that Σ c_q·z_q = −lr·ĝ with ĝ the mean of the Q estimates.

    lr and g are rounded to float32 first, and so is c: what a run records is exactly what it applied.
    Source: MeZO, arXiv 2305.17333; ZO-SGD in arXiv 2402.11592.
    """

    capturable = True

    def coefficients(self, g_Q: Sequence[float], lr: float) -> list[float]:
        return [coefficient(lr, g, 1 / len(g_Q)) for g in g_Q]

    def coefficients_on_device(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return (-(lr.float().double() * g_Q.float().double()) * (1 / g_Q.numel())).float()

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        return w_n - lr * g_n

    def _by_torch(self, param: Any, gradient: Any, state: State, lr: float, decay: float) -> bool:
        # Beside 16-bit numbers torch rounds alpha, and its product, to 16 bits on a CPU; on CUDA both are float32.
        narrow = param.dtype.itemsize < 4 and not param.is_cuda
        if narrow or not float32(lr) or shrinkage(lr, decay) != 1:
            return False
        param.data.add_(gradient, alpha=-float32(lr))
        state[param]["steps"] = state[param].get("steps", 0) + 1
        return True


@dataclass(frozen=True)
class ScalarSign(Linear):
    """c_q = −lr·sign(g_q) / Q: the sign of the projected gradient, times z. What the public code of arXiv 2402.11592 does."""

    capturable = True

    def coefficients(self, g_Q: Sequence[float], lr: float) -> list[float]:
        return [coefficient(lr, _sign(float32(g)), 1 / len(g_Q)) for g in g_Q]

    def coefficients_on_device(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return (-(lr.float().double() * g_Q.float().sign().double()) * (1 / g_Q.numel())).float()


@dataclass(frozen=True)
class Conservative(Sgd):
    """θ ← the best of {θ, θ − lr·ĝ, θ + lr·ĝ} on the step's own batch; on a tie θ stays. Source: arXiv 2402.11592, ZO-SGD-Cons.

    The choice is 0, 1 or 2, in that order. No decay: it would move θ where the choice is to stay.
    """

    extra_forwards = 3

    def displacement(self, by: Scalars) -> Displacement:
        taken = super().displacement(by)
        if by.choice == 0:
            return taken.some(0, 0)
        return taken if by.choice == 1 else taken.negated()

    def choose(self, losses_3: Sequence[float]) -> int:
        """Of the losses at θ, θ − lr·ĝ and θ + lr·ĝ. One that is not a number is never chosen."""
        best = 0
        for choice in (1, 2):
            if losses_3[choice] < losses_3[best]:
                best = choice
        return best

    def choose_on_device(self, losses_3: Tensor) -> Tensor:
        """The same choice, 0-d, in the losses' dtype. No number from the host: a capture could not copy it."""
        import torch

        best, choice = losses_3[0], torch.zeros_like(losses_3[0])
        for other in (1, 2):
            better = losses_3[other] < best
            best = torch.where(better, losses_3[other], best)
            choice = torch.where(better, torch.full_like(choice, other), choice)
        return choice

    def apply(self, directions: Directions, by: Scalars, state: State) -> None:
        if by.choice:
            self.displace(directions, self.displacement(by), state)


@dataclass(frozen=True)
class Sign(Rule):
    """θ ← θ − lr·sign(ĝ), element by element; sign(0) = 0. Source: arXiv 1810.03737 (ZO-signSGD), 2402.11592."""

    kernel = "sign"
    capturable = True

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        return w_n - lr * g_n.sign()

    def reach(self, g_Q: Sequence[float], lr: float) -> list[float]:
        return [*g_Q, lr]

    def reach_on_device(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return _with(g_Q, lr)


@dataclass(frozen=True)
class Momentum(Rule):
    """m ← β·m + ĝ, θ ← θ − lr·m; no dampening, so that the step grows to lr·ĝ/(1 − β). Source: arXiv 2402.11592, ZO-SGD-MMT."""

    beta: float = 0.9

    buffers = ("m",)
    kernel = "momentum"
    capturable = True
    state_copies = 1

    def numbers(self, lr: float, decay: float, steps: int) -> tuple[float, ...]:
        return *super().numbers(lr, decay, steps), self.beta

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        m_n = state["m"].mul_(self.beta).add_(g_n)
        return w_n - lr * m_n

    def reach(self, g_Q: Sequence[float], lr: float) -> list[float]:
        return [lr * g for g in g_Q]

    def reach_on_device(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return lr * g_Q


@dataclass(frozen=True)
class Adam(Rule):
    """m ← β₁m + (1 − β₁)ĝ, v ← β₂v + (1 − β₂)ĝ², θ ← θ − lr·m̂/(√v̂ + ε), m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ).

    Source: Kingma & Ba, arXiv 1412.6980; on ZO estimates arXiv 2402.11592, ZO-Adam.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    buffers = ("m", "v")
    kernel = "adam"
    counts = True
    capturable = True
    state_copies = 2

    def numbers(self, lr: float, decay: float, steps: int) -> tuple[float, ...]:
        shrink, lr = super().numbers(lr, decay, steps)
        by_beta1, by_beta2 = 1 - self.beta1**steps, 1 - self.beta2**steps
        return shrink, lr / by_beta1, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, by_beta2, self.epsilon

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        m_n = state["m"].mul_(self.beta1).add_(g_n, alpha=1 - self.beta1)
        v_n = state["v"].mul_(self.beta2).addcmul_(g_n, g_n, value=1 - self.beta2)
        root_n = (v_n / (1 - self.beta2**steps)).sqrt_().add_(self.epsilon)
        return w_n - lr / (1 - self.beta1**steps) * (m_n / root_n)

    def _by_torch(self, param: Any, gradient: Any, state: State, lr: float, decay: float) -> bool:
        """Its fused AdamW wants one dtype for all: beside float32 moments narrow weights are widened, in tiles."""
        import torch
        from torch.optim.adamw import adamw

        lr, shrink = float32(lr), shrinkage(lr, decay)
        self.reserve([param], state)
        own, wide = state[param], torch.promote_types(param.dtype, torch.float32)
        m, v = (own[name].view(-1) for name in self.buffers)
        # at lr 0 not a bit of the weights may change
        if not lr or m.dtype != v.dtype or m.dtype not in (wide, param.dtype) or not param.data.is_contiguous():
            return False
        flat, slope = param.data.view(-1), gradient.reshape(-1).contiguous()  # the kernels know no strides
        size = flat.numel() if m.dtype == param.dtype else TILE
        for first in range(0, flat.numel(), max(size, 1)):
            at = slice(first, first + size)
            w_n = flat[at].to(m.dtype)
            before = torch.full((), own.get("steps", 0), dtype=torch.float32, device=param.device)
            adamw(
                [w_n], [slope[at].to(m.dtype)], [m[at]], [v[at]], [], [before], fused=True, amsgrad=False, maximize=False,
                beta1=self.beta1, beta2=self.beta2, eps=self.epsilon, lr=lr, weight_decay=(1 - shrink) / lr,
            )  # fmt: skip
            if m.dtype != param.dtype:
                flat[at] = w_n
        own["steps"] = own.get("steps", 0) + 1
        return True

    def reach(self, g_Q: Sequence[float], lr: float) -> list[float]:
        return [*g_Q, lr]

    def reach_on_device(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return _with(g_Q, lr)


def clip(g_GQ: Sequence[Sequence[float]], most: float | None) -> tuple[tuple[float, ...], ...]:
    """Each g brought into [−most, most]; NaN stays."""
    if most is None:
        return tuple(map(tuple, g_GQ))
    return tuple(tuple(g if g != g else min(max(g, -most), most) for g in g_Q) for g_Q in g_GQ)


def _with(g_Q: Tensor, lr: Tensor) -> Tensor:
    import torch

    return torch.cat([g_Q, lr.view(1)])


def _sign(x: float) -> float:
    return x if x != x else float((x > 0) - (x < 0))
