"""How a run begins, whatever it trains on: its folder is held, and its workers are found to begin with the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from zotune.options import RunOptions
from zotune.prepare.listener import Listener
from zotune.prepare.ready import Ready
from zotune.run.arguments import check_reporters
from zotune.run.folder import RunFolder
from zotune.run.together import LAUNCH, facts, refuse_unlike
from zotune.workers.group import Workers
from zotune.workers.launcher import launch

TRANSIENT = {"resume", "overwrite", "dry_run"}  # options of a call, not of its run

R = TypeVar("R", bound=Ready)


def opened(
    config: RunOptions,
    folder: RunFolder,
    listener: Listener,
    held: ExitStack,
    resolved: Collection[str],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Hold the folder while `held` lasts. Returns what result.json holds, if the run has ended before.

    resolved: keys that a run fills in where nothing is asked. more: what is asked in other words than the options'.
    """
    check_reporters(config.report_to)
    recorded = config.model_dump(exclude=TRANSIENT)
    asked = {k: v for k, v in recorded.items() if k not in resolved or v is not None} | dict(more)
    folder.check(asked, resume=config.resume, overwrite=config.overwrite)
    held.enter_context(folder.storing())
    held.enter_context(folder.locked())
    folder.check(asked, resume=config.resume, overwrite=config.overwrite)
    folder.tidy()
    done = folder.read_json("result.json") if config.resume else {}
    if done:
        listener.say(f"{folder.path}: this run is finished; nothing to do")
        folder.finish(config.keep is not None)  # as its process may have been killed before
    return done


def begun_alike(begin: Callable[[], R], folder: RunFolder, listener: Listener, workers: Workers) -> R:
    """What each worker begins with, once all are known to begin with the same."""
    several = workers.size > 1
    ready: R | None = None

    def told_of() -> dict[str, Any]:
        nonlocal ready
        ready = begin()
        return facts(ready) if several else {}

    told = workers.together(told_of)
    assert ready is not None
    workers.together(lambda: refuse_unlike(told))
    if several:
        listener.say(f"{workers.size} workers share the steps; this one writes {folder.path}")
    return ready


def write_down(config: RunOptions, folder: RunFolder) -> None:
    """The run's options, once nothing is left to be refused; and which launcher it is of, that may start its processes again."""
    if config.overwrite:
        folder.clear()
    folder.write_config(config.model_dump(exclude=TRANSIENT))
    if name := launch():
        folder.write_json("progress.json", folder.read_json("progress.json") | {LAUNCH: name})
