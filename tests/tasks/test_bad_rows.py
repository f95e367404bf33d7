"""Bad rows are named together, or left out and counted; runs that stop early; classes as often as each other."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import tiny

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.record.trajectory import read_file as read_trajectory
from zotune.run import train as runs
from zotune.run.recorder import Recorder
from zotune.tasks.rows import BadRows, read_file
from zotune.tasks.splits import Source, find_source, training_splits
from zotune.tasks.task import Task

TASK = Task(name="t", prompt="{text} It was", words={"0": "bad", "1": "good"})


@pytest.fixture
def model(tmp_path):
    return tiny.save_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    """Of 40 training rows 3 cannot be used, of 20 test rows one is too long for the model."""
    folder = tiny.save_data(tmp_path / "data", train=40, validation=10, test=20)
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[1], lines[4] = "{oops", '{"text": "no label"}'
    lines[30] = '{"text": "x", "label": 7}'
    (folder / "train.jsonl").write_text("\n".join(lines))
    lines = (folder / "test.jsonl").read_text().splitlines()
    lines[5] = json.dumps({"text": "film " * 90, "label": 1})
    (folder / "test.jsonl").write_text("\n".join(lines))
    return folder


def test_bad_rows_of_a_file_come_in_one_error_each_with_its_line(data, model, tmp_path, capsys):
    assert run(["train", *tiny.flags(model, data), "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    for line, part in zip(
        said, (":2: not a JSON object", ":5: no field 'label'", ":31: label '7' has no word"), strict=False
    ):
        assert part in line
    assert said[3] == "zotune: 3 bad rows; --skip-bad-rows leaves them out"


def test_of_many_bad_rows_the_first_five_are_shown(tmp_path):
    path = tiny.write_rows(tmp_path / "a.jsonl", [{"text": "x", "label": 7}] * 12)
    source = find_source(TASK, str(path), None).asking(TASK.example)
    with pytest.raises(InputError) as error:
        source.rows("train")
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    assert "12 bad rows, the first 5 above" in lines[-1]
    skipping = find_source(TASK, str(path), None, skip_bad_rows=True).asking(TASK.example)
    with pytest.raises(InputError, match=r"a\.jsonl:12: label '7' has no word .*; no other row can be used either"):
        skipping.rows("train")


def test_a_field_that_all_rows_lack_is_said_once(tmp_path):
    path = tiny.write_rows(tmp_path / "a.jsonl", [{"review": "x", "label": 1}] * 12)
    with pytest.raises(InputError) as error:
        find_source(TASK, str(path), None).asking(TASK.example).rows("train")
    assert "a.jsonl:1: no field 'text' (has 'review', 'label'), nor have 11 other rows" in str(error.value)
    assert "--columns" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_to_try_is_said_once():
    """Who asked for the field may have said it already."""
    bad = BadRows()
    for line in (2, 3, 4):
        with bad.caught():
            raise InputError(f"a.csv:{line}: no field 'prompt' (has 'id', 'text'); name one by --columns")
    with pytest.raises(InputError) as error:
        bad.refuse()
    assert str(error.value) == (
        "a.csv:2: no field 'prompt' (has 'id', 'text'), nor have 2 other rows; name one by --columns; "
        "--skip-bad-rows leaves such rows out"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", '{"a": 1}\n[2]\n{"a": 3}\n'), ("a.csv", "a\n1\n2,2\n3\n")],
)
def test_the_rows_around_a_bad_one_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    bad = BadRows(skip=True)
    rows = read_file(tmp_path / name, bad)
    assert [str(row["a"]) for row in rows] == ["1", "3"]
    assert len(bad.said) == 1
    with pytest.raises(InputError):
        read_file(tmp_path / name)


def test_skipped_rows_are_counted_and_reported_wherever_rows_are_read(data, model, tmp_path, capsys):
    done, skip = tmp_path / "run", "--skip-bad-rows"
    assert run(["train", *tiny.flags(model, data), skip, "--output", str(done)]) == 0
    result = json.loads((done / "result.json").read_text())
    assert (result["bad_rows"], result["test_rows"]) == (4, 19)
    assert "bad rows" in capsys.readouterr().out
    own = tiny.flags(model, data, steps=None, eval_every=None, log_every=None, lr=None)
    assert run(["eval", *own]) == 2
    assert "test.jsonl:6: prompt and answer are" in capsys.readouterr().err
    assert run(["eval", *own, skip, "--output", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert (figures["bad_rows"], figures["n"]) == (1, 19)
    assert "bad rows: 1 left out, the first: " in capsys.readouterr().err
    assert run(["predict", *own, skip, "--output", str(tmp_path / "p.jsonl")]) == 0
    places = [json.loads(line)["row"].rsplit(":", 1)[1] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert places == [str(i) for i in range(1, 21) if i != 6]
    preview = ["preview", *own[2:6], "--label-words", tiny.WORDS, "--rows", "1"]
    assert run(preview) == 2
    assert run([*preview, skip]) == 0
    assert "bad rows: 3 left out" in capsys.readouterr().out


def test_a_bad_row_that_chooses_and_scores_counts_once(data, model, tmp_path):
    (data / "validation.jsonl").write_text((data / "test.jsonl").read_text())
    (data / "test.jsonl").unlink()
    flags = [*tiny.flags(model, data, steps=2), "--skip-bad-rows", "--output", str(tmp_path / "run")]
    assert run(["train", *flags]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["test_split"], result["bad_rows"], result["test_rows"]) == ("validation", 4, 19)


@pytest.mark.parametrize("field", ["text", "label"])
@pytest.mark.parametrize("missing", [float("nan"), np.float32("nan"), pd.NA, pd.NaT])
def test_what_pandas_has_for_no_value_is_none(field, missing):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1} | {field: missing}]
    source = Source(tables={"": rows}).asking(TASK.example)
    with pytest.raises(InputError, match=f"row 2: field '{field}' has no value"):
        source.rows("train")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("given", [list(pd.DataFrame({"text": ["a"], "label": [0]})), ["a", "b", 3]])
def test_rows_none_of_which_is_a_dict_are_refused_in_one_line(given, skip):
    with pytest.raises(InputError) as error:
        Source(tables={"": given}, bad=BadRows(skip)).rows("train")
    assert str(error.value).startswith("data: holds no dict (but ")
    assert 'df.to_dict("records")' in str(error.value)
    assert "\n" not in str(error.value)


def stopping(model, data, out, **changes):
    """At lr 0 nothing ever gets better, so the first evaluation stays the best."""
    options = {"steps": 40, "eval_every": 4, "lr": 0, "early_stop": 2} | changes
    return ["train", *tiny.flags(model, data, **options), "--output", str(out)]


def test_a_run_stops_after_so_many_evaluations_without_a_better_one(model, tmp_path, capsys):
    data = tiny.save_data(tmp_path / "data")
    assert run(stopping(model, data, tmp_path / "run")) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["stopped_early"]) == (12, True)
    assert len(read_trajectory(tmp_path / "run" / "trajectory.zot").records) == 12
    assert "stopped early" in capsys.readouterr().out
    assert run(stopping(model, data, tmp_path / "whole", early_stop=None)) == 0
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert (result["steps"], result["stopped_early"]) == (40, False)


@pytest.mark.parametrize("stop_at", [4, 7, 9])
def test_an_interrupted_run_stops_early_where_a_whole_one_does(model, tmp_path, monkeypatch, stop_at):
    data = tiny.save_data(tmp_path / "data")
    changes = {"eval_every": 3, "lr": 1e-4}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(stopping(model, data, whole, **changes)) == 0
    step_end = Recorder.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == stop_at:
            self.state.ask_to_stop(15)
        step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", interrupted)
        assert run(stopping(model, data, cut, **changes)) == 143
    assert run([*stopping(model, data, cut, **changes), "--resume"]) == 0
    same(whole, cut)


@pytest.mark.parametrize("early_stop", [2, None])
def test_a_run_that_is_killed_after_its_last_step_takes_no_further_one(model, tmp_path, monkeypatch, early_stop):
    data = tiny.save_data(tmp_path / "data")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"early_stop": early_stop, "steps": 14, "lr": 1e-4}
    assert run(stopping(model, data, whole, **changes)) == 0

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "finish", killed)
        assert run(stopping(model, data, cut, **changes)) == 130
    assert run([*stopping(model, data, cut, **changes), "--resume"]) == 0
    same(whole, cut)


def same(whole, cut) -> None:
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, cut)]
    for key in ("steps", "chosen_step", "stopped_early", "test_after", "forward_passes", "validation_best"):
        assert results[0][key] == results[1][key], key
    for name in ("trajectory.zot", "model/model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def skewed(tmp_path) -> Source:
    rows = [{"text": f"row {i}", "label": int(i % 10 == 0)} for i in range(200)]
    folder = tmp_path / "skewed"
    folder.mkdir()
    for split in ("train", "validation"):
        tiny.write_rows(folder / f"{split}.jsonl", rows)
    return Source(folder=folder)


@pytest.mark.parametrize(("size", "each", "rare"), [(30, 15, 15), (100, 50, 20), (1000, 180, 20)])
def test_balanced_classes_come_as_often_as_each_other(tmp_path, size, each, rare):
    def draw(seed):
        sizes = {"train_size": size, "validation_size": 100, "test_size": 100}
        return training_splits(TASK, skewed_source, **sizes, seed=seed, balanced=True)

    skewed_source = skewed(tmp_path)
    drawn = draw(0).train
    assert Counter(e.label for e in drawn) == {0: each, 1: each}
    assert len({e.where for e in drawn if e.label == 1}) == rare  # all of them before one comes again
    assert len({e.where for e in drawn if e.label == 0}) == each
    again = [draw(seed).train for seed in (0, 1)]
    assert drawn == again[0] != again[1]
    assert Counter(e.label for e in draw(0).validation)[1] < 20  # what scores stays as it is
    assert {e.label for e in drawn[: min(10, each)]} == {0, 1}


def test_what_cannot_be_balanced_is_refused(model, tmp_path, capsys):
    data = tiny.save_data(tmp_path / "data")
    generating = tiny.flags(model, data, label_words=None, answer_field="label")
    assert run(["train", *generating, "--balance-classes", "--output", str(tmp_path / "run")]) == 2
    assert "--balance-classes: task 'data' has no classes" in capsys.readouterr().err
    tiny.write_rows(data / "train.jsonl", [{"text": "a", "label": 1}] * 5)
    assert run(["train", *tiny.flags(model, data), "--balance-classes", "--output", str(tmp_path / "run")]) == 2
    assert "all training rows are of one class" in capsys.readouterr().err
