"""Budgets of seconds, by the pace of a step alone; and a search that one task makes for all."""

from __future__ import annotations

import json

import pytest
from standin import SUITE, run_here

pytest.importorskip("sqlalchemy", reason="zotune[bench] is not installed")

from zotune.bench import materials, pace
from zotune.bench.frame import runs_frame
from zotune.bench.pace import FILE, Paces, measure, time_all
from zotune.bench.plan import foresee, made_folder, make_plan
from zotune.bench.store import Store
from zotune.bench.suite import expand, load_suite
from zotune.cli.app import run
from zotune.errors import InputError

GRID = {"model": "tiny", "task": "words", "method": ["zo-sgd", "fo-sgd"], "scheme": "full", "seed": [0, 4]}
SECONDS = {"grid": GRID, "budget": {"seconds": 3.0}, "search": {"budget": {"seconds": 1.0}},
           "rules": [{"search": {"lr": [1e-4, 1e-3]}}]}  # fmt: skip


def known(folder, **seconds: float) -> None:
    """Paces by method, as if they had been timed."""
    paces = Paces(folder)
    expand(load_suite(str(folder.parent / "mine.yaml")), paces)
    file = folder / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {}
    for key in paces.missing:
        cells = expand(load_suite(str(folder.parent / "mine.yaml")), Paces(folder)).cells
        method = next(cell.options["method"] for cell in cells if cell.pace_key == key)
        told[key] = {"seconds": seconds[method]} if method in seconds else {"seconds": None, "why": "it broke"}
    file.write_text(json.dumps(told))


def test_each_run_has_as_many_steps_as_fit_its_seconds(suite_file, tmp_path):
    suite, out = suite_file(**SECONDS), tmp_path / "out"
    known(out, **{"zo-sgd": 0.01, "fo-sgd": 0.7})
    cells = expand(load_suite(suite), Paces(out)).cells
    steps = {(c.options["method"], c.search): c.options["steps"] for c in cells}
    assert steps == {("zo-sgd", True): 100, ("zo-sgd", False): 300, ("fo-sgd", True): 1, ("fo-sgd", False): 4}
    assert {c.forward_passes for c in cells if not c.search and c.options["method"] == "zo-sgd"} == {600}
    plan = make_plan(expand(load_suite(suite), Paces(out)), out)
    foresee(plan)
    assert {run.planned["pace"] for run in plan.runs} == {0.01, 0.7}


def test_what_cannot_be_timed_is_left_out_with_its_reason(suite_file, tmp_path):
    suite, out = suite_file(**SECONDS, missing="skip"), tmp_path / "out"
    known(out, **{"zo-sgd": 0.01})
    expanded = expand(load_suite(suite), Paces(out))
    assert {c.options["method"] for c in expanded.cells} == {"zo-sgd"}
    assert expanded.left_out == {"its steps could not be timed: it broke": 2}


def test_a_budget_of_seconds_needs_paces(suite_file):
    with pytest.raises(InputError, match=r"budget\.seconds: is of suites that `zotune bench run` runs"):
        expand(load_suite(suite_file(**SECONDS)))


def test_a_pace_is_of_what_a_step_does_and_of_nothing_else(suite_file, tmp_path):
    def keys(**changes) -> set[str]:
        suite = load_suite(suite_file(**(SECONDS | changes)))
        return {cell.pace_key for cell in expand(suite, Paces(tmp_path / "out")).cells}

    plain = keys()
    assert len(plain) == 2  # of twelve cells
    assert keys(defaults=SUITE["defaults"] | {"eval_size": 4, "log_every": 3}) == plain
    assert keys(defaults=SUITE["defaults"] | {"batch_size": 8}).isdisjoint(plain)
    assert keys(budget={"seconds": 9.0}) == plain


def test_a_step_is_timed_and_the_weights_stay_as_they_are(suite_file, tmp_path):
    suite, out = suite_file(**SECONDS), tmp_path / "out"
    paces = Paces(out)
    plan = make_plan(expand(load_suite(suite), paces), out)
    first = next(run for run in plan.runs if run.options["method"] == "fo-sgd")
    for what, definition in first.cell.made.items():
        materials.make(what, definition, made_folder(out, what, first.cell, definition))
    asked = tmp_path / "asked.json"
    asked.write_text(
        json.dumps({"a": first.options | {"lr": 1.0}, "b": first.options | {"scheme": "no-such", "lr": 1.0}})
    )
    measure(asked, tmp_path / "paces.json")
    told = json.loads((tmp_path / "paces.json").read_text())
    assert 0 < told["a"]["seconds"] < 5
    assert told["b"]["seconds"] is None
    assert "no-such" in told["b"]["why"]
    (tmp_path / "paces.json").write_text(json.dumps(told | {"a": {"seconds": 7.0}}))
    measure(asked, tmp_path / "paces.json")  # goes on, and asks nothing twice
    assert json.loads((tmp_path / "paces.json").read_text())["a"] == {"seconds": 7.0}


def test_when_the_time_is_up_the_rest_is_timed_by_the_next_command(suite_file, tmp_path, monkeypatch):
    suite, out = suite_file(**SECONDS), tmp_path / "out"
    paces = Paces(out)
    expanded = expand(load_suite(suite), paces)
    assert not time_all(expanded, paces, out, until=0.0, say=lambda line: None)
    monkeypatch.setattr(pace.sys, "executable", "false")
    with pytest.raises(InputError, match="the pace of steps could not be had"):
        time_all(expanded, paces, out, until=float("inf"), say=lambda line: None)


def test_a_report_s_seconds_are_those_of_a_step_alone(suite_file, program, tmp_path):
    _, store = run_here(suite_file(grid=GRID | {"seed": [0]}), tmp_path / "out", program)
    first, second = store.all()
    store.update(first.key, planned={"pace": 0.25})
    store.update(second.key, planned={}, metrics=[{"step": 1, "step_seconds": 0.5}])
    assert list(runs_frame(store.latest()).step_seconds) == [0.25, 0.5]


TWO = {"words": SUITE["tasks"]["words"], "others": SUITE["tasks"]["words"] | {"train": 30}}


def test_a_search_that_names_its_task_is_made_there_for_all(suite_file, program, tmp_path):
    grid = {"model": "tiny", "task": ["others", "words"], "method": "zo-sgd", "scheme": "full", "seed": [0, 4]}
    rules = [{"search": {"lr": [1e-4, 1e-3]}}]
    search = {"task": "words", "budget": {"forward_passes": 4}}
    suite, out = suite_file(grid=grid, tasks=TWO, rules=rules, search=search), tmp_path / "out"
    cells = expand(load_suite(suite)).cells
    assert {(c.task, c.search, c.trial) for c in cells} == {
        ("words", True, True), ("words", False, False), ("others", False, False),
    }  # fmt: skip
    assert len({c.group for c in cells}) == 1
    plan, store = run_here(suite, out, program)
    found = sorted((r.task, r.seed, r.options["lr"], bool(r.labels.get("search"))) for r in store.all())
    assert [(task, seed) for task, seed, _, tried in found if not tried] == [
        ("others", 0), ("others", 4), ("words", 0), ("words", 4),
    ]  # fmt: skip
    assert {lr for task, _, lr, tried in found if not tried} == {1e-3}
    assert [task for task, *_, tried in found if tried] == ["words", "words"]
    assert plan.held == []
    whole = expand(load_suite(suite, {"search.task": "others", "task": ["words"]})).cells
    assert {(c.task, c.search) for c in whole} == {("others", True), ("words", False)}


@pytest.mark.slow
def test_a_suite_with_a_budget_of_seconds_runs_to_its_report(suite_file, tmp_path, capsys):
    changes = SECONDS | {"budget": {"seconds": 0.2}, "search": {"budget": {"seconds": 0.1}}}
    suite, out = suite_file(**changes), tmp_path / "out"
    assert run(["bench", "run", suite, "--output", str(out), "--jobs", "2"]) == 0
    told = json.loads((out / FILE).read_text())
    paces = {one["method"]: one["seconds"] for one in told.values()}
    for record in Store(out).latest():
        seconds = 0.1 if record.labels.get("search") else 0.2
        assert record.options["steps"] == max(1, int(seconds / paces[record.method]))
    stamp = (out / FILE).stat().st_mtime_ns
    capsys.readouterr()
    assert run(["bench", "run", suite, "--output", str(out)]) == 0
    assert "all done" in capsys.readouterr().out
    assert (out / FILE).stat().st_mtime_ns == stamp
