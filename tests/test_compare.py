"""`zotune compare`: who gets how much, which runs that makes, and the sentence at the end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

for extra in ("itables", "jinja2", "matplotlib", "sqlalchemy"):
    pytest.importorskip(extra, reason="zotune[bench] is not installed")

import zotune
from zotune.cli.app import run
from zotune.cli.bench import check_folder
from zotune.cli.compare import _sized
from zotune.options import CompareConfig, resolve
from zotune.reports.compare import TRIAL, contenders, plan_for, row_of, steps_of, too_few, verdict
from zotune.reports.facts import Facts


def options(**given) -> CompareConfig:
    return resolve(CompareConfig, {"model": "m", "task": "sst2", "output": "o", **given}, None)


def row(name, after, gib, validation=None, status="done"):
    value = after if validation is None else validation
    return {
        "name": name, "status": status, "metric": "accuracy", "after": after, "validation": value, "peak_memory_bytes": gib * 2**30,
    }  # fmt: skip


def facts(scores) -> Facts:
    return Facts(Path("x"), {}, {"metric": "accuracy"}, [], [{"after": {"score": float(score)}} for score in scores])


def test_time_and_passes_pay_for_steps():
    assert steps_of("time", 2.0, None, 0.5, 2) == steps_of("memory", 2.0, None, 0.5, 2) == 240
    assert steps_of("passes", 2.0, 2000, 0.5, 2) == 1000
    assert steps_of("time", 0.001, None, 5.0, 2) == 2


def test_back_propagation_is_beside_and_zeroth_orders_own_options_are_its_alone():
    found = contenders(options(method="zo-sgd-mmt", momentum=0.8, queries=2), 1e-5, 10**8)
    assert [one.options["method"] for one in found] == ["zo-sgd-mmt", "fo-adam", "fo-adam"]
    assert [one.options["scheme"] for one in found] == ["full", "lora", "full"]
    assert found[0].options["momentum"] == 0.8
    assert found[0].rates == (3e-6, 1e-5, 3e-5)
    assert set(found[1].options) == {"method", "scheme"}
    assert contenders(options(lr=1e-4), 1e-5, 10**8)[0].rates == ()
    small, big = (contenders(options(), 1e-5, size)[2].rates for size in (10**8, 7 * 10**9))
    assert big == pytest.approx([rate / 10 for rate in small])


def test_each_tries_its_rates_for_a_part_of_its_steps_and_runs_the_best_whole():
    config = options(seeds="0,1", method="zo-sgd-mmt", momentum=0.8)
    sized = list(zip(contenders(config, 1e-5, 10**8), (400, 80, 40), strict=True))
    cells = plan_for(config, sized).cells
    for contender, steps in sized:
        own = [
            c
            for c in cells
            if (c.options["method"], c.options["scheme"]) == (contender.options["method"], contender.options["scheme"])
        ]
        tried, whole = [c for c in own if c.trial], [c for c in own if not c.trial]
        assert sorted(c.options["lr"] for c in tried) == sorted(contender.rates)
        assert {c.options["steps"] for c in tried} == {steps // TRIAL}
        assert [(c.options["steps"], c.options["seed"], c.open) for c in whole] == [
            (steps, 0, ("lr",)),
            (steps, 1, ("lr",)),
        ]
        assert {c.options.get("momentum") for c in own} == {
            0.8 if contender.options["method"] == "zo-sgd-mmt" else None
        }


def test_a_row_is_the_mean_of_its_whole_runs(tmp_path):
    def record(seed, steps, after, status="done"):
        result = {
            "metric": "accuracy", "test_before": 50.0, "test_after": after, "validation_best": after + 1, "lr": 1e-5,
            "forward_passes": 2 * steps, "wall_seconds": 10.0, "peak_memory_bytes": 100 + seed,
        }  # fmt: skip
        return SimpleNamespace(
            method="zo-sgd",
            scheme="full",
            seed=seed,
            status=status,
            options={"steps": steps},
            result=result,
            folder=f"runs/{seed}",
        )

    contender = contenders(options(), 1e-5, 1)[0]
    records = [record(0, 40, 80.0), record(1, 40, 90.0), record(0, 10, 10.0)]
    found = row_of(contender, records, 40, tmp_path)
    assert (found["after"], found["validation"], found["seeds"], found["peak_memory_bytes"]) == (85.0, 86.0, 2, 101)
    assert found["folders"] == [str(tmp_path / "runs/0"), str(tmp_path / "runs/1")]
    assert row_of(contender, [record(0, 40, 0.0, "oom")], 40, tmp_path) == {"name": "zo-sgd", "status": "oom"}


def test_use_lora_is_a_good_answer():
    rows = [row("zo-sgd", 80.0, 1.0), row("Adam on LoRA", 92.0, 1.05), row("Adam on all weights", 91.0, 3.0)]
    assert verdict(rows, {}, "time").startswith("Use Adam on LoRA: 92.0 %, and none of these needs much less memory")


def test_validation_chooses_not_test():
    rows = [row("a", 70.0, 1.0, validation=95.0), row("b", 99.0, 1.0, validation=60.0)]
    assert verdict(rows, {}, "time").startswith("Use a: 70.0 %")


def test_what_rows_cannot_tell_apart_is_not_worth_memory():
    rows = [row("zo-sgd", 80.0, 1.0), row("Adam", 81.0, 4.0)]
    near = {"zo-sgd": facts([1] * 80 + [0] * 20), "Adam": facts([1] * 75 + [0] * 19 + [1] * 6)}
    assert "cannot tell" in verdict(rows, near, "time")
    assert verdict(rows, near, "time").startswith("Use zo-sgd")
    far = {"zo-sgd": facts([1] * 50 + [0] * 50), "Adam": facts([1] * 95 + [0] * 5)}
    assert verdict(rows, far, "time").startswith("Use Adam: 81.0 % against 80.0 % of zo-sgd, if 4.0 times its memory")


def test_in_the_same_memory_what_needs_more_is_no_choice():
    rows = [row("zo-sgd", 80.0, 1.0), row("Adam on LoRA", 85.0, 1.5), row("Adam", 99.0, 4.0)]
    assert verdict(rows, {}, "memory") == "Use zo-sgd: 80.0 %; the others need more memory than it does."
    assert verdict(rows, {}, "time").startswith("Use Adam: 99.0 %")


def test_what_failed_is_no_choice():
    rows = [row("zo-sgd", 80.0, 1.0), row("Adam", 0.0, 1.0, status="oom")]
    assert verdict(rows, {}, "time").startswith("Use zo-sgd")
    assert "nothing can be said" in verdict([rows[1]], {}, "time")


def test_a_handful_of_steps_of_zeroth_order_is_said_to_be_no_trial():
    few = {"name": "zo-sgd", "status": "done", "steps": 3}
    assert too_few(few, "time").startswith("zo-sgd got 3 steps, where it takes hundreds: 34 times the --minutes")
    assert "--passes" in too_few(few, "passes")
    assert too_few(few | {"steps": 100}, "time") == too_few({"name": "zo-sgd", "status": "oom"}, "time") == ""


def test_steps_are_timed_once_and_anew_where_other_budgets_are_asked_for(tmp_path, monkeypatch):
    model, data = tiny.save_model(tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", tiny.text_rows(40))
    seconds = iter(range(1, 100))
    monkeypatch.setattr("zotune.run.timing.timed", lambda ready: (0.01 * next(seconds), 0.01, 2, "any"))

    def sized(minutes):
        given = options(
            model=str(model), task=None, data=str(data), template=tiny.TEMPLATE, label_words=tiny.WORDS, minutes=minutes
        )
        return [steps for _, steps in _sized(given, tmp_path / "out")]

    first = sized(0.1)
    assert first == [600, 300, 200]  # 6 s in steps of 0.01, 0.02, 0.03
    assert sized(0.1) == first
    assert sized(0.2) == [300, 240, 200]
    check_folder(tmp_path / "out")  # what it wrote keeps no benchmark out


@pytest.mark.slow  # a dozen processes
def test_a_comparison_on_rows_in_memory(tmp_path, capsys):
    tiny.save_model(tmp_path / "model")
    rows = {"train": tiny.text_rows(60), "validation": tiny.text_rows(20, 1), "test": tiny.text_rows(30, 2)}
    given = {
        "model": tmp_path / "model", "data": rows, "template": tiny.TEMPLATE, "label_words": json.loads(tiny.WORDS),
        "loss": "candidates", "minutes": 0.03, "output": tmp_path / "out",
    }  # fmt: skip
    told = zotune.compare(**given)
    assert [one["status"] for one in told["rows"]] == ["done"] * 3
    assert told["verdict"] in capsys.readouterr().out
    assert told == json.loads((tmp_path / "out/compare.json").read_text())
    assert (tmp_path / "out/compare.html").read_text().count("<svg") == 2
    again = zotune.compare(**given)  # everything is there
    assert again == told


def test_a_folder_of_somebodys_own_is_refused(tmp_path, capsys):
    tiny.save_model(tmp_path / "model")
    (tmp_path / "notes.txt").write_text("mine")
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.text_rows(20))
    argv = ["compare", "--model", str(tmp_path / "model"), "--data", str(data), "--template", tiny.TEMPLATE]
    assert run([*argv, "--label-words", tiny.WORDS, "--output", str(tmp_path)]) == 2
    assert "not a benchmark's" in capsys.readouterr().err
