"""From a suite's cells to runs: their keys and commands, what is done already, and what the rest will take."""

from __future__ import annotations

import hashlib
import json
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import zotune
from zotune.bench import FINAL
from zotune.bench.choice import outcome
from zotune.bench.suite import Cell, Expanded
from zotune.errors import InputError

if TYPE_CHECKING:
    from zotune.bench.store import Record, Store

# Options that name no part of what is computed. A training run is the same experiment on every device.
WEIGHTS = (".safetensors", ".bin", ".gguf")
ENDS = 1 << 20  # bytes at each end of weights that tell them from others
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
            return ["bench", "probe", json.dumps(self.options, sort_keys=True, allow_nan=False)]
        flags: list[str] = []
        for name, value in self.options.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                flags += [flag] if value else []
            elif isinstance(value, list):
                flags += [flag, ",".join(map(str, value))] if value else []
            else:
                flags += [flag, json.dumps(value, allow_nan=False) if isinstance(value, dict) else str(value)]
        return ["train", *flags]

    @property
    def command(self) -> str:
        where = [] if self.cell.kind == "probe" else ["--output", str(self.folder), "--resume"]
        return shlex.join(["zotune", *self.arguments, *where])


@dataclass
class Plan:
    """runs: whose lr and eps are known. held: runs that wait for a search to tell theirs; hopeless: whose search has failed."""

    expanded: Expanded
    folder: Path
    runs: list[Run]
    any_version: bool = False
    held: list[Run] = field(default_factory=list)
    hopeless: list[Run] = field(default_factory=list)

    @property
    def to_do(self) -> list[Run]:
        """Searches, then a seed of everything after the other: what says most comes first if time runs out."""
        seeds = list(dict.fromkeys(_seed(run) for run in [*self.runs, *self.held]))
        waiting = [run for run in self.runs if run.status not in FINAL]
        return sorted(waiting, key=lambda run: (not run.cell.search, seeds.index(_seed(run))))

    @property
    def forward_passes(self) -> int:
        return sum(run.cell.forward_passes for run in [*self.runs, *self.held])

    def release(self, store: Store, *, retry: bool = False) -> list[Run]:
        """The held runs whose search is over, with the lr and eps that were best on validation. They are among `runs` now."""
        trying = {run.cell.group for run in self.runs if run.cell.search and run.status not in FINAL}
        ready = [run for run in self.held if run.cell.group not in trying]
        if not ready:
            return []
        self.held = [run for run in self.held if run.cell.group in trying]
        known = _Known(store, self.any_version)
        released = []
        for run in ready:
            tried = [r for r in self.runs if r.cell.search and r.cell.group == run.cell.group]
            records = [record for record in map(known.get, tried) if record is not None]
            best = outcome(records)[0] if records else {"seeds": 0}
            if not best["seeds"]:
                self.hopeless.append(run)
                continue
            found = _run(run.cell.chosen(best), self.folder)
            if found.key in {r.key for r in self.runs}:  # the search has run it, or another suite's
                continue
            found.planned = dict(run.planned)
            _recall(found, known, retry)
            released.append(found)
        self.runs += released
        return released


def _seed(run: Run) -> int:
    return int(run.cell.options.get("seed") or 0)


class _Known:
    """What the store has of a run: by this version of the code, or by another's."""

    def __init__(self, store: Store, any_version: bool) -> None:
        self.own = {record.key: record for record in store.all()}
        done = (record for record in store.latest() if record.status == "done")
        self.others = {record.config_key: record for record in done} if any_version else {}

    def get(self, run: Run) -> Record | None:
        return self.own.get(run.key) or self.others.get(run.config_key)


def _recall(run: Run, known: _Known, retry: bool) -> None:
    if (record := known.get(run)) is not None:
        again = retry and record.status in ("failed", "oom")
        run.status, run.planned = "" if again else record.status, run.planned | record.planned


def make_plan(
    expanded: Expanded, folder: Path, store: Store | None = None, *, retry: bool = False, any_version: bool = False
) -> Plan:
    """The runs of a suite in a folder. retry: failed runs too. any_version: what other versions of the code did counts."""
    made = [_run(cell, folder) for cell in expanded.cells]
    plan = Plan(expanded, folder, [run for run in made if not run.cell.open], any_version)
    plan.held = [run for run in made if run.cell.open]
    if store is not None:
        known = _Known(store, any_version)
        for run in plan.runs:
            _recall(run, known, retry)
        plan.release(store, retry=retry)
    return plan


def _run(cell: Cell, folder: Path) -> Run:
    config_key = digest(identity(cell))
    key = digest([config_key, code_version()])
    options = dict(cell.options)
    for what, definition in cell.made.items():
        if cell.kind == "probe" and what == "model":
            options["model"] = {"random": definition}
        else:
            options[what] = str(made_folder(folder, what, cell, definition))
    return Run(cell, config_key, key, folder / "runs" / key, options)


def identity(cell: Cell) -> dict[str, Any]:
    """What makes two runs the same: options that count, and the definitions (not the place) of what is made.

    Memory and time are all that a probe finds, so its device counts.
    """
    options = {k: v for k, v in cell.options.items() if k not in FREE or (cell.kind == "probe" and k == "device")}
    return {"kind": cell.kind, "options": options, "made": cell.made} | _contents(options)


def _contents(options: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the local files that options name: under the same name another model, or other rows, are another run."""
    data_dir, task = options.get("data_dir"), options.get("task")
    places = {name: options.get(name) for name in ("model", "data")}
    places |= {"data_dir": f"{data_dir}/{task}" if data_dir else None}
    paths = {name: Path(place).expanduser() for name, place in places.items() if isinstance(place, str)}
    there = {name: _files(path) for name, path in paths.items() if path.exists()}
    return {"contents": {name: _content(files) for name, files in there.items()}} if there else {}


def _files(place: Path) -> tuple[tuple[str, int, int], ...]:
    """Paths, sizes and times of change."""
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@lru_cache
def _content(files: tuple[tuple[str, int, int], ...]) -> str:
    """A digest of names, sizes and bytes, of weights those at both ends."""
    seen = hashlib.sha256()
    for name, size, _ in files:
        path = Path(name)
        seen.update(f"{path.name} {size}\n".encode())
        part = ENDS if path.suffix in WEIGHTS else size
        with open(path, "rb") as opened:
            seen.update(opened.read(part))
            opened.seek(max(part, size - part))
            seen.update(opened.read())
    return seen.hexdigest()[:16]


def made_folder(folder: Path, what: str, cell: Cell, definition: Mapping[str, Any]) -> Path:
    name = cell.model if what == "model" else cell.task
    return folder.absolute() / "made" / f"{what}-{name}-{digest(definition)[:6]}"


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of the value as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


@lru_cache
def code_version() -> str:
    """The package's version, and a digest of the sources that decide a result: all but the benchmark and the command line."""
    home = Path(zotune.__file__).parent
    sources = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        if path.relative_to(home).parts[0] not in ("bench", "cli", "reports"):
            sources.update(path.relative_to(home).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{zotune.__version__}+{sources.hexdigest()[:8]}"


START_SECONDS = 8.0  # until the first step, where no run has told: imports, the model, the score before


def _estimated(options: Mapping[str, Any]) -> str:
    """What an estimate depends on."""
    from zotune.estimates.estimate import READ

    return json.dumps([options.get(name) for name in ("model", *READ)], sort_keys=True, allow_nan=False)


class Forecast:
    """What runs are expected to take: from finished ones like them where there are any, else from the estimate."""

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self.starts: list[float] = []
        self.seconds: dict[tuple[str, ...], list[float]] = {}  # a forward pass; of a probe, all of it
        for record in records:
            self.learn(record)

    def learn(self, record: Record) -> None:
        took, result = record.finished - record.started, record.result
        if record.status not in ("done", "oom") or result.get("resumed_at"):
            return
        wall, passes = result.get("wall_seconds"), result.get("forward_passes")
        if record.kind == "train" and wall and passes:
            self.starts.append(max(0.0, took - wall))
            took = wall / passes
        elif record.kind == "train":
            return
        for like in _likes(record.model, record.task, record.method, record.scheme):
            self.seconds.setdefault((record.kind, *like), []).append(took)

    def of(self, run: Run) -> float | None:
        cell = run.cell
        scheme = cell.options.get("scheme", "full")
        likes = [(cell.kind, *like) for like in _likes(cell.model, cell.task, cell.options["method"], scheme)]
        told = next((self.seconds[like] for like in likes if like in self.seconds), None)
        start = median(self.starts) if self.starts else START_SECONDS
        if told is not None:
            return median(told) if cell.kind == "probe" else start + median(told) * cell.forward_passes
        step = run.planned.get("step_seconds")
        return None if step is None else start + step * run.options["steps"]


def foresee(plan: Plan, store: Store | None = None) -> Forecast:
    """Fill in what each run is expected to take."""
    records = store.all() if store is not None else []
    forecast = Forecast(records)
    own = [record for record in records if record.code == code_version() and "step_seconds" in record.planned]
    guesses = {_estimated(record.options): record.planned for record in own}  # another version's may differ
    for run in [*plan.runs, *plan.held]:
        key = _estimated(run.options)
        if key not in guesses:
            guesses[key] = _guess(run)
        run.planned |= {"peak_bytes": guesses[key].get("peak_bytes"), "step_seconds": guesses[key].get("step_seconds")}
        if run.cell.pace is not None:
            run.planned |= {"step_seconds": run.cell.pace, "pace": run.cell.pace}
        run.planned |= {"seconds": forecast.of(run), "forward_passes": run.cell.forward_passes}
        if why := guesses[key].get("why"):
            run.planned["why"] = why
    return forecast


def _guess(run: Run) -> dict[str, Any]:
    """Memory, and seconds a step, from the model's config; or why they cannot be had."""
    from zotune.estimates.estimate import estimate_for, uncounted

    if why := uncounted(run.options):
        return {"why": why}
    definition = run.cell.made.get("model")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return estimate_for({"random": definition} if definition else run.options["model"], run.options)
    except InputError as error:
        return {"why": str(error)}


def _likes(model: str, task: str, method: str, scheme: str) -> list[tuple[str, ...]]:
    """From alike to less alike: what a rate may be taken from."""
    return [(model, task, method, scheme), (model, task, scheme), (model, method), (model,)]
