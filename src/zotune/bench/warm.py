"""Runs that find their libraries loaded: a server imports them once, and each run is a fork of it.

A short run spends most of its time on imports. `multiprocessing` has such a server too, but one that outlives a runner that
is killed for as long as a child lives; here server and runs die with the runner (child.py).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from zotune import quiet
from zotune.bench.child import die_with

# What `zotune train` imports on its way, whatever the model.
LOADED = (
    "zotune.cli.app", "zotune.cli.train", "zotune.cli.expected", "zotune.cli.progress", "zotune.run.train",
    "zotune.record.replay", "zotune.run.card", "zotune.directions.calibration", "zotune.estimates.estimate",
    "zotune.bench.probe", "zotune.step.enhancements", "zotune.noise.cpu", "zotune.tasks.own",
    "zotune.tasks.generation", "zotune.models.adapters", "zotune.models.quantized", "zotune.engines.dual",
    "zotune.step.graphs", "torch._dynamo", "datasets", "peft", "transformers.trainer", "transformers.modelcard",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.loss.loss_utils", "transformers.core_model_loading",
)  # fmt: skip
AVAILABLE = sys.platform == "linux"
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 300.0  # for the imports
LOST = (
    128 + signal.SIGTERM
)  # what a run ends with whose server was killed: it is to go on, like one that was asked to stop


class Forked:
    """A run under way, with what the runner uses of `subprocess.Popen`."""

    def __init__(self, server: _Process, pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.code_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"run {self.pid}", timeout or 0.0)
            time.sleep(POLL_SECONDS)
        return code


class Server:
    """Starts runs; `with` it, or close() it. Of the thread that made it alone: it dies with that thread.

    log: what the server itself has to say. asked: whether to stop, which ends the wait for its imports.
    """

    def __init__(self, log: Path | None = None, asked: Callable[[], object] = lambda: False) -> None:
        self._log, self._asked = log, asked
        self._now: _Process | None = None
        self._wanted = AVAILABLE

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *of: object) -> None:
        self.close()

    def start(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Forked | None:
        """`zotune ARGUMENTS` as the leader of a group, what it says in the log. None where there is no server to be had."""
        log.write_bytes(b"")
        for _ in range(2):  # one that was killed is replaced once
            if not self._wanted:
                break
            if self._now is None or self._now.lost:
                self._now = _Process(environment, self._log)
            try:
                if not self._now.ready(self._asked):
                    self._wanted = bool(self._asked())  # one that is of no use is not tried again
                    self.close()
                    break
                pid = self._now.fork({"arguments": list(arguments), "log": str(log), "environment": dict(environment)})
                return None if pid is None else Forked(self._now, pid)
            except (EOFError, OSError):
                self._now.close()
        return None

    def close(self) -> None:
        """End the server, and with it what still runs."""
        if self._now is not None:
            self._now.close()
            self._now = None


class _Process:
    """A server, and the ends of its runs. Raises EOFError or OSError where it is gone."""

    def __init__(self, environment: Mapping[str, str], log: Path | None) -> None:
        self.lost = False
        self._ended: dict[int, int] = {}
        self._ready: bool | None = None
        self._channel, theirs = Pipe()
        program = [sys.executable, "-m", "zotune.bench.warm", str(theirs.fileno())]
        with open(log or os.devnull, "wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "zotune.bench.child", str(os.getpid()), *program],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, pass_fds=(theirs.fileno(),),
                # A run picks its GPU after the fork: asking how many there are must not start the driver before.
                env={**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}, start_new_session=True,
            )  # fmt: skip
        theirs.close()

    def ready(self, asked: Callable[[], object]) -> bool:
        """Whether it has imported everything and can fork; waits for that."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._ready is None and not asked() and time.monotonic() < deadline:
            if self._channel.poll(POLL_SECONDS):
                self._ready = self._channel.recv()[1]
        return bool(self._ready)

    def fork(self, job: Mapping[str, Any]) -> int | None:
        """The run's process id; None where there could be no further process."""
        self._channel.send(job)
        while (said := self._channel.recv())[0] == "ended":
            self._ended[said[1]] = said[2]
        return said[1] if said[0] == "started" else None

    def code_of(self, pid: int) -> int | None:
        """The exit code of a run, minus a signal's number; None while it runs."""
        try:
            while not self.lost and self._channel.poll():
                said = self._channel.recv()
                self._ended[said[1]] = said[2]
        except (EOFError, OSError):
            self.close()
        return self._ended.pop(pid, LOST if self.lost else None)

    def close(self) -> None:
        if not self.lost:
            self.lost = True
            self._channel.close()
            self._process.kill()
            self._process.wait()


def serve(channel: Connection) -> dict[str, Any] | None:
    """Forks for each job until nobody asks any more. Returns the job in the fork that is to do it, None in the server."""
    me = os.getpid()
    while True:
        if channel.poll(POLL_SECONDS):
            try:
                job: dict[str, Any] = channel.recv()
            except EOFError:
                return None
            try:
                pid = os.fork()
            except OSError:  # no memory, or too many processes: those that run go on
                channel.send(("refused", 0))
                continue
            if pid == 0:
                die_with(me)
                with contextlib.suppress(OSError):
                    os.setpgid(0, 0)
                channel.close()
                return job
            with contextlib.suppress(OSError):  # both do it: whoever signals the group must find it
                os.setpgid(pid, pid)
            channel.send(("started", pid))
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                channel.send(("ended", ended[0], os.waitstatus_to_exitcode(ended[1])))


def do(job: Mapping[str, Any]) -> int:
    """The run, in the fork. Returns its exit code."""
    said = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = ["zotune", *job["arguments"]]
    sys.modules["__main__"].__package__ = ""  # by these two a usage error names the program
    code: int = importlib.import_module("zotune.cli.app").run(job["arguments"])  # as `python -m zotune` would
    return code


def load() -> bool:
    """Imports; False where one of them has started the CUDA driver, which no fork can use."""
    quiet.libraries()
    for module in LOADED:
        with contextlib.suppress(Exception):  # a run that needs it says what is wrong
            importlib.import_module(module)
    import torch

    return not (torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork())


def main(argv: Sequence[str]) -> int:
    channel = Connection(int(argv[0]))
    able = load()
    channel.send(("ready", able))
    if not able:
        return 0
    gc.freeze()  # what is loaded is shared: a collection in a fork writes to none of it
    job = serve(channel)
    return 0 if job is None else do(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
