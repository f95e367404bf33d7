"""The runs of a plan, a process each, one after the other or one for each GPU.

Everything happens in one thread: Linux kills a child when the *thread* that started it ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml
from filelock import FileLock, Timeout

from zotune.bench import Stopped, materials, warm
from zotune.bench.plan import Forecast, Plan, Run, code_version, made_folder
from zotune.bench.store import Record, Store, now
from zotune.errors import InputError
from zotune.run.folder import write_atomically

if TYPE_CHECKING:
    from zotune.bench.shared import Crew

GRACE_SECONDS = 60.0  # between SIGTERM, which saves, and SIGKILL
POLL_SECONDS = 0.1
ZOTUNE = (sys.executable, "-m", "zotune")
ERROR_CHARACTERS = 4000
# What torch, CUDA and numpy say where memory is short.
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "not enough memory", "MemoryError", "CUBLAS_STATUS_ALLOC_FAILED")


class Process(Protocol):
    """What is used of `subprocess.Popen`."""

    pid: int
    returncode: Any

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


class Watcher(Protocol):
    """Who is told how the runs go."""

    def changed(self, state: State) -> None: ...


@dataclass(kw_only=True)
class Active:
    """A run under way, and the last that metrics.jsonl says of it."""

    run: Run
    began: float = field(default_factory=time.monotonic)
    metrics_size: int = -1
    step: int = 0
    loss: float | None = None


@dataclass(kw_only=True)
class _Process(Active):
    process: Process
    slot: int
    log: Path
    kills_before: int


@dataclass
class State:
    plan: Plan
    active: Sequence[Active] = ()
    finished: list[tuple[Run, Record]] = field(default_factory=list)
    waiting: Sequence[Run] = ()
    late: bool = False  # the time that was given is up


class Waiting:
    """The runs to do, in order. With `seconds`, none is given out that is not expected to end within them."""

    def __init__(
        self, plan: Plan, store: Store, forecast: Forecast | None = None, seconds: float | None = None
    ) -> None:
        self.plan, self.store, self.forecast = plan, store, forecast or Forecast()
        self.until = math.inf if seconds is None else time.monotonic() + seconds
        self.runs = plan.to_do

    @property
    def late(self) -> bool:
        return time.monotonic() >= self.until

    def take(self) -> Run | None:
        left = self.until - time.monotonic()
        for run in self.runs:
            if left == math.inf or (left > 0 and (run.planned.get("seconds") or 0.0) <= left):
                self.runs.remove(run)
                return run
        return None

    def learn(self, record: Record) -> None:
        """A run has ended: what the others will take is known better, and a search may be over."""
        self.forecast.learn(record)
        self.runs += self.plan.release(self.store)
        order = {run.key: i for i, run in enumerate(self.plan.to_do)}
        self.runs = sorted((run for run in self.runs if run.key in order), key=lambda run: order[run.key])
        for run in [*self.runs, *self.plan.held]:
            run.planned["seconds"] = self.forecast.of(run)


@contextlib.contextmanager
def sole_runner(folder: Path) -> Iterator[None]:
    """One runner a folder. Raises InputError where there is another."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"--output {folder}: another `zotune bench run` works in it") from None
    try:
        yield
    finally:
        lock.release()


def execute(
    plan: Plan,
    store: Store,
    *,
    jobs: int,
    gpus: int,
    watcher: Watcher,
    waiting: Waiting | None = None,
    program: Sequence[str] = ZOTUNE,
    crew: Crew | None = None,
) -> State:
    """Run what is to do, each run by `program` and its arguments. crew: the workers that take each run together.

    A failed run is recorded and stops no other; when the time of `waiting` is up, what runs saves and stops.
    Raises Stopped on Ctrl-C and SIGTERM, when all is saved.
    """
    active: list[_Process] = []
    waiting = waiting or Waiting(plan, store)
    state = State(plan, active, waiting=waiting.runs)
    free = list(range(jobs))
    log = plan.folder / "logs" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with signals() as asked, warm.Server(log, lambda: asked) as server:
        start = functools.partial(
            _start, plan=plan, store=store, jobs=jobs, gpus=gpus, program=program, server=server, crew=crew
        )
        try:
            while not asked and not (waiting.late and active):
                while free and (run := waiting.take()) is not None:
                    free.sort(key=lambda slot: (_crowd(slot, active, gpus), slot))
                    active.append(start(run, slot=free.pop(0)))
                if not active:
                    break
                for one in [a for a in active if a.process.poll() is not None]:
                    active.remove(one)
                    free.append(one.slot)
                    record = _finish(one, plan, store)
                    state.finished.append((one.run, record))
                    waiting.learn(record)
                state.waiting = waiting.runs
                for one in active:
                    look(one)
                watcher.changed(state)
                time.sleep(POLL_SECONDS)
        finally:
            _end(active, plan, store)
    raise_if_asked(asked, state)
    state.late = waiting.late or bool(waiting.runs)
    return state


def _crowd(slot: int, active: Sequence[_Process], gpus: int) -> int:
    """How many runs the slot's GPU has."""
    return sum(one.slot % max(1, gpus) == slot % max(1, gpus) for one in active)


def raise_if_asked(asked: Sequence[int], state: State) -> None:
    """Raises Stopped where a signal asked for it."""
    if asked:
        raise Stopped(f"stopped; {len(state.finished)} runs done now, the same command goes on", 128 + asked[0])


def begin(run: Run, plan: Plan, store: Store) -> Path:
    """What a run needs is made, and the store says that it runs. Returns the file for what it will say."""
    for what, definition in run.cell.made.items():
        if run.cell.kind == "train":
            materials.make(what, definition, made_folder(plan.folder, what, run.cell, definition))
    _find_again(run)
    old = store.get(run.key)
    attempts = 1 + (old.attempts if old is not None else 0)
    cell = run.cell
    store.put(
        Record(
            key=run.key, config_key=run.config_key, code=code_version(), suite=cell.suite, kind=cell.kind,
            name=cell.name, model=cell.model, task=cell.task, method=cell.options["method"],
            scheme=cell.options.get("scheme", "full"), seed=int(cell.options.get("seed") or 0),
            labels=cell.labels | ({"search": True} if cell.trial else {}),
            options=run.options, command=run.command, folder=str(run.folder.relative_to(plan.folder)),
            planned=run.planned, status="running", attempts=attempts, started=now(), finished=0.0, result={},
            metrics=[], error="",
        )
    )  # fmt: skip
    log = plan.folder / "logs" / f"{run.key}.log"
    log.parent.mkdir(exist_ok=True)
    return log


def _find_again(run: Run) -> None:
    """The output folder may have been moved since the run began: where things that are made lie is no option of it."""
    path = run.folder / "config.yaml"
    if run.cell.made and path.is_file():
        known = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        places = {what: run.options[what] for what in run.cell.made if what in known}
        if known | places != known:
            write_atomically(path, yaml.safe_dump(known | places, sort_keys=False, allow_unicode=True))


def _start(
    run: Run,
    *,
    plan: Plan,
    store: Store,
    slot: int,
    jobs: int,
    gpus: int,
    program: Sequence[str],
    server: warm.Server,
    crew: Crew | None,
) -> _Process:
    log = begin(run, plan, store)
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if crew is not None:
        environment |= crew.environment  # by which each process takes a card of its own
    elif gpus > 1 or jobs > 1:
        environment["CUDA_VISIBLE_DEVICES"] = _device(slot, gpus)
    arguments, kills = [*run.arguments, *where(run, run.folder)], kernel_kills()
    on_card = gpus and run.options.get("device") != "cpu"
    forks = run.cell.kind == "train" or on_card  # on a CPU a probe measures a process of its own
    process = started(arguments, log, environment, server if forks else None, program)
    if crew is not None:
        process = crew.begin(arguments, process, log)
    return _Process(run=run, process=process, slot=slot, log=log, kills_before=kills)


def started(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    server: warm.Server | None,
    program: Sequence[str] = ZOTUNE,
) -> Process:
    """`program` with these arguments: a fork of the server where that serves, else a process that is begun anew."""
    process: Process | None = None
    if program == ZOTUNE and server is not None:
        process = server.start(arguments, log, environment)
    return process or spawn([*program, *arguments], log, environment)


def where(run: Run, folder: Path) -> list[str]:
    """The flags that tell a run its folder."""
    return ["--output", str(folder)] + (["--resume"] if run.cell.kind == "train" else [])


def spawn(command: Sequence[str], log: Path, environment: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    """The command as the leader of a group that dies with this thread; what it says goes into the log."""
    with open(log, "wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "zotune.bench.child", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, start_new_session=True,
        )  # fmt: skip


def _device(slot: int, gpus: int) -> str:
    """The slot's GPU among those that we may see."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = given.split(",") if given else [str(i) for i in range(gpus)]
    return seen[slot % len(seen)] if gpus else (given or "")


def _finish(active: _Process, plan: Plan, store: Store) -> Record:
    starved = kernel_kills() > active.kills_before
    return settle(active.run, plan, store, active.process.returncode, _said(active.log), starved)


def _said(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


def settle(run: Run, plan: Plan, store: Store, code: int, said: str, starved: bool) -> Record:
    """What a run that has ended left in its folder goes into the store. starved: the kernel has killed something for memory."""
    result = _read_json(run.folder / "result.json")
    status, error = "done", ""
    if code != 0 or not result:
        status, error = "failed", _last_words(said, code)
        if (code == -signal.SIGKILL and starved) or any(mark in said for mark in OUT_OF_MEMORY):
            status = "oom"
        elif code in (130, 143):
            status = "interrupted"
    store.update(run.key, status=status, error=error, result=result, metrics=_metrics(run.folder), finished=now())
    if status == "done" and not plan.expanded.suite.keep_models:
        _drop_weights(run.folder)
    run.status = status
    record = store.get(run.key)
    assert record is not None
    return record


def _end(active: Sequence[_Process], plan: Plan, store: Store) -> None:
    """Ask what still runs to save and stop; make it, after a while."""
    end([one.process for one in active])
    for one in active:
        if one.process.returncode == 0:
            _finish(one, plan, store)
        else:
            store.update(one.run.key, status="interrupted", finished=now())


def end(processes: Sequence[Process]) -> None:
    """SIGTERM, and to what has not ended GRACE_SECONDS later SIGKILL."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, number)  # it leads a group of its own


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The numbers of the signals that asked us to stop."""
    asked: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: asked.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def look(active: Active) -> None:
    """The last line of metrics.jsonl, read only where the file has grown."""
    path = active.run.folder / "metrics.jsonl"
    with contextlib.suppress(OSError, ValueError, IndexError):
        size = path.stat().st_size
        if size == active.metrics_size:
            return
        active.metrics_size = size
        with open(path, "rb") as file:
            file.seek(max(0, size - 4096))
            last = json.loads(file.read().splitlines()[-1])
        active.step, active.loss = last["step"], last.get("loss")


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = []
    with contextlib.suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def _drop_weights(folder: Path) -> None:
    """The trained weights of a finished run; its trajectory and record stay."""
    for path in (folder / "model").glob("*.safetensors"):
        path.unlink()


def _last_words(said: str, code: int) -> str:
    tail = said[-ERROR_CHARACTERS:].strip()
    return tail or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory; 0 where it does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0
