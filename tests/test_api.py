"""The commands as functions: rows in memory give what the same rows in files give."""

from __future__ import annotations

import json

import datasets
import pytest
import tiny

import zotune
from zotune.tasks import Task

WORDS = {"0": "bad", "1": "good"}


@pytest.fixture
def model(tmp_path):
    return tiny.save_model(tmp_path / "model")


def options(model, output, **changes):
    return {
        "model": model, "template": tiny.TEMPLATE, "label_words": WORDS, "steps": 6, "eval_every": 2, "batch_size": 4,
        "lr": 1e-2, "device": "cpu", "output": output,
    } | changes  # fmt: skip


def test_rows_in_memory_train_the_model_that_files_do(model, tmp_path):
    folder = tiny.save_data(tmp_path / "data")
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}
    whole = datasets.DatasetDict({split: datasets.Dataset.from_list(given) for split, given in rows.items()})
    results, weights = [], []
    for name, data in (("files", folder), ("dicts", rows), ("datasets", whole)):
        results.append(zotune.train(**options(model, tmp_path / name, data=data)))
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]
    assert results[0]["test_after"] == results[1]["test_after"] == results[2]["test_after"]
    own = options(tmp_path / "dicts" / "model", None, steps=None, eval_every=None, lr=None, data=whole)
    assert zotune.evaluate(**own)["value"] == results[0]["test_after"]
    with pytest.raises(zotune.InputError, match="data was 'rows-"):  # other rows are another run
        zotune.train(**options(model, tmp_path / "dicts", data=rows | {"train": rows["test"]}, resume=True))


def test_a_list_is_scored_and_labelled_whole_and_a_task_may_be_an_object(model, tmp_path):
    task = Task(name="reviews", prompt="{review} It was", words=WORDS, columns={"text": "review"})
    rows = tiny.text_rows(12)
    own = {"model": str(model), "task": task, "data": rows, "device": "cpu"}
    figures = zotune.evaluate(**own)
    assert (figures["task"], figures["n"], figures["split"]) == ("reviews", 12, "rows")
    unlabelled = datasets.Dataset.from_list([{"text": row["text"]} for row in rows])
    told = zotune.predict(**own | {"data": unlabelled})
    assert len(told) == 12
    right = sum(line["label"] == str(row["label"]) for line, row in zip(told, rows, strict=True))
    assert figures["value"] == pytest.approx(100 * right / 12)
    spoken = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}]}]
    with pytest.raises(zotune.InputError, match="has no chat template"):
        zotune.evaluate(model=str(model), data=spoken)
    assert zotune.evaluate(model=str(model), data=[{"text": "the film"}])["metric"] == "perplexity"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([{"text": "a", "label": 0}, "b"], "row 2: a str where a dict was expected"),
        ([{"text": "a"}], "row 1: no field 'label'"),
        ({"trian": []}, "splits 'trian'; name them train, validation, test"),
        ({"test": [{"text": "a", "label": 0}]}, "data: no rows to train on"),
        (iter([{"text": "a"}]), "give a list of dicts"),
        ([], "no rows in it"),
    ],
)
def test_rows_that_are_none_are_refused_as_the_command_does(model, tmp_path, data, said):
    with pytest.raises(zotune.InputError, match=said):
        zotune.train(**options(model, tmp_path / "run", data=data))


def test_wrong_options_are_refused_as_the_command_does(model, tmp_path):
    with pytest.raises(zotune.InputError, match="--stepz: no such option"):
        zotune.train(**options(model, tmp_path / "run", data=[], stepz=3))


def test_a_dry_run_and_outputs_are_those_of_the_commands(model, tmp_path, capsys):
    rows = tiny.text_rows(12)
    assert zotune.train(**options(model, tmp_path / "dry", data=rows, dry_run=True)) == {}
    assert not (tmp_path / "dry").exists()
    assert "nothing was written" in capsys.readouterr().out
    own = {
        "model": str(model),
        "task": Task(name="t", prompt="{text} It was", words=WORDS),
        "data": rows,
        "device": "cpu",
    }
    figures = zotune.evaluate(**own, output=tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    told = zotune.predict(**own, output=str(tmp_path / "told.jsonl"))
    assert [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()] == told
    with pytest.raises(zotune.InputError, match="exists; name another file"):
        zotune.predict(**own, output=str(tmp_path / "told.jsonl"))
    with pytest.raises(zotune.InputError, match="is a folder; name a file"):
        zotune.evaluate(**own, output=tmp_path)
