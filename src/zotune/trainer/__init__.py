"""`ZOTrainer`: a `transformers.Trainer` that steps without back-propagation."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from zotune.errors import nearest
from zotune.methods import METHODS
from zotune.step.optimizer import ZeroOrderOptimizer, trainable

RowLoss = Callable[[nn.Module, Any], Tensor]


@dataclass
class ZOTrainingArguments(transformers.TrainingArguments):
    """`TrainingArguments` and the zeroth-order ones, with defaults that fit: constant lr, no gradient clipping, losses as they are
    (NaN too), batches copied to the device while it computes.

    The run's `seed` also seeds the directions, `weight_decay` is decoupled, and the schedule steps once an update.
    """

    method: str = field(default="zo-sgd", metadata={"help": "a method of `zotune list methods`"})
    eps: float = field(default=1e-3, metadata={"help": "size of the perturbation, in units of the weights"})
    direction: str = field(default="gaussian", metadata={"help": "gaussian or rademacher"})
    queries: int = field(default=1, metadata={"help": "directions a step; each costs two forwards"})
    groups: Any = field(default=1, metadata={"help": "directions over the rows of a batch: 1, a number, or 'batch'"})
    rank: int = field(default=1, metadata={"help": "rank of the directions of engine lowrank"})
    fold_every: int = field(default=1, metadata={"help": "steps whose updates are applied together"})
    rounding: str = field(default="nearest", metadata={"help": "nearest or compensated"})
    engine: str = field(default="auto", metadata={"help": "an engine of `zotune list engines`"})
    method_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "further options of the method"})
    calibration_rows: int = field(default=128, metadata={"help": "training rows that a mask of wanda is made from"})
    max_skipped: int = field(default=5, metadata={"help": "stop after so many non-finite steps in a row"})
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant"
    max_grad_norm: float = 0.0
    logging_nan_inf_filter: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataloader_pin_memory:
            accelerator: Any = self.accelerator_config
            accelerator.non_blocking = True  # a copy that is waited for waits for the step before it too
        if self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm}: a zeroth-order step has no gradient to clip; leave it at 0"
            )


_ZO_FIELDS = (
    "method", "eps", "direction", "queries", "groups", "rank", "fold_every", "rounding", "engine", "method_options",
    "max_skipped", "calibration_rows",
)  # fmt: skip


class _TrainersOptimizer(ZeroOrderOptimizer):
    """The Trainer calls `optimizer.step()` after `training_step`. A zeroth-order step is the evaluation of the loss, so
    it has been taken by then."""

    def step(self, closure: Callable[..., Any] | None = None, *, batch: Any = None) -> Any:
        return None if closure is None else super().step(closure, batch=batch)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters. Decay reaches what the Trainer decays: no biases and no norms."""
    named = trainable(model)
    if not weight_decay:
        return [{"params": named}]
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # reads no self
    groups = [
        {"params": [(n, p) for n, p in named if n in decayed], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class ZOTrainer(transformers.Trainer):
    """`transformers.Trainer` with `training_step` replaced: no backward, no gradient, forward passes in eval mode.

    Everything else is the Trainer's own: data loading, gradient accumulation (the micro-batches of an update share its
    directions and are evaluated in every probe, so that k of them equal one batch), schedules, logging and `report_to`,
    callbacks, evaluation, checkpoints and `resume_from_checkpoint`.

    args: `ZOTrainingArguments`, or plain `TrainingArguments` with the zeroth-order options as keywords
        (`method="zo-sgd", eps=…`); keywords win.
    row_loss: (model, inputs) → (B,) losses, instead of `compute_loss`; the batch's loss is their mean.

    Each logged step also carries `projected_gradient`, `forward_passes` and `skipped_steps`. After a step with a
    non-finite loss nothing has changed; after `max_skipped` in a row `NonFiniteLoss` ends training.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *positional: Any, row_loss: RowLoss | None = None, **kwargs: Any
    ) -> None:
        given = {name: kwargs.pop(name) for name in _ZO_FIELDS if name in kwargs}
        self.row_loss = row_loss
        args = args if args is not None else ZOTrainingArguments()
        self._zo = {
            f.name: getattr(args, f.name, _default(f))
            for f in dataclasses.fields(ZOTrainingArguments)
            if f.name in _ZO_FIELDS
        } | given
        if self._zo["method"] not in METHODS:
            raise ValueError(f"unknown method {self._zo['method']!r}; {nearest(self._zo['method'], METHODS)}")
        if args.fp16:
            raise ValueError(
                "fp16=True scales gradients, and there are none here: load the model with dtype=torch.float16"
            )
        args.max_grad_norm = 0.0
        args._n_gpu = min(args.n_gpu, 1)  # no DataParallel: its replicas are copies that no perturbation reaches
        self._micro_batches: list[Any] = []
        self._row_loss_of: Callable[[Any], Tensor] | None = None
        self._weights: int | None = None
        super().__init__(model, args, *positional, **kwargs)

    @property
    def zo_optimizer(self) -> ZeroOrderOptimizer:
        """The optimizer itself, without what accelerate wraps around it."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            assert model is not None
            options = dict(self._zo)
            options |= options.pop("method_options")
            del options["calibration_rows"]
            self.optimizer = optimizer = _TrainersOptimizer(
                parameter_groups(model, self.args.weight_decay),
                lr=self.args.learning_rate,
                seed=self.args.seed,
                **options,
            )
            optimizer.calibrate = self.calibrate
        return self.optimizer

    def calibrate(self) -> int:
        """Evaluates the loss on the first `calibration_rows` training rows, one at a time, so that no padding is among them.

        Returns the forward passes, in batches of the size that a step has.
        """
        model, count = self.model, 0
        assert model is not None
        for row in itertools.islice(iter(self.train_dataset), self._zo["calibration_rows"]):  # type: ignore[arg-type]
            inputs = self._prepare_inputs(self.calibration_batch(row))
            self._rows_of(model)(inputs) if self.row_loss is not None else self.compute_loss(model, inputs)
            count += 1
        return -(-count // self.args.per_device_train_batch_size)

    def calibration_batch(self, row: Any) -> Any:
        """What the model is given of one training row."""
        return self._get_collator_with_removed_columns(self.data_collator)([row])

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
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
            self._settle()
        return torch.as_tensor(loss, dtype=torch.float32, device=self.args.device)

    # An engine that was named may hold a step's update back (see `ZeroOrderOptimizer`); whoever reads the weights finds it written.

    def _settle(self) -> None:
        if isinstance(self.zo_optimizer, ZeroOrderOptimizer):
            self.zo_optimizer.settle()

    def _watched(self) -> bool:
        """Whether somebody's callback may read the weights after each step: transformers' and zotune's do not."""
        known = ("transformers", "zotune")
        return any(type(c).__module__.split(".")[0] not in known for c in self.callback_handler.callbacks)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        own = model is not None and "zero_grad" not in model.__dict__
        if own:
            model.zero_grad = _nothing  # no parameter ever has a gradient, and looking takes as long as much of a step
        try:
            done = super().train(*args, **kwargs)
            if isinstance(self.zo_optimizer, ZeroOrderOptimizer):
                self.zo_optimizer.flush()  # a run that was stopped early has updates that wait
            return done
        finally:
            if own and "zero_grad" in model.__dict__:
                del model.zero_grad
            self._settle()

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> None:
        """There is no gradient; the Trainer would look through all parameters for one."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Two operations for each weight, token and forward pass. The number of weights is counted once."""
        model: Any = self.model
        ids = inputs.get(getattr(model, "main_input_name", "input_ids")) if isinstance(inputs, dict) else None
        if not isinstance(ids, Tensor) or not hasattr(model, "num_parameters"):
            return 0
        if self._weights is None:
            self._weights = int(model.num_parameters(exclude_embeddings=True))
        return 2 * self.zo_optimizer.forwards_a_step * ids.numel() * self._weights

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._settle()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self._settle()
        super().save_model(*args, **kwargs)

    def _load_best_model(self) -> None:
        self._settle()
        super()._load_best_model()

    def _rows_of(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """The row loss of the model, the same object each time: captured steps are found by it."""
        if self._row_loss_of is None:
            assert self.row_loss is not None
            self._row_loss_of = functools.partial(self.row_loss, model)
        return self._row_loss_of

    def _loss(self, model: nn.Module, batches: list[Any], num_items_in_batch: Any) -> Tensor:
        summed = self.compute_loss_func is not None or (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        )
        losses: list[Any] = [
            self.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch) for batch in batches
        ]
        return torch.stack(losses).sum() if summed else torch.stack(losses).mean()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        optimizer = self.zo_optimizer
        if "loss" in logs and isinstance(optimizer, ZeroOrderOptimizer) and optimizer.last is not None:
            logs.pop("grad_norm", None)  # the Trainer's, of gradients that are not there
            if not optimizer.method.first_order:
                g_Q = optimizer.last.g_GQ[0]
                logs["projected_gradient"] = sum(g_Q) / len(g_Q)
            logs["forward_passes"] = optimizer.forward_passes
            logs["skipped_steps"] = optimizer.skipped_steps
        super().log(logs, *args, **kwargs)
        history: list[Any] = self.state.log_history  # goes into a checkpoint's JSON, which has no NaN
        history[-1] = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in history[-1].items()}


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _default(f: Any) -> Any:
    return f.default_factory() if f.default is dataclasses.MISSING else f.default
