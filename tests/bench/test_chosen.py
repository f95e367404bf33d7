"""lr and eps searched within a suite, the time that a runner has, and results that move to another folder."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml
from standin import Silent, run_here

pytest.importorskip("sqlalchemy", reason="zotune[bench] is not installed")

from zotune.bench.frame import groups_frame, runs_frame
from zotune.bench.plan import Forecast, make_plan
from zotune.bench.runner import Waiting, begin, execute
from zotune.bench.store import Store
from zotune.bench.suite import expand, load_suite, together
from zotune.cli.bench import searches

GRID = {"model": "tiny", "task": "words", "method": "zo-sgd", "scheme": "full", "seed": [0, 4]}
SEARCH = {
    "grid": GRID, "rules": [{"when": {"method": "zo-sgd"}, "search": {"lr": [1e-4, 1e-3]}}],
    "search": {"budget": {"forward_passes": 4}}, "defaults": {"batch_size": 4, "device": "cpu", "log_every": 1},
}  # fmt: skip


def plan_of(suite: str, folder: Path, store: Store | None = None):
    return make_plan(expand(load_suite(suite)), folder, store)


def test_each_pair_is_tried_with_one_seed_and_the_best_on_validation_runs_with_all(suite_file, program, tmp_path):
    suite, out = suite_file(**SEARCH), tmp_path / "out"
    before = plan_of(suite, out)
    assert [(run.cell.options["lr"], run.cell.options["steps"]) for run in before.runs] == [(1e-4, 2), (1e-3, 2)]
    assert [run.cell.options["seed"] for run in before.held] == [0, 4]
    assert searches(before) == [
        "lr and eps: 2 of the runs try them for 1 configurations, validation chooses", "2 runs wait for that choice",
    ]  # fmt: skip
    plan, store = run_here(suite, out, program)
    found = {(r.seed, r.options["lr"], r.options["steps"]): r.labels for r in store.all() if r.status == "done"}
    assert found == {
        (0, 1e-4, 2): {"lr": 1e-4, "search": True}, (0, 1e-3, 2): {"lr": 1e-3, "search": True},
        (0, 1e-3, 4): {}, (4, 1e-3, 4): {},
    }  # fmt: skip
    assert (plan.to_do, plan.held) == ([], [])
    assert plan_of(suite, out, store).to_do == []
    (row,) = groups_frame(runs_frame(store.latest())).itertuples()
    assert (row.n, row.mean, row.lr, row.searched) == (2, 62.0, 1e-3, 2)  # the search's own figures are none of them


def test_a_search_tries_no_eps_for_methods_that_have_none(suite_file):
    grid = {"model": "tiny", "task": "words", "method": ["zo-sgd", "fo-sgd", "forward-grad"], "seed": 0}
    both = {"grid": grid, "rules": [{"search": {"lr": [1e-4, 1e-3], "eps": [1e-3, 1e-2]}}]}
    cells = [cell for cell in expand(load_suite(suite_file(**both))).cells if cell.search]
    assert [sum(cell.options["method"] == name for cell in cells) for name in grid["method"]] == [4, 2, 2]
    axes = {"grid": grid | {"eps": [1e-3, 1e-2]}}
    names = [cell.options["method"] for cell in expand(load_suite(suite_file(**axes))).cells]
    assert names == ["zo-sgd", "zo-sgd", "fo-sgd", "forward-grad"]


def test_a_search_with_the_budget_of_its_suite_is_not_run_twice(suite_file, program, tmp_path):
    _, store = run_here(suite_file(**(SEARCH | {"search": {}})), tmp_path / "out", program)
    assert sorted((r.seed, r.options["lr"], r.attempts) for r in store.all()) == [
        (0, 1e-4, 1),
        (0, 1e-3, 1),
        (4, 1e-3, 1),
    ]
    (row,) = groups_frame(runs_frame(store.latest())).itertuples()
    assert (row.n, row.lr) == (2, 1e-3)


def test_runs_whose_search_has_failed_are_left_and_named(suite_file, program, tmp_path):
    suite = suite_file(**(SEARCH | {"search": {"seed": 2}}))  # of which the program makes a failure
    plan, store = run_here(suite, tmp_path / "out", program)
    assert {r.status for r in store.all()} == {"failed"}
    assert len(plan.hopeless) == 2
    assert "as no lr and eps that were tried work: tiny words zo-sgd full seed=0" in searches(plan)[-1]


def test_when_the_time_is_up_what_runs_saves_and_the_same_plan_goes_on(suite_file, program, tmp_path):
    suite, out = suite_file(grid=GRID | {"seed": [0, 1]}), tmp_path / "out"  # seed 1 waits for a file
    store = Store(out)
    plan = plan_of(suite, out, store)
    state = execute(
        plan, store, jobs=2, gpus=0, watcher=Silent(), program=program, waiting=Waiting(plan, store, seconds=5)
    )
    assert state.late
    assert {r.seed: r.status for r in store.all()} == {0: "done", 1: "interrupted"}
    (out / "go").touch()
    run_here(suite, out, program)
    assert {r.seed: r.status for r in store.all()} == {0: "done", 1: "done"}


def test_no_run_is_started_that_is_not_expected_to_end_in_time(suite_file, program, tmp_path):
    out = tmp_path / "out"
    _, store = run_here(suite_file(grid=GRID | {"seed": [0]}), out, program)
    store.update(store.all()[0].key, started=0.0, finished=1000.0)  # 4 seconds for 8 passes, after 996 to begin with
    plan = plan_of(suite_file(), out, store)
    forecast = Forecast(store.all())
    for run in plan.runs:
        run.planned["seconds"] = forecast.of(run)
    assert [run.planned["seconds"] for run in plan.to_do] == [1000.0]
    assert Waiting(plan, store, forecast, seconds=900).take() is None
    assert Waiting(plan, store, forecast, seconds=1100).take() is not None


def test_a_run_that_two_suites_ask_for_is_one_run(suite_file, tmp_path):
    first = expand(load_suite(suite_file()))
    both = together([first, expand(load_suite(suite_file(name="more", grid=GRID | {"seed": [1, 2]})))])
    assert [cell.options["seed"] for cell in both.cells] == [0, 1, 2]
    assert [cell.suite for cell in both.cells] == ["mine", "mine", "more"]
    assert both.suite.name == "mine, more"


def test_results_packed_in_one_place_go_on_in_another(suite_file, program, tmp_path):
    path = Path(__file__).parents[2] / "benchmarks" / "study" / "study.py"
    spec = spec_from_file_location("study", path)
    study = module_from_spec(spec)
    spec.loader.exec_module(study)
    suite, there, here, packed = suite_file(**SEARCH), tmp_path / "there", tmp_path / "here", tmp_path / "packed"
    _, store = run_here(suite, there, program)
    weights = there / store.all()[0].folder / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("large")
    packed.mkdir()
    (packed / "study.tar.gz.99").write_text("of an earlier, larger pack")
    (there / "made" / "paces.json").write_text("{}")
    size = study.pack(there, packed, 0.001)
    parts = sorted(packed.iterdir())
    assert len(parts) == -(-size // int(0.001 * 2**20)) > 1
    study.unpack(packed, here)
    again = Store(here)
    assert [(r.key, r.result, r.metrics, r.status) for r in again.all()] == [
        (r.key, r.result, r.metrics, r.status) for r in store.all()
    ]
    assert plan_of(suite, here, again).to_do == []
    assert (here / "made" / "paces.json").read_text() == "{}"
    assert {p.name for p in (here / "runs").rglob("*") if p.is_file()} == {"metrics.jsonl", "result.json"}


def test_a_run_goes_on_in_a_folder_that_was_moved(suite_file, program, tmp_path):
    """Where a model lies that is made is no option of the run."""
    suite, out = suite_file(), tmp_path / "out"
    plan, store = plan_of(suite, tmp_path / "moved"), Store(tmp_path / "moved")
    run = plan.runs[0]
    run.folder.mkdir(parents=True)
    earlier = {"model": str(out / "made" / "model"), "data": str(out / "made" / "data"), "lr": 0.001}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(earlier))
    begin(run, plan, store)
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == {
        "model": run.options["model"], "data": run.options["data"], "lr": 0.001,
    }  # fmt: skip
