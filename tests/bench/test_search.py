"""The search: the grid and Optuna's trials, chosen on validation, resumed after a kill."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from standin import Silent

optuna = pytest.importorskip("optuna", reason="zotune[bench] is not installed")
pytest.importorskip("sqlalchemy", reason="zotune[bench] is not installed")

from zotune.bench import search
from zotune.bench.runner import execute
from zotune.bench.store import Record, Store
from zotune.bench.suite import expand
from zotune.cli import sweep
from zotune.cli.app import run
from zotune.options import SweepConfig, resolve


def options(tmp_path, **changes) -> SweepConfig:
    given = {
        "model": "org/model", "data": str(tmp_path), "template": "{text}", "label_words": {"0": "bad", "1": "good"},
        "steps": 4, "output": str(tmp_path / "out"), "eps": 1e-3,
    } | changes  # fmt: skip
    return resolve(SweepConfig, given, None)


@pytest.fixture
def searched(tmp_path, program):
    """Runs `by_optuna` with the stand-in, whose validation is best at lr 1e-3."""
    store = Store(tmp_path / "out")

    def go(trials: int, carry_out=None, **changes):
        given = options(tmp_path, trials=trials, **changes)
        real = lambda plan: execute(plan, store, jobs=1, gpus=0, watcher=Silent(), program=program)  # noqa: E731
        lrs, epses = search.values(given)
        return search.by_optuna(given, tmp_path / "out", store, carry_out or real, lrs, epses), store

    return go


def test_the_grid_is_every_pair_and_seed_over_the_same_options(tmp_path):
    given = options(tmp_path, lrs="1e-5,1e-4", epses="1e-3,1e-2", seeds="0,1", batch_size="4")
    cells = expand(search.suite_of(given, *search.values(given))).cells
    assert len({json.dumps(cell.options, sort_keys=True) for cell in cells}) == 8
    assert {(cell.options["lr"], cell.options["eps"]) for cell in cells} == {
        (1e-5, 1e-3), (1e-5, 1e-2), (1e-4, 1e-3), (1e-4, 1e-2),
    }  # fmt: skip
    assert {cell.options["batch_size"] for cell in cells} == {4}
    assert {cell.options["steps"] for cell in cells} == {4}


@pytest.mark.parametrize("method", ["fo-sgd", "fo-adam", "forward-grad"])
def test_a_method_without_eps_is_tried_with_none(tmp_path, method, program):
    given = options(tmp_path, method=method, lrs="1e-5,1e-4", epses="1e-3,1e-2", eps=None)
    cells = expand(search.suite_of(given, *search.values(given))).cells
    assert [(cell.options["lr"], cell.options.get("eps")) for cell in cells] == [(1e-5, None), (1e-4, None)]
    store = Store(tmp_path / "out")
    plan = search.plan_of(given, tmp_path / "out", store, *search.values(given))
    execute(plan, store, jobs=1, gpus=0, watcher=Silent(), program=program)
    assert all(math.isnan(row["eps"]) for row in search.outcome(store.all()))


def test_without_values_the_grid_spans_decades_around_the_schemes_start(tmp_path):
    from zotune.models.schemes import SCHEMES

    for name in ("full", "lora"):
        lrs, epses = search.values(options(tmp_path, scheme=name, eps=None))
        assert lrs[0] < SCHEMES[name].lr < lrs[-1]
        assert all(2 < b / a < 20 for a, b in pairwise(lrs))
        assert epses == [SCHEMES[name].eps]


def test_validation_chooses_a_pair_and_a_pair_with_a_failed_seed_comes_after_whole_ones():
    def record(lr, status, validation, test):
        result = {"validation_best": validation, "test_after": test} if status == "done" else {}
        return Record(options={"lr": lr, "eps": 1.0}, status=status, result=result)

    rows = search.outcome(
        [
            record(0.1, "done", 80.0, 60.0), record(0.1, "done", 82.0, 60.0), record(0.2, "done", 70.0, 99.0),
            record(0.3, "done", 99.0, 99.0), record(0.3, "failed", 0, 0),
        ]
    )  # fmt: skip
    assert [row["lr"] for row in rows] == [0.1, 0.2, 0.3]
    assert (rows[0]["validation"], rows[0]["seeds"], rows[2]["failed"]) == (81.0, 2, 1)


def test_a_task_given_as_a_block_is_searched_under_its_name(tmp_path):
    block = {"name": "mine", "data": "rows.jsonl", "prompt": "{text}", "words": {"0": "no", "1": "yes"}}
    given = options(tmp_path, data=None, template=None, label_words=None, task=block)
    cells = expand(search.suite_of(given, [1e-3], [1e-3])).cells
    assert [cell.task for cell in cells] == ["mine"]
    assert cells[0].options["task"]["words"] == block["words"]


def test_of_perplexities_the_lowest_is_chosen():
    tried = [
        Record(
            options={"lr": lr, "eps": 1.0}, status="done",
            result={"validation_best": best, "test_after": best, "metric": "perplexity"},
        )
        for lr, best in ((0.1, 30.0), (0.2, 20.0), (0.3, 25.0))
    ]  # fmt: skip
    assert [row["lr"] for row in search.outcome(tried)] == [0.2, 0.3, 0.1]


def test_optuna_tries_as_often_as_asked_within_the_range_and_goes_on(searched):
    runs, store = searched(3, lrs="1e-5,1e-1")
    rates = [r.options["lr"] for r in store.all()]
    assert len(runs) == len(rates) == 3
    assert all(1e-5 <= lr <= 1e-1 for lr in rates)
    more, _ = searched(5, lrs="1e-5,1e-1")
    assert len(more) == 2
    best = search.outcome(store.all())[0]
    assert best["validation"] == pytest.approx(
        90 - 10 * min(abs(math.log10(lr) + 3) for lr in (r.options["lr"] for r in store.all()))
    )


def test_a_trial_that_was_killed_is_tried_again_where_it_was(searched, tmp_path):
    class Killed(BaseException):
        pass

    asked = []

    def die(plan):
        asked.append(plan.runs[0].options["lr"])
        raise Killed

    with pytest.raises(Killed):
        searched(2, die, lrs="1e-5,1e-1")
    runs, _ = searched(2, lrs="1e-5,1e-1")
    assert runs[0].options["lr"] == asked[0]
    study = optuna.load_study(study_name="lr and eps", storage=f"sqlite:///{tmp_path / 'out' / search.STUDY}")
    states = [trial.state.name for trial in study.trials]
    assert states == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_failed_run_is_a_failed_trial(searched, tmp_path):
    runs, store = searched(1, lrs="1e-5,1e-1", seed=2)
    assert [record.status for record in store.all()] == ["failed"]
    assert len(runs) == 1


def test_the_command_plans_without_writing(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n' * 4)
    command = ["sweep", "--model", "org/model", "--data", str(tmp_path), "--template", "{text}", "--label-words",
               '{"0": "bad", "1": "good"}', "--output", str(tmp_path / "out"), "--lrs", "1e-5,1e-4"]  # fmt: skip
    assert run([*command, "--dry-run"]) == 0
    assert "2 runs" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run([*command, "--lrs", "fast"]) == 2
    assert run([*command, "--overwrite"]) == 2


@pytest.mark.slow
def test_a_search_in_which_no_run_finished_says_why(tmp_path, capsys):
    command = ["sweep", "--model", "org/model", "--data", str(tmp_path / "nothere"), "--template", "{text}",
               "--label-words", '{"0": "bad", "1": "good"}', "--output", str(tmp_path / "out"), "--lrs", "1e-5",
               "--device", "cpu"]  # fmt: skip
    assert run(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"no run of the search was finished, the first failed: --data {tmp_path / 'nothere'}: no such file" in last
    assert last.endswith(f"see {tmp_path / 'out'}/logs")


def test_what_failed_is_said_by_its_last_line_and_of_bad_rows_by_the_first_one():
    rows = "zotune: a:1: no word\nzotune: a:2: no word\nzotune: 9 bad rows, the first 2 above"
    for error, said in (
        (rows, "a:1: no word; 9 bad rows, the first 2 above"),
        ("Traceback\nKeyError: 3", "KeyError: 3"),
    ):
        failed = [Record(status="done", error=""), Record(status="failed", error=error)]
        assert sweep._why(failed) == f", the first failed: {said}"
    assert sweep._why([]) == ""
