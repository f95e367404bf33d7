"""`ZeroOrderOptimizer`: a `torch.optim.Optimizer` whose step needs no backward."""

# Q directions of a step, K directions over the rows of a batch, G parameter groups.

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zotune import noise
from zotune.directions import Displacement, joined
from zotune.directions.calibration import Norms
from zotune.directions.partition import seed_in
from zotune.engines.following import FollowingEngine
from zotune.engines.reads import as_written
from zotune.engines.writing import Through
from zotune.errors import NonFiniteLoss, OptionError
from zotune.methods import Method, make_method
from zotune.record.steps import StepRecord
from zotune.record.trajectory import Record
from zotune.step import replaying
from zotune.step.arithmetic import Given, weights_of
from zotune.step.captured import CapturedSteps
from zotune.step.choices import Choices, check_rates, is_count
from zotune.step.choosing import engines_over, reason
from zotune.step.enhancements import Enhancements
from zotune.step.host import HostStep
from zotune.step.masking import StepMasks, masked
from zotune.step.parameters import NamedParams, by_order, named_group, trainable
from zotune.step.pieces import Sharing
from zotune.step.probing import rows_shared
from zotune.step.rates import auto_rate, rates, see
from zotune.step.shards import laid_out, refuse_more
from zotune.step.streaming import streams
from zotune.step.turning import move_cores, turned
from zotune.updates import Linear
from zotune.workers.group import Workers

__all__ = ["StepRecord", "ZeroOrderOptimizer", "trainable"]

logger = logging.getLogger(__name__)

RANK_BEFORE = 128  # of an update that one product folded, before places


class ZeroOrderOptimizer(torch.optim.Optimizer):
    """θ ← θ + Σ_q c_q·z(seed_q): the gradient is estimated from the loss at displaced weights alone.

    params: a module (its trainable parameters), an iterable of (name, parameter) or a dict of these, an iterable
        of parameters, or of groups (dicts whose "params" is one of them). Names decide the noise: give them where you can.
    method: a name of `zotune.methods.METHODS`, `module:NAME` of your own, or a `zotune.Method`; a named method's further options
        (`estimator`, …) are keywords here, and are refused beside a `Method`, which has its own.
    lr, eps, weight_decay: per group. eps in units of the weights; decay is decoupled, θ ← (1 − lr·decay)·θ first. Without lr or
        eps the method's own, else 1e-6 and 1e-3. lr "auto": the run finds it (`zotune.step.rates`), falling linearly to 0 over
        `total_steps`, without a scheduler; groups with a number of their own keep it.
    seed: of the run. The directions of step s are noise(seed, s), whatever the device, dtype or torch's own seeds.
    direction: "gaussian" or "rademacher" [the method's own, else gaussian]. queries: directions for the same rows [the method's].
    groups: directions over the rows of a batch: 1, a number, or "batch" for one a row [the method's own, else 1]. More than one
        takes the engine `lowrank` and a loss that is a vector, a number a row; the update: Σ_k −lr·(n_k/B)·g_k·z_k, n_k of B rows.
    sparsity, mask, sparsity_scope, mask_refresh, blocks, block_update, hybrid, fo_lr, g_clip: see `Enhancements`.
        With mask "wanda" the attribute `calibrate` may be a function that evaluates the model on some rows and returns how many
        forward passes it took; without it a mask is made from its step's own batch. The norms that make each mask are
        kept by step in `norms`, which a replay needs.
    engine: see `zotune.engines.ENGINES`, or "auto". rank: of the directions of `lowrank` [the method's own, else 1].
        With "dual" the update of a step with a batch is written when the next step reads the weights: call `settle` or `flush`
        before you read or replace them; `state_dict` does. With all others, "auto" too, weights are current after each step.
    forward_tokens: tokens of one forward, at most, where the places of a step share forwards [by memory on CUDA, 1,024 on a CPU; a
        plain pair is then not split].
    micro_batch: rows of a step that are evaluated together [all]; needs a batch and a loss a row. workers: the processes that share
        them out, see `zotune.join`: weights are those of one process, bit for bit.
    fold_every: the updates of so many steps are applied together, in one pass over the weights; the probes between see the
        weights before them. `flush` applies what waits.
    rounding: "nearest", or "compensated", see `zotune.updates.Rule`.
    max_skipped: a step whose loss is not finite changes nothing and is counted; after so many in a row `step` raises
        `NonFiniteLoss`.

    Weights change only by the update: a closure that raises leaves every one bit for bit as it was, and a step with
    lr 0 as well. Dropout and other draws from torch's generators are the same in all probes of a step; better, call
    `model.eval()`. Works in float64, float32, bfloat16 and float16, on any device. What `torch.compile` has compiled runs
    uncompiled within a step, with the same losses.

    >>> model = nn.Linear(3, 1)
    >>> optimizer = ZeroOrderOptimizer(model, method="zo-sgd", lr=1e-2, eps=1e-3, seed=0)
    >>> x = torch.ones(2, 3)
    >>> loss = optimizer.step(lambda: model(x).square().mean())
    >>> optimizer.forward_passes
    2
    """

    def __init__(
        self,
        params: nn.Module | NamedParams | dict[str, nn.Parameter] | Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        method: str | Method = "zo-sgd",
        *,
        lr: float | str | None = None,
        eps: float | None = None,
        seed: int = 0,
        direction: str | None = None,
        queries: int | None = None,
        groups: int | str | None = None,
        engine: str = "auto",
        rank: int | None = None,
        forward_tokens: int | None = None,
        micro_batch: int | None = None,
        workers: Workers | None = None,
        fold_every: int = 1,
        rounding: str | None = None,
        weight_decay: float = 0.0,
        max_skipped: int = 5,
        total_steps: int | None = None,
        **options: Any,
    ) -> None:
        self.enhancements = more = Enhancements(**{k: options.pop(k) for k in Enhancements.names() if k in options})
        self.method = made = _rounded(make_method(method, queries=_whole(queries), **options), rounding)
        lr, eps = made.own("lr", lr, 1e-6), made.own("eps", eps, 1e-3)
        groups = groups if groups is not None else made.groups or 1
        rank = rank if rank is not None else made.rank or 1
        self.choices = chosen = Choices(
            made, method if isinstance(method, str) else "method", seed, direction, groups, engine, rank, fold_every,
            made.rule.rounding, forward_tokens, lr, eps, weight_decay, max_skipped, more, micro_batch=micro_batch,
        )  # fmt: skip
        chosen.refuse()
        self.direction = direction or made.direction or "gaussian"
        self.groups, self.rank = chosen.groups, int(rank)
        self.fold_every, self.max_skipped = int(fold_every), max_skipped
        # directions of a full batch: the most seen so far
        self.pairs = 1 if self.groups == "batch" else int(self.groups)
        self.folds_by_query = False  # low-rank updates are rounded as they once were: see `at_once`
        self.sharing = Sharing(micro_batch, workers)
        self.forward_passes = 0
        self.watch: Callable[[StepRecord], None] | None = None
        self.last: StepRecord | None = None  # the last step that has landed: see `land`
        self.skipped_steps = 0  # of those that have landed
        self._skipped_in_a_row = 0
        self.pending: list[Displacement] = []  # updates that wait for a fold
        self._masks = StepMasks(more, int(seed)) if more.sparsity is not None else None
        self.calibrate: Callable[[], int] | None = None
        self.norms: MutableMapping[int, Norms] = {}
        self.captured = CapturedSteps()
        self._version = 0  # of the weights after the last step, by others' writes alone
        self.engine: Any = None
        self.blocks: list[Any] = []
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "seed": int(seed), "step": 0}
        given, self.shards = laid_out(params)
        self.shards.refuse(chosen, self.sharing)
        super().__init__(by_order(given, made.first_order, more.hybrid, more.fo_lr), defaults)
        self.rate = auto_rate(self, total_steps, params if isinstance(params, nn.Module) else None)
        self._build()
        logger.info("engine %s", self.chosen_engine)

    def _build(self) -> None:
        """The engines over the present parameter groups: one over all that the method trains, and one a block."""
        mask = None if self._masks is None else self._masks.mask
        self.engine, self.blocks = engines_over(self.param_groups, self.choices, self.direction, mask, self.shards)
        streams(self)

    @property
    def chosen_engine(self) -> str:
        """The engine, and why it was taken where it was not named; or that it stepped aside, once it has."""
        return reason(self.engine, self.choices)

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
    def steps(self) -> int:
        """Steps taken, skipped ones included."""
        return self.param_groups[0]["step"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = dict(param_group)
        check_rates(group)
        if "names" not in group:
            group = named_group(group, offset=sum(len(g["params"]) for g in self.param_groups))
        built = self.engine is not None
        if built:  # steps under way are those of the groups before
            refuse_more(group["params"])
            self.flush()
        super().add_param_group(group)
        if built:
            self.captured.forget()
            self._build()

    # A step.

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, *, batch: Any = None) -> Any:
        """One step. closure: () → the loss, a number, a 0-d tensor, or a vector of per-row losses (their mean is taken).

        It must see the same batch at each place, and needs no gradient. Returns the loss near θ
        (as the estimator tells it), a tensor where the closure gives one. Raises `NonFiniteLoss` after `max_skipped`
        steps in a row with a NaN or infinite loss; whatever the closure raises passes through, nothing applied.

        batch: a dict of tensors, given to the closure: `step(loss_of, batch=batch)`; or a list of them, the rows of one step.
        With it the engines compute the losses of all places in few forwards, if loss_of returns one a row. On CUDA such a step
        is captured as one graph for each shape of batch, so pass the same function every time and pad to a few lengths; not
        with blocks or hybrid training. It returns when the device has been given the
        step: the loss is a tensor there, and the step is one of the past (in `last`, for `watch`, as a skipped one of those
        that end in `NonFiniteLoss`) with the next one, or when somebody calls `land`.
        """
        if closure is None:
            raise TypeError("step() needs a closure that returns the loss: optimizer.step(lambda: model(**batch).loss)")
        with as_written():
            return self._step(closure, batch)

    def _step(self, closure: Callable[..., Any], batch: Any) -> Any:
        loss_of = (lambda _: closure()) if batch is None else closure
        batches = batch if isinstance(batch, list) else [batch]
        loss_of = self.shards.ready(loss_of, self.sharing, self.steps)
        shared = rows_shared(self, closure, batch is not None, batches)
        self.prepare(loss_of, batches)
        self.sharing.begin(self, batches)
        if batch is not None and (near := self.captured.step(self, loss_of, batches, shared)) is not None:
            return near
        self.land()
        taken = HostStep(self, loss_of, batches, hold=batch is not None)
        record, loss = taken.take(shared)
        self.advance(len(batches))
        self.took(record)
        return torch.tensor(loss) if taken.tensors else loss

    def prepare(self, loss_of: Any = None, batches: Sequence[Any] = ()) -> None:
        """The subspace and the mask of this step; without a loss a mask that was drawn from data is made of what is recorded."""
        self.forward_passes += turned(self, loss_of, batches)
        if self._masks is not None:
            self.forward_passes += masked(self, self._masks, loss_of, batches)

    def advance(self, batches: int) -> None:
        """One step more, on so many batches."""
        self.forward_passes += self.forwards_a_step * batches
        for group in self.param_groups:
            group["step"] += 1
        self._version = self._weights_version()

    def land(self) -> None:
        """Wait for all steps that the device has been given, and see what they found."""
        self.captured.land(self)

    def took(self, record: StepRecord) -> None:
        """A step is one of the past. Raises NonFiniteLoss where it was one skipped too many."""
        self.last = record
        see(self, record)
        if self.watch is not None:
            self.watch(record)
        self.skipped_steps += record.skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if record.skipped else 0
        if self._skipped_in_a_row >= self.max_skipped:
            raise NonFiniteLoss(
                f"the loss or its estimate was not finite in {self._skipped_in_a_row} steps in a row (step {record.step + 1}); "
                "nothing of them was applied: try a smaller lr or eps, or look at the data of these batches"
            )

    # What a step is made of, for those who take one.

    def seeds(self, step: int, block: int) -> tuple[int, ...]:
        """Query by query, of each direction over the rows; blocks have their own, or blocks of one shape would move alike."""
        rows = range(self.pairs) if len(self.blocks) == 1 else [block]
        seed, sets = self.param_groups[0]["seed"], self.method.sets
        found = ((q, noise.step_seed(seed, step, q, k)) for q in range(self.method.queries) for k in rows)
        return tuple(one if sets == 1 else seed_in(one, q % sets) for q, one in found)

    def settings(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """lr, decay and eps by parameter group, as they are now."""
        lr_G, decay_G, eps_G = (tuple(float(g[k]) for g in self.param_groups) for k in ("lr", "weight_decay", "eps"))
        return (lr_G if self.rate is None else rates(self, self.rate.at(self.steps))), decay_G, eps_G

    def given(self, shared: Sequence[int], lr_G: Sequence[float], eps_G: Sequence[float]) -> Given:
        """What a step is given beside its losses, on the host."""
        eps, lr = (torch.tensor(values, dtype=torch.float64) for values in (eps_G, lr_G))
        return Given(eps, lr, weights_of(shared, self.pairs), self.pairs, self.enhancements.g_clip, self.room())

    def room(self) -> float:
        """What a coefficient must stay under: the narrowest weight's largest number, over 16, since |z| stays under 6."""
        return min(torch.finfo(p.dtype).max for group in self.param_groups for p in group["params"]) / 16

    def at_once(self, directions: int, fold: bool = False) -> int:
        """How many low-rank directions are summed before they are rounded: all of a step's, or of a fold's.

        Of one query, and of runs older than places, a query's at the most, and of these as many as have a rank of 128 together:
        bits that those steps have always had.
        """
        if self.method.queries > 1 and not self.folds_by_query:
            return directions
        return min(directions if fold else self.pairs, max(1, RANK_BEFORE // int(self.choices.rank)))

    def apply_now(self, late: list[tuple[Any, StepRecord]], hold: bool = False) -> None:
        """Updates, in order: through the engine's writer where they are displacements. hold: which may wait further."""
        rule = self.method.rule
        for engine, record in late:
            if self.method.subspace is not None:
                move_cores(self, engine, record)
                continue
            if self.fold_every > 1:
                assert isinstance(rule, Linear)
                self.pending.append(rule.displacement(record))
                continue
            through = Through(engine.writer, self.at_once(len(record.seeds_Q)), hold)
            rule.apply(through if rule.linear else engine.writer.directions, record, self.state)
        late.clear()
        self.shards.still()

    def fold_at(self, step: int) -> None:
        """Apply what waits where the step ends a fold."""
        if self.fold_every > 1 and (step + 1) % self.fold_every == 0:
            self.flush()

    # Recorded steps.

    @torch.no_grad()
    def apply_record(self, record: Record) -> None:
        """Do to the weights what a recorded step did, without its losses: a replay from step 0, in order, gives the run's bits.

        For an optimizer made with the run's method, options, seed, direction and engine; one eps for all groups. Raises
        ValueError for a record of another step, and for a method whose steps are not scalars alone (back-propagation, and what
        `needs_rows`).
        """
        replaying.apply_record(self, record)

    @torch.no_grad()
    def apply_records(self, records: Sequence[Record]) -> None:
        """`apply_record` of one after the other, to the bit, with fewer passes over the weights where steps are Σ c·z alone."""
        replaying.apply_records(self, records)

    # State, and updates that wait.

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the counts of passes and skipped steps: a resumed run goes on counting. After it weights are current."""
        self.land()
        self.settle()
        counts = {"forward_passes": self.forward_passes, "skipped_steps": self.skipped_steps}
        return super().state_dict() | {
            "counts": counts | {"skipped_in_a_row": self._skipped_in_a_row, "pairs": self.pairs},
            "trust": getattr(self.engine, "trust", None),
            "pending": [(list(moved.seeds_Q), [list(c) for c in moved.coefs_GQ]) for moved in self.pending],
            "rate": None if self.rate is None else self.rate.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's. An update that is held back is written first, or given up where the weights were loaded since the last step."""
        self.captured.drop()
        for engine in self.blocks:
            (engine.writer.settle if self._version == self._weights_version() else engine.writer.drop)()
        super().load_state_dict(state_dict)
        self.captured.forget()  # graphs hold the tensors of the state before
        _keep_dtypes(self, state_dict)
        counts = state_dict.get("counts", {})
        self.forward_passes, self.skipped_steps = counts.get("forward_passes", 0), counts.get("skipped_steps", 0)
        self._skipped_in_a_row = counts.get("skipped_in_a_row", 0)
        self.pairs = counts.get("pairs", self.pairs)
        if isinstance(self.engine, FollowingEngine):
            self.engine.trust = state_dict.get("trust")
        if self.rate is not None and state_dict.get("rate") is not None:
            self.rate.load_state_dict(state_dict["rate"])
        self.pending = [
            Displacement(tuple(seeds_Q), tuple(map(tuple, coefs_GQ)))
            for seeds_Q, coefs_GQ in state_dict.get("pending", ())
        ]

    def _weights_version(self) -> int:
        """Grows when a weight is written by torch's operations, as loading does; a step's own writes go past it."""
        return self.param_groups[0]["params"][0]._version

    @torch.no_grad()
    def settle(self) -> None:
        """Write the update that an engine's writer holds back (see `engine`): the weights are then those after the last step.

        It changes no bit of a run, so it may be called at any time. Updates that wait for a fold go on waiting.
        """
        for engine in self.blocks:
            engine.writer.settle()

    @torch.no_grad()
    def flush(self) -> None:
        """Apply all updates that wait: what `settle` writes, and those since the last step whose number `fold_every` divides."""
        self.land()
        self.settle()
        waiting, self.pending = self.pending, []
        if not waiting:
            return
        by, rule = joined(waiting), self.method.rule
        assert isinstance(rule, Linear)
        at_once = self.at_once(len(by.seeds_Q), fold=True)
        if self.captured.fold(by, at_once):
            return
        rule.displace(Through(self.engine.writer, at_once), by, self.state)
        self.shards.still()


def _keep_dtypes(of: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """torch rounds an optimizer's state to the dtype of its parameter: a float32 moment of 16-bit weights would lose bits."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    for i, param in zip(ids, (p for group in of.param_groups for p in group["params"]), strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            if isinstance(value, Tensor):
                of.state[param][name] = value.to(param.device, copy=True)


def _rounded(method: Method, rounding: str | None) -> Method:
    """The method with its updates rounded so, where that is said."""
    if rounding in (None, method.rule.rounding):
        return method
    return replace(method, rule=replace(method.rule, rounding=str(rounding)))


def _whole(queries: Any) -> int | None:
    if queries is not None and not is_count(queries):
        raise OptionError("queries", f"queries={queries!r}: must be a whole number from 1")
    return None if queries is None else int(queries)
