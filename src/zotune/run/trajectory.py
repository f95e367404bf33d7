"""A run's trajectory: its header, and the file as a run that begins or goes on finds it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from zotune import noise
from zotune.errors import InputError
from zotune.methods import make_method
from zotune.models.heads import label_names
from zotune.models.kinds import kind_of
from zotune.models.quantized import library_versions
from zotune.options import RunOptions, TrainConfig
from zotune.prepare.listener import Listener
from zotune.prepare.ready import Ready
from zotune.record.fingerprints import machine, start
from zotune.record.trajectory import REWARDS, Header, Trajectory, TrajectoryError, TrajectoryWriter, read_file
from zotune.run.card import command
from zotune.run.folder import CALIBRATION, FREE
from zotune.run.result import versions
from zotune.run.state import RunState
from zotune.step.optimizer import ZeroOrderOptimizer

UNSEEN = {"deterministic", "log_every"}  # keys that change no step
LONGEST = 8192  # characters of a command that a trajectory's header takes


def header_of(ready: Ready, optimizer: ZeroOrderOptimizer, members: int = 0) -> Header:
    """members: of a run on rewards, which records what each of them got."""
    config, kind = ready.config, kind_of(ready.model)
    options = config.recorded_options
    if optimizer.folds_by_query:  # a run that is older than forwards which places share
        del options["forward_tokens"]
    labels = label_names(ready.model.config) if kind == "classifier" else ready.task.labels
    return Header(
        noise_version=noise.NOISE_VERSION,
        direction=config.direction or "gaussian",
        method=config.method,
        seed=config.seed,
        planned_steps=config.steps,
        pairs=config.pairs * len(optimizer.blocks),
        groups=len(optimizer.param_groups),
        members=members,
        layout=("lr", REWARDS) if members else ("lr",),
        decay=tuple(group["weight_decay"] for group in optimizer.param_groups),
        method_options=options,
        dtype=str(config.dtype),
        engine=optimizer.engine.name,
        base={
            "name": config.model,
            "revision": getattr(ready.model.config, "_commit_hash", None),
            "gguf_file": config.gguf_file,
            "scheme": config.scheme,
            "freeze": config.freeze,
            "kind": kind,
            "labels": labels,  # of a classifier, its outputs' names in their order
            "sha256": ready.base,
            **({"start": start(ready.model)} if config.scheme != "full" else {}),
            "machine": machine(ready.device) | library_versions(ready.model),
        }
        | ({"quantize": config.quantize} if config.quantize else {}),
        task=ready.task.name,
        versions=versions(),
        extra=({"command": said} if len(said := command(config, FREE | UNSEEN)) <= LONGEST else {})
        | ({"ends": ready.ends} if ready.ends else {}),
    )


def open_trajectory(state: RunState, config: RunOptions, step: int) -> None:
    """Ready for writing (`state.trajectory`), with what a killed run has recorded if it can be applied again to the bit
    (`state.recorded`).

    step: the checkpoint's. Steps behind it that are in the file need no forward pass: they are applied from there.
    """
    if state.header is None:
        return
    path, sync_every = state.folder / "trajectory.zot", config.sync_every
    base: dict[str, Any] = state.header.base
    written = readable(path, step) if step or path.exists() else None
    same = written is not None and written.header.encode() == state.header.encode()
    same = same and retraceable(config)
    if step and written and written.header.base.get("sha256") != base["sha256"]:
        raise InputError(f"--model {config.model}: its weights are not those that the run began with")
    if step == 0 and not same:
        path.unlink(missing_ok=True)
        shutil.rmtree(state.folder / CALIBRATION, ignore_errors=True)
        state.trajectory = TrajectoryWriter.create(path, state.header, sync_every=sync_every)
        return
    assert written is not None
    state.recorded = written.records if same else None
    reached = max(step, len(state.recorded or ()))
    state.trajectory = TrajectoryWriter.resume(path, reached, sync_every=sync_every)


def retraceable(config: RunOptions) -> bool:
    """Whether a run's steps can be applied again from its trajectory alone."""
    # masks of wanda cost forward passes, which are counted as they are made; rows are not in the file
    return config.mask != "wanda" and not make_method(config.method).needs_rows


def of_before(path: Path, config: TrainConfig, listener: Listener) -> bool:
    """Whether this goes on with a run that is older than places that share a forward, which is said where that shows."""
    recorded = readable(path, 0) if path.exists() else None
    if recorded is None or "forward_tokens" in recorded.header.method_options:
        return False
    if config.directions_a_row > 1 or config.estimator == "one-sided":
        listener.say(
            "this run is older than forwards that several places share: losses from here on may differ in their last bits"
        )
    return True


def readable(path: Path, step: int) -> Trajectory | None:
    """What can be read of a run's trajectory: up to any damage, but `step` steps at least. None where that is none."""
    try:
        return read_file(path)
    except TrajectoryError as error:
        if error.steps is not None and error.steps >= step:
            return read_file(path, until=error.steps)
        if step:
            raise
        return None
