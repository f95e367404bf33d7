"""The same suite over Ray: the driver alone writes the store, a node that sees nothing of its folder sends the files back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from standin import Silent, run_here
from test_runner import alive, wait_for

pytest.importorskip("sqlalchemy", reason="zotune[bench] is not installed")

from zotune.bench import cluster
from zotune.bench.cluster import TOKEN, Job, execute_on_ray, work
from zotune.bench.plan import make_plan
from zotune.bench.store import Store
from zotune.bench.suite import expand, load_suite
from zotune.cli.app import run

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="zotune[ray] is not installed")

DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_cluster import over_ray
over_ray(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
"""


def over_ray(suite: str, folder: Path, program, **options):
    store = Store(folder)
    plan = make_plan(expand(load_suite(suite)), folder, store)
    execute_on_ray(plan, store, address=None, jobs=2, watcher=Silent(), program=program[1:], **options)
    return plan, store


def test_without_ray_one_line_says_so(monkeypatch, capsys, suite_file, tmp_path):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    command = ["bench", "run", suite_file(), "--output", str(tmp_path / "out")]
    assert run([*command, "--executor", "ray"]) == 2
    assert capsys.readouterr().err == "zotune: --executor ray needs zotune[ray]: pip install 'zotune[ray]'\n"
    assert run([*command, "--ray-address", "auto"]) == 2
    assert "needs --executor ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_ray
def test_an_address_without_a_cluster_is_one_line(capsys, suite_file, tmp_path):
    command = ["bench", "run", suite_file(), "--output", str(tmp_path / "out"), "--executor", "ray", "--ray-address"]
    for address in ("127.0.0.1:9", "nowhere"):
        assert run([*command, address]) == 2
        assert f"--ray-address {address}: no cluster there" in capsys.readouterr().err


@pytest.fixture
def job(suite_file, program, tmp_path, monkeypatch) -> Job:
    """The run of seed 0, of a driver whose token is 'ours'."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    plan = make_plan(expand(load_suite(suite_file())), tmp_path / "out")
    (tmp_path / "out").mkdir()
    return Job(plan.runs[0], tmp_path / "out", "ours", False, program[1:])


def test_a_node_that_sees_the_drivers_folder_works_in_it(job, tmp_path):
    (job.folder / TOKEN).write_text("ours")
    outcome = work(job)
    assert (outcome.code, outcome.files) == (0, {})
    assert json.loads((job.run.folder / "result.json").read_text())["test_after"] == 60.0
    assert not list((tmp_path / "elsewhere").glob("zotune-bench-*"))


@pytest.mark.parametrize("token", [None, "another driver's"])
def test_a_node_that_does_not_see_it_makes_what_is_needed_and_sends_the_files_back(job, token, tmp_path):
    if token:
        (job.folder / TOKEN).write_text(token)
    outcome = work(job)
    assert outcome.code == 0
    assert set(outcome.files) == {"result.json", "metrics.jsonl", "pid", "attempts"}
    assert json.loads(outcome.files["result.json"])["test_after"] == 60.0
    assert not job.run.folder.exists()
    (there,) = (tmp_path / "elsewhere").glob("zotune-bench-*")
    assert {p.name.split("-")[0] for p in (there / "made").iterdir()} == {"model", "data"}
    assert not list((there / "runs").iterdir())


@needs_ray
def test_the_store_is_that_of_a_local_run(suite_file, program, tmp_path):
    suite = suite_file(grid={"model": "tiny", "task": "words", "method": "zo-sgd", "seed": [2, 3, 0]})
    _, local = run_here(suite, tmp_path / "local", program)
    _, store = over_ray(suite, tmp_path / "out", program)

    def rows(of: Store) -> dict:
        return {r.seed: (r.key, r.status, r.result, r.metrics, r.attempts, r.planned) for r in of.all()}

    assert rows(store) == rows(local)
    assert "it broke" in next(r.error for r in store.all() if r.seed == 2)
    assert not (tmp_path / "out" / TOKEN).exists()
    again, _ = over_ray(suite, tmp_path / "out", program)
    assert again.to_do == []


@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="a child dies with its parent on Linux alone")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_ends_takes_its_runs_with_it_and_none_counts_twice(suite_file, program, tmp_path, how):
    suite, out = suite_file(), tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), suite, str(out), *program]
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    def states() -> dict[int, str]:
        return {row.seed: row.status for row in Store(out).all()} if (out / "results.sqlite").exists() else {}

    wait_for(lambda: states() == {0: "done", 1: "running"})
    child = next(out / row.folder for row in Store(out).all() if row.seed == 1)
    wait_for(lambda: (child / "metrics.jsonl").exists())
    pid = int((child / "pid").read_text())
    driver.send_signal(how)
    assert driver.wait(60) != 0
    wait_for(lambda: not alive(pid))
    assert states()[1] == ("running" if how == signal.SIGKILL else "interrupted")
    (out / "go").touch()
    _, store = over_ray(suite, out, program)
    assert states() == {0: "done", 1: "done"}
    assert {row.seed: row.attempts for row in store.all()} == {0: 1, 1: 2}
    assert sorted((f / "attempts").read_text() for f in (out / "runs").iterdir()) == ["x", "xx"]
