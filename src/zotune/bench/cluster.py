"""The runs of a plan spread over a Ray cluster: the driver keeps the store, a task is a run.

A node works in the output folder itself where it sees it (the driver's own machine, a shared file system). Elsewhere it works in
its temporary folder, and what the run leaves comes back as bytes. Ray ends the tasks of a driver that dies, and a
run dies with its task; started again, it goes on from its last checkpoint where that can be seen, else from its beginning.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from zotune.bench import materials
from zotune.bench.plan import Plan, Run, code_version, digest, made_folder
from zotune.bench.runner import (
    POLL_SECONDS,
    Active,
    State,
    Waiting,
    Watcher,
    begin,
    end,
    kernel_kills,
    look,
    raise_if_asked,
    settle,
    signals,
    spawn,
    where,
)
from zotune.bench.store import Store, now
from zotune.errors import InputError

PROGRAM = ("-m", "zotune")  # after the node's own Python
TOKEN = ".token"  # in the output folder: a node that reads the driver's token there sees the driver's folder
EARLIER_SECONDS = 60.0  # until the run of a driver that was killed has let go of its folder


@dataclass(frozen=True)
class Job:
    """What a node is told of a run. folder: the driver's output folder."""

    run: Run
    folder: Path
    token: str
    keep_models: bool
    program: Sequence[str] = PROGRAM


@dataclass(frozen=True)
class Outcome:
    """What comes back: the exit code, what was said, and the run's files (by path) where the driver cannot see them."""

    code: int
    said: str
    starved: bool
    version: str
    node: str
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Task(Active):
    reference: Any
    log: Path


def need_ray() -> None:
    """Raises InputError where `zotune[ray]` is not installed."""
    if find_spec("ray") is None:
        raise InputError("--executor ray needs zotune[ray]: pip install 'zotune[ray]'")


def execute_on_ray(
    plan: Plan,
    store: Store,
    *,
    address: str | None,
    jobs: int | None,
    watcher: Watcher,
    waiting: Waiting | None = None,
    program: Sequence[str] = PROGRAM,
) -> State:
    """Run what is to do on the cluster at the address, or on one that is started here and ended with us.

    jobs: runs at one time; by default one for each GPU, without any one for each node. A failed run is recorded and stops no
    other. Raises InputError where there is no such cluster or a node has another version, Stopped on Ctrl-C and SIGTERM.
    """
    import ray

    if address is not None:
        _check_reach(address)
    try:
        ray.init(address=address or "local", include_dashboard=False if address is None else None, log_to_driver=False,
                 logging_level="error")  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--ray-address {address}: {said}") from None
    try:
        gpus, cpus = (int(ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU"))
        jobs = jobs or gpus or len([node for node in ray.nodes() if node["Alive"]])
        share = min(1.0, gpus / jobs) if gpus else 0.0
        task = ray.remote(num_cpus=1 if gpus else max(1, cpus // jobs), num_gpus=share, max_retries=0)(work)
        return _drive(plan, store, jobs, watcher, waiting or Waiting(plan, store), task.remote, program)
    finally:
        ray.shutdown()


def _check_reach(address: str) -> None:
    """Raises InputError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or "write HOST:PORT, such as 10.0.0.1:6379, or auto"
        raise InputError(f"--ray-address {address}: no cluster there ({said})") from None


def _drive(
    plan: Plan,
    store: Store,
    jobs: int,
    watcher: Watcher,
    waiting: Waiting,
    submit: Callable[[Job], Any],
    program: Sequence[str],
) -> State:
    import ray

    token = digest([time.time(), os.getpid(), socket.gethostname()])
    (plan.folder / TOKEN).write_text(token)
    active: list[_Task] = []
    state = State(plan, active, waiting=waiting.runs)
    with signals() as asked:
        try:
            while not asked and not (waiting.late and active):
                while len(active) < jobs and (run := waiting.take()) is not None:
                    log = begin(run, plan, store)
                    job = Job(run, plan.folder.absolute(), token, plan.expanded.suite.keep_models, program)
                    active.append(_Task(run=run, reference=submit(job), log=log))
                if not active:
                    break
                ready, _ = ray.wait([one.reference for one in active], timeout=POLL_SECONDS)
                for one in [a for a in active if a.reference in ready]:
                    active.remove(one)
                    record = _take(one, plan, store)
                    state.finished.append((one.run, record))
                    waiting.learn(record)
                state.waiting = waiting.runs
                for one in active:
                    look(one)
                watcher.changed(state)
        finally:
            for one in active:
                ray.cancel(one.reference, force=False)
            for one in active:
                ray.wait([one.reference], timeout=EARLIER_SECONDS)
                store.update(one.run.key, status="interrupted", finished=now())
            (plan.folder / TOKEN).unlink(missing_ok=True)
    raise_if_asked(asked, state)
    state.late = waiting.late or bool(waiting.runs)
    return state


def _take(one: _Task, plan: Plan, store: Store) -> Any:
    """A task's outcome into the folder and the store."""
    import ray

    try:
        outcome: Outcome = ray.get(one.reference)
    except ray.exceptions.RayError as error:  # its node or its process is gone
        outcome = Outcome(-1, f"Ray: {error}", isinstance(error, ray.exceptions.OutOfMemoryError), code_version(), "")
    if outcome.version != code_version():
        store.update(one.run.key, status="interrupted", finished=now())
        raise InputError(
            f"--executor ray: {outcome.node} has zotune {outcome.version}, here it is {code_version()}; "
            "install the same on every machine"
        )
    one.log.write_text(outcome.said)
    for name, content in outcome.files.items():
        path = one.run.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return settle(one.run, plan, store, outcome.code, outcome.said, outcome.starved)


def work(job: Job) -> Outcome:
    """On a node: one run to its end. Cancelled, it lets the run save."""
    here = job.folder if _sees(job) else Path(tempfile.gettempdir()) / f"zotune-bench-{digest(str(job.folder))}"
    run, version = job.run, code_version()
    folder = here / "runs" / run.key
    folder.mkdir(parents=True, exist_ok=True)
    if here != job.folder and run.cell.kind == "train":
        for what, definition in run.cell.made.items():
            materials.make(what, definition, made_folder(here, what, run.cell, definition))
    try:
        with FileLock(folder / ".lock", timeout=EARLIER_SECONDS):
            pass
    except Timeout:
        return Outcome(1, f"{folder}: another zotune is running in it", False, version, socket.gethostname())
    arguments = [text.replace(str(job.folder), str(here)) for text in run.arguments]
    kills_before = kernel_kills()
    log = here / f"{run.key}.log"
    process = spawn([sys.executable, *job.program, *arguments, *where(run, folder)], log, os.environ)
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)  # not wait(): Ray's cancellation is an exception between two bytecodes
    except BaseException:
        end([process])
        raise
    said = log.read_text(errors="replace")
    log.unlink()
    starved = kernel_kills() > kills_before
    files = {} if here == job.folder else _left(folder, job.keep_models)
    if here != job.folder:
        shutil.rmtree(folder)
    return Outcome(process.returncode, said, starved, version, socket.gethostname(), files)


def _sees(job: Job) -> bool:
    try:
        return (job.folder / TOKEN).read_text() == job.token
    except OSError:
        return False


def _left(folder: Path, weights: bool) -> dict[str, bytes]:
    """The files of a run by their place in its folder, without checkpoints, and without trained weights unless asked."""
    found = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        name = path.relative_to(folder)
        passing = name.parts[0].startswith(("checkpoint-", ".lock"))
        if not passing and (weights or name.parts[0] != "model" or path.suffix != ".safetensors"):
            found[name.as_posix()] = path.read_bytes()
    return found
