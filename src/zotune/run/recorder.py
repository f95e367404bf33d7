"""What a run writes down while it lasts: the trajectory, metrics.jsonl, and what its listener is told."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import transformers

from zotune.estimates.memory import peak_bytes, reset_peak
from zotune.prepare.listener import Listener
from zotune.prepare.ready import Ready
from zotune.record.scalars import float32
from zotune.record.trajectory import Record
from zotune.run.folder import as_json, sync, write_atomically
from zotune.run.guards import Guards
from zotune.run.state import RunState
from zotune.run.trajectory import open_trajectory
from zotune.step.optimizer import StepRecord
from zotune.step.probing import sides
from zotune.tasks.metrics import figure

WINDOW = "window.json"  # of a checkpoint: what the next line of metrics.jsonl is a mean of, so far


class Recorder(transformers.TrainerCallback):
    """Writes the trajectory and metrics.jsonl, shows progress, and passes on a request to stop.

    signs: of the method's places, which say what its losses are.
    """

    def __init__(self, state: RunState, ready: Ready, listener: Listener, signs: Sequence[int]) -> None:
        self.state, self.ready, self.listener, self.signs = state, ready, listener, signs
        self.path = state.folder / "metrics.jsonl"
        self.guards = Guards(listener.say)
        self.losses: list[float] = []  # since the last line
        # seconds from a step's end to the next one's, evaluation and checkpoints left out; that is a step's time on CUDA too,
        # where a step is given to the device before the last one is done
        self.took: list[float] = []
        self.ended: float | None = None
        self.g: float | None = None  # of the last step, the mean over its pairs
        self.line: dict[str, Any] = {}
        self.validation: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        run, step = self.state, state.global_step
        open_trajectory(run, self.ready.config, step)
        if run.checkpoint is not None:
            window = run.folder.read_json(f"{run.checkpoint.name}/{WINDOW}")
            self.losses = [math.nan if loss is None else loss for loss in window.get("losses", [])]  # of a skipped step
            self.guards.g = window.get("g", [])
            self.guards.apart = window.get("apart", [])
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_atomically(self.path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))
        if reached := max(step, len(run.recorded or ())):
            again = f"; {reached - step} of them from the trajectory" if reached > step else ""
            self.listener.say(f"going on after step {reached} of {state.max_steps}{again}")
            run.progress["resumed_at"].append(reached)
            run.save()
        own = _own(optimizer)
        if run.header is not None and own.engine.name in (
            "sequential",
            "dual",
        ):  # they add ε·z to the weights themselves
            self.guards.weigh(own.engine.directions.params, own.param_groups[0]["eps"])
        own.watch = self.see
        self.listener.begin("train", state.max_steps)
        self.listener.advance("train", step)

    def see(self, last: StepRecord) -> None:
        """A step that was taken; on CUDA the next one may be under way."""
        run, step, loss = self.state, last.step + 1, last.loss
        if run.trajectory is not None:
            record = self._record(last)
            if run.recorded is None or last.step >= len(run.recorded):
                run.trajectory.append(record)
            # as they are recorded, so that a line is the same whether its steps were taken or applied from the file
            plus, minus = float32(record.loss_plus), float32(record.loss_minus)
            g_Q = tuple(map(float32, record.g))
            self.g = sum(g_Q) / len(g_Q)
            loss = minus if 0 in self.signs else (plus + minus) / 2
            if not last.skipped:
                if min(self.signs) > 0:  # places on one side alone: as far apart as their differences say
                    half = (self.ready.config.eps or 0.0) * sum(map(abs, g_Q)) / len(g_Q) / 2
                    plus, minus = plus + half, minus - half
                self.guards.see(step, plus, minus, g_Q)
        self.losses.append(loss)
        self.listener.advance("train", 1, loss=loss, **self.validation)
        if last.skipped:
            self.listener.say(f"step {step}: the loss is not finite; the step is skipped")

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        run = self.state
        run.peak = max(run.peak, peak_bytes(self.ready.device))
        now = time.perf_counter()
        if self.ended is not None:
            self.took.append(now - self.ended)
        last_one = state.global_step == state.max_steps
        if state.global_step % args.eval_steps == 0 or last_one:
            control.should_log = control.should_evaluate = True
        control.should_save = state.global_step % args.save_steps == 0 or last_one
        if run.stop is not None:
            control.should_save = control.should_training_stop = True
        if state.global_step % args.logging_steps == 0 or control.should_log or control.should_save:
            _own(optimizer).land()
        self.ended = None if control.should_evaluate or control.should_save else now

    def _record(self, last: StepRecord) -> Record:
        written = self.state.recorded
        if written is not None and last.step < len(written):
            return written[last.step]
        plus, other = sides(self.signs, last.losses_P, len(last.shares))
        return Record(
            step=last.step,
            loss_plus=_over_rows(plus or other, last.shares),  # forward mode: both are L(θ)
            loss_minus=_over_rows(other or plus, last.shares),  # leave-one-out: no other
            g=last.g_GQ[0],
            lr=last.lr_G,
            decay=last.decay_G,
            skipped=last.skipped,
            choice=last.choice,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = dict(logs or {})
        if "loss" in logs:
            self._write()
            losses, self.losses = self.losses, []
            took, self.took = self.took, []
            self.line = {
                "step": state.global_step,
                "loss": sum(losses) / len(losses),
                "lr": logs["learning_rate"],
                "projected_gradient": self.g if self.state.trajectory else logs.get("projected_gradient"),
                **self.guards.statistics(),
                "forward_passes": logs["forward_passes"],
                "skipped_steps": logs["skipped_steps"],
                "seconds": round(self.state.wall(), 3),
                **({"step_seconds": round(median(took), 6)} if took else {}),
            }

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reset_peak(self.ready.device)  # the peak is that of the steps

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        reset_peak(self.ready.device)
        name, value = next(iter(metrics.items()))
        self.validation = {self.ready.task.metric: value}
        self.line[name.replace("eval_", "validation_")] = value
        shown = figure(self.ready.task.metric, value)
        self.listener.say(f"step {state.global_step}: validation {shown}")
        self._write()

    def sync(self) -> None:
        """All lines and steps so far are on the disk."""
        self._write()
        if self.path.exists():
            sync(self.path)
        if self.state.trajectory is not None:
            self.state.trajectory.sync()
        self.state.progress["wall_seconds"] = self.state.wall()
        self.state.save()

    def window(self) -> dict[str, list[float]]:
        """What the next line is a mean of, so far."""
        return {"losses": self.losses, "g": self.guards.g, "apart": self.guards.apart}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def _write(self) -> None:
        if self.line:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(as_json(self.line) + "\n")
            self.line = {}


def _own(optimizer: Any) -> Any:
    """The optimizer without what accelerate wraps around it."""
    return getattr(optimizer, "optimizer", optimizer)


def _over_rows(losses: list[float], shares: Sequence[int]) -> float:
    """The mean over the batch of the losses of its directions' rows, query by query."""
    if len(shares) == 1:
        return sum(losses) / len(losses)
    weights = list(shares) * (len(losses) // len(shares))
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)


def _step_of(line: str) -> float:
    """A line's step; beyond all steps where the line is torn."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
