"""Runs as forks of a server that has loaded the libraries."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest

from zotune import quiet
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


@pytest.mark.slow
def test_where_the_server_was_killed_its_runs_are_to_go_on_and_the_next_has_another(long_run, tmp_path):
    flags, _ = long_run
    with warm.Server() as server:
        lost = server.start([*flags[:-1], str(tmp_path / "out")], tmp_path / "log", os.environ)
        server._now._process.kill()
        until(lambda: not alive(lost.pid), 10)
        another = server.start(["list", "engines"], tmp_path / "next.log", os.environ)
        assert lost.poll() == lost.wait(1) == warm.LOST == 143  # nobody else tells
        assert another.wait(60) == 0


def test_a_system_that_allows_no_further_process_takes_no_run_along(monkeypatch):
    def fork():
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    ours, theirs = Pipe()
    thread = threading.Thread(target=warm.serve, args=(theirs,))
    thread.start()
    ours.send({"arguments": []})
    assert ours.recv() == ("refused", 0)
    ours.close()
    thread.join(10)
    assert not thread.is_alive()


def test_who_is_asked_to_stop_waits_for_no_imports(tmp_path):
    began = time.monotonic()
    with warm.Server(asked=lambda: True) as server:
        assert server.start(["list", "methods"], tmp_path / "log", os.environ) is None
    assert time.monotonic() - began < 3


PEFT = {
    "starts the driver": ("import torch\ntorch.cuda.is_initialized = lambda: True\n", False),
    "is broken": ("raise RuntimeError('no such kernel')\n", True),
}


@pytest.mark.parametrize("kind", PEFT)
def test_a_library_that_starts_the_driver_ends_the_server_and_one_that_is_broken_does_not(kind, tmp_path):
    source, able = PEFT[kind]
    (tmp_path / "peft.py").write_text(source)
    places = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with warm.Server(tmp_path / "server.log") as server:
        run = server.start(["list", "methods"], tmp_path / "log", os.environ | {"PYTHONPATH": places})
        assert (run is not None) == able
        if able:
            assert run.wait(60) == 0
        else:  # for good: none of the later ones waits
            began = time.monotonic()
            assert server.start(["list", "methods"], tmp_path / "log", os.environ) is None
            assert time.monotonic() - began < 0.5


def test_a_usage_error_names_the_program(server, tmp_path):
    run = server.start(["train", "--no-such-option"], tmp_path / "log", os.environ)
    assert run.wait(60) == 2
    assert "see zotune train --help" in (tmp_path / "log").read_text()


def test_what_is_loaded_beforehand_exists():
    for module in warm.LOADED:
        importlib.import_module(module)


def test_what_other_libraries_say_while_they_load_is_kept_off_a_sweep_and_a_suite(monkeypatch, caplog):
    for name in quiet.TALKATIVE:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    monkeypatch.setattr(warm, "LOADED", ())
    assert warm.load()
    for name in quiet.TALKATIVE:
        logging.getLogger(f"{name}.kernels").warning("a kernel for another machine")
        logging.getLogger(name).error("a fault")
    assert [record.message for record in caplog.records] == ["a fault"] * len(quiet.TALKATIVE)
