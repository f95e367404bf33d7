"""`zotune reward`: one run, from options to a folder. The parts are elsewhere; this is their order."""

from __future__ import annotations

from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any

from zotune.errors import InputError
from zotune.estimates.memory import peak_bytes, reset_peak
from zotune.models.schemes import trainable_parameters
from zotune.options import RewardConfig
from zotune.prepare.identity import refuse_others
from zotune.prepare.listener import Listener
from zotune.prepare.prompts import PreparedReward, prepare_reward, resolved_reward, short_of_room
from zotune.record.trajectory import TrajectoryWriter
from zotune.run.card import reward_card
from zotune.run.folder import CARD, CHECKPOINT, RunFolder, write_atomically
from zotune.run.opening import begun_alike, opened, write_down
from zotune.run.predictions import keep_answers
from zotune.run.process import deterministic, tf32
from zotune.run.result import device_name, save_weights, versions
from zotune.run.rewarding import PromptTrainer
from zotune.run.state import MADE_OF, RunState
from zotune.run.together import goes_on, refuse_few, state_of
from zotune.run.trajectory import header_of
from zotune.workers.group import Workers, joined

RESOLVED = ("lr", "sigma", "eps", "queries", "dtype", "direction", "estimator", "rounding", "forward_tokens")


def reward(config: RewardConfig, listener: Listener | None = None) -> dict[str, Any]:
    """Run, or go on with, the run that the options describe. Returns what result.json holds.

    Under torchrun all workers return it. The first alone writes the folder and talks to the listener.
    """
    with joined(config.worker_timeout) as workers, ExitStack() as held:
        listener = listener if listener is not None and workers.first else Listener()
        folder = RunFolder(config.output)
        workers.together(lambda: refuse_few(config, workers.size))
        if workers.first:
            config = goes_on(config, folder)
        if done := workers.from_first(lambda: _open(config, folder, listener, held)):
            return done
        config = config.model_copy(update={"resume": workers.from_first(lambda: config.resume)})
        held.enter_context(deterministic(config.deterministic))
        held.enter_context(tf32(config.tf32))
        ready = begun_alike(lambda: _ready(config, folder, listener, workers), folder, listener, workers)
        place = folder if workers.first else RunFolder(held.enter_context(TemporaryDirectory(prefix="zotune-worker-")))
        trainer = _trainer(ready, place, listener)  # what it refuses leaves no run behind, and none is deleted for it
        workers.from_first(lambda: write_down(ready.config, folder))
        with state_of(folder, workers, config) as state:
            return _go(trainer, state)


def _open(config: RewardConfig, folder: RunFolder, listener: Listener, held: ExitStack) -> dict[str, Any]:
    more = {"eval_every": config.evaluates_every, "show_every": config.shows_every}
    return opened(config, folder, listener, held, RESOLVED, more)


def _ready(config: RewardConfig, folder: RunFolder, listener: Listener, workers: Workers) -> PreparedReward:
    if not workers.first:
        config = config.model_copy(update={"report_to": []})
    ready = prepare_reward(config)
    listener.say(ready.described())
    if ready.unread:
        listener.say(ready.unread)
    for line in warnings_of(ready):
        listener.say(line)
    if config.resume and workers.first:
        refuse_others(folder.read_json("progress.json").get(MADE_OF), ready.made_of, str(folder.path), config.model)
    ready.config = resolved_reward(config, ready.model)
    return ready


def warnings_of(ready: PreparedReward) -> list[str]:
    """Lines on what will cut answers."""
    config, said = ready.config, []
    if not ready.ends:
        whose = "tokenizer and generation_config name none"
        said.append(f"no token ends an answer ({whose}): each has --max-new-tokens {config.max_new_tokens}")
    every = [*ready.train, *ready.validation, *ready.test]
    if short := short_of_room(every, ready.model, config.max_new_tokens):
        said.append(
            f"{short} of {len(every)} prompts leave less room than --max-new-tokens {config.max_new_tokens}: answers are cut"
        )
    return said


def _trainer(ready: PreparedReward, folder: RunFolder, listener: Listener) -> PromptTrainer:
    try:
        trainer = PromptTrainer(ready, RunState(folder, {}), listener)
        trainer.decoder  # noqa: B018  # what it refuses is refused now
    except ValueError as error:
        raise InputError(str(error)) from None
    optimizer = trainer.zo_optimizer
    optimizer.pairs = ready.config.pairs // ready.config.directions_a_row
    return trainer


def _go(trainer: PromptTrainer, state: RunState) -> dict[str, Any]:
    ready, optimizer, workers = trainer.ready, trainer.zo_optimizer, state.workers
    trainer.run = trainer.recorder.state = state
    optimizer.sharing.workers = workers if workers.size > 1 else None
    state.header = workers.from_first(lambda: header_of(ready, optimizer, members=len(optimizer.method.signs)))
    state.progress[MADE_OF] = ready.made_of
    if optimizer.rate is not None:
        optimizer.rate.say = trainer.listener.say
    reset_peak(ready.device)
    workers.from_first(lambda: _before(trainer, ready, state))
    trainer.to_the_end()
    return workers.from_first(lambda: _finish(trainer, ready, state))


def _before(trainer: PromptTrainer, ready: PreparedReward, state: RunState) -> None:
    """What the untrained model gets, once in a run."""
    if "reward_before" in state.progress:
        return
    state.progress["reward_before"] = _kept(trainer, ready, state, "before")
    state.progress["evaluation_peak_bytes"] = peak_bytes(ready.device)
    reset_peak(ready.device)
    state.save()


def _finish(trainer: PromptTrainer, ready: PreparedReward, state: RunState) -> dict[str, Any]:
    """The chosen step's weights are scored and saved, and result.json says that all is there."""
    config, folder, reached = ready.config, state.folder, trainer.state
    chosen = int(reached.best_global_step or reached.global_step)
    trainer.load_best(folder / f"{CHECKPOINT}{chosen}")
    after = _kept(trainer, ready, state, "after")
    with TrajectoryWriter.resume(folder / "trajectory.zot", reached.global_step) as trajectory:
        trajectory.mark_chosen(chosen)
    result = _result(trainer, ready, state, chosen, after)
    with folder.staged("model") as path:
        save_weights(ready, path)
        reward_card(config, result, trajectory=False).save(path / "README.md")
    write_atomically(folder / CARD, str(reward_card(config, result, trajectory=True)))
    folder.write_json("result.json", result)  # last: it says that all the rest is there
    folder.finish(config.keep is not None)
    return result


def _kept(trainer: PromptTrainer, ready: PreparedReward, state: RunState, when: str) -> dict[str, float]:
    """Statistics of the test prompts' answers; these are in predictions.jsonl then."""
    found, written, scores = trainer.score(ready.test, when)
    keep_answers(state.folder, when, written, scores, trainer.rewards.names)
    return found


def _result(
    trainer: PromptTrainer, ready: PreparedReward, state: RunState, chosen: int, after: dict[str, float]
) -> dict[str, Any]:
    config, optimizer, told = ready.config, trainer.zo_optimizer, trainer.told.values()
    before = state.progress["reward_before"]
    tokens, seconds = (sum(one.get(name) or 0 for one in told) for name in ("tokens", "seconds"))
    names = [name for name in before if name.startswith("rewards/") and name.endswith("/mean")]
    return {
        "task": ready.task.name,
        "metric": ready.task.metric,
        "reward_before": before["reward"],
        "reward_after": after["reward"],
        "rewards": {name.split("/", 1)[1].rpartition("/")[0]: [before[name], after[name]] for name in names},
        "length_before": before["completions/mean_length"],
        "length_after": after["completions/mean_length"],
        "cut_before": before["completions/clipped_ratio"],
        "cut_after": after["completions/clipped_ratio"],
        "test_split": ready.test_split,
        "test_rows": len(ready.test),
        "train_rows": len(ready.train),
        "validation_rows": len(ready.validation),
        "rows_given": ready.given,
        "validation_best": trainer.state.best_metric,
        "steps": trainer.state.global_step,
        "chosen_step": chosen,
        "resumed_at": state.progress["resumed_at"],
        "skipped_steps": optimizer.skipped_steps,
        "steps_that_told_nothing": sum(one.get("frac_reward_zero_std") == 1 for one in told),
        "bad_rows": len(ready.bad.said),
        "stopped_early": trainer.state.global_step < config.steps,
        "forward_passes": optimizer.forward_passes,
        "generated_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "trainable_parameters": trainable_parameters(ready.model),
        "wall_seconds": round(state.wall(), 3),
        "peak_memory_bytes": state.peak,
        "evaluation_peak_bytes": state.progress.get("evaluation_peak_bytes"),
        "state_bytes": optimizer.state_bytes,
        "method": config.method,
        "scheme": config.scheme,
        "engine": optimizer.engine.name,
        "decoder": trainer.decoder.name,
        "members": config.members,
        "sigma": config.sigma,
        "lr": config.lr if optimizer.rate is None else optimizer.rate.so_far,
        "dtype": config.dtype,
        "rounding": config.rounding,
        "device": device_name(ready.device),
        "model": config.model,
        "seed": config.seed,
        "versions": versions(),
    }
