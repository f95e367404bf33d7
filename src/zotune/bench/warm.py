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
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from zotune.bench.child import die_with

# What `zotune train` imports on its way, whatever the model.
LOADED = (
    "zotune.cli.app", "zotune.cli.train", "zotune.cli.expected", "zotune.cli.progress", "zotune.run", "zotune.replay",
    "zotune.card", "zotune.calibration", "zotune.bench.estimate", "zotune.bench.probe", "zotune.enhancements", "zotune.noise.cpu",
    "zotune.tasks.own", "zotune.tasks.generation", "zotune.models.adapters", "zotune.models.quantized",
    "zotune.engines.dual", "zotune.engines.graphs", "torch._dynamo", "datasets", "peft", "transformers.trainer",
    "transformers.modelcard", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.loss.loss_utils", "transformers.core_model_loading",
)  # fmt: skip
AVAILABLE = sys.platform == "linux"
REAP_SECONDS = 0.05


class Forked:
    """A run under way, with what the runner uses of `subprocess.Popen`."""

    def __init__(self, server: Server, pid: int) -> None:
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
            time.sleep(REAP_SECONDS)
        return code


class Server:
    """Starts runs; `with` it, or close() it. Of the thread that made it alone: it dies with that thread."""

    def __init__(self) -> None:
        self._ended: dict[int, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *of: object) -> None:
        self.close()

    def start(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Forked | None:
        """`zotune ARGUMENTS` as the leader of a group, what it says in the log. None where there is no server to be had."""
        job = {"arguments": list(arguments), "log": str(log), "environment": dict(environment)}
        for _ in range(2):  # a server that was killed is replaced once
            if self._process is None:
                self._open(environment)
            try:
                self._channel.send(job)
                while (said := self._channel.recv())[0] != "started":
                    self._note(said)
                return Forked(self, said[1])
            except (EOFError, OSError):
                self.close()
        return None

    def code_of(self, pid: int) -> int | None:
        """The exit code of a run, minus a signal's number; None while it runs."""
        try:
            while self._process is not None and self._channel.poll():
                self._note(self._channel.recv())
        except (EOFError, OSError):
            self.close()
        if self._process is None:  # its runs died with it
            self._ended.setdefault(pid, -signal.SIGKILL)
        return self._ended.pop(pid, None)

    def close(self) -> None:
        """End the server, and with it what still runs."""
        if self._process is not None:
            self._channel.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def _open(self, environment: Mapping[str, str]) -> None:
        self._channel, theirs = Pipe()
        program = [sys.executable, "-m", "zotune.bench.warm", str(theirs.fileno())]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zotune.bench.child", str(os.getpid()), *program],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
            # A run picks its GPU after the fork: asking how many there are must not start the driver before.
            env={**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}, start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def _note(self, said: tuple[Any, ...]) -> None:
        _, pid, code = said
        self._ended[pid] = code


def serve(channel: Connection) -> dict[str, Any] | None:
    """Forks for each job until nobody asks any more. Returns the job in the fork that is to do it, None in the server."""
    me = os.getpid()
    while True:
        if channel.poll(REAP_SECONDS):
            try:
                job: dict[str, Any] = channel.recv()
            except EOFError:
                return None
            if (pid := os.fork()) == 0:
                die_with(me)
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
    said = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.clear()
    os.environ.update(job["environment"])
    import torch

    if torch.cuda._is_in_bad_fork():  # something that was imported has started the driver, which no fork can use
        os.execv(sys.executable, [sys.executable, "-m", "zotune.cli", *job["arguments"]])
    from zotune.cli.app import run

    return run(job["arguments"])


def main(argv: Sequence[str]) -> int:
    channel = Connection(int(argv[0]))
    for module in LOADED:
        with contextlib.suppress(ImportError):  # what an extra brings; a run that needs it says so
            importlib.import_module(module)
    gc.freeze()  # what is loaded is shared: a collection in a fork writes to none of it
    job = serve(channel)
    return 0 if job is None else do(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
