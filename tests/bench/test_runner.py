"""The runner: what is done stays done, whatever kills it."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from standin import run_here

pytest.importorskip("sqlalchemy", reason="zotune[bench] is not installed")

from zotune.bench.store import Store
from zotune.cli.app import run

DRIVER = """
import sys
from pathlib import Path
from standin import run_here
run_here(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
"""


def test_failures_and_want_of_memory_are_results_that_stop_no_other(suite_file, program, tmp_path):
    suite = suite_file(grid={"model": "tiny", "task": "words", "method": "zo-sgd", "seed": [2, 3, 0]})
    _, store = run_here(suite, tmp_path / "out", program)
    rows = {row.seed: row for row in store.all()}
    assert {seed: row.status for seed, row in rows.items()} == {0: "done", 2: "failed", 3: "oom"}
    assert "it broke" in rows[2].error
    assert rows[0].result["test_after"] == 60.0
    assert rows[0].metrics == [{"step": 1, "loss": 0.5, "forward_passes": 2}]
    assert "--seed 0" in rows[0].command
    again, _ = run_here(suite, tmp_path / "out", program)
    assert again.to_do == []
    retried, _ = run_here(suite, tmp_path / "out", program, retry=True)
    assert len(retried.runs) == 3
    assert {row.seed: row.attempts for row in store.all()} == {0: 1, 2: 2, 3: 2}


def test_the_call_in_which_a_run_fails_ends_with_1_and_later_ones_name_it(
    suite_file, program, tmp_path, capsys, monkeypatch
):
    from zotune.bench import runner

    monkeypatch.setattr(runner, "execute", functools.partial(runner.execute, program=program))
    grid = {"model": "tiny", "task": "words", "method": "zo-sgd", "scheme": "full"}
    command = ["bench", "run", suite_file(grid=grid | {"seed": [3, 0, 2]}), "--output", str(tmp_path / "out")]
    assert run(command) == 1
    said = capsys.readouterr()
    assert "1 failed (--retry runs failed ones again)" in said.out
    assert "failed: tiny words zo-sgd full seed=2: zotune: it broke" in said.err
    assert run(command) == 0
    said = capsys.readouterr()
    assert "all done, 1 of 3 failed: --retry" in said.out
    assert "failed: tiny words zo-sgd full seed=2" in said.err
    assert run([*command[:2], suite_file(grid=grid | {"seed": [3, 0]}), *command[3:-1], str(tmp_path / "other")]) == 0


def test_other_versions_of_the_code_count_only_when_asked(suite_file, program, tmp_path, monkeypatch):
    from zotune.bench import plan

    suite = suite_file(grid={"model": "tiny", "task": "words", "method": "zo-sgd", "seed": [0]})
    run_here(suite, tmp_path / "out", program)
    for module in ("plan", "runner"):
        monkeypatch.setattr(f"zotune.bench.{module}.code_version", lambda: "later")
    counted, _ = run_here(suite, tmp_path / "out", program, any_version=True)
    assert counted.to_do == []
    _, store = run_here(suite, tmp_path / "out", program)
    assert len(store.all()) == 2
    assert [row.code for row in store.latest()] == ["later"]
    assert plan.code_version() == "later"


def test_what_a_run_will_take_is_reckoned_anew_by_another_version(suite_file, program, tmp_path, monkeypatch):
    from zotune.bench.plan import foresee, make_plan
    from zotune.bench.suite import expand, load_suite

    suite = suite_file(grid={"model": "tiny", "task": "words", "method": "zo-sgd", "seed": [0]})
    _, store = run_here(suite, tmp_path / "out", program)
    (row,) = store.all()
    store.update(row.key, planned={"peak_bytes": 7, "step_seconds": 7.0})

    def planned() -> dict:
        plan = make_plan(expand(load_suite(suite)), tmp_path / "out", store)
        foresee(plan, store)
        return plan.runs[0].planned

    assert planned()["peak_bytes"] == 7
    for module in ("plan", "runner"):
        monkeypatch.setattr(f"zotune.bench.{module}.code_version", lambda: "later")
    assert planned()["peak_bytes"] > 10_000


def test_runs_that_differ_in_what_takes_memory_are_reckoned_apart(suite_file, tmp_path):
    from zotune.bench.plan import foresee, make_plan
    from zotune.bench.suite import expand, load_suite

    axes = {"model": "tiny", "task": "words", "method": "zo-sgd", "scheme": "full", "seed": 0}
    engines = {"engine": ["sequential", "dual"]}
    plan = make_plan(expand(load_suite(suite_file(grid=axes | engines))), tmp_path / "out", None)
    foresee(plan)
    sequential, dual = plan.runs
    assert sequential.planned["peak_bytes"] < dual.planned["peak_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="a child dies with its parent on Linux alone")
def test_a_killed_runner_takes_its_run_with_it_and_goes_on_when_started_again(suite_file, program, tmp_path):
    suite, out = suite_file(), tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    runner = subprocess.Popen([sys.executable, "-c", DRIVER, suite, str(out), *program], env=environment)

    def states() -> dict[int, str]:
        return {row.seed: row.status for row in Store(out).all()} if (out / "results.sqlite").exists() else {}

    wait_for(lambda: states() == {0: "done", 1: "running"})
    child = next(out / row.folder for row in Store(out).all() if row.seed == 1)
    wait_for(lambda: (child / "metrics.jsonl").exists())
    pid = int((child / "pid").read_text())
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    wait_for(lambda: not alive(pid))
    (out / "go").touch()
    plan, store = run_here(suite, out, program)
    assert [r.cell.options["seed"] for r in plan.runs if r.folder == child] == [1]
    assert states() == {0: "done", 1: "done"}
    assert {row.seed: row.attempts for row in store.all()} == {0: 1, 1: 2}
    assert {len((f / "attempts").read_text()) for f in (out / "runs").iterdir()} == {1, 2}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 60) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)


def test_a_suite_by_the_command_line_end_to_end(suite_file, tmp_path, capsys):
    """One real run; then there is nothing to do; a second runner and a foreign folder are refused."""
    suite, out = suite_file(), tmp_path / "out"
    command = ["bench", "run", suite, "--output", str(out), "--set", "seed=3"]
    assert run([*command, "--dry-run"]) == 0
    assert "1 runs, 8 forward passes; 0 done, 1 to do" in " ".join(capsys.readouterr().out.split())
    assert not out.exists()
    assert run(command) == 0
    (row,) = Store(out).all()
    assert (row.status, row.seed, row.error) == ("done", 3, "")
    assert row.result["forward_passes"] == row.planned["forward_passes"] == 8
    assert [line["step"] for line in row.metrics] == [1, 2, 3, 4]
    assert not list((out / row.folder).glob("model/*.safetensors"))
    assert json.loads((out / row.folder / "result.json").read_text()) == row.result
    capsys.readouterr()
    assert run(command) == 0
    assert "all done" in capsys.readouterr().out
    from filelock import FileLock

    with FileLock(out / ".lock"):
        assert run(command) == 2
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    assert run([*command[:4], str(foreign)]) == 2
    assert "thesis.tex" in capsys.readouterr().err


def test_without_the_extra_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr("zotune.bench.EXTRA", ("sqlalchemy", "not_there_at_all"))
    assert run(["bench", "run", "smoke", "--output", "x"]) == 2
    said = capsys.readouterr().err
    assert "zotune[bench]" in said
    assert len(said.splitlines()) == 1


def test_help_and_import_load_nothing_of_the_extra():
    code = (
        "import sys, zotune\nfrom zotune.cli.app import run\nrun(['bench', '--help'])\nrun(['--help'])\n"
        "bad = {'sqlalchemy', 'matplotlib', 'pandas', 'optuna', 'itables', 'jinja2', 'torch'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
