"""Workers that are killed: torchrun starts the group again, it goes on from the record, and ends in the bits of a whole run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from launch import HERE, environment

import zotune

sys.path.insert(0, str(HERE.parent / "reliability"))
from processes import assert_same, outcome

from zotune.record.trajectory import TrajectoryError, read_file

LONG = {"steps": 60, "eval_every": 20, "save_every": 15, "lr": "1e-3", "micro_batch": 1}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def taken(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("localhost", port)) == 0


def agent(port: int, name: str, flags: list[str], said: Path) -> subprocess.Popen[str]:
    """A torchrun of one worker, one of 1 to 4."""
    how = [
        "--nnodes=1:4", "--nproc-per-node=1", "--max-restarts=20", f"--rdzv-id={name}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}", "--monitor-interval=0.1",
        "--rdzv-conf=last_call_timeout=10,join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=3",
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", *how, "-m", "zotune", "train", *flags]
    return started(command, said)


def started(command: Any, said: Path) -> subprocess.Popen[str]:
    shared_by_none = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"
    }  # else torch lets an agent that comes later wait for ever
    with open(said, "w") as file:
        return subprocess.Popen(command, env=environment(**shared_by_none), stdout=file, stderr=file, text=True)


def workers_of(agents: list[subprocess.Popen[str]]) -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {one.pid for one in agents}
    return [int(pid) for pid, parent in map(str.split, found.splitlines()) if int(parent) in parents]


def reached(folder: Path) -> int:
    try:
        return len(read_file(folder / "trajectory.zot").records)
    except TrajectoryError:
        return 0


@pytest.fixture
def launched(tmp_path, request):
    """Agents of a run, three or as many as the test says, and what a whole run of one process leaves."""
    model, data = tiny.save_model(tmp_path / "model"), tiny.save_data(tmp_path / "data", train=20, validation=6, test=6)
    options: dict[str, Any] = LONG | {"lr": float(LONG["lr"])}
    zotune.train(output=str(tmp_path / "whole"), **(runs.options_of(tmp_path) | options))
    flags, port = [*tiny.flags(model, data, **LONG), "--output", str(tmp_path / "run")], free_port()
    agents = [agent(port, tmp_path.name, flags, tmp_path / "0.said")]
    until = time.monotonic() + 60
    while (
        not taken(port) and time.monotonic() < until
    ):  # whoever comes first has torchrun's store, and has to be the one that stays
        time.sleep(0.05)
    agents += [
        agent(port, tmp_path.name, flags, tmp_path / f"{i}.said") for i in range(1, getattr(request, "param", 3))
    ]
    yield agents, tmp_path / "run", outcome(tmp_path / "whole")
    for one in agents:
        one.terminate()
    for one in agents:
        one.wait(60)


def told(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.parent.glob("*.said")))


def kill(*processes: int) -> None:
    for one in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def ended(agents: list[subprocess.Popen[str]], folder: Path, each: Callable[[], None] = lambda: None) -> None:
    """Wait for all agents to end well. each: called again and again before they do."""
    until = time.monotonic() + 280
    while any(one.poll() is None for one in agents) and time.monotonic() < until:
        time.sleep(0.02)
        each()
    assert [one.poll() for one in agents] == [0] * len(agents), told(folder)


@pytest.mark.slow
@pytest.mark.parametrize("launched", [2, 3, 4], indirect=True)
def test_a_run_whose_workers_are_killed_at_random_ends_in_the_bits_of_a_whole_one(launched):
    agents, folder, whole = launched
    draw, kills, last = random.Random(0), 0, 0

    def perhaps_kill() -> None:
        nonlocal kills, last
        if kills < 3 and last < reached(folder) < LONG["steps"]:  # it has come further since the last kill
            time.sleep(draw.random() / 5)
            alive, last = workers_of(agents), reached(folder)
            if alive:
                kill(draw.choice(alive))
                kills += 1

    ended(agents, folder, perhaps_kill)
    assert kills >= 1
    assert_same(folder, whole)


@pytest.mark.slow
def test_those_that_are_left_go_on_without_a_machine_that_is_gone(launched):
    agents, folder, whole = launched
    while (reached(folder) < 3 or "3 workers share the steps" not in told(folder)) and agents[0].poll() is None:
        time.sleep(0.02)
    kill(*workers_of(agents[2:]), agents[2].pid)  # the first agent has torchrun's own store
    ended(agents[:2], folder)
    assert "2 workers share the steps" in told(folder)
    assert_same(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("launched", [2], indirect=True)
def test_a_machine_that_comes_while_the_run_goes_on_joins_it(launched):
    agents, folder, whole = launched
    while (reached(folder) < 3 or "2 workers share the steps" not in told(folder)) and agents[0].poll() is None:
        time.sleep(0.02)
    held = workers_of(agents)[0]
    os.kill(held, signal.SIGSTOP)  # the run would be over before a third is there
    agents.append(started(agents[0].args, folder.parent / "2.said"))
    while "closing signal SIGTERM" not in told(folder) and agents[0].poll() is None:  # its coming ends the group of two
        time.sleep(0.1)
    os.kill(held, signal.SIGCONT)
    ended(agents, folder)
    assert "3 workers share the steps" in told(folder)
    assert_same(folder, whole)
