"""`ZOTrainingArguments`: what a `ZOTrainer` is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import transformers

from zotune.step.choices import AUTO
from zotune.trainer.refusals import refuse_arguments


@dataclass
class ZOTrainingArguments(transformers.TrainingArguments):
    """`TrainingArguments` and the zeroth-order ones, with defaults that fit: constant lr, no gradient clipping, losses as they are
    (NaN too), batches copied to the device while it computes.

    The run's `seed` also seeds the directions, `weight_decay` is decoupled, and the schedule steps once an update.

    Refused, since a step would ignore it or do it wrong: `fp16`, `max_grad_norm`, `optim`, `optim_args`, `optim_target_modules`,
    `adam_beta1`, `adam_beta2`, `adam_epsilon`, `neftune_noise_alpha`, `torch_compile` (with `_backend`, `_mode`),
    `use_liger_kernel`, `activation_checkpointing` (`gradient_checkpointing`), `torch_empty_cache_steps`,
    `auto_find_batch_size`, `deepspeed`, `fsdp`, `parallelism_config`; see `zotune.trainer.refusals`. All else is the Trainer's own:
    `bf16` computes losses under autocast, `label_smoothing_factor` smooths them.
    """

    method: Any = field(default="zo-sgd", metadata={"help": "a method of `zotune list methods`, or a zotune.Method"})
    eps: float | None = field(
        default=None,
        metadata={"help": "size of the perturbation, in units of the weights [the method's own, else 1e-3]"},
    )
    direction: str | None = field(default=None, metadata={"help": "gaussian or rademacher [the method's own]"})
    queries: int | None = field(default=None, metadata={"help": "directions for the same rows [the method's own]"})
    groups: Any = field(
        default=None,
        metadata={"help": "directions over the rows of a batch: 1, a number, or 'batch' [the method's own, else 1]"},
    )
    rank: int | None = field(
        default=None, metadata={"help": "rank of the directions of engine lowrank [the method's own, else 1]"}
    )
    forward_tokens: int | None = field(default=None, metadata={"help": "tokens of one forward at most"})
    micro_batch: int | None = field(default=None, metadata={"help": "rows of a step that are evaluated together"})
    fold_every: int = field(default=1, metadata={"help": "steps whose updates are applied together"})
    rounding: str = field(default="nearest", metadata={"help": "nearest or compensated"})
    engine: str = field(default="auto", metadata={"help": "an engine of `zotune list engines`"})
    method_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "further options of the method"})
    calibration_rows: int = field(default=128, metadata={"help": "training rows that a mask of wanda is made from"})
    max_skipped: int = field(default=5, metadata={"help": "stop after so many non-finite steps in a row"})
    lr: Any = field(
        default=None,
        metadata={"help": "instead of learning_rate: a number, or 'auto': the run finds it (`zotune.step.rates`)"},
    )
    learning_rate: float = 1e-6
    lr_scheduler_type: Any = field(
        default=None, metadata={"help": "as transformers has them [constant; with lr auto linear]"}
    )
    max_grad_norm: float = 0.0
    logging_nan_inf_filter: bool = False

    def __post_init__(self) -> None:
        refuse_arguments(self)
        if self.lr_scheduler_type is None:
            self.lr_scheduler_type = "linear" if self.lr == AUTO else "constant"
        super().__post_init__()
        if self.dataloader_pin_memory:
            accelerator: Any = self.accelerator_config
            accelerator.non_blocking = True  # a copy that is waited for waits for the step before it too


ZO_FIELDS = (
    "method", "eps", "direction", "queries", "groups", "rank", "forward_tokens", "micro_batch", "fold_every", "rounding", "engine",
    "method_options", "max_skipped", "calibration_rows", "lr",
)  # fmt: skip


def options_of(args: transformers.TrainingArguments, given: dict[str, Any]) -> dict[str, Any]:
    """The zeroth-order options by name: as keywords, else as the arguments have them, else by default."""
    held = {f.name: f for f in dataclasses.fields(ZOTrainingArguments)}
    return {name: getattr(args, name, _default(held[name])) for name in ZO_FIELDS} | given


def _default(f: Any) -> Any:
    return f.default_factory() if f.default is dataclasses.MISSING else f.default
