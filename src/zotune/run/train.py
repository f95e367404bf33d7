"""`zotune train`: one run, from options to a folder. The parts are elsewhere; this is their order."""

from __future__ import annotations

from typing import Any

from zotune.directions.calibration import NormsFolder
from zotune.errors import InputError
from zotune.estimates.memory import peak_bytes, reset_peak
from zotune.models.partial import some, untrained
from zotune.options import TrainConfig
from zotune.prepare.identity import refuse_others
from zotune.prepare.listener import Listener
from zotune.prepare.prepared import Prepared, prepare, resolved, tokens_together
from zotune.record.trajectory import TrajectoryWriter
from zotune.run.arguments import check_reporters, optimizer_for
from zotune.run.card import trajectory_card
from zotune.run.folder import CALIBRATION, CARD, CHECKPOINT, RunFolder, write_atomically
from zotune.run.predictions import keep
from zotune.run.process import Interrupted, deterministic, signals, stops_the_run, tf32
from zotune.run.result import result_of, save_model
from zotune.run.state import MADE_OF, RunState
from zotune.run.trainer import TaskTrainer
from zotune.run.trajectory import header_of, of_before
from zotune.tasks.own import described

# keys that a run fills in; one that its record lacks, since it is older than the key, means what it meant then
RESOLVED = (
    "lr",
    "eps",
    "dtype",
    "direction",
    "queries",
    "estimator",
    "forward_tokens",
    "template",
    "label_words",
    "eval_every",
)


def train(config: TrainConfig, listener: Listener | None = None) -> dict[str, Any]:
    """Run, or go on with, the run that the options describe. Returns what result.json holds."""
    listener = listener or Listener()
    check_reporters(config.report_to)
    folder = RunFolder(config.output)
    recorded = config.model_dump(exclude={"resume", "overwrite", "dry_run"})
    asked = {k: v for k, v in recorded.items() if k not in RESOLVED or v is not None}
    folder.check(asked, resume=config.resume, overwrite=config.overwrite)
    with folder.storing(), folder.locked():
        folder.check(asked, resume=config.resume, overwrite=config.overwrite)
        folder.tidy()
        if config.resume and (done := folder.read_json("result.json")):
            listener.say(f"{folder.path}: this run is finished; nothing to do")
            folder.finish(config.keep is not None)  # as its process may have been killed before
            return done
        with deterministic(config.deterministic), tf32(config.tf32):
            ready = prepare(config)
            if config.task is None and (config.template is None or (ready.task.words and not config.label_words)):
                listener.say(described(ready.task))
            listener.say(ready.splits.described())
            if ready.unread:
                listener.say(ready.unread)
            if fresh := untrained(ready.model):
                listener.say(f"the model has no trained head: {some(fresh)} are drawn by the seed")
            if config.resume:
                _check_resumed(folder, ready, listener)
                again = {
                    "eval_every": folder.recorded("eval_every") or config.eval_every
                }  # as it was, whatever the default is now
                ready.config = config = config.model_copy(update=again)
            ready.config = config = resolved(ready)
            if config.forward_tokens is None:
                ready.config = config = config.model_copy(update={"forward_tokens": tokens_together(ready)})
            if not config.resume:
                optimizer_for(ready)  # what it refuses leaves no run behind, and none is deleted for it
            if config.overwrite:
                folder.clear()
            folder.write_config(config.model_dump(exclude={"resume", "overwrite", "dry_run"}))
            listener.prepared(ready)
            return _go(ready, folder, listener)


def _check_resumed(folder: RunFolder, ready: Prepared, listener: Listener) -> None:
    """Raises InputError where rows, tokenizer, template or task are not those that the run began with."""
    progress = folder.read_json("progress.json")
    known = refuse_others(progress.get(MADE_OF), ready.made_of, str(folder.path), ready.config.model)
    if not known and (progress or folder.last_checkpoint() is not None):
        listener.say(
            f"{folder.path}: this run's record does not say which rows, tokenizer, template and task it began with; going on"
        )


def _go(ready: Prepared, folder: RunFolder, listener: Listener) -> dict[str, Any]:
    state = RunState.found(folder)
    state.progress[MADE_OF] = ready.made_of
    reset_peak(ready.device)
    if "test_before" not in state.progress:
        with stops_the_run("test, before"):
            found = ready.outcome(ready.test, listener, "test, before")
            state.progress["test_before"] = found.metric(ready.task.metric, ready.test)
            keep(ready, found, folder, "before")
            state.progress["validation_before"] = ready.score(ready.validation, listener, "validation, before")
        state.progress["evaluation_peak_bytes"] = peak_bytes(ready.device)
        reset_peak(ready.device)
        state.save()
    trainer = _trainer(ready, state, listener)
    try:
        with signals(state.ask_to_stop):
            trainer.train(resume_from_checkpoint=str(state.checkpoint) if state.checkpoint else None)
    finally:
        if state.trajectory is not None:
            state.trajectory.close()
    listener.end("train")
    if state.stop is not None:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {ready.config.steps}, saved; "
            "go on with the same command and --resume",
            128 + state.stop,
        )
    return finish(trainer, ready, state, listener)


def _trainer(ready: Prepared, state: RunState, listener: Listener) -> TaskTrainer:
    try:
        trainer = TaskTrainer(ready, state, listener)
    except ValueError as error:
        raise InputError(str(error)) from None
    optimizer = trainer.zo_optimizer
    if ready.config.engine == "auto":
        listener.say(f"engine {optimizer.chosen_engine}")
    optimizer.pairs = ready.config.pairs // ready.config.directions_a_row
    optimizer.folds_by_query = of_before(state.folder / "trajectory.zot", ready.config, listener)
    optimizer.norms = NormsFolder(state.folder / CALIBRATION)
    if not any(group.get("first_order") for group in optimizer.param_groups):
        state.header = header_of(ready, optimizer)  # now: of the first values of what trains
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
