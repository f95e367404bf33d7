"""Budgets of seconds: what a step of each configuration takes alone on the device, timed once before the runs.

A run's steps are then known beforehand, the same however many runs share the device later, and stay what they are when a folder is
gone on with. Timed at lr 0, which leaves every weight as it is, over batches of the configuration's own rows; start-up, captures
and evaluation are no part of it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.bench import materials
from zotune.bench.plan import Run, digest, made_folder, make_plan
from zotune.bench.suite import Cell, Expanded
from zotune.errors import InputError
from zotune.run.folder import write_atomically

if TYPE_CHECKING:
    from zotune.prepare.prepared import Prepared

FILE = "made/paces.json"
# Options of a run that its steps take no longer for.
FREE = {
    "lr", "seed", "steps", "lr_schedule", "eval_size", "eval_every", "early_stop", "log_every", "save_every", "keep", "report_to",
}  # fmt: skip
BATCHES, SECONDS = 12, 0.5  # of different rows; of timed steps, at least
UNKNOWN = 0.02  # seconds a step where a plan alone is wanted, and nothing is known


class Paces:
    """The paces of a folder. missing: what expanding a suite has asked for and nobody has timed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.known: dict[str, dict[str, Any]] = {}
        self.missing: set[str] = set()
        with contextlib.suppress(OSError, ValueError):
            self.known = dict(json.loads(self.path.read_text(encoding="utf-8")))

    def __call__(self, options: Mapping[str, Any]) -> tuple[str, float]:
        """What a run of these options is known by, and its seconds a step; where they are missing about what they will be.

        Raises InputError where they were tried, and could not be had.
        """
        key = digest({name: value for name, value in sorted(options.items()) if name not in FREE})
        if (known := self.known.get(key)) is None:
            self.missing.add(key)
            return key, _guess(options)
        if known["seconds"] is None:
            raise InputError(f"its steps could not be timed: {known['why']}")
        return key, float(known["seconds"])


def _guess(options: Mapping[str, Any]) -> float:
    from zotune.estimates.estimate import estimate_for

    with contextlib.suppress(InputError, KeyError):
        if isinstance(options.get("model"), str):
            return float(estimate_for(options["model"], options).get("step_seconds") or UNKNOWN)
    return UNKNOWN


def time_all(expanded: Expanded, paces: Paces, folder: Path, until: float, say: Callable[[str], None]) -> bool:
    """Time what is missing, in a process of its own with the device to itself. False where the time was up before the end."""
    plan = make_plan(expanded, folder)
    runs: dict[str, Run] = {}
    for run in [*plan.runs, *plan.held]:
        if run.cell.pace_key in paces.missing:
            runs.setdefault(run.cell.pace_key, run)
    for run in runs.values():
        for what, definition in run.cell.made.items():
            materials.make(what, definition, made_folder(folder, what, run.cell, definition))
    asked = folder / "made" / "to-time.json"
    asked.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        asked, json.dumps({key: _untimed(run.cell, run.options) for key, run in runs.items()}, allow_nan=False)
    )
    say(f"timing a step of {len(runs)} configurations, each alone on the device")
    from zotune.bench.runner import spawn

    command = [sys.executable, "-m", "zotune", "bench", "pace", str(asked), "--output", str(paces.path)]
    log = folder / "made" / "pace.log"
    process = spawn(command, log, None)
    try:
        code = process.wait(max(0.0, until - time.monotonic()) if until < float("inf") else None)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    if code:
        last = (log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
        raise InputError(f"the pace of steps could not be had: {last}")
    return True


def _untimed(cell: Cell, options: Mapping[str, Any]) -> dict[str, Any]:
    """A run's options, with some rate."""
    return {**options, "lr": 1e-6 if "lr" in cell.open else options.get("lr", 1e-6)}


def measure(asked: Path, path: Path) -> None:
    """Seconds a step of each of the options, added to the file one after the other; what cannot be timed has a reason."""
    import torch

    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    for key, options in json.loads(asked.read_text(encoding="utf-8")).items():
        if key in known:
            continue
        try:
            known[key] = _timed(options)
        except Exception as error:  # whatever it is, the run itself would meet it too
            known[key] = {"seconds": None, "why": (str(error).splitlines() or [type(error).__name__])[0]}
        write_atomically(path, json.dumps(known, indent=2, allow_nan=False) + "\n")
        gc.collect()  # graphs hold memory, and the next configuration is to have it all
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _timed(options: Mapping[str, Any]) -> dict[str, Any]:
    from zotune.options import TrainConfig, resolve
    from zotune.prepare.prepared import prepare, resolved

    config = resolve(TrainConfig, {**options, "output": "-", "dry_run": True}, None)
    ready = prepare(config)
    ready.config = resolved(ready)
    return {"seconds": step_seconds(ready), "method": config.method, "scheme": config.scheme}


def step_seconds(ready: Prepared) -> float:
    """Of a step that follows another: the median of rounds over the same batches, whose first round captures and compiles."""
    from zotune.run.arguments import optimizer_for
    from zotune.run.timing import now
    from zotune.run.trainer import objective_of

    config, device = ready.config, ready.device
    ready.model.eval()
    optimizer, asked = optimizer_for(ready), objective_of(ready)
    rows = ready.train * -(-BATCHES * config.batch_size // len(ready.train))
    batches = [
        {k: v.to(device) if hasattr(v, "to") else v for k, v in asked.collate(rows[i : i + config.batch_size]).items()}
        for i in range(0, BATCHES * config.batch_size, config.batch_size)
    ]
    loss_of = functools.partial(asked.row_loss, ready.model)
    took: list[float] = []
    while len(took) < 2 or (sum(took[1:]) < SECONDS and len(took) < 50):
        began = now(device)
        for batch in batches:
            optimizer.step(loss_of, batch=batch)
        optimizer.land()
        took.append(now(device) - began)
    return config.accumulate * statistics.median(took[1:]) / len(batches)
