"""The Trainer of a run on rewards, and what it writes down: steps.jsonl, completions.jsonl, each member's reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from torch import Tensor

from zotune.prepare.listener import Listener
from zotune.prepare.prompts import PreparedReward
from zotune.record.scalars import float32
from zotune.record.trajectory import Record
from zotune.rewards.asking import Scores, Written
from zotune.rewards.prompts import Prompt
from zotune.rewards.shown import samples
from zotune.run.arguments import of_every_run
from zotune.run.folder import COMPLETIONS, STEPS, RunFolder, as_json, write_atomically
from zotune.run.recorder import Recorder
from zotune.run.state import RunState
from zotune.run.trainer import RunTrainer
from zotune.step.optimizer import StepRecord
from zotune.trainer.reward_arguments import RewardTrainingArguments
from zotune.trainer.rewarding import RewardTrainer


def arguments(ready: PreparedReward, folder: RunFolder) -> RewardTrainingArguments:
    config = ready.config
    return RewardTrainingArguments(
        **of_every_run(ready, folder),
        members=config.members,
        sigma=config.sigma,
        sigma_schedule=config.sigma_schedule,
        lr=config.lr,
        reward_weights=config.reward_weights,
        reward_timeout=config.reward_timeout,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        decoder=config.decoder,
        slots=config.slots,
        greater_is_better=True,
        dataloader_pin_memory=False,
    )


class RewardRecorder(Recorder):
    """Beside the trajectory and metrics.jsonl a line a step in steps.jsonl, which lines of metrics are means of, so that a resumed
    run says of the steps that it applies from the trajectory what was said when they were taken."""

    ready: PreparedReward
    told: dict[int, dict[str, Any]]  # the trainer's own
    tell: Callable[[], None]  # likewise

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, optimizer, **kwargs)
        reached = max(state.global_step, len(self.state.recorded or ()))
        for line in self.keep(STEPS, reached):
            self.told[line["step"]] = {name: value for name, value in line.items() if name != "step"}
        self.keep(COMPLETIONS, reached)

    def keep(self, name: str, step: int) -> list[dict[str, Any]]:
        """The lines of a file up to a step; what is behind them, or torn, is cut."""
        path = self.state.folder / name
        if not path.exists():
            return []
        kept = [
            line
            for text in path.read_text(encoding="utf-8").splitlines()
            if (line := _read(text)) and line["step"] <= step
        ]
        write_atomically(path, "".join(as_json(line) + "\n" for line in kept))
        return kept

    def append(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        with open(self.state.folder / name, "a", encoding="utf-8") as file:
            file.write("".join(as_json(line) + "\n" for line in lines))

    def see(self, last: StepRecord) -> None:
        self.tell()
        run, step = self.state, last.step + 1
        assert run.trajectory is not None
        record = self._record(last)
        if run.recorded is None or last.step >= len(run.recorded):
            run.trajectory.append(record)
        plus, minus = float32(record.loss_plus), float32(record.loss_minus)
        self.losses.append(minus if 0 in self.signs else (plus + minus) / 2)
        told = self.told.get(step, {})
        shown = {"reward": -self.losses[-1]}
        for key, name in SHOWN.items():
            if told.get(key) is not None:
                shown[name] = told[key]
        if told.get("seconds"):
            shown["tokens/s"] = told["tokens"] / told["seconds"]
        held_out = {"held-out": self.validation["reward"]} if self.validation else {}
        self.listener.advance("train", 1, **shown, **held_out)
        if last.skipped:
            self.listener.say(f"step {step}: a reward or an update is not finite; the step is skipped")

    def _record(self, last: StepRecord) -> Record:
        written = self.state.recorded
        if written is not None and last.step < len(written):
            return written[last.step]
        rewards = tuple(-loss for loss in members_of(last))
        return replace(super()._record(last), rewards=rewards)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = dict(logs or {})
        if "loss" not in logs:
            return
        self._write()
        losses, self.losses = self.losses, []
        took, self.took = self.took, []
        names = {"tokens_per_second", *self.told.get(state.global_step, ())} - {"tokens", "seconds"}
        self.line = {
            "step": state.global_step,
            "loss": sum(losses) / len(losses),
            "lr": logs["learning_rate"],
            "sigma": self.ready.config.sigma * args.factor(max(0, state.global_step - 1), state.max_steps),
            **{name: value for name, value in logs.items() if name in names},
            "forward_passes": logs["forward_passes"],
            "skipped_steps": logs["skipped_steps"],
            "seconds": round(self.state.wall(), 3),
            **({"step_seconds": round(median(took), 6)} if took else {}),
        }


# What a step found, and how the bar calls it.
SHOWN = {
    "reward_std": "± members",
    "frac_reward_zero_std": "alike",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "cut",
}


def members_of(last: StepRecord) -> list[float]:
    """The mean loss of each member, over its prompts; with a direction for each of them, over these."""
    k = len(last.shares)
    if k == 1:
        return list(last.losses_P)
    by_member = [last.losses_P[first : first + k] for first in range(0, len(last.losses_P), k)]
    return [sum(n * loss for n, loss in zip(last.shares, of, strict=True)) / sum(last.shares) for of in by_member]


def _read(text: str) -> dict[str, Any] | None:
    """A line, if it is whole."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


class PromptTrainer(RunTrainer, RewardTrainer):
    """Of a run on rewards."""

    ready: PreparedReward
    recorder: RewardRecorder

    def __init__(self, ready: PreparedReward, state: RunState, listener: Listener) -> None:
        self.listener = listener
        super().__init__(
            ready.model,
            ready.functions,
            arguments(ready, state.folder),
            train_dataset=ready.train,
            eval_dataset=ready.validation,
            processing_class=ready.tokenizer,
        )
        optimizer: Any = self.create_optimizer()
        recorder = RewardRecorder(state, ready, listener, optimizer.method.signs)
        recorder.told, recorder.tell = self.told, self.tell
        self.records_by(recorder)
        self._what = ""

    def say(self, line: str) -> None:
        self.listener.say(line)

    def wrote(self, answers: int) -> None:
        if self._what:
            self.listener.advance(self._what, answers)

    def see(self, written: Sequence[Written], scores: Scores, rewards_CB: Tensor) -> None:
        super().see(written, scores, rewards_CB)
        config, step = self.ready.config, self.zo_optimizer.steps
        self.recorder.append(STEPS, [{"step": step, **self.told[step]}])
        if step % config.shows_every == 0 or step == 1:
            shown = samples(step, self.rewards.names, written, scores, config.show)
            self.recorder.append(COMPLETIONS, shown)
            self.listener.answered(step, shown)

    def score(self, prompts: Sequence[Prompt], what: str) -> tuple[dict[str, float], list[Written], Scores]:
        """Statistics of the model's own answers, these, and what they got, with progress."""
        self.listener.begin(what, len(prompts))
        self._what = what
        try:
            return self.scored(prompts)
        finally:
            self._what = ""
            self.listener.end(what)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        score = lambda: self.score(self.ready.validation, "held-out")[0]  # noqa: E731
        found = self.run.workers.from_first(score)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
