"""A run's folder after the run: what it keeps of each row, how sure its figures are, its page, the folder in place of a model."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import tiny
import yaml

import zotune
from zotune.cli.app import run
from zotune.errors import InputError
from zotune.options.from_run import from_run
from zotune.tasks.intervals import Z, gain, interval

NASTY = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, rows, and two runs on them: all parameters, and LoRA."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.save_model(folder / "model")
    (folder / "data").mkdir()
    for split, size, seed in (("train", 60, 0), ("validation", 20, 1), ("test", 40, 2)):
        tiny.write_rows(folder / "data" / f"{split}.jsonl", tiny.text_rows(size, seed))
    common = {
        "model": folder / "model", "data": folder / "data", "template": tiny.TEMPLATE, "label_words": json.loads(tiny.WORDS),
        "loss": "candidates", "steps": 30, "method": "fo-adam", "lr": 2e-3,
    }  # fmt: skip
    zotune.train(**common, output=folder / "full")
    zotune.train(**common, output=folder / "lora", scheme="lora")
    return folder


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_page_says_that_there_were_no_rows_to_test_on(place, tmp_path):
    """The rows to choose by are scored then, and are no others."""
    from zotune.reports.page import make_page

    data = {"train": tiny.text_rows(12), "validation": tiny.text_rows(4, 1)}
    zotune.train(
        model=place / "model",
        data=data,
        output=tmp_path / "a",
        steps=1,
        template=tiny.TEMPLATE,
        label_words=json.loads(tiny.WORDS),
    )
    page = make_page([tmp_path / "a"], tmp_path / "page.html").read_text()
    assert "12 to train on, 4 to choose by, none to test on" in page
    whole = make_page([place / "lora"], tmp_path / "other.html").read_text()
    assert re.search(r"\d+ to train on, \d+ to choose by, 40 to test on", whole)


def test_wilsons_interval_is_where_the_figure_is_just_as_far_as_95_percent_allow():
    for n, k in ((10, 0), (10, 10), (50, 37), (1000, 812)):
        low, high = interval([1.0] * k + [0.0] * (n - k))
        for p in (low, high):
            if 1e-9 < p < 1 - 1e-9:
                assert math.isclose(abs(k / n - p), Z * math.sqrt(p * (1 - p) / n), rel_tol=1e-9)
        assert low <= k / n <= high


def test_a_gain_of_rows_scored_twice_is_surer_than_two_intervals_say():
    draw = random.Random(0)
    before = [float(draw.random() < 0.5) for _ in range(400)]
    after = [1.0 if i % 20 == 0 else score for i, score in enumerate(before)]  # some are mended, none spoilt
    mean, low, high = gain(before, after)
    assert math.isclose(mean, fmean(after) - fmean(before))
    assert 0 < low < mean < high < 0.06
    assert interval(after)[0] < interval(before)[1]  # which alone would tell nothing


@pytest.mark.parametrize("seed", range(3))
def test_the_bootstrap_of_other_scores_is_as_wide_as_the_normal_one(seed):
    draw = random.Random(seed)
    scores = [draw.random() for _ in range(500)]
    low, high = interval(scores)
    mean = fmean(scores)
    half = Z * math.sqrt(fmean((s - mean) ** 2 for s in scores) / len(scores))
    assert math.isclose(high - low, 2 * half, rel_tol=0.08)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_predictions_are_those_that_the_figures_are_made_of(place, name):
    lines, figures = predictions(place / name), result(place / name)
    assert len(lines) == figures["test_rows"] == 40
    for when in ("before", "after"):
        assert math.isclose(100 * fmean(line[when]["score"] for line in lines), figures[f"test_{when}"])
        assert all(line[when]["score"] == (line[when]["label"] == line["right"]) for line in lines)
    assert figures["validation_before"] <= figures["validation_best"]


def test_answers_and_plain_text_are_kept_too(place, tmp_path):
    rows = [{"prompt": f"the day {i}", "completion": " good"} for i in range(8)]
    zotune.train(model=place / "model", data=rows, output=tmp_path / "a", steps=1, lr=0.0, max_new_tokens=3)
    lines = predictions(tmp_path / "a")
    assert {line["right"].strip() for line in lines} == {"good"}
    assert all("answer" in line["after"] and 0 <= line["after"]["score"] <= 1 for line in lines)
    zotune.train(model=place / "model", data=[{"text": "the film"}] * 4, output=tmp_path / "b", steps=1, lr=0.0)
    assert all(
        line["right"] is None and line["before"]["loss"] == line["after"]["loss"]
        for line in predictions(tmp_path / "b")
    )


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_runs_folder_is_its_model(place, name, tmp_path):
    options = {"template": tiny.TEMPLATE, "label_words": json.loads(tiny.WORDS), "data": place / "data"}
    named = {
        "full": {"model": place / "full/model"},
        "lora": {"model": place / "model", "adapter": place / "lora/model"},
    }
    figures = zotune.evaluate(model=place / name)
    assert figures == zotune.evaluate(**named[name], **options)
    assert figures["value"] == result(place / name)["test_after"]
    rows = tiny.text_rows(6, seed=5)
    assert zotune.predict(model=place / name, data=rows) == zotune.predict(**named[name], **options | {"data": rows})
    if name == "lora":
        assert run(["merge", "--model", str(place / name), "--output", str(tmp_path / "whole")]) == 0
        assert zotune.evaluate(model=tmp_path / "whole", **options)["value"] == figures["value"]


def test_what_is_said_beside_a_runs_folder_wins(place):
    known = dict.fromkeys(("model", "data", "task", "template", "label_words", "seed", "dtype"))
    given = {
        "model": str(place / "full"),
        "template": "{text}",
        "label_words": {"0": "a", "1": "b"},
        "dtype": "bfloat16",
    }
    taken = from_run(given, known)
    assert taken == given | {"model": str(place / "full/model"), "data": str(place / "data"), "seed": 0}
    task = from_run({"model": str(place / "full"), "task": "sst2"}, known)
    assert task["task"] == "sst2"
    assert not {"template", "label_words", "data"} & set(task)
    assert from_run({"model": str(place / "model")}, known) == {"model": str(place / "model")}


def test_a_run_that_has_no_model_yet_or_none_to_merge_is_refused(place, tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    shutil.copy(place / "full/config.yaml", tmp_path / "begun")
    assert run(["eval", "--model", str(tmp_path / "begun")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(["merge", "--model", str(place / "full"), "--output", str(tmp_path / "m")]) == 2
    assert "whole already" in capsys.readouterr().err


def test_predictions_keep_the_rows_columns_also_as_a_table(place, tmp_path):
    rows = [
        {"id": i, "text": text, "label": "?", "tags": ["x", "y"]}
        for i, text in enumerate(["a great day", 'a "bad", film'])
    ]
    path = tiny.write_rows(tmp_path / "new.jsonl", rows)
    for name in ("out.jsonl", "out.csv", "out.tsv"):
        assert (
            run(["predict", "--model", str(place / "full"), "--data", str(path), "--output", str(tmp_path / name)]) == 0
        )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        assert {k: line[k] for k in ("id", "text", "tags")} == {k: row[k] for k in ("id", "text", "tags")}
        assert line["given_label"] == "?"
        assert line["label"] == max(line["scores"], key=line["scores"].get)
    for name, delimiter in (("out.csv", ","), ("out.tsv", "\t")):
        with open(tmp_path / name, newline="") as file:
            cells = list(csv.DictReader(file, delimiter=delimiter))
        assert [cell["text"] for cell in cells] == [row["text"] for row in rows]
        assert [json.loads(cell["tags"]) for cell in cells] == [row["tags"] for row in rows]
        assert [float(cell["score 1"]) for cell in cells] == [line["scores"]["1"] for line in lines]


def test_details_say_how_sure_and_what_is_taken_for_what(place, capsys, tmp_path):
    out = tmp_path / "figures.json"
    assert run(["eval", "--model", str(place / "full"), "--details", "--output", str(out)]) == 0
    figures, shown = json.loads(out.read_text()), capsys.readouterr().out
    counts: dict[tuple[str, str], int] = {}
    for line in predictions(place / "full"):
        pair = line["right"], line["after"]["label"]
        counts[pair] = counts.get(pair, 0) + 1
    assert figures["labels"] == ["0", "1"]
    assert figures["confusion"] == [[counts.get((a, b), 0) for b in "01"] for a in "01"]
    low, high = figures["interval"]
    assert low <= figures["value"] <= high
    assert f"{low:.1f} to {high:.1f}" in shown


def page_of(*folders: Path, target: Path) -> str:
    pytest.importorskip("matplotlib", reason="zotune[bench] is not installed")
    assert run(["report", *map(str, folders), "--output", str(target)]) == 0
    return target.read_text()


def test_the_page_of_a_run_has_its_figures_and_needs_nothing_else(place, tmp_path):
    page, figures = page_of(place / "full", target=tmp_path / "page.html"), result(place / "full")
    assert f"{figures['test_before']:.1f} %" in page
    assert f"{figures['test_after']:.1f} %" in page
    mended = sum(line["after"]["score"] > line["before"]["score"] for line in predictions(place / "full"))
    assert f"Rows that were mended: {mended}" in page
    assert "zotune train" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert page.count("<svg") == 2


def test_what_rows_and_options_say_is_text_in_the_page(place, tmp_path):
    shutil.copytree(place / "full", tmp_path / "run")
    lines = predictions(tmp_path / "run")
    for line in lines:
        line["prompt"], line["before"]["score"], line["after"]["score"] = NASTY, 0.0, 1.0
    (tmp_path / "run/predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run/result.json").write_text(json.dumps(result(place / "full") | {"task": NASTY, "device": NASTY}))
    page = page_of(tmp_path / "run", target=tmp_path / "page.html")
    assert NASTY not in page
    assert "&lt;script&gt;alert(1)" in page


def test_runs_beside_each_other_and_a_run_that_kept_no_predictions(place, tmp_path):
    shutil.copytree(place / "full", tmp_path / "old")
    (tmp_path / "old/predictions.jsonl").unlink()
    told = result(tmp_path / "old")
    del told["validation_before"]
    (tmp_path / "old/result.json").write_text(json.dumps(told))
    page = page_of(place / "full", place / "lora", tmp_path / "old", target=tmp_path / "page.html")
    assert "3 runs" in page
    assert page.count('scope="row"><a href="#run-') == 3


def test_a_run_that_answers_one_class_is_told_so(place, tmp_path):
    shutil.copytree(place / "full", tmp_path / "run")
    told = result(tmp_path / "run") | {"test_after": 50.0, "one_class": 50.0}
    (tmp_path / "run/result.json").write_text(json.dumps(told))
    assert "No better than always answering" in page_of(tmp_path / "run", target=tmp_path / "page.html")


@pytest.mark.parametrize("what", ["missing", "empty", "unfinished", "torn"])
def test_what_is_no_finished_run_is_a_line(place, tmp_path, capsys, what):
    pytest.importorskip("matplotlib", reason="zotune[bench] is not installed")
    folder = tmp_path / "run"
    if what != "missing":
        folder.mkdir()
    if what in ("unfinished", "torn"):
        shutil.copy(place / "full/config.yaml", folder)
    if what == "torn":
        (folder / "result.json").write_text('{"task": ')
    assert run(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert str(folder) in said
    assert len(said.strip().splitlines()) == 1


def test_a_page_in_place_of_a_folder_is_refused(place, tmp_path):
    pytest.importorskip("matplotlib", reason="zotune[bench] is not installed")
    from zotune.reports.page import make_page

    with pytest.raises(InputError, match="is a folder"):
        make_page([place / "full"], tmp_path)


def test_evaluations_see_at_most_half_as_many_rows_as_the_steps_where_nothing_is_said(place, tmp_path):
    many = {"train": tiny.text_rows(40), "validation": tiny.text_rows(90, 1), "test": tiny.text_rows(8, 2)}
    common = {"model": place / "model", "template": tiny.TEMPLATE, "label_words": json.loads(tiny.WORDS), "lr": 0.0}
    for rows, steps, every in ((90, 20, 12), (90, 200, 20), (9, 20, 2)):
        data = many | {"validation": many["validation"][:rows]}
        out = tmp_path / f"{rows}-{steps}"
        zotune.train(**common, data=data, output=out, steps=steps, batch_size=8)
        assert yaml.safe_load((out / "config.yaml").read_text())["eval_every"] == every
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        evaluated = [line["step"] for line in lines if "validation_accuracy" in line]
        assert evaluated == [*range(every, steps, every), steps]


@pytest.mark.parametrize(
    ("recorded", "command"),
    [
        ({"method": "os:path"}, "train"),
        ({"loss": "os:path"}, "train"),
        ({"task": {"name": "t", "prompt": "{text}", "answer_field": "label", "metric": "os:path"}}, "eval"),
        ({"task": {"name": "t", "ask": "os:path"}}, "predict"),
    ],
)
def test_code_that_a_runs_record_names_is_not_imported(place, tmp_path, capsys, recorded, command):
    shutil.copytree(place / "full", tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    (tmp_path / "run/config.yaml").write_text(
        yaml.safe_dump({**config, "template": None, "label_words": None, **recorded})
    )
    file = [
        "--config",
        str(tmp_path / "run/config.yaml"),
        "--model",
        str(place / "model"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert run([command, *file]) == 2
    assert "no code imported" in capsys.readouterr().err
    if command != "train":
        assert run([command, "--model", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
        assert "no code imported" in capsys.readouterr().err
