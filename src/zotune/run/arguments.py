"""A run's options as the Trainer's arguments and as an optimizer's, and what neither can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zotune.errors import InputError
from zotune.prepare.prepared import Prepared
from zotune.prepare.ready import Ready
from zotune.run.folder import RunFolder
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.tasks.task import LOWER_IS_BETTER
from zotune.trainer import ZOTrainingArguments
from zotune.trainer.arguments import ZO_FIELDS


def of_every_run(ready: Ready, folder: RunFolder) -> dict[str, Any]:
    """The Trainer's arguments of a run, whatever it trains on."""
    config = ready.config
    given = config.optimizer_options
    return {
        "output_dir": str(folder.path),
        "method": config.method,
        "weight_decay": given.pop("weight_decay"),  # the Trainer's own
        "method_options": {name: value for name, value in given.items() if name not in ZO_FIELDS},
        **{name: value for name, value in given.items() if name in ZO_FIELDS},
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "seed": config.seed,
        "logging_steps": config.log_every,
        "eval_strategy": "steps",
        "eval_steps": config.evaluates_every,
        "save_strategy": "steps",
        "save_steps": config.saves_every,
        "metric_for_best_model": ready.task.metric,
        "disable_tqdm": True,
        "report_to": config.report_to,
        "use_cpu": ready.device.type == "cpu",
    }


def arguments(ready: Prepared, folder: RunFolder) -> ZOTrainingArguments:
    config = ready.config
    assert config.lr is not None
    return ZOTrainingArguments(
        **of_every_run(ready, folder),
        calibration_rows=config.calibration_rows or ZOTrainingArguments.calibration_rows,
        lr=config.lr,
        lr_scheduler_type=config.lr_schedule,
        gradient_accumulation_steps=config.accumulate,
        greater_is_better=ready.task.metric not in LOWER_IS_BETTER,
        remove_unused_columns=False,
        dataloader_pin_memory=ready.device.type == "cuda",
    )


def optimizer_for(ready: Prepared) -> ZeroOrderOptimizer:
    """A run's optimizer, at lr 0. Raises InputError for options that do not go together."""
    config = ready.config
    try:
        return ZeroOrderOptimizer(ready.model, config.method, lr=0.0, **config.optimizer_options)
    except ValueError as error:
        raise InputError(str(error)) from None


def check_reporters(names: Sequence[str]) -> None:
    """Raises InputError for a tracker that transformers does not know, or that is not installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([] if name in ("none", "all") else [name]):
                callback()
        except (ValueError, RuntimeError, ImportError, AssertionError) as error:
            raise InputError(f"--report-to {name}: {str(error).splitlines()[0]}") from None
