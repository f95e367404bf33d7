"""Runs as forks of a server that has loaded the libraries."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zotune.bench import warm

pytestmark = pytest.mark.skipif(not warm.AVAILABLE, reason="runs are forks on Linux alone")

DRIVER = """
import os, sys, time
from pathlib import Path
from zotune.bench import warm
with warm.Server() as server:
    run = server.start(sys.argv[2:], Path(sys.argv[1]), os.environ)
    print(run.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def server():
    with warm.Server() as server:
        yield server


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Flags of a training run that does not end by itself, and its folder."""
    from standin import SUITE

    from zotune.bench import materials

    place = tmp_path_factory.mktemp("long")
    materials.make("model", SUITE["models"]["tiny"]["random"], place / "tiny")
    (place / "rows.jsonl").write_text('{"text": "so bad", "label": "no"}\n{"text": "so good", "label": "yes"}\n' * 20)
    flags = f"train --model {place / 'tiny'} --data {place / 'rows.jsonl'} --method zo-sgd --lr 1e-9 --device cpu"
    return [*flags.split(), "--steps", "10000000", "--log-every", "1", "--output", str(place / "out")], place / "out"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(what, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_has_its_exit_code_its_words_and_its_environment(server, tmp_path):
    done = server.start(["list", "methods"], tmp_path / "a.log", os.environ)
    bad = server.start(["train", "--method", "zo-none"], tmp_path / "b.log", os.environ)
    narrow = server.start(["list", "methods"], tmp_path / "c.log", {**os.environ, "COLUMNS": "60"})
    assert [run.wait(60) for run in (narrow, bad, done)] == [0, 2, 0]
    assert len({done.pid, bad.pid, narrow.pid, os.getpid()}) == 4
    assert "zo-sgd" in (tmp_path / "a.log").read_text()
    assert (tmp_path / "b.log").read_text().startswith("zotune: ")
    widths = [max(map(len, (tmp_path / name).read_text().splitlines())) for name in ("a.log", "c.log")]
    assert widths[1] < widths[0]


def test_a_run_leads_a_group_that_a_signal_reaches(server, long_run, tmp_path):
    flags, _ = long_run
    run = server.start([*flags[:-1], str(tmp_path / "out")], tmp_path / "log", os.environ)
    assert os.getpgid(run.pid) == run.pid
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(0.1)
    until(lambda: (tmp_path / "out" / "metrics.jsonl").exists())
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(60) == 143
    assert "saved" in (tmp_path / "log").read_text()
    assert run.poll() == run.returncode == 143


def test_a_killed_runner_takes_server_and_run_with_it(long_run, tmp_path):
    flags, out = long_run
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "log"), *flags], stdout=subprocess.PIPE, text=True
    )
    pid = int(driver.stdout.readline())
    server = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    until((out / "metrics.jsonl").exists)
    assert alive(pid)
    assert alive(server)
    assert server != driver.pid
    driver.kill()
    driver.wait()
    until(lambda: not alive(pid) and not alive(server), 10)


def test_where_the_server_was_killed_its_runs_are_and_the_next_has_another(long_run, tmp_path):
    flags, _ = long_run
    with warm.Server() as server:
        lost = server.start([*flags[:-1], str(tmp_path / "out")], tmp_path / "log", os.environ)
        server._process.kill()
        assert lost.wait(10) == -signal.SIGKILL
        until(lambda: not alive(lost.pid), 10)
        assert server.start(["list", "engines"], tmp_path / "next.log", os.environ).wait(60) == 0


def test_a_fork_that_cannot_use_the_card_starts_anew(tmp_path, monkeypatch):
    """The driver was started before the fork: the run is another interpreter, by execve."""
    import torch

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    if (pid := os.fork()) == 0:
        try:
            warm.do({"arguments": ["list", "schemes"], "log": str(tmp_path / "log"), "environment": dict(os.environ)})
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "prompt" in (tmp_path / "log").read_text()


def test_what_is_loaded_beforehand_exists():
    for module in warm.LOADED:
        importlib.import_module(module)
