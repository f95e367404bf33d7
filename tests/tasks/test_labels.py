"""Labelled texts whose template or label words are not given: what the rows tell, and what has to be said."""

from __future__ import annotations

import json

import pytest
import tiny
import yaml

import zotune
from zotune.cli.app import run
from zotune.errors import InputError
from zotune.options import EvalConfig, resolve
from zotune.tasks.own import TEMPLATE, data_of, described
from zotune.tasks.splits import SPLITS


def task_of(rows, **options):
    config = resolve(EvalConfig, {"model": "m", "data": "rows", **options}, None)
    config.set_tables({"": rows})
    return data_of(config)[0]


KINDS = [{"text": f"a {kind} note", "label": kind} for kind in ("spam", "ham", "spam", "eggs")]


def test_labelled_texts_are_a_classification_whose_labels_are_its_words():
    task = task_of(KINDS)
    assert (task.prompt, task.words, task.metric) == (
        TEMPLATE,
        {"eggs": "eggs", "ham": "ham", "spam": "spam"},
        "accuracy",
    )
    assert "3 words: eggs, ham, spam" in described(task)


def test_words_are_those_of_all_splits(tmp_path):
    for split, label in zip(SPLITS, ("good", "bad", "fair"), strict=True):
        tiny.write_rows(tmp_path / f"{split}.jsonl", [{"text": "a", "label": label}])
    config = resolve(EvalConfig, {"model": "m", "data": str(tmp_path)}, None)
    assert data_of(config)[0].labels == ["bad", "fair", "good"]


def test_a_template_needs_no_map_of_labels_that_are_words():
    task = task_of([{"q": "a", "kind": "spam"}, {"q": "b", "kind": "ham"}], template="{q} is", label_field="kind")
    assert (task.prompt, task.label_field, task.words) == ("{q} is", "kind", {"ham": "ham", "spam": "spam"})


def test_label_words_need_no_template_beside_a_field_text():
    task = task_of([{"text": "a", "label": 1}, {"text": "b", "label": 0}], label_words='{"0": "bad", "1": "good"}')
    assert (task.prompt, task.words) == (TEMPLATE, {"0": "bad", "1": "good"})


def test_texts_without_labels_and_a_named_text_field_are_plain_text():
    assert task_of([{"text": "a"}]).text_field == "text"
    assert task_of(KINDS, text_field="text").text_field == "text"
    assert task_of([{"body": "a"}], text_field="body").metric == "perplexity"


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"text": "a", "label": 0}, {"text": "b", "label": 1}], {}, '--label-words \'{"0": "…", "1": "…"}\''),
        ([{"text": "a", "label": "0"}, {"text": "b", "label": "1"}], {}, "no words (0, 1)"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], {}, "no words (x, y)"),
        ([{"text": "a", "label": "good"}] * 3, {}, "one label alone"),
        ([{"text": "a", "label": f"label {i}{i} of them"} for i in range(60)], {}, "60 different labels"),
        ([{"q": "a", "kind": "good"}], {"template": "{q}"}, "no field 'label' (has 'q', 'kind')"),
        ([{"q": "a", "label": 0}], {"label_words": '{"0": "a", "1": "b"}'}, "no field 'text'"),
        (KINDS, {"text_field": "text", "template": "{text}"}, "--template: means nothing beside --text-field"),
    ],
)
def test_what_the_rows_do_not_tell_is_asked_for(rows, options, said):
    with pytest.raises(InputError) as caught:
        task_of(rows, **options)
    assert said in str(caught.value)


def test_what_the_rows_told_is_in_the_record_and_holds_for_new_rows(tmp_path, capsys):
    tiny.save_model(tmp_path / "model")
    rows = [{"text": row["text"], "label": ("bad", "good")[row["label"]]} for row in tiny.text_rows(24)]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    argv = [
        "train",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(path),
        "--steps",
        "2",
        "--output",
        str(tmp_path / "run"),
    ]
    assert run(argv) == 0
    assert "field 'label' (2 words: bad, good)" in capsys.readouterr().err
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (config["template"], config["label_words"]) == (TEMPLATE, {"bad": "bad", "good": "good"})
    told = zotune.predict(model=tmp_path / "run", data=[{"text": "a great day"}])
    assert set(told[0]["scores"]) == {"bad", "good"}
    assert run([*argv, "--resume"]) == 0
    (tmp_path / "run/result.json").unlink()  # as if it had been killed just before its end
    assert run([*argv, "--resume"]) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["metric"] == "accuracy"
