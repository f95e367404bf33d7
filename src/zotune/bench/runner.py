"""The runs of a plan, a process each, one after the other or one for each GPU.

Everything happens in one thread: Linux kills a child when the *thread* that started it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from zotune.bench import Stopped, materials
from zotune.bench.plan import Plan, Run, code_version, made_folder
from zotune.bench.store import Record, Store, now
from zotune.errors import InputError

GRACE_SECONDS = 60.0  # between SIGTERM, which saves, and SIGKILL
POLL_SECONDS = 0.1
ZOTUNE = (sys.executable, "-m", "zotune.cli")
ERROR_CHARACTERS = 4000
# What torch, CUDA and numpy say where memory is short.
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "not enough memory", "MemoryError", "CUBLAS_STATUS_ALLOC_FAILED")


class Watcher(Protocol):
    """Who is told how the runs go."""

    def changed(self, state: State) -> None: ...


@dataclass
class Active:
    run: Run
    process: subprocess.Popen[bytes]
    slot: int
    began: float
    log: Path
    kills_before: int
    keeps_models: bool
    metrics_size: int = -1
    step: int = 0
    loss: float | None = None


@dataclass
class State:
    plan: Plan
    active: list[Active] = field(default_factory=list)
    finished: list[tuple[Run, Record]] = field(default_factory=list)
    waiting: int = 0


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
    plan: Plan, store: Store, *, jobs: int, gpus: int, watcher: Watcher, program: Sequence[str] = ZOTUNE
) -> State:
    """Run what is to do, each run by `program` and its arguments.

    A failed run is recorded and stops no other. Raises Stopped on Ctrl-C and SIGTERM, when all is saved.
    """
    state = State(plan, waiting=len(plan.to_do))
    queue = deque(plan.to_do)
    free = list(range(jobs))
    with _signals() as asked:
        try:
            while (queue or state.active) and not asked:
                while queue and free:
                    run = queue.popleft()
                    slot = free.pop(0)
                    state.active.append(_start(run, plan, store, slot, jobs, gpus, program))
                    state.waiting = len(queue)
                for active in [a for a in state.active if a.process.poll() is not None]:
                    state.active.remove(active)
                    free.append(active.slot)
                    state.finished.append((active.run, _finish(active, store)))
                for active in state.active:
                    _look(active)
                watcher.changed(state)
                time.sleep(POLL_SECONDS)
        finally:
            _end(state.active, store)
    if asked:
        raise Stopped(f"stopped; {len(state.finished)} runs done now, the same command goes on", 128 + asked[0])
    return state


def _start(run: Run, plan: Plan, store: Store, slot: int, jobs: int, gpus: int, program: Sequence[str]) -> Active:
    for what, definition in run.cell.made.items():
        if run.cell.kind == "train":
            materials.make(what, definition, made_folder(plan.folder, what, run.cell, definition))
    old = store.get(run.key)
    attempts = 1 + (old.attempts if old is not None else 0)
    cell = run.cell
    store.put(
        Record(
            key=run.key, config_key=run.config_key, code=code_version(), suite=plan.expanded.suite.name, kind=cell.kind,
            name=cell.name, model=cell.model, task=cell.task, method=cell.options["method"],
            scheme=cell.options.get("scheme", "full"), seed=int(cell.options.get("seed") or 0), labels=cell.labels,
            options=run.options, command=run.command, folder=str(run.folder.relative_to(plan.folder)),
            planned=run.planned, status="running", attempts=attempts, started=now(), finished=0.0, result={},
            metrics=[], error="",
        )
    )  # fmt: skip
    log = plan.folder / "logs" / f"{run.key}.log"
    log.parent.mkdir(exist_ok=True)
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if gpus > 1 or jobs > 1:
        environment["CUDA_VISIBLE_DEVICES"] = _device(slot, gpus)
    where = ["--output", str(run.folder)] + (["--resume"] if cell.kind == "train" else [])
    command = [*program, *run.arguments, *where]
    with open(log, "wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "zotune.bench.child", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, start_new_session=True,
        )  # fmt: skip
    return Active(run, process, slot, time.monotonic(), log, _kernel_kills(), plan.expanded.suite.keep_models)


def _device(slot: int, gpus: int) -> str:
    """The slot's GPU among those that we may see."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = given.split(",") if given else [str(i) for i in range(gpus)]
    return seen[slot % len(seen)] if gpus else (given or "")


def _finish(active: Active, store: Store) -> Record:
    run, code = active.run, active.process.returncode
    said = active.log.read_text(errors="replace")
    result = _read_json(run.folder / "result.json")
    status, error = "done", ""
    if code != 0 or not result:
        status, error = "failed", _last_words(said, code)
        killed_for_memory = code == -signal.SIGKILL and _kernel_kills() > active.kills_before
        if killed_for_memory or any(mark in said for mark in OUT_OF_MEMORY):
            status = "oom"
        elif code in (130, 143):
            status = "interrupted"
    store.update(run.key, status=status, error=error, result=result, metrics=_metrics(run.folder), finished=now())
    if status == "done" and not active.keeps_models:
        _drop_weights(run.folder)
    run.status = status
    record = store.get(run.key)
    assert record is not None
    return record


def _end(active: list[Active], store: Store) -> None:
    """Ask what still runs to save and stop; make it, after a while."""
    for one in active:
        _signal(one, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for one in active:
        try:
            one.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(one, signal.SIGKILL)
            one.process.wait()
        if one.process.returncode == 0:
            _finish(one, store)
        else:
            store.update(one.run.key, status="interrupted", finished=now())


def _signal(active: Active, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(active.process.pid, number)  # it leads a group of its own


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the signals that asked us to stop."""
    asked: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: asked.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _look(active: Active) -> None:
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


def _kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory; 0 where it does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0
