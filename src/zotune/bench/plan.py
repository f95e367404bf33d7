"""From a suite's cells to runs: their keys and commands, what is done already, and what the rest will take."""

from __future__ import annotations

import hashlib
import json
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import zotune
from zotune.bench.suite import Cell, Expanded
from zotune.errors import InputError

# Options that name no part of what is computed.
FREE = ("report_to", "log_every", "device")


@dataclass
class Run:
    """A cell with its identity and its place."""

    cell: Cell
    config_key: str
    key: str
    folder: Path
    options: dict[str, Any]
    status: str = ""  # as the store has it; "" where it has not
    planned: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """What follows `zotune`: the exact command, without --output and --resume."""
        if self.cell.kind == "probe":
            return ["bench", "probe", json.dumps(self.options, sort_keys=True)]
        flags: list[str] = []
        for name, value in self.options.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                flags += [flag] if value else []
            elif isinstance(value, list):
                flags += [flag, ",".join(map(str, value))] if value else []
            else:
                flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
        return ["train", *flags]

    @property
    def command(self) -> str:
        where = [] if self.cell.kind == "probe" else ["--output", str(self.folder), "--resume"]
        return shlex.join(["zotune", *self.arguments, *where])


@dataclass
class Plan:
    expanded: Expanded
    folder: Path
    runs: list[Run]
    final: frozenset[str]

    @property
    def to_do(self) -> list[Run]:
        return [run for run in self.runs if run.status not in self.final]

    @property
    def forward_passes(self) -> int:
        return sum(run.cell.forward_passes for run in self.runs)


def make_plan(
    expanded: Expanded, folder: Path, store: Any = None, *, retry: bool = False, any_version: bool = False
) -> Plan:
    """The runs of a suite in a folder. retry: failed runs too. any_version: what other versions of the code did counts."""
    final = frozenset({"done"} if retry else {"done", "failed", "oom"})
    runs = []
    for cell in expanded.cells:
        config_key = digest(identity(cell))
        key = digest([config_key, code_version()])
        options = dict(cell.options)
        for what, definition in cell.made.items():
            if cell.kind == "probe" and what == "model":
                options["model"] = {"random": definition}
            else:
                options[what] = str(made_folder(folder, what, cell, definition))
        runs.append(Run(cell, config_key, key, folder / "runs" / key, options))
    if store is not None:
        known = {record.key: record for record in store.all()}
        others = (
            {record.config_key: record for record in store.latest() if record.status == "done"} if any_version else {}
        )
        for run in runs:
            record = known.get(run.key) or others.get(run.config_key)
            run.status = record.status if record is not None else ""
            run.planned = dict(record.planned) if record is not None else {}
    return Plan(expanded, folder, runs, final)


def identity(cell: Cell) -> dict[str, Any]:
    """What makes two runs the same: options that count, and the definitions (not the place) of what is made."""
    options = {k: v for k, v in cell.options.items() if k not in FREE}
    return {"kind": cell.kind, "options": options, "made": cell.made}


def made_folder(folder: Path, what: str, cell: Cell, definition: Mapping[str, Any]) -> Path:
    name = cell.model if what == "model" else cell.task
    return folder.absolute() / "made" / f"{what}-{name}-{digest(definition)[:6]}"


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of the value as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache
def code_version() -> str:
    """The package's version, and a digest of the sources that decide a result: all but the benchmark and the command line."""
    home = Path(zotune.__file__).parent
    sources = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        if path.relative_to(home).parts[0] not in ("bench", "cli"):
            sources.update(path.relative_to(home).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{zotune.__version__}+{sources.hexdigest()[:8]}"


def foresee(plan: Plan, store: Any = None) -> None:
    """Fill in what each run is expected to take: from finished runs like it where there are any, else from the estimate."""
    rates: dict[tuple[str, ...], list[float]] = {}
    for record in store.all(status=("done",)) if store is not None else []:
        if seconds := record.result.get("wall_seconds"):
            passes = max(1, record.result.get("forward_passes", 1))
            for like in _likes(record.model, record.task, record.method, record.scheme):
                rates.setdefault(like, []).append(seconds / passes)
    guesses: dict[str, dict[str, Any]] = {}
    for run in plan.runs:
        cell = run.cell
        likes = _likes(cell.model, cell.task, cell.options["method"], cell.options.get("scheme", "full"))
        rate = next((median(rates[like]) for like in likes if like in rates), None)
        memory_of = {k: v for k, v in run.options.items() if k not in ("seed", "lr", "eps", "steps")}
        key = json.dumps(memory_of, sort_keys=True, default=str)
        if key not in guesses:
            guesses[key] = _guess(run)
        guess = guesses[key]
        run.planned |= {"peak_bytes": guess.get("peak_bytes")}
        seconds = cell.forward_passes * rate if rate is not None else guess.get("step_seconds")
        if seconds is not None and rate is None:
            seconds = START_SECONDS + seconds * run.options["steps"]
        run.planned |= {"seconds": seconds, "forward_passes": cell.forward_passes}


START_SECONDS = 8.0  # until the first step: imports, the model, the score before


def _guess(run: Run) -> dict[str, Any]:
    """Memory, and seconds a step, from the model's config; nothing where it cannot be had."""
    try:
        from zotune.bench.estimate import estimate_for
    except ImportError:
        return {}
    definition = run.cell.made.get("model")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return estimate_for({"random": definition} if definition else run.options["model"], run.options)
    except InputError:
        return {}


def _likes(model: str, task: str, method: str, scheme: str) -> list[tuple[str, ...]]:
    """From alike to less alike: what a rate may be taken from."""
    return [(model, task, method, scheme), (model, task, scheme), (model, method), (model,)]
