"""`ZOTrainer`: a `transformers.Trainer` with `training_step` replaced."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from zotune.engines.attended import hiding_nothing
from zotune.errors import InputError
from zotune.methods import find
from zotune.models.border import reading
from zotune.step.choices import AUTO
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.step.rates import scale_of
from zotune.trainer.arguments import ZO_FIELDS, ZOTrainingArguments, options_of
from zotune.trainer.groups import parameter_groups
from zotune.trainer.hooks import HookedTrainer, one_card, plain
from zotune.trainer.outputs import Outputs
from zotune.trainer.refusals import refuse_shared, refuse_trainer
from zotune.trainer.resuming import RATE, load_as_told
from zotune.trainer.sharing import processes
from zotune.trainer.tally import Tally, without_nan

RowLoss = Callable[[nn.Module, Any], Tensor]
# What a checkpoint has to have in common with the run that goes on from it: it makes the directions and the rule.
KEPT = ("method", "method_options", "direction", "queries", "groups", "rank", "fold_every", "rounding")
UNREADABLE = "its state cannot be read: "
POSITIONAL = (  # of the Trainer, behind model and args
    "data_collator", "train_dataset", "eval_dataset", "processing_class", "model_init", "compute_loss_func", "compute_metrics",
    "callbacks", "optimizers", "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics",
)  # fmt: skip


class _TrainersOptimizer(ZeroOrderOptimizer):
    """The Trainer calls `optimizer.step()` after `training_step`. A zeroth-order step is the evaluation of the loss, so
    it has been taken by then. told: what its maker was told, which its state keeps; was_told: the same of the state loaded last."""

    told: Mapping[str, Any] = MappingProxyType({})
    was_told: Mapping[str, Any] = MappingProxyType({})

    def step(self, closure: Callable[..., Any] | None = None, *, batch: Any = None) -> Any:
        return None if closure is None else super().step(closure, batch=batch)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"told": dict(self.told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.was_told = state_dict.get("told", {})


class ZOTrainer(HookedTrainer):
    """`transformers.Trainer` with `training_step` replaced: no backward, no gradient, forward passes in eval mode.

    Everything else is the Trainer's own: data loading, gradient accumulation (the micro-batches of an update share its
    directions and are evaluated in every probe, so that k of them equal one batch), schedules, logging and `report_to`,
    callbacks, evaluation, checkpoints and `resume_from_checkpoint`.

    args: `ZOTrainingArguments`, or plain `TrainingArguments` with the zeroth-order options as keywords
        (`method="zo-sgd", eps=…`); keywords win.
    row_loss: (model, inputs) → (B,) losses, instead of `compute_loss`; the batch's loss is their mean.

    Under torchrun or accelerate it keeps the Trainer's convention: each process has batches of its own, of
    `per_device_train_batch_size` rows; a step has the rows of all, and all apply it. Losses alone travel between them.

    Each logged step also carries `projected_gradient`, `forward_passes` and `skipped_steps`. After a step with a
    non-finite loss nothing has changed; after `max_skipped` in a row `NonFiniteLoss` ends training.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *positional: Any, row_loss: RowLoss | None = None, **kwargs: Any
    ) -> None:
        self._given = {name: kwargs.pop(name) for name in ZO_FIELDS if name in kwargs}
        self.row_loss = row_loss
        args = args if args is not None else ZOTrainingArguments()
        method = options_of(args, self._given)["method"]
        if isinstance(method, str):
            find(method)  # an unknown name is refused here
        refuse_trainer(model, args, row_loss, dict(zip(POSITIONAL, positional, strict=False)) | kwargs)
        args.max_grad_norm = 0.0
        args.logging_nan_inf_filter = False  # it would wait for each step; see Tally
        one_card(args)
        self._micro_batches: list[Any] = []
        self._row_loss_of: functools.partial[Tensor] | None = None
        self._weights: tuple[nn.Module, int] | None = None
        self._outputs: Outputs | None = None  # of an evaluation that is under way
        self.tally = Tally()
        self._workers = processes(args)
        super().__init__(model, args, *positional, **kwargs)
        if any(p.requires_grad for p in self.model.parameters()):  # type: ignore[union-attr]
            self._made_optimizer(self.model)  # what it refuses is refused now; the run's own is made when it begins

    @property
    def zo_optimizer(self) -> ZeroOrderOptimizer:
        """The optimizer itself, without what accelerate wraps around it."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = optimizer = self._made_optimizer(self.model if model is None else model)
            optimizer.calibrate = self.calibrate
        return self.optimizer

    def _made_optimizer(self, model: Any) -> _TrainersOptimizer:
        options = options_of(
            self.args, self._given
        )  # as they are now: a search of hyperparameters sets them for each trial
        options["lr"] = self.args.learning_rate if options["lr"] is None else options["lr"]
        told = {name: _plain(options[name]) for name in KEPT} | {RATE: options["lr"]}
        options |= options.pop("method_options")
        del options["calibration_rows"]
        if options["lr"] == AUTO:
            options["total_steps"] = max(1, self.args.max_steps)  # until the schedule tells
        groups = parameter_groups(model, self.args.weight_decay)
        optimizer = _TrainersOptimizer(groups, seed=self.args.seed, **options)
        if optimizer.rate is not None:
            optimizer.rate.scale = scale_of([p for group in optimizer.param_groups for p in group["params"]], model)
        optimizer.told = told | {"groups": optimizer.groups, "rank": optimizer.rank}
        if self._workers is not None:
            refuse_shared(optimizer.method, optimizer.enhancements, self._workers.size)
        optimizer.sharing.workers = self._workers
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's; it is also what a rate that the run finds by itself is laid out by."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        rate = getattr(self.zo_optimizer, "rate", None)
        if rate is not None:
            if not isinstance(schedule, LambdaLR):
                raise InputError(
                    f"lr_scheduler_type={self.args.lr_scheduler_type!r}: lr='auto' needs a schedule that is known beforehand; "
                    "use linear, cosine or constant"
                )
            rate.plan(num_training_steps, schedule.lr_lambdas[0])
        return schedule

    def calibrate(self) -> int:
        """Evaluates the loss on the first `calibration_rows` training rows, one at a time, so that no padding is among them.

        Returns the forward passes, in batches of the size that a step has.
        """
        model, count = self.model, 0
        assert model is not None
        for row in itertools.islice(iter(self.train_dataset), options_of(self.args, self._given)["calibration_rows"]):  # type: ignore[arg-type]
            inputs = self.on_device(self.calibration_batch(row))
            self._rows_of(model)(inputs) if self.row_loss is not None else self.compute_loss(model, inputs)
            count += 1
        return -(-count // self.args.per_device_train_batch_size)

    def calibration_batch(self, row: Any) -> Any:
        """What the model is given of one training row."""
        return self.collated([row])

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not isinstance(self.zo_optimizer, ZeroOrderOptimizer):  # a subclass's, or one that was put there
            raise InputError(
                f"optimizer: {type(self.zo_optimizer).__name__} steps by gradients, and there are none; leave create_optimizer to "
                "ZOTrainer, and name a method by method="
            )
        self._micro_batches.append(self.on_device(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
        model = plain(model)
        if model.training:  # it walks through all modules
            model.eval()
        with self.compute_loss_context_manager():
            if self.row_loss is not None:
                batch = batches[0] if len(batches) == 1 else batches
                loss = self.zo_optimizer.step(self._rows_of(model), batch=batch)
            else:
                loss = self.zo_optimizer.step(lambda: self._loss(model, batches, num_items_in_batch))
        if self.state.global_step + 1 >= self.state.max_steps:
            self.zo_optimizer.flush()  # the run's last update waits for no other
        elif self._watched():
            self.settle()
        return self.tally.add(torch.as_tensor(loss, dtype=torch.float32, device=self.args.device))

    # An engine that was named may hold a step's update back (see `ZeroOrderOptimizer`); whoever reads the weights finds it written.

    def settle(self) -> None:
        if isinstance(self.zo_optimizer, ZeroOrderOptimizer):
            self.zo_optimizer.settle()

    def _watched(self) -> bool:
        """Whether somebody's callback may read the weights after each step: transformers' and zotune's do not."""
        known = ("transformers", "zotune")
        return any(type(c).__module__.split(".")[0] not in known for c in self.callback_handler.callbacks)

    def choose(self, metrics: dict[str, float], better: Callable[[], bool]) -> bool:
        found = better()
        if self.state.best_metric is not None and not math.isfinite(self.state.best_metric):
            self.state.best_metric = None  # which the Trainer takes for the same, and JSON can hold
        return found

    def load_state(self, checkpoint: str, load: Callable[[], None]) -> None:
        """As told: the arguments' eps, rate and decay win over the checkpoint's; another method is refused (see `resuming`)."""
        optimizer: Any = self.zo_optimizer
        if not isinstance(optimizer, _TrainersOptimizer):
            return load()

        def states() -> Mapping[str, Any]:
            load()
            return optimizer.was_told

        with reading(checkpoint, checkpoint, said=UNREADABLE):
            load_as_told(optimizer, self.lr_scheduler, optimizer.told, checkpoint, states)
        if optimizer.steps != self.state.global_step:
            raise InputError(
                f"{checkpoint}: holds no optimizer's state of step {self.state.global_step} (save_only_model?); begin a run of its "
                "own from these weights, or name another checkpoint"
            )

    def load_draws(self, checkpoint: str, load: Callable[[], None]) -> None:
        with reading(checkpoint, checkpoint, said=UNREADABLE):
            load()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        own = model is not None and "zero_grad" not in model.__dict__
        if own:
            model.zero_grad = _nothing  # no parameter ever has a gradient, and looking takes as long as much of a step
        try:
            self.tally = Tally()
            done = super().train(*args, **kwargs)
            mean = self.tally.mean_of_all(done.training_loss)
            done = done._replace(training_loss=math.nan if mean is None else mean)
            if isinstance(self.zo_optimizer, ZeroOrderOptimizer):
                self.zo_optimizer.flush()  # a run that was stopped early has updates that wait
            return done
        finally:
            if own and "zero_grad" in model.__dict__:
                del model.zero_grad
            self.settle()

    def floating_point_ops(self, inputs: Any) -> int:
        """Two operations for each weight, token and forward pass. The number of weights is counted once."""
        model: Any = self.model
        ids = inputs.get(getattr(model, "main_input_name", "input_ids")) if isinstance(inputs, dict) else None
        if not isinstance(ids, Tensor) or not hasattr(model, "num_parameters"):
            return 0
        if self._weights is None or self._weights[0] is not model:
            self._weights = model, int(model.num_parameters(exclude_embeddings=True))
        return 2 * self.zo_optimizer.forwards_a_step * ids.numel() * self._weights[1]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.settle()
        return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's. Raises NotFinite where the model gives a row something that is no number, before a metric is asked."""
        assert self.model is not None
        self._outputs = seen = Outputs(self.model)
        metric = self.compute_metrics
        if metric is not None:
            self.compute_metrics = seen.before(metric)
        try:
            with hiding_nothing(self.model.parameters()):
                found = super().evaluation_loop(*args, **kwargs)
        finally:
            self._outputs, self.compute_metrics = None, metric
        seen.refuse()
        return found

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if self._outputs is not None:
            self._outputs.look(found[1], inputs)
        return found

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.settle()
        super().save_model(*args, **kwargs)

    def _rows_of(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """The row loss of the model, the same object each time: captured steps are found by it."""
        if self._row_loss_of is None or self._row_loss_of.args[0] is not model:
            assert self.row_loss is not None
            self._row_loss_of = functools.partial(self.row_loss, model)
        return self._row_loss_of

    def _loss(self, model: nn.Module, batches: list[Any], num_items_in_batch: Any) -> Tensor:
        summed = getattr(self, "loss_is_scaled_for_ga", None)  # what a subclass says of its own compute_loss
        if summed is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            summed = self.compute_loss_func is not None or counted
        losses: list[Any] = [
            self.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch) for batch in batches
        ]
        return torch.stack(losses).sum() if summed else torch.stack(losses).mean()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer does; the loss is the mean of the steps that were not skipped, and what is not finite is None."""
        optimizer = self.zo_optimizer
        for name, mean in (("loss", self.tally.mean), ("train_loss", self.tally.mean_of_all)):
            if name in logs:
                logs[name] = mean(logs[name])  # type: ignore[assignment]
        if "loss" in logs and isinstance(optimizer, ZeroOrderOptimizer):
            optimizer.land()  # the line is of the steps so far
        if "loss" in logs and isinstance(optimizer, ZeroOrderOptimizer) and optimizer.last is not None:
            logs.pop("grad_norm", None)  # the Trainer's, of gradients that are not there
            if not optimizer.method.first_order:
                g_Q = optimizer.last.g_GQ[0]
                logs["projected_gradient"] = sum(g_Q) / len(g_Q)
            if optimizer.rate is not None:
                logs["learning_rate"] = max(optimizer.last.lr_G)
            logs["forward_passes"] = optimizer.forward_passes
            logs["skipped_steps"] = optimizer.skipped_steps
        told = without_nan(logs)
        super().log(told, *args, **kwargs)
        logs.update({name: value for name, value in told.items() if name not in logs})  # the epoch


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _plain(value: Any) -> Any:
    """As a checkpoint holds it: numbers and texts, of others what they say of themselves."""
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
