"""`ZeroOrderOptimizer`: a `torch.optim.Optimizer` whose step needs no backward."""

# Q queries (directions), P probes, G parameter groups.

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune import noise
from zotune.directions import Directions, Displacement
from zotune.engines import make_engine
from zotune.engines.following import rows_in
from zotune.engines.graphs import StepGraphs
from zotune.engines.probing import centre, probe, shares, spread
from zotune.errors import NonFiniteLoss, nearest
from zotune.estimators import TwoSided
from zotune.methods import make_method
from zotune.trajectory import shrinkage

NamedParams = Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class StepRecord:
    """What a step saw and applied: all that it takes to apply it again.

    losses_P in the order of the estimator's probes; g_GQ the projected gradients, lr_G and decay_G as used.
    """

    step: int
    losses_P: tuple[float, ...]
    g_GQ: tuple[tuple[float, ...], ...]
    lr_G: tuple[float, ...]
    decay_G: tuple[float, ...]
    skipped: bool

    @property
    def loss(self) -> float:
        return sum(self.losses_P) / len(self.losses_P)


class ZeroOrderOptimizer(torch.optim.Optimizer):
    """θ ← θ + Σ_q c_q·z(seed_q): the gradient is estimated from the loss at displaced weights alone.

    params: a module (its trainable parameters), an iterable of (name, parameter), of parameters, or of groups
        (dicts whose "params" is one of the last two). Names decide the noise: give them where you can.
    method: see `zotune.methods.METHODS`; its further options (`estimator`, …) are keywords here.
    lr, eps, weight_decay: per group. eps in units of the weights; decay is decoupled, θ ← (1 − lr·decay)·θ first.
    seed: of the run. The directions of step s are noise(seed, s), whatever the device, dtype or torch's own seeds.
    direction: "gaussian" or "rademacher". queries: directions a step.
    groups: directions over the rows of a batch: 1, a number, or "batch" for one a row. More than one takes the engine
        `lowrank` and a loss that is a vector, one number a row; the update is Σ_k −lr·(n_k/B)·g_k·z_k, n_k of B rows each.
    engine: see `zotune.engines.ENGINES`, or "auto". rank: of the directions of `lowrank`.
    max_skipped: a step whose loss is not finite changes nothing and is counted; after so many in a row `step` raises
        `NonFiniteLoss`.

    Weights change only by the update: a closure that raises leaves every one bit for bit as it was, and a step with
    lr 0 as well. Dropout and other draws from torch's generators are the same in all probes of a step; better, call
    `model.eval()`. Works in float64, float32, bfloat16 and float16, on any device.

    >>> model = nn.Linear(3, 1)
    >>> optimizer = ZeroOrderOptimizer(model, method="zo-sgd", lr=1e-2, eps=1e-3, seed=0)
    >>> x = torch.ones(2, 3)
    >>> loss = optimizer.step(lambda: model(x).square().mean())
    >>> optimizer.forward_passes
    2
    """

    def __init__(
        self,
        params: nn.Module | NamedParams | Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        method: str = "zo-sgd",
        *,
        lr: float = 1e-6,
        eps: float = 1e-3,
        seed: int = 0,
        direction: str = "gaussian",
        queries: int = 1,
        groups: int | str = 1,
        engine: str = "auto",
        rank: int = 1,
        weight_decay: float = 0.0,
        max_skipped: int = 5,
        **options: Any,
    ) -> None:
        _check("lr", lr, lr >= 0, "at least 0")
        _check("eps", eps, eps > 0, "above 0")
        _check("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        _check("queries", queries, queries >= 1 and queries == int(queries), "a whole number from 1")
        _check("max_skipped", max_skipped, max_skipped >= 1, "at least 1")
        if direction not in noise.DIRECTIONS:
            raise ValueError(f"unknown direction {direction!r}; {nearest(direction, noise.DIRECTIONS)}")
        _check("rank", rank, rank >= 1 and rank == int(rank), "a whole number from 1")
        groups = int(groups) if isinstance(groups, str) and groups.isdecimal() else groups
        _check(
            "groups",
            groups,
            groups == "batch" or (isinstance(groups, int) and groups >= 1),
            "a number from 1 or 'batch'",
        )
        self.method = make_method(method, queries=int(queries), **options)
        self.direction = direction
        self.engine_name = engine
        self.groups = groups
        self.rank = int(rank)
        self.pairs = 1 if groups == "batch" else int(groups)  # directions of a full batch: the most seen so far
        if groups != 1 and not isinstance(self.method.estimator, TwoSided):
            raise ValueError(f"groups={groups!r} needs two-sided estimates: each row's two losses are its own")
        self.max_skipped = max_skipped
        self.forward_passes = 0
        self.skipped_steps = 0
        self.last: StepRecord | None = None
        self._skipped_in_a_row = 0
        self._engine: Any = None
        self._graphs: StepGraphs | None = None
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "seed": int(seed), "step": 0}
        super().__init__(_groups(params), defaults)
        self.engine  # noqa: B018  # built now, so that a wrong name or a collision is an error of the constructor

    @property
    def engine(self) -> Any:
        """The engine over the present parameter groups."""
        if self._engine is None:
            named = [list(zip(g["names"], g["params"], strict=True)) for g in self.param_groups]
            self._engine = make_engine(self.engine_name, Directions(named, self.direction), self.groups, self.rank)
        return self._engine

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = dict(param_group)
        if "names" not in group:
            group = _named_group(group, offset=sum(len(g["params"]) for g in self.param_groups))
        super().add_param_group(group)
        self._engine = None

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones included."""
        return self.param_groups[0]["step"]

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, *, batch: Any = None) -> Any:
        """One step. closure: () → the loss, a number, a 0-d tensor, or a vector of per-row losses (their mean is taken).

        It is called once a probe, must see the same batch each time, and needs no gradient. Returns the loss near θ
        (the mean over the probes), a tensor where the closure gives one. Raises `NonFiniteLoss` after `max_skipped`
        steps in a row with a NaN or infinite loss; whatever the closure raises passes through, nothing applied.

        batch: a dict of tensors, given to the closure: `step(loss_of, batch=batch)`; or a list of them, the rows of one step.
        With it the engines compute both losses of every row in one forward, if loss_of returns one a row. On CUDA such a step
        is captured as one graph for each shape of batch, so pass the same function every time and pad to a few lengths.
        """
        if closure is None:
            raise TypeError("step() needs a closure that returns the loss: optimizer.step(lambda: model(**batch).loss)")
        estimator, groups, step = self.method.estimator, self.param_groups, self.steps
        loss_of = (lambda _: closure()) if batch is None else closure
        batches = batch if isinstance(batch, list) else [batch]
        shares = self._shares(closure, batch, batches)
        seed = groups[0]["seed"]
        seeds_Q = tuple(noise.step_seed(seed, step, q, k) for q in range(estimator.queries) for k in range(self.pairs))
        losses_P = self._captured_step(loss_of, batches, seeds_Q, shares) if batch is not None else None
        captured = losses_P is not None
        if losses_P is None:
            raw_P = probe(self.engine, estimator, loss_of, batches, functools.partial(self._at, seeds_Q), shares)
            losses_P = _numbers(raw_P)
        self.forward_passes += len(estimator.probes)

        d_Q = spread(estimator, losses_P, shares, self.pairs)
        g_GQ = tuple(tuple(d / g["eps"] for d in d_Q) for g in groups)
        coefs_GQ = tuple(
            tuple(self.method.rule.coefficients(g_Q, float(group["lr"])))
            for g_Q, group in zip(g_GQ, groups, strict=True)
        )
        skipped = not self._applicable(losses_P, coefs_GQ)
        if not skipped and not captured:
            self._decay()
            self.engine.apply(Displacement(seeds_Q, coefs_GQ), self.pairs)
        for group in groups:
            group["step"] += 1
        self.last = StepRecord(
            step=step,
            losses_P=tuple(losses_P),
            g_GQ=g_GQ,
            lr_G=tuple(float(g["lr"]) for g in groups),
            decay_G=tuple(float(g["weight_decay"]) for g in groups),
            skipped=skipped,
        )
        self._count(skipped)
        loss = centre(estimator, losses_P, shares)
        return torch.tensor(loss) if captured or isinstance(raw_P[0], Tensor) else loss

    def _at(self, seeds_Q: Sequence[int], query: int, sign: int) -> Displacement:
        """Where a probe is: ±eps along each of a query's directions."""
        if sign == 0:
            return Displacement()
        own = tuple(seeds_Q[query * self.pairs : (query + 1) * self.pairs])
        return Displacement(own, tuple((sign * g["eps"],) * len(own) for g in self.param_groups))

    def _shares(self, closure: Callable[..., Any], batch: Any, batches: Sequence[Any]) -> tuple[int, ...]:
        """How many of the step's rows each direction has; (1,) where one direction has all."""
        if self.groups == 1:
            return (1,)
        if batch is not None:
            rows = sum(rows_in(b) for b in batches)
        else:  # a closure says how many rows it has by what it returns, at θ
            losses = self.engine.loss(closure, Displacement())
            if not isinstance(losses, Tensor) or losses.dim() != 1:
                raise ValueError(f"groups={self.groups!r} needs a loss of each row; the closure returns one number")
            rows = losses.numel()
        directions = rows if self.groups == "batch" else min(int(self.groups), rows)
        self.pairs = max(self.pairs, directions)
        return shares(rows, directions)

    def _captured_step(
        self, loss_of: Callable[[Any], Any], batches: Sequence[Any], seeds_Q: Sequence[int], shares: tuple[int, ...]
    ) -> list[float] | None:
        """The probes' losses where the step could be taken as a CUDA graph, else None."""
        groups = self.param_groups
        if len(batches) > 1 or any(g["weight_decay"] for g in groups):
            return None
        if not all(p.is_cuda for g in groups for p in g["params"]) or not all(t.is_cuda for t in batches[0].values()):
            return None
        eps_G = tuple(g["eps"] for g in groups)
        if self._graphs is None or self._graphs.eps_G != eps_G or self._graphs.engine is not self.engine:
            self._graphs = StepGraphs(self.engine, self.method.estimator, self.method.rule, eps_G, self._room())
        return self._graphs.step(loss_of, batches[0], seeds_Q, [float(g["lr"]) for g in groups], shares, self.pairs)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the counts of passes and skipped steps: a resumed run goes on counting."""
        counts = {"forward_passes": self.forward_passes, "skipped_steps": self.skipped_steps}
        return super().state_dict() | {
            "counts": counts | {"skipped_in_a_row": self._skipped_in_a_row, "pairs": self.pairs}
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        counts = state_dict.get("counts", {})
        self.forward_passes = counts.get("forward_passes", 0)
        self.skipped_steps = counts.get("skipped_steps", 0)
        self._skipped_in_a_row = counts.get("skipped_in_a_row", 0)
        self.pairs = counts.get("pairs", self.pairs)

    def flush(self) -> None:
        """Apply whatever an engine holds back. The engines of this version hold nothing back."""

    def _applicable(self, losses_P: Sequence[float], coefs_GQ: Sequence[Sequence[float]]) -> bool:
        """Whether the update is finite, in the weights' own dtype too: 16 bits overflow where 32 do not."""
        if not all(map(math.isfinite, losses_P)):
            return False
        room = self._room()
        return all(abs(c) < room for coefs_Q in coefs_GQ for c in coefs_Q)  # NaN compares false

    def _room(self) -> float:
        """What a coefficient must stay under: the narrowest weight's largest number, over 16, since |z| stays under 6."""
        return min(torch.finfo(p.dtype).max for group in self.param_groups for p in group["params"]) / 16

    def _decay(self) -> None:
        for group in self.param_groups:
            factor = shrinkage(float(group["lr"]), float(group["weight_decay"]))
            if factor != 1:
                for param in group["params"]:
                    param.mul_(factor)

    def _count(self, skipped: bool) -> None:
        self.skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= self.max_skipped:
            raise NonFiniteLoss(
                f"the loss or its estimate was not finite in {self._skipped_in_a_row} steps in a row (step {self.steps}); "
                "nothing of them was applied: try a smaller lr or eps, or look at the data of these batches"
            )


def _numbers(raw_P: Sequence[Any]) -> list[float]:
    """Each loss as a Python float: the mean of a vector, in float64; one wait for the device, not one a loss."""
    if all(isinstance(raw, Tensor) for raw in raw_P):
        return torch.stack([raw.detach().double().mean() for raw in raw_P]).tolist()
    return [float(torch.as_tensor(raw, dtype=torch.float64).mean()) for raw in raw_P]


def _groups(params: Any) -> list[dict[str, Any]]:
    if isinstance(params, nn.Module):
        params = [(n, p) for n, p in params.named_parameters() if p.requires_grad]
        if not params:
            raise ValueError("the model has no trainable parameter: none has requires_grad=True")
    params = list(params)
    if not params:
        raise ValueError("no parameters to optimize")
    if not isinstance(params[0], dict):
        params = [{"params": params}]
    groups: list[dict[str, Any]] = []
    for group in params:
        groups.append(_named_group(group, offset=sum(len(g["params"]) for g in groups)))
    return groups


def _named_group(group: dict[str, Any], offset: int) -> dict[str, Any]:
    """A group with plain `params` and their `names`; parameters without one are named by their position."""
    given = group["params"]
    given = [given] if isinstance(given, Tensor) else list(given)
    pairs = [p if isinstance(p, tuple) else (f"param.{offset + i}", p) for i, p in enumerate(given)]
    for name, param in pairs:
        if not isinstance(param, Tensor) or not param.is_floating_point():
            raise ValueError(
                f"parameter {name!r} is {getattr(param, 'dtype', type(param).__name__)}: only floating-point tensors "
                "can be perturbed; freeze it (requires_grad=False) and train an adapter on top"
            )
    rest = {k: v for k, v in group.items() if k != "params"}
    return {**rest, "params": [p for _, p in pairs], "names": [n for n, _ in pairs]}


def _check(name: str, value: Any, ok: bool, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}: must be {wanted}")
