"""`zotune bench run` under torchrun: each run is shared by all workers, and is that of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import HashStore

pytest.importorskip("sqlalchemy", reason="zotune[bench] is not installed")

import zotune
from zotune.bench import shared
from zotune.bench.store import Store
from zotune.bench.suite import expand, load_suite
from zotune.cli.app import run
from zotune.errors import InputError
from zotune.record.trajectory import read_file

sys.path.insert(0, str(Path(__file__).parents[1] / "workers"))
from launch import said, torchrun

PYTHON = [sys.executable, "-c"]


@pytest.mark.slow
def test_a_suite_s_runs_by_two_workers_are_those_of_one_process(suite_file, tmp_path):
    suite, out = suite_file(grid={"model": "tiny", "task": "words", "method": ["zo-sgd", "zo-adam"]}), tmp_path / "out"
    command = ["-m", "zotune", "bench", "run", suite, "--output", out, "--set", "micro_batch=2"]
    done = torchrun(2, *command)
    assert done.returncode == 0, done.stderr
    rows = Store(out).all()
    assert [row.status for row in rows] == ["done", "done"]
    for row in rows:
        folder, alone = out / row.folder, tmp_path / row.key
        assert "2 workers share the steps" in (out / "logs" / f"{row.key}.log").read_text()
        zotune.train(**row.options, output=str(alone))
        assert read_file(folder / "trajectory.zot").records == read_file(alone / "trajectory.zot").records
        assert row.result["test_after"] == json.loads((alone / "result.json").read_text())["test_after"]
    again = torchrun(2, *command)
    assert (again.returncode, "all done" in again.stdout) == (0, True), again.stderr
    refused = torchrun(2, *command[:-2], "--set", "seed=1")
    assert refused.returncode == 1
    assert said(refused) == [
        "zotune: tiny words zo-sgd full seed=1: --micro-batch: 2 workers share out a step's rows, so many at a time; give it, at "
        "most 2"
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "tiny words zo-sgd full seed=0: --micro-batch: 2 workers share out"),
        ({"micro_batch": 3, "batch_size": 3}, "a step has 1 such piece for 2 workers"),
        (
            {"method": "fo-adam"},
            "--method fo-adam: 2 workers share out the places of zeroth-order steps",
        ),
    ],
)
def test_a_run_that_workers_cannot_share_is_named(suite_file, changes, line):
    with pytest.raises(InputError, match=line) as error:
        shared.refuse_unshared(expand(load_suite(suite_file(), changes)).cells, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv", [["--jobs", "2"], ["--executor", "ray"]])
def test_what_starts_processes_elsewhere_is_refused_under_a_launcher(argv, suite_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("zotune.bench.cluster.need_ray", lambda: None)
    assert run(["bench", "run", suite_file(), "--output", str(tmp_path / "out"), *argv]) == 2
    assert f"{' '.join(argv)}: 2 workers take one run at a time together" in capsys.readouterr().err


def a_process(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*PYTHON, code], start_new_session=True)


def test_a_run_has_ended_when_it_has_in_all_workers(tmp_path):
    log, store = tmp_path / "said.log", HashStore()
    log.write_text("its own words\n")
    crew = shared.Crew(0, 3, store, {})
    run = crew.begin(["train"], a_process(""), log)
    assert json.loads(store.get("run/1")) == ["train"]
    run._own.wait()
    store.set("ended/1/1", json.dumps({"code": 0, "said": "of no interest"}))
    assert run.poll() is None
    store.set("ended/1/2", json.dumps({"code": 1, "said": "zotune: worker 2: out of memory"}))
    assert run.wait(30) == 1
    assert log.read_text() == "its own words\nzotune: worker 2: out of memory\n"


def test_a_worker_that_fails_before_the_others_have_met_it_ends_them(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "PATIENCE", 0.2)
    crew = shared.Crew(0, 2, HashStore(), {})
    run = crew.begin(["train"], a_process("import time; time.sleep(60)"), tmp_path / "said.log")
    crew.store.set("ended/1/1", json.dumps({"code": 2, "said": "zotune: data: no such file"}))
    assert run.wait(30) == -15
    assert "no such file" in (tmp_path / "said.log").read_text()


def test_a_worker_that_does_not_answer_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "PATIENCE", 0.2)
    crew = shared.Crew(0, 2, HashStore(), {})
    run = crew.begin(["train"], a_process(""), tmp_path / "said.log")
    assert run.wait(30) == 1
    assert crew.store.check(["stop/1"])
