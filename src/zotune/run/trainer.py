"""The Trainer of a task: its metric, the steps that a trajectory has already, and checkpoints that are never half there."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from zotune.errors import InputError
from zotune.models.border import tells_of_input
from zotune.models.loading import load_weights
from zotune.prepare.listener import Listener
from zotune.prepare.prepared import LENGTHS, Prepared
from zotune.prepare.ready import Ready
from zotune.record.replay import apply
from zotune.run.arguments import arguments
from zotune.run.folder import CHECKPOINT, as_json
from zotune.run.process import Interrupted, signals, stops_the_run
from zotune.run.recorder import WINDOW, Recorder
from zotune.run.state import RunState
from zotune.step.optimizer import StepRecord
from zotune.step.pieces import pieces
from zotune.tasks.objectives import Objective, objective
from zotune.trainer import ZOTrainer


class RunTrainer(ZOTrainer):
    """A run's Trainer: steps that the trajectory has already are applied from there; of checkpoints equal on validation the
    latest is the best; these are never half there."""

    model: nn.Module
    recorder: Recorder
    ready: Ready
    run: RunState

    def records_by(self, recorder: Recorder) -> None:
        """Once it is made. The recorder's run is this one's."""
        self.ready, self.run, self.listener, self.recorder = recorder.ready, recorder.state, recorder.listener, recorder
        self._metric = f"eval_{self.ready.task.metric}"
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(recorder)
        if (patience := self.ready.config.early_stop) is not None:
            self.add_callback(EarlyStop(patience))

    def to_the_end(self) -> None:
        """The steps from the newest checkpoint on. Raises Interrupted where a signal asks for an end; what was reached is saved."""
        run = self.run
        try:
            with signals(run.ask_to_stop):
                self.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        finally:
            if run.trajectory is not None:
                run.trajectory.close()
        self.listener.end("train")
        if run.stop is not None:
            raise Interrupted(
                f"stopped at step {self.state.global_step} of {self.ready.config.steps}, saved; "
                "go on with the same command and --resume",
                128 + run.stop,
            )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A step that the trajectory has already is applied from there, with no forward pass."""
        optimizer, step, recorded = self.zo_optimizer, self.zo_optimizer.steps, self.run.recorded
        if recorded is None or step >= len(recorded) or not self.accelerator.sync_gradients:
            return super().training_step(model, inputs, num_items_in_batch)
        batches, self._micro_batches = len(self._micro_batches) + 1, []
        record = recorded[step]
        optimizer.apply_record(record)
        optimizer.forward_passes += optimizer.forwards_a_step * batches
        losses_P, g_GQ = (record.loss_plus, record.loss_minus), (record.g,) * len(record.lr)
        optimizer.took(StepRecord(step, (), losses_P, g_GQ, record.lr, record.decay, record.skipped, record.choice))
        return self.tally.add(torch.tensor((record.loss_plus + record.loss_minus) / 2, device=self.args.device))

    def has_ended(self) -> bool:
        patience = self.ready.config.early_stop
        early = patience is not None and EarlyStop(patience).reached(self.args, self.state)
        return early or super().has_ended()

    def load_best(self, checkpoint: Path) -> None:
        """Tensor by tensor into the weights that are there: no second copy of them in memory."""
        if not load_weights(self.model, checkpoint):
            self.load_best_from(checkpoint)

    def load_weights(self, checkpoint: Path) -> bool:
        if self.run.rebuilt is None:
            return load_weights(self.model, checkpoint)
        apply(self.zo_optimizer, self.run.rebuilt)
        return True

    def load_state(self, checkpoint: str, load: Callable[[], None]) -> None:
        """All of it: the folder has said that the options are the run's own."""
        own = {} if self.run.rebuilt is None else dict(self.zo_optimizer.state)
        with readable_state(checkpoint):
            load()
        self.zo_optimizer.state.update(own)

    def load_draws(self, checkpoint: str, load: Callable[[], None]) -> None:
        with readable_state(checkpoint):
            load()

    def choose(self, metrics: dict[str, float], better: Callable[[], bool]) -> bool:
        if metrics[self._metric] == self.state.best_metric:
            self.state.best_metric = None
        found = super().choose(metrics, better)
        self.control.should_save |= found  # whatever --save-every says
        return found

    def save_checkpoint(self, save: Callable[[], None]) -> None:
        """What it relies on goes to the disk before it, and older ones after it. Of several workers the first does so."""
        if not self.run.workers.first:
            return
        folder = self.run.folder
        self.recorder.sync()
        with folder.staged(f"{CHECKPOINT}{self.state.global_step}") as path:
            save()
            (path / WINDOW).write_text(as_json(self.recorder.window()), encoding="utf-8")
        folder.keep_checkpoints(self.ready.config.keep or 1, self.state.best_global_step)

    def checkpoints_folder(self) -> Path:
        return self.run.folder.staging


def objective_of(ready: Prepared) -> Objective:
    """What a run's steps minimise, and their batches."""
    multiple = LENGTHS if ready.device.type == "cuda" else 1
    return objective(ready.config.loss, ready.task, ready.tokenizer, ready.pad_id, multiple)


class TaskTrainer(RunTrainer):
    """Of a task: its losses, and evaluation by its metric."""

    ready: Prepared

    def __init__(self, ready: Prepared, state: RunState, listener: Listener) -> None:
        asked = objective_of(ready)
        super().__init__(
            ready.model,
            arguments(ready, state.folder),
            train_dataset=ready.train,
            eval_dataset=ready.validation,
            data_collator=asked.collate,
            row_loss=asked.row_loss,
        )
        self._unpadded = objective(ready.config.loss, ready.task, ready.tokenizer, ready.pad_id).collate
        optimizer: Any = self.create_optimizer()
        self.records_by(Recorder(state, ready, listener, optimizer.method.signs))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        new = self.run.header is not None and not self.run.recorded and self.zo_optimizer.steps == 0
        if new and self.args.gradient_accumulation_steps == 1:
            with torch.no_grad():  # once, to see whether probes see the same loss
                loss, batch = self._rows_of(model.eval()), self.on_device(inputs)
                most = self.zo_optimizer.sharing.micro_batch
                rows = loss(batch) if most is None else torch.cat([loss(p.batch) for p in pieces([batch], most)])
            self.recorder.guards.at_rest = float(rows.double().mean())
        return super().training_step(model, inputs, num_items_in_batch)

    def calibration_batch(self, row: Any) -> Any:
        return self._unpadded([row])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.settle()
        with stops_the_run(f"step {self.state.global_step}: validation"):
            score = lambda: self.ready.score(self.ready.validation, self.listener, "validation")  # noqa: E731
            metrics = {self._metric: self.run.workers.from_first(score)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@contextmanager
def readable_state(checkpoint: str) -> Iterator[None]:
    """A checkpoint's state that is damaged, or holds more than numbers, as a line; torch reads it with weights_only."""
    try:
        yield
    except Exception as error:
        if not tells_of_input(error):
            raise
        said = type(error).__name__  # torch's own message recommends to unpickle it
        raise InputError(
            f"{checkpoint}: its state cannot be read ({said}); delete this folder and go on: an older checkpoint, or the "
            "trajectory alone, serves --resume"
        ) from error


class EarlyStop(transformers.TrainerCallback):
    """Ends training after so many evaluations in a row none of which was better than all before it.

    It counts in the log that checkpoints hold, so that a resumed run ends where a whole one does.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reached(args, state):
            control.should_training_stop = True

    def reached(self, args: Any, state: Any) -> bool:
        name = f"eval_{args.metric_for_best_model}"
        better = operator.gt if args.greater_is_better else operator.lt
        best, since = math.nan, 0
        for value in (line[name] for line in state.log_history if name in line):
            best, since = (value, 0) if best != best or better(value, best) else (best, since + 1)
        return since >= self.patience
