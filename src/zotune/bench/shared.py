"""Runs of a plan that the processes of a launcher take together, one run after the other.

Worker 0 keeps plan and store, and says in the launcher's store which run is next; each worker starts `zotune train` of it as a
process of its own, as torchrun would have, and says how that ended. The processes of a run share its steps as any do.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.bench import runner, warm
from zotune.errors import Elsewhere, InputError, WorkerError
from zotune.options import TrainConfig, resolve
from zotune.run.together import refuse_few
from zotune.workers import launcher

if TYPE_CHECKING:
    from zotune.bench.suite import Cell

LOOKS = 0.2  # seconds between looks for what the others say
PATIENCE = 30.0  # seconds for the other processes of a run that has ended in one of them
LEAVES = 10.0  # seconds until all have heard that there is no further run
SAID = 2000  # characters of what a worker's process has said


class Crew:
    """The benchmark's processes under a launcher, of which this is number `rank` of `size`, and the store by which they talk.

    environment: what makes a child one of a run's processes. These meet in the launcher's store, so no further port is taken.
    """

    def __init__(self, rank: int, size: int, store: Any, environment: Mapping[str, str]) -> None:
        self.rank, self.size, self.store, self.environment = rank, size, store, environment
        self.runs = 0

    def begin(self, arguments: Sequence[str], own: runner.Process, log: Path) -> Together:
        """The first worker's: the others start their part of a run too. own: the first's process, log: what that says."""
        self.runs += 1
        self.store.set(f"run/{self.runs}", json.dumps(list(arguments), allow_nan=False))
        return Together(self, self.runs, own, log)

    def end(self, code: int) -> None:
        """There is no further run. code: of the first worker's command. The others hear of it before its store may go with it."""
        with contextlib.suppress(RuntimeError):
            self.store.set("end", str(code))
            self.store.wait([f"left/{rank}" for rank in range(1, self.size)], timedelta(seconds=LEAVES))

    def told(self, key: str) -> str | None:
        """What stands in the store, if it does. Raises WorkerError where the launcher's store is gone."""
        try:
            return self.store.get(key).decode() if self.store.check([key]) else None
        except RuntimeError as error:
            raise WorkerError("the benchmark's first worker is gone; the same command goes on") from error


class Together:
    """A run under way in all workers, as the runner sees it: it has ended when it has in all of them."""

    def __init__(self, crew: Crew, number: int, own: runner.Process, log: Path) -> None:
        self._crew, self._number, self._own, self._log = crew, number, own, log
        self.pid = own.pid
        self.returncode: int | None = None
        self._since: float | None = None  # the first has ended

    def poll(self) -> int | None:
        if self.returncode is not None:
            return self.returncode
        keys = [f"ended/{self._number}/{rank}" for rank in range(1, self._crew.size)]
        others = [json.loads(told) for key in keys if (told := self._crew.told(key)) is not None]
        own = self._own.poll()
        if own is None and not any(other["code"] for other in others):
            return None
        self._since = self._since or time.monotonic()
        if own is None or len(others) < len(keys):
            waited = time.monotonic() - self._since
            if waited > PATIENCE:
                self._crew.store.set(f"stop/{self._number}", "")
                runner.end([self._own])
            if waited < 2 * PATIENCE:
                return None
            others.append({"code": 1, "said": "zotune: a worker of the benchmark does not answer"})
        with open(self._log, "a", encoding="utf-8") as log:
            log.writelines(f"{other['said'].strip()}\n" for other in others if other["code"] and other["said"].strip())
        self.returncode = next((code for code in (own, *(other["code"] for other in others)) if code), 0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired("the workers' run", timeout or 0.0)
            time.sleep(LOOKS)
        return code


@contextmanager
def crew_of(jobs: int | None, executor: str) -> Iterator[Crew | None]:
    """Those that a launcher has started to run a suite together; None without one.

    Others than the first do not come out of it before the first has: what ends it ends them. Raises InputError for what a shared
    suite does not go with.
    """
    if (size := launcher.asked_for()) == 1:
        yield None
        return
    for option, wrong in (("--executor ray", executor == "ray"), (f"--jobs {jobs}", (jobs or 1) > 1)):
        if wrong:
            raise InputError(
                f"{option}: {size} workers take one run at a time together; leave it out, or run without torchrun"
            )
    from zotune.workers.group import exit_code, meeting

    with meeting() as (store, rank):
        store.set(f"here/{rank}", "")
        if rank == 0:  # no run's process looks for its like in the launcher's store before all of ours have met
            store.wait([f"here/{other}" for other in range(size)])
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    theirs = {
        name: os.environ.pop(name) for name in launcher.VARIABLES if name in os.environ
    }  # what is asked here is one's
    theirs |= {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    here = Crew(rank, size, store, theirs)
    if rank:
        _follow(here)
    code = 1
    try:
        yield here
        code = 0
    except Exception as error:
        code = exit_code(error)
        raise
    finally:
        here.end(code)


def _follow(here: Crew) -> None:
    """A worker that keeps no plan: its part of each run that the first names. Raises Elsewhere once there is no further one."""
    with tempfile.TemporaryDirectory(prefix="zotune-worker-") as place, runner.signals() as asked:
        log = Path(place) / "said.log"
        with warm.Server(Path(place) / "server.log", lambda: asked) as server:
            while not asked and (ended := here.told("end")) is None:
                if (arguments := here.told(f"run/{here.runs + 1}")) is None:
                    time.sleep(LOOKS)
                    continue
                here.runs += 1
                environment = {**os.environ, **here.environment}
                code = _part(here, runner.started(json.loads(arguments), log, environment, server), asked)
                said = log.read_text(errors="replace")[-SAID:]
                here.store.set(
                    f"ended/{here.runs}/{here.rank}", json.dumps({"code": code, "said": said}, allow_nan=False)
                )
    with contextlib.suppress(RuntimeError):
        here.store.set(f"left/{here.rank}", "")
    raise Elsewhere("the first worker says how it ended", 128 + asked[0] if asked else int(ended or 0))


def _part(here: Crew, process: runner.Process, asked: Sequence[int]) -> int:
    """The exit code of this worker's process, which is made to end where this worker, or the run, is to."""
    while (code := process.poll()) is None:
        if asked or here.told(f"stop/{here.runs}") is not None:
            runner.end([process])
        time.sleep(LOOKS)
    return code


def refuse_unshared(cells: Sequence[Cell], workers: int) -> None:
    """Raises InputError for the first run of a suite that so many workers cannot share."""
    for cell in cells:
        if cell.kind == "probe" or cell.pace_key:
            what = "a probe" if cell.kind == "probe" else "a budget of seconds"
            raise InputError(f"{cell.name}: {what} is of one process; run it without torchrun")
        try:
            refuse_few(resolve(TrainConfig, cell.options | {"output": "-"}, None), workers)
        except InputError as error:
            raise InputError(f"{cell.name}: {error}") from None
