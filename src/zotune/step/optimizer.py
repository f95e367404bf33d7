"""`ZeroOrderOptimizer`: a `torch.optim.Optimizer` whose step needs no backward."""

# Q queries (directions), P probes, G parameter groups.

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from zotune import noise
from zotune.directions import Directions, Displacement
from zotune.directions.calibration import Norms, measure
from zotune.engines import choose, make_engine
from zotune.engines.following import FollowingEngine, rows_in
from zotune.engines.forward_mode import ForwardModeEngine
from zotune.engines.sequential import SequentialEngine, Through, same_draws
from zotune.errors import InputError, NonFiniteLoss, nearest
from zotune.estimators import TwoSided
from zotune.methods import make_method
from zotune.record.trajectory import Record
from zotune.step.enhancements import Enhancements, Mask, MaskedDirections, partition, shallow
from zotune.step.graphs import Flight, StepGraphs
from zotune.step.probing import centre, loss_at, probe, shares, spread, whole
from zotune.updates import ROUNDINGS, Conservative, Linear, Scalars, clip, passes_for, steps_of

logger = logging.getLogger(__name__)

NamedParams = Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class StepRecord:
    """What a step saw and applied: all that it takes to apply it again.

    losses_P in the order of the estimator's probes; g_GQ the projected gradients, lr_G and decay_G as used. A block-wise
    step has both block by block; g is NaN where a block was not moved. choice: of a conservative step, 0 to stay, 1 or 2.
    """

    step: int
    losses_P: tuple[float, ...]
    g_GQ: tuple[tuple[float, ...], ...]
    lr_G: tuple[float, ...]
    decay_G: tuple[float, ...]
    skipped: bool
    choice: int = 0
    shares: tuple[int, ...] = (1,)  # rows of each direction, where there are several

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
    sparsity, mask, sparsity_scope, mask_refresh, blocks, block_update, hybrid, fo_lr, g_clip: see `Enhancements`.
        With mask "wanda" the attribute `calibrate` may be a function that evaluates the model on some rows and returns how many
        forward passes it took; without it a mask is made from its step's own batch. The norms that make each mask are
        kept by step in `norms`, which a replay needs.
    engine: see `zotune.engines.ENGINES`, or "auto". rank: of the directions of `lowrank`. With "dual" the update of a step
        with a batch is written when the next step reads the weights: call `settle` or `flush` before you read or replace
        them; `state_dict` does. With all others, "auto" too, weights are current after each step.
    fold_every: the updates of so many steps are applied together, in one pass over the weights; the probes between see the
        weights before them. `flush` applies what waits.
    rounding: "nearest", or "compensated", see `zotune.updates.Rule`.
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
        fold_every: int = 1,
        rounding: str = "nearest",
        weight_decay: float = 0.0,
        max_skipped: int = 5,
        **options: Any,
    ) -> None:
        for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            _check(name, number, isinstance(number, (Real, Tensor)), "a number")
        _check("lr", lr, lr >= 0, "at least 0")
        _check("eps", eps, eps > 0, "above 0")
        _check("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        whole_number = isinstance(seed, Integral) and not isinstance(seed, bool)
        _check("seed", seed, whole_number and 0 <= seed < 2**64, "a whole number from 0 to 2**64 - 1")
        _check("queries", queries, queries >= 1 and queries == int(queries), "a whole number from 1")
        _check("max_skipped", max_skipped, max_skipped >= 1, "at least 1")
        if direction not in noise.DIRECTIONS:
            raise ValueError(f"unknown direction {direction!r}; {nearest(direction, noise.DIRECTIONS)}")
        _check("rank", rank, rank >= 1 and rank == int(rank), "a whole number from 1")
        _check("fold_every", fold_every, fold_every >= 1 and fold_every == int(fold_every), "a whole number from 1")
        if rounding not in ROUNDINGS:
            raise ValueError(f"unknown rounding {rounding!r}; {nearest(rounding, ROUNDINGS)}")
        groups = int(groups) if isinstance(groups, str) and groups.isdecimal() else groups
        _check(
            "groups",
            groups,
            groups == "batch" or (isinstance(groups, int) and groups >= 1),
            "a number from 1 or 'batch'",
        )
        self.enhancements = Enhancements(**{k: options.pop(k) for k in Enhancements.names() if k in options})
        self.method = make_method(method, queries=int(queries), **options)
        if rounding != self.method.rule.rounding:
            self.method = replace(self.method, rule=replace(self.method.rule, rounding=rounding))
        self.direction = direction
        self.engine_name = engine
        self.groups = groups
        self.rank = int(rank)
        self.fold_every = int(fold_every)
        self._pending: list[Displacement] = []
        self.pairs = 1 if groups == "batch" else int(groups)  # directions of a full batch: the most seen so far
        if groups != 1 and not isinstance(self.method.estimator, TwoSided):
            raise ValueError(f"groups={groups!r} needs two-sided estimates: each row's two losses are its own")
        self._refuse(method, weight_decay)
        self.max_skipped = max_skipped
        self.forward_passes = 0
        self.watch: Callable[[StepRecord], None] | None = None
        self._last: StepRecord | None = None
        self._flying: deque[_Flying] = deque()
        self._skipped_steps = 0
        self._skipped_in_a_row = 0
        self._engine: Any = None
        self._blocks: list[Any] = []
        self._mask = Mask(self.enhancements, int(seed)) if self.enhancements.sparsity is not None else None
        self.calibrate: Callable[[], int] | None = None
        self.norms: MutableMapping[int, Norms] = {}
        self._graphs: StepGraphs | None = None
        self._version = 0  # of the weights after the last step, by others' writes alone
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "seed": int(seed), "step": 0}
        super().__init__(self._by_order(_groups(params)), defaults)
        self.engine  # noqa: B018  # built now, so that a wrong name or a collision is an error of the constructor
        logger.info("engine %s", self.chosen_engine)

    @property
    def engine(self) -> Any:
        """The engine over the present parameter groups."""
        if self._engine is None:
            named = [
                [] if g.get("first_order") else list(zip(g["names"], g["params"], strict=True))
                for g in self.param_groups
            ]
            self._engine = self._engine_over(named)
            self._blocks = [self._engine]
            if self.enhancements.blocks:
                parts = partition([name for group in named for name, _ in group], self.enhancements.blocks)
                self._blocks = [
                    self._engine_over([[pair for pair in group if pair[0] in set(names)] for group in named])
                    for names in parts.values()
                ]
                for engine in self._blocks:
                    engine.scratch = self._engine.scratch
        return self._engine

    @property
    def chosen_engine(self) -> str:
        """The engine, and why it was taken where it was not named."""
        name = self.engine.name
        if self.method.first_order:
            return "back-propagation: the method's own"
        if self.engine_name != "auto":
            return f"{name}: as asked for"
        if self._brings_its_engine:
            return f"{name}: what the method and its enhancements are served by"
        return f"{name}: {choose(self.groups)[1]}"

    @property
    def blocks(self) -> list[Any]:
        """The engines that a step visits in order: one over all that the method trains, or one a block."""
        self.engine  # noqa: B018
        return self._blocks

    @property
    def forwards_a_step(self) -> int:
        """Evaluations of the loss on one batch."""
        return self.method.forwards * len(self.blocks) + (self.enhancements.hybrid is not None)

    @property
    def state_bytes(self) -> int:
        """What the update rule and the masks keep between steps."""
        held = (value for own in self.state.values() for value in own.values() if isinstance(value, Tensor))
        return sum(value.numel() * value.element_size() for value in held)

    @property
    def _brings_its_engine(self) -> bool:
        return self.method.first_order or self.method.forward_mode or self.enhancements.sequential

    def _engine_over(self, named: list[list[tuple[str, nn.Parameter]]]) -> Any:
        if self._brings_its_engine:
            directions = Directions(named, self.direction)
            if self._mask is not None:
                directions = MaskedDirections(named, self.direction)
                directions.mask = self._mask
            return (ForwardModeEngine if self.method.forward_mode else SequentialEngine)(directions)
        return make_engine(self.engine_name, Directions(named, self.direction), self.groups, self.rank)

    def _refuse(self, method: str, weight_decay: float) -> None:
        """What cannot be had together, said in a line."""
        rule, more = self.method.rule, self.enhancements
        more.refuse(method, self.method.first_order, isinstance(rule, Conservative))
        if self.fold_every > 1:
            plain = rule.linear and not rule.extra_forwards and not self.method.first_order and not more.sequential
            if not plain or more.hybrid is not None or weight_decay:
                raise ValueError(
                    f"fold_every={self.fold_every}: only updates that are lists of coefficients can wait (zo-sgd, "
                    "forward-grad, zo-sgd-sign with sign_mode scalar; no weight decay, masks, blocks or hybrid); use 1"
                )
        if rule.rounding != "nearest" and weight_decay and (self.groups != 1 or self.engine_name == "lowrank"):
            raise ValueError(
                f"rounding='compensated' and weight_decay={weight_decay}: low-rank updates do not go with both; "
                "leave weight_decay at 0"
            )
        if isinstance(rule, Conservative) and weight_decay:
            raise ValueError(
                f"weight_decay={weight_decay}: method {method!r} may stay at θ, which decay would move; leave it at 0"
            )
        needs = next((n for n in ("sparsity", "blocks", "hybrid") if getattr(more, n) is not None), None)
        if self.method.first_order or self.method.forward_mode:
            needs = f"method {method!r}"
        served = ("auto", "sequential", *([ForwardModeEngine.name] if self.method.forward_mode else []))
        if needs and self.engine_name not in served:
            raise ValueError(f"engine={self.engine_name!r}: does not serve {needs}; use engine='auto'")
        if needs and self.groups != 1:
            raise ValueError(f"groups={self.groups!r}: does not go with {needs}; use groups=1")
        if (self.groups != 1 or self.engine_name == "lowrank") and (rule.extra_forwards or not rule.linear):
            raise ValueError(
                f"method {method!r} reads the estimate element by element or compares moves, which low-rank directions "
                "do not serve; use groups=1 and engine='auto', or zo-sgd"
            )

    def _by_order(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups, marked first_order where back-propagation trains them; hybrid training cuts each in two."""
        if self.method.first_order:
            return [group | {"first_order": True} for group in groups]
        fraction = self.enhancements.hybrid
        if fraction is None:
            return groups
        mine = shallow([name for group in groups for name in group["names"]], fraction)
        cut = []
        for group in groups:
            pairs = list(zip(group["names"], group["params"], strict=True))
            for deep in (False, True):
                some = [pair for pair in pairs if (pair[0] not in mine) == deep]
                more = {"first_order": True, "lr": self.enhancements.fo_lr} if deep else {}
                if some:
                    cut.append(group | more | {"names": [n for n, _ in some], "params": [p for _, p in some]})
        return cut

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = dict(param_group)
        if "names" not in group:
            group = _named_group(group, offset=sum(len(g["params"]) for g in self.param_groups))
        if self.param_groups:  # steps under way are those of the groups before
            self.flush()
        super().add_param_group(group)
        self._engine = None

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones included."""
        return self.param_groups[0]["step"]

    @property
    def last(self) -> StepRecord | None:
        """The last step, for which it waits."""
        self.land()
        return self._last

    @property
    def skipped_steps(self) -> int:
        self.land()
        return self._skipped_steps

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, *, batch: Any = None) -> Any:
        """One step. closure: () → the loss, a number, a 0-d tensor, or a vector of per-row losses (their mean is taken).

        It is called once a probe, must see the same batch each time, and needs no gradient. Returns the loss near θ
        (the mean over the probes), a tensor where the closure gives one. Raises `NonFiniteLoss` after `max_skipped`
        steps in a row with a NaN or infinite loss; whatever the closure raises passes through, nothing applied.

        batch: a dict of tensors, given to the closure: `step(loss_of, batch=batch)`; or a list of them, the rows of one step.
        With it the engines compute both losses of every row in one forward, if loss_of returns one a row. On CUDA such a step
        is captured as one graph for each shape of batch, so pass the same function every time and pad to a few lengths; not
        with blocks, hybrid training or back-propagation. It returns when the device has been given the
        step: the loss is a tensor there, and the step is one of the past (in `last`, for `watch`, as a skipped one of those
        that end in `NonFiniteLoss`) with the next one, or when somebody asks.
        """
        if closure is None:
            raise TypeError("step() needs a closure that returns the loss: optimizer.step(lambda: model(**batch).loss)")
        loss_of = (lambda _: closure()) if batch is None else closure
        batches = batch if isinstance(batch, list) else [batch]
        shares, step = self._shares(closure, batch, batches), self.steps
        self._draw_mask(step, lambda drawn: self._calibrate(drawn, loss_of, batches))
        if batch is not None and (near := self._captured_step(loss_of, batches, shares)) is not None:
            return near
        self.land()
        losses_P: list[float] = []
        g_BGQ: list[tuple[tuple[float, ...], ...]] = []
        gradients: list[Any] = []
        skipped_B: list[bool] = []
        choice = 0
        first: float | None = None
        raw: Any = None
        if any(g.get("first_order") for g in self.param_groups):
            raw, gradients = self._backward(loss_of, batches)
            first = _numbers([raw])[0]
            some = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
            if not torch.isfinite(get_total_norm(some, math.inf)):  # one pass, and no tensor as large as they
                first = math.nan  # 16 bits may hold the loss and not its gradient
        late: list[tuple[Any, Scalars]] = []
        for block, engine in enumerate(() if self.method.first_order else self.blocks):
            seeds_Q = self._seeds(step, block)
            raw_P, losses, d_Q = self._estimate(engine, loss_of, batches, seeds_Q, shares)
            raw = raw_P[0]
            scalars = self._scalars(seeds_Q, d_Q, *self._settings())
            skipped = not self._applicable(losses if first is None else [*losses, first], scalars)
            if not skipped:
                if isinstance(self.method.rule, Conservative):
                    choice = self._choose(engine, loss_of, batches, losses, scalars)
                    scalars = replace(scalars, choice=choice)
                late.append((engine, scalars))
            if self.enhancements.block_update != "jacobi":
                self._apply(late, hold=batch is not None)
            losses_P += losses
            g_BGQ.append(_nan(scalars.g_GQ) if skipped and len(self.blocks) > 1 else scalars.g_GQ)
            skipped_B.append(skipped)
        if self.method.first_order:
            assert first is not None
            losses_P, g_BGQ = [first], [((0.0,),) * len(self.param_groups)]
            skipped_B = [not math.isfinite(first)]
        self._apply(late, hold=batch is not None)
        self._fold_at(step)
        if gradients and not skipped_B[0]:
            self._descend(gradients)
        lr_G, decay_G, _ = self._settings()
        self._advance(len(batches))
        g_GQ = tuple(tuple(g for block in g_BGQ for g in block[k]) for k in range(len(self.param_groups)))
        self.took(StepRecord(step, tuple(losses_P), g_GQ, lr_G, decay_G, all(skipped_B), choice, shares))
        loss = losses_P[0] if self.method.first_order else centre(self.method.estimator, losses_P, shares)
        return torch.tensor(loss) if isinstance(raw, Tensor) else loss

    def _seeds(self, step: int, block: int) -> tuple[int, ...]:
        """Query by query, of each direction over the rows; blocks have their own, or blocks of one shape would move alike."""
        rows = range(self.pairs) if len(self.blocks) == 1 else [block]
        queries, seed = self.method.estimator.queries, self.param_groups[0]["seed"]
        return tuple(noise.step_seed(seed, step, q, k) for q in range(queries) for k in rows)

    def _settings(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """lr, decay and eps by parameter group, as they are now."""
        lr_G, decay_G, eps_G = (tuple(float(g[k]) for g in self.param_groups) for k in ("lr", "weight_decay", "eps"))
        return lr_G, decay_G, eps_G

    def _scalars(
        self,
        seeds_Q: tuple[int, ...],
        d_Q: Sequence[float],
        lr_G: tuple[float, ...],
        decay_G: tuple[float, ...],
        eps_G: tuple[float, ...],
    ) -> Scalars:
        """g = d/eps, clipped; a derivative is g itself."""
        exact = self.method.forward_mode
        g_GQ = clip([[d if exact else d / eps for d in d_Q] for eps in eps_G], self.enhancements.g_clip)
        return Scalars(seeds_Q, g_GQ, lr_G, decay_G)

    def _estimate(
        self, engine: Any, loss_of: Any, batches: list[Any], seeds_Q: tuple[int, ...], shares: tuple[int, ...]
    ) -> tuple[list[Any], list[float], list[float]]:
        """What the loss gave at each probe, the same as numbers, and d of each direction."""
        estimator = self.method.estimator
        if self.method.forward_mode:
            raw_P, d_Q = [], []
            redraw = same_draws(engine.directions.params)
            for seed in seeds_Q:
                redraw()
                along = Displacement((seed,), ((1.0,),) * len(self.param_groups))
                loss, derivative = engine.derivative(lambda: whole(loss_of, batches), along)
                raw_P.append(loss)
                d_Q.append(derivative)
            return raw_P, _numbers(raw_P), _numbers(d_Q)
        raw_P = probe(engine, estimator, loss_of, batches, functools.partial(self._at, seeds_Q), shares)
        losses_P = _numbers(raw_P)
        return raw_P, losses_P, spread(estimator, losses_P, shares, self.pairs)

    def _backward(self, loss_of: Any, batches: list[Any]) -> tuple[Tensor, list[Any]]:
        """The loss, and the gradients of the first-order groups, in order. Nothing of the layers before them is kept."""
        others = [p for g in self.param_groups if not g.get("first_order") for p in g["params"] if p.requires_grad]
        params = [p for g in self.param_groups if g.get("first_order") for p in g["params"]]
        redraw = same_draws(params)
        try:
            for param in others:
                param.requires_grad_(False)
            with torch.enable_grad():
                loss = whole(loss_of, batches)
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    raise InputError(
                        "back-propagation needs a closure that returns a tensor with a gradient; this one's has none "
                        "(a number, a detached tensor, or parameters with requires_grad=False)"
                    )
                loss = loss.double().mean() if loss.dim() else loss
                gradients = list(torch.autograd.grad(loss, params, allow_unused=True))
        finally:
            for param in others:
                param.requires_grad_(True)
        redraw()  # the probes see the same dropout
        return loss.detach(), gradients

    def _descend(self, gradients: list[Any]) -> None:
        for group in self.param_groups:
            if group.get("first_order"):
                own = [gradients.pop(0) for _ in group["params"]]
                lr, decay = float(group["lr"]), float(group["weight_decay"])
                self.method.rule.descend(group["params"], own, lr, decay, self.state)

    def _choose(self, engine: Any, loss_of: Any, batches: list[Any], losses_P: list[float], scalars: Scalars) -> int:
        """Which of θ and its two neighbours has the least loss on the step's batch."""
        rule, probes = self.method.rule, self.method.estimator.probes
        assert isinstance(rule, Conservative)
        redraw = same_draws(engine.directions.params)
        here = [loss for loss, asked in zip(losses_P, probes, strict=True) if asked.sign == 0]
        found: list[Any] = []
        for choice in range(len(here[:1]), 3):
            redraw()
            found.append(loss_at(engine, loss_of, batches, rule.displacement(replace(scalars, choice=choice))))
        return rule.choose(here[:1] + _numbers(found))

    def _apply(self, late: list[tuple[Any, Scalars]], hold: bool = False) -> None:
        """The updates that wait, in order: through the engine where they are displacements. hold: which may wait further."""
        rule = self.method.rule
        for engine, scalars in late:
            if self.fold_every > 1:
                assert isinstance(rule, Linear)
                self._pending.append(rule.displacement(scalars))
                continue
            weights: Any = Through(engine, self.pairs, hold) if rule.linear else engine.directions
            rule.apply(weights, scalars, self.state)
        late.clear()

    def _fold_at(self, step: int) -> None:
        if self.fold_every > 1 and (step + 1) % self.fold_every == 0:
            self.flush()

    def _draw_mask(self, step: int, norms: Callable[[int], Norms]) -> None:
        if self._mask is not None:
            directions, version = self.engine.directions, self._mask.version
            named = {directions.slots[id(p)].name: p for p in directions.params}
            self._mask.seed = self.param_groups[0]["seed"]
            self._mask.at(step, named, self.state, norms)
            if self._mask.version != version:
                self._graphs = None  # they read the mask where it was

    def _calibrate(self, drawn: int, loss_of: Any, batches: list[Any]) -> Norms:
        """The norms of the linear maps' inputs at θ, kept for a replay."""

        def own() -> int:
            whole(loss_of, batches)
            return len(batches)

        directions, passes = self.engine.directions, list[int]()
        redraw = same_draws(directions.params)
        named = {directions.slots[id(p)].name: p for p in directions.params}
        self.norms[drawn] = measure(lambda: passes.append((self.calibrate or own)()), named)
        redraw()
        self.forward_passes += passes[0]
        return self.norms[drawn]

    def _recorded_norms(self, drawn: int) -> Norms:
        found = self.norms.get(drawn)
        if found is None:
            raise ValueError(
                f"mask='wanda': a replay needs the input norms of the run's step {drawn}; give optimizer.norms those of the run"
            )
        return found

    def _advance(self, batches: int) -> None:
        """One step more, on so many batches."""
        self.forward_passes += self.forwards_a_step * batches
        for group in self.param_groups:
            group["step"] += 1
        self._version = self._weights_version

    def took(self, record: StepRecord) -> None:
        """A step is one of the past. Raises NonFiniteLoss where it was one skipped too many."""
        self._last = record
        if self.watch is not None:
            self.watch(record)
        self._count(record.skipped)

    def land(self, but: int = 0) -> None:
        """Wait for all steps that the device has been given, but so many, and see what they found."""
        while len(self._flying) > but:
            flying = self._flying.popleft()
            (losses_P, d_Q, choice), rule = flying.flight.taken(), self.method.rule
            if not self.method.forward_mode:
                d_Q = spread(self.method.estimator, losses_P, flying.shares, flying.pairs)
            scalars = self._scalars(flying.seeds_Q, d_Q, *flying.settings)
            skipped = not self._applicable(losses_P, scalars)
            if not skipped and self.fold_every == 1:
                rule.count(self.engine.directions.params, self.state)
            elif not skipped:
                assert isinstance(rule, Linear)
                self._pending.append(rule.displacement(scalars))
            lr_G, decay_G, _ = flying.settings
            self.took(
                StepRecord(flying.step, tuple(losses_P), scalars.g_GQ, lr_G, decay_G, skipped, choice, flying.shares)
            )

    @torch.no_grad()
    def apply_record(self, record: Record) -> None:
        """Do to the weights what a recorded step did, without its losses: a replay from step 0, in order, gives the run's bits.

        For an optimizer made with the run's method, options, seed, direction and engine; one eps for all groups. Raises
        ValueError for a record of another step, and for a method whose steps are not scalars (back-propagation).
        """
        if any(g.get("first_order") for g in self.param_groups):
            raise ValueError("a step by back-propagation is no list of scalars: it cannot be replayed")
        self.land()
        if record.step != self.steps:
            raise ValueError(f"the record of step {record.step}: step {self.steps} comes next")
        self.settle()
        self._draw_mask(record.step, self._recorded_norms)
        late: list[tuple[Any, Scalars]] = []
        queries = len(record.g) // len(self.blocks)
        if len(self.blocks) == 1:
            self.pairs = queries // self.method.estimator.queries
        for block, engine in enumerate(self.blocks):
            g_Q = record.g[block * queries : (block + 1) * queries]
            moved = not record.skipped and not any(map(math.isnan, g_Q))
            if moved:
                g_GQ = (g_Q,) * len(self.param_groups)
                seeds_Q = self._seeds(record.step, block)
                late.append((engine, Scalars(seeds_Q, g_GQ, record.lr, record.decay, record.choice)))
            if self.enhancements.block_update != "jacobi":
                self._apply(late)
        self._apply(late)
        self._fold_at(record.step)
        for group in self.param_groups:
            group["step"] += 1

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
        self, loss_of: Callable[[Any], Any], batches: Sequence[Any], shares: tuple[int, ...]
    ) -> Tensor | None:
        """The loss near θ where the step can be taken as a CUDA graph, else None. The device may still be at it, and at the
        step before: what the host has to do meets with what the device does.
        """
        groups, rule, more = self.param_groups, self.method.rule, self.enhancements
        if not rule.capturable or self.method.first_order or more.blocks is not None or more.hybrid is not None:
            return None
        if not all(_on_cuda(p) for g in groups for p in g["params"]) or not all(
            isinstance(b, Mapping) and b and all(map(_on_cuda, b.values())) for b in batches
        ):
            return None
        settings = lr_G, decay_G, eps_G = self._settings()
        if rule.counts:
            self.land()  # how many steps were applied decides what Adam does next
        steps_G = steps_of(self.engine.directions, self.state) if rule.counts else [0] * len(groups)
        if steps_G is None or ((not rule.linear or any(decay_G)) and passes_for(self.engine.directions) is None):
            return None
        if self._graphs is None or self._graphs.eps_G != eps_G or self._graphs.engine is not self.engine:
            estimator, applies = self.method.estimator, self.fold_every == 1
            self._graphs = StepGraphs(
                self.engine, estimator, rule, eps_G, self._room(), more.g_clip, self.state, applies
            )
        step, seeds_Q, numbers_GN = self.steps, self._seeds(self.steps, 0), rule.table(lr_G, decay_G, steps_G)
        flight = self._graphs.step(loss_of, batches, seeds_Q, lr_G, numbers_GN, any(decay_G), shares, self.pairs)
        if flight is None:
            return None
        self._flying.append(_Flying(flight, step, seeds_Q, shares, self.pairs, settings))
        self._advance(len(batches))
        self.land(but=1)
        self._fold_at(step)
        return flight.loss

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the counts of passes and skipped steps: a resumed run goes on counting. After it weights are current."""
        self.land()
        self.settle()
        counts = {"forward_passes": self.forward_passes, "skipped_steps": self.skipped_steps}
        return super().state_dict() | {
            "counts": counts | {"skipped_in_a_row": self._skipped_in_a_row, "pairs": self.pairs},
            "trust": getattr(self.engine, "trust", None),
            "pending": [(list(moved.seeds_Q), [list(c) for c in moved.coefs_GQ]) for moved in self._pending],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's. An update that is held back is written first, or given up where the weights were loaded since the last step."""
        while self._flying:  # what they found is not what is loaded
            self._flying.popleft().flight.taken()
        for engine in self._blocks:
            (engine.settle if self._version == self._weights_version else engine.drop)()
        super().load_state_dict(state_dict)
        self._graphs = None  # they hold the tensors of the state before
        # torch rounds an optimizer's state to the dtype of its parameter: a float32 moment of 16-bit weights would lose bits
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.to(param.device, copy=True)
        counts = state_dict.get("counts", {})
        self.forward_passes = counts.get("forward_passes", 0)
        self._skipped_steps = counts.get("skipped_steps", 0)
        self._skipped_in_a_row = counts.get("skipped_in_a_row", 0)
        self.pairs = counts.get("pairs", self.pairs)
        if isinstance(self.engine, FollowingEngine):
            self.engine.trust = state_dict.get("trust")
        self._pending = [
            Displacement(tuple(seeds_Q), tuple(map(tuple, coefs_GQ)))
            for seeds_Q, coefs_GQ in state_dict.get("pending", ())
        ]

    @property
    def _weights_version(self) -> int:
        """Grows when a weight is written by torch's operations, as loading does; a step's own writes go past it."""
        return self.param_groups[0]["params"][0]._version

    @torch.no_grad()
    def settle(self) -> None:
        """Write the update that an engine holds back (see `engine`): the weights are then those after the last step.

        It changes no bit of a run, so it may be called at any time. Updates that wait for a fold go on waiting.
        """
        for engine in self._blocks:
            engine.settle()

    @torch.no_grad()
    def flush(self) -> None:
        """Apply all updates that wait: what `settle` writes, and those since the last step whose number `fold_every` divides."""
        self.land()
        self.settle()
        waiting, self._pending = self._pending, []
        if not waiting:
            return
        by = Displacement(
            tuple(seed for moved in waiting for seed in moved.seeds_Q),
            tuple(tuple(c for moved in waiting for c in moved.coefs_GQ[g]) for g in range(len(self.param_groups))),
        )
        rule = self.method.rule
        assert isinstance(rule, Linear)
        if self._graphs is not None and self._graphs.fold(by, len(by.seeds_Q)):
            return
        rule.displace(Through(self.engine, len(by.seeds_Q)), by, self.state)

    def _applicable(self, losses_P: Sequence[float], by: Scalars) -> bool:
        """Whether the update is finite, in the weights' own dtype too: 16 bits overflow where 32 do not."""
        if not all(map(math.isfinite, losses_P)):
            return False
        room = self._room()
        reach = [self.method.rule.reach(g_Q, lr) for g_Q, lr in zip(by.g_GQ, by.lr_G, strict=True)]
        return all(abs(c) < room for reach_Q in reach for c in reach_Q)  # NaN compares false

    def _room(self) -> float:
        """What a coefficient must stay under: the narrowest weight's largest number, over 16, since |z| stays under 6."""
        return min(torch.finfo(p.dtype).max for group in self.param_groups for p in group["params"]) / 16

    def _count(self, skipped: bool) -> None:
        self._skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= self.max_skipped:
            step = self.steps if self._last is None else self._last.step + 1
            raise NonFiniteLoss(
                f"the loss or its estimate was not finite in {self._skipped_in_a_row} steps in a row (step {step}); "
                "nothing of them was applied: try a smaller lr or eps, or look at the data of these batches"
            )


@dataclass(frozen=True)
class _Flying:
    """A step that the device has been given, and what it takes to know what became of it. settings: lr, decay and eps by group."""

    flight: Flight
    step: int
    seeds_Q: tuple[int, ...]
    shares: tuple[int, ...]
    pairs: int
    settings: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


def _on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def _nan(g_GQ: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple((math.nan,) * len(g_Q) for g_Q in g_GQ)


def _numbers(raw_P: Sequence[Any]) -> list[float]:
    """Each loss as a Python float: the mean of a vector, in float64; one wait for the device, not one a loss."""
    if all(isinstance(raw, Tensor) for raw in raw_P):
        return torch.stack([raw.detach().double().mean() for raw in raw_P]).tolist()
    return [float(torch.as_tensor(raw, dtype=torch.float64).mean()) for raw in raw_P]


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, by name. Raises ValueError where there is none."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter: none has requires_grad=True")
    return named


def _groups(params: Any) -> list[dict[str, Any]]:
    if isinstance(params, nn.Module):
        params = trainable(params)
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
