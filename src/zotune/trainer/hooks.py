"""What zotune overrides or calls of transformers' Trainer that begins with an underscore: all of it, and here alone.

transformers promises nothing of these. `SIGNATURES` says what they are taken to be, a test compares it with what is installed, and
`pyproject.toml` bounds the version. `HookedTrainer` gives each a name without an underscore, which the rest of zotune knows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from zotune.errors import InputError
from zotune.models.border import damaged, reading

logger = logging.getLogger(__name__)

# Method → its parameters behind self.
SIGNATURES = {
    "_run_epoch": (
        "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial", "ignore_keys_for_eval",
        "start_time", "resume_from_checkpoint", "epochs_trained", "steps_trained_in_current_epoch",
    ),
    "_prepare_inputs": ("inputs",),
    "_get_collator_with_removed_columns": ("data_collator", "description"),
    "_get_grad_norm": ("model", "grad_norm"),
    "_determine_best_metric": ("metrics", "trial"),
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
}  # fmt: skip
# Public, and relied on beyond what their pages say: `get_decay_parameter_names` reads no self, the others are called so.
PUBLIC = {
    "get_decay_parameter_names": ("model",),
    "create_optimizer": ("model",),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "save_model": ("output_dir", "_internal_call"),
    "floating_point_ops": ("inputs",),
}


def decayed_names(model: nn.Module) -> set[str]:
    """The parameters that the Trainer decays: no biases and no norms."""
    return set(transformers.Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # reads no self


def one_card(args: transformers.TrainingArguments) -> None:
    """No DataParallel: its replicas are copies that no perturbation reaches."""
    if args.n_gpu > 1:
        logger.warning("one of %d GPUs trains; CUDA_VISIBLE_DEVICES chooses it", args.n_gpu)
    args._n_gpu = min(args.n_gpu, 1)


def plain(model: nn.Module) -> nn.Module:
    """Without DistributedDataParallel, which would send buffers at each forward, and processes take different numbers of these."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


class HookedTrainer(transformers.Trainer):
    """The Trainer, which asks its subclass by names of ours where it would go through private methods."""

    # A subclass's to override.

    def has_ended(self) -> bool:
        """Whether there is no step left; asked before each epoch, which would begin with one."""
        return bool(self.state.global_step >= self.state.max_steps)

    def settle(self) -> None:
        """Called before weights are read, saved or replaced."""

    def load_weights(self, checkpoint: Path) -> bool:
        """Load a checkpoint's weights into the model; False leaves it to the Trainer."""
        return False

    def load_state(self, checkpoint: str, load: Callable[[], None]) -> None:
        """load: loads the optimizer's and the schedule's state."""
        load()

    def load_draws(self, checkpoint: str, load: Callable[[], None]) -> None:
        """load: loads the states of the generators of random numbers."""
        load()

    def choose(self, metrics: dict[str, float], better: Callable[[], bool]) -> bool:
        """better: compares with the best so far, and keeps what is better."""
        return better()

    def save_checkpoint(self, save: Callable[[], None]) -> None:
        """save: writes weights, states and the Trainer's own record."""
        save()

    def checkpoints_folder(self) -> Path | None:
        """Where checkpoints are written; None leaves it to the Trainer."""
        return None

    # For a subclass to call.

    def on_device(self, inputs: Any) -> Any:
        return self._prepare_inputs(inputs)

    def collated(self, rows: list[Any]) -> Any:
        """Rows as the model is given them, without the columns that it does not take."""
        return self._get_collator_with_removed_columns(self.data_collator)(rows)

    def load_best_from(self, checkpoint: Path) -> None:
        self.state.best_model_checkpoint = str(checkpoint)
        self._load_best_model()

    # The Trainer's own.

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer would take one step more of a run that is resumed after its last."""
        if not self.has_ended():
            super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> None:
        """There is no gradient; the Trainer would look through all parameters for one."""

    def _load_best_model(self) -> None:
        self.settle()
        super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        place = resume_from_checkpoint
        if not self.load_weights(Path(place)):
            if found := damaged(place):
                raise InputError(f"{place}: {found}")
            with reading(place, place):
                super()._load_from_checkpoint(place, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        plain = super()._load_optimizer_and_scheduler
        if checkpoint is not None:
            self.load_state(checkpoint, lambda: plain(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        plain = super()._load_rng_state
        if checkpoint is not None:
            self.load_draws(checkpoint, lambda: plain(checkpoint))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        plain = super()._determine_best_metric
        return self.choose(metrics, lambda: plain(metrics, trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        plain = super()._save_checkpoint
        self.save_checkpoint(lambda: plain(model, trial))

    def _get_output_dir(self, trial: Any) -> str:
        folder = self.checkpoints_folder()
        return super()._get_output_dir(trial) if folder is None else str(folder)
