"""`zotune train`: one run, from options to a folder. The parts are elsewhere; this is their order."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from zotune.directions.calibration import NormsFolder
from zotune.errors import InputError
from zotune.estimates.memory import peak_bytes, reset_peak
from zotune.models.partial import some, untrained
from zotune.options import TrainConfig
from zotune.options.defaults import flags_of
from zotune.prepare.identity import refuse_others
from zotune.prepare.listener import Listener
from zotune.prepare.prepared import Prepared, prepare, resolved, taken_by_default, tokens_together
from zotune.record.trajectory import TrajectoryWriter
from zotune.run.arguments import optimizer_for
from zotune.run.card import trajectory_card
from zotune.run.folder import CALIBRATION, CARD, CHECKPOINT, RunFolder, write_atomically
from zotune.run.opening import begun_alike, opened, write_down
from zotune.run.predictions import keep
from zotune.run.process import deterministic, stops_the_run, tf32
from zotune.run.result import result_of, save_model
from zotune.run.state import MADE_OF, RunState
from zotune.run.together import goes_on, refuse_few, state_of
from zotune.run.trainer import TaskTrainer
from zotune.run.trajectory import header_of, of_before
from zotune.tasks.own import described
from zotune.workers.group import Workers, joined

# keys that a run fills in; one that its record lacks, since it is older than the key, means what it meant then
RESOLVED = (
    "lr",
    "eps",
    "dtype",
    "direction",
    "queries",
    "estimator",
    "rounding",
    "forward_tokens",
    "template",
    "label_words",
    "eval_every",
)


def train(config: TrainConfig, listener: Listener | None = None) -> dict[str, Any]:
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
        every = workers.from_first(lambda: folder.recorded("eval_every") if config.resume else None)
        config = config.model_copy(
            update={"eval_every": every or config.eval_every}
        )  # as it was, whatever the default is now
        held.enter_context(deterministic(config.deterministic))
        held.enter_context(tf32(config.tf32))
        ready = _alike(config, folder, listener, workers)
        workers.from_first(lambda: _write_down(ready, folder))
        listener.prepared(ready)
        with state_of(folder, workers, config) as state:
            return _go(ready, state, listener)


def _open(config: TrainConfig, folder: RunFolder, listener: Listener, held: ExitStack) -> dict[str, Any]:
    more = {} if config.eval_every is None else {"eval_every": config.evaluates_every}  # as it is recorded
    return opened(config, folder, listener, held, RESOLVED, more)


def _alike(config: TrainConfig, folder: RunFolder, listener: Listener, workers: Workers) -> Prepared:
    ready = begun_alike(lambda: _ready(config, folder, listener, workers), folder, listener, workers)
    if workers.size > 1:
        tokens = workers.from_first(lambda: ready.config.forward_tokens)
        ready.config = ready.config.model_copy(update={"forward_tokens": tokens})
    return ready


def _ready(config: TrainConfig, folder: RunFolder, listener: Listener, workers: Workers) -> Prepared:
    if not workers.first:
        config = config.model_copy(update={"report_to": []})
    ready = prepare(config)
    if config.task is None and (config.template is None or (ready.task.words and not config.label_words)):
        listener.say(described(ready.task))
    listener.say(ready.splits.described())
    if ready.unread:
        listener.say(ready.unread)
    if ready.placed is not None:
        listener.say(f"layers stream: {ready.placed.line}")
    if fresh := untrained(ready.model):
        listener.say(f"the model has no trained head: {some(fresh)} are drawn by the seed")
    if config.resume and workers.first:
        _check_resumed(folder, ready, listener)
    given, ready.config = config, resolved(ready)
    config = ready.config
    if given.by_default and not config.resume:
        listener.say(f"for want of other options: {flags_of(taken_by_default(ready, given))}")
    if config.forward_tokens is None:
        ready.config = config.model_copy(update={"forward_tokens": tokens_together(ready)})
    return ready


def _write_down(ready: Prepared, folder: RunFolder) -> None:
    if not ready.config.resume:
        optimizer_for(ready)  # what it refuses leaves no run behind, and none is deleted for it
    write_down(ready.config, folder)


def _check_resumed(folder: RunFolder, ready: Prepared, listener: Listener) -> None:
    """Raises InputError where rows, tokenizer, template or task are not those that the run began with."""
    progress = folder.read_json("progress.json")
    known = refuse_others(progress.get(MADE_OF), ready.made_of, str(folder.path), ready.config.model)
    if not known and (progress or folder.last_checkpoint() is not None):
        listener.say(
            f"{folder.path}: this run's record does not say which rows, tokenizer, template and task it began with; going on"
        )


def _go(ready: Prepared, state: RunState, listener: Listener) -> dict[str, Any]:
    state.progress[MADE_OF] = ready.made_of
    reset_peak(ready.device)
    state.workers.from_first(lambda: _before(ready, state, listener))
    trainer = _trainer(ready, state, listener)
    trainer.to_the_end()
    return state.workers.from_first(lambda: finish(trainer, ready, state, listener))


def _before(ready: Prepared, state: RunState, listener: Listener) -> None:
    """What the untrained model scores, once in a run."""
    if "test_before" in state.progress:
        return
    with stops_the_run("test, before"):
        found = ready.outcome(ready.test, listener, "test, before")
        state.progress["test_before"] = found.metric(ready.task.metric, ready.test)
        keep(ready, found, state.folder, "before")
        state.progress["validation_before"] = ready.score(ready.validation, listener, "validation, before")
    state.progress["evaluation_peak_bytes"] = peak_bytes(ready.device)
    reset_peak(ready.device)
    state.save()


def _trainer(ready: Prepared, state: RunState, listener: Listener) -> TaskTrainer:
    try:
        trainer = TaskTrainer(ready, state, listener)
    except ValueError as error:
        raise InputError(str(error)) from None
    optimizer, workers = trainer.zo_optimizer, state.workers
    if ready.config.engine == "auto":
        listener.say(f"engine {optimizer.chosen_engine}")
    optimizer.sharing.workers = workers if workers.size > 1 else None
    if optimizer.rate is not None:
        optimizer.rate.say = listener.say
    optimizer.pairs = ready.config.pairs // ready.config.directions_a_row
    optimizer.folds_by_query = of_before(state.folder / "trajectory.zot", ready.config, listener)
    optimizer.norms = NormsFolder(state.folder / CALIBRATION)
    if not any(group.get("first_order") for group in optimizer.param_groups):
        # now: of the first values of what trains
        state.header = workers.from_first(lambda: header_of(ready, optimizer))
    return trainer


def finish(trainer: TaskTrainer, ready: Prepared, state: RunState, listener: Listener) -> dict[str, Any]:
    """The chosen step's weights are scored and saved, and result.json says that all is there."""
    config, folder, reached = ready.config, state.folder, trainer.state
    chosen = int(reached.best_global_step or reached.global_step)
    trainer.load_best(folder / f"{CHECKPOINT}{chosen}")
    with stops_the_run("test, after"):
        found = ready.outcome(ready.test, listener, "test, after")
        test_after = found.metric(ready.task.metric, ready.test)
        keep(ready, found, folder, "after")
    if state.trajectory is not None:
        with TrajectoryWriter.resume(folder / "trajectory.zot", reached.global_step) as trajectory:
            trajectory.mark_chosen(chosen)
    result = result_of(ready, state, reached, trainer.zo_optimizer, chosen, test_after)
    with folder.staged("model") as path:
        save_model(ready, path, result)
    if state.trajectory is not None:
        write_atomically(folder / CARD, str(trajectory_card(config, ready.task, result)))
    folder.write_json("result.json", result)  # last: it says that all the rest is there
    folder.finish(config.keep is not None)
    return result
