"""A task as a small YAML file or block: the same object as a built-in one, shown, copied, changed and used everywhere."""

from __future__ import annotations

import json

import pytest
import tiny
import yaml

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.tasks import TASKS, get_task
from zotune.tasks.files import definition, make_task, written
from zotune.tasks.rows import Row
from zotune.tasks.task import Task

OWN = {
    "prompt": "{review} It was",
    "words": {"0": "bad", "1": "good"},
    "label_field": "stars",
    "columns": {"text": "review", "label": "stars"},
}


@pytest.mark.parametrize("name", TASKS)
def test_a_builtin_task_written_and_read_again_is_the_same(name, tmp_path):
    (tmp_path / f"{name}.yaml").write_text(written(TASKS[name]), encoding="utf-8")
    assert get_task(str(tmp_path / f"{name}.yaml")) == TASKS[name]
    assert make_task(json.loads(json.dumps(definition(TASKS[name])))) == TASKS[name]


def test_words_that_yaml_once_took_for_truth_are_words(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("prompt: '{text}'\nwords: {no: No, yes: Yes, true: On}\nlabel-field: answer\n")
    task = get_task(str(path))
    assert task.words == {"no": "No", "yes": "Yes", "true": "On"}
    assert (task.name, task.label_field) == ("mine", "answer")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wrods": {}}, "task 't': unknown key 'wrods'; did you mean 'words'?"),
        ({"metric": "acuracy"}, "task 't': metric: unknown metric 'acuracy'; did you mean 'accuracy'?"),
        ({"metric": "f1"}, "task 't': metric 'f1' does not fit it; "),
        ({"words": {"0": 5, "1": 6}}, "task 't': words: "),
        ({"words": None}, "give label words"),
        ({"prompt": "no field"}, "names no field"),
        ({"ask": "nowhere:f"}, "ask nowhere:f: cannot be imported"),
        ({"text_field": "text"}, "counts as it stands"),
        ({"validation_size": "many"}, "task 't': validation_size: 'many' should be"),
    ],
)
def test_a_wrong_definition_is_said_in_a_line(change, said):
    with pytest.raises(InputError) as error:
        make_task({"name": "t"} | OWN | change)
    assert said in str(error.value)


def test_a_file_that_is_none_is_said(tmp_path, capsys):
    assert run(["preview", "--task", str(tmp_path / "no.yaml")]) == 2
    assert "--task" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("prompt: [")
    assert run(["preview", "--task", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml:1: not YAML" in capsys.readouterr().err


def test_a_function_that_has_no_name_is_refused():
    with pytest.raises(InputError, match="must be one of a module"):
        definition(Task(name="t", ask=lambda row, labelled: shouted(row, labelled)))


def shouted(row: Row, labelled: bool):
    from zotune.tasks.task import Asked

    return Asked(str(row["text"]).upper(), ["no", "yes"], int(row["label"]) if labelled else None)


def test_a_file_may_name_a_function(tmp_path):
    task = make_task({"name": "t", "ask": f"{__name__}:shouted"})
    assert task.example(Row({"text": "loud", "label": 1}, "f:1")).prompt == "LOUD"
    assert make_task(definition(task)) == task


@pytest.mark.parametrize(
    "idle", [{"prompt": "{text}"}, {"plain": "{text}"}, {"label_field": "stars"}, {"answer_field": "answer"}]
)
def test_a_key_that_a_function_makes_idle_is_refused(idle):
    with pytest.raises(InputError, match=f"key '{next(iter(idle))}' has no effect beside 'ask'"):
        make_task({"name": "t", "ask": f"{__name__}:shouted"} | idle)


def test_a_copy_says_which_function_asks_and_holds_nothing_that_it_makes_idle():
    text = written(TASKS["squad"])
    assert text.startswith("# zotune.tasks.reading:ask_squad makes prompt and answers; ")
    assert "prompt:" not in text
    assert not written(TASKS["sst2"]).startswith("#")


@pytest.fixture
def task_file(tmp_path):
    data = tiny.save_data(tmp_path / "reviews")
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(OWN | {"data": str(data)}))
    return path


def test_a_file_serves_train_eval_predict_and_preview_and_is_recorded_whole(task_file, tmp_path, capsys):
    model = tiny.save_model(tmp_path / "model")
    done = tmp_path / "run"
    flags = tiny.flags(model, None, template=None, label_words=None, task=task_file)
    assert run(["train", *flags, "--output", str(done)]) == 0
    result = json.loads((done / "result.json").read_text())
    assert (result["task"], result["metric"], result["test_rows"]) == ("own", "accuracy", 30)
    record = yaml.safe_load((done / "config.yaml").read_text())
    assert record["task"]["words"] == OWN["words"]
    task_file.unlink()  # the record is enough
    config = ["--config", str(done / "config.yaml"), "--model", str(done / "model"), "--device", "cpu"]
    assert run(["eval", *config, "--output", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["value"] == result["test_after"]
    assert run(["predict", *config, "--output", str(tmp_path / "p.jsonl")]) == 0
    assert set(json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])["scores"]) == {"0", "1"}
    capsys.readouterr()
    block = tmp_path / "block.yaml"
    block.write_text(yaml.safe_dump({"task": OWN | {"name": "mine", "data": str(tmp_path / "reviews")}}))
    assert run(["preview", "--config", str(block), "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert "mine, train: 60 rows" in said
    assert "It was⟦ bad⟧" in said


def test_a_task_asks_about_other_rows_where_data_names_them(tmp_path, capsys):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"sentence": "so it goes", "label": 1}] * 3)
    assert run(["preview", "--task", "sst2", "--data", str(rows), "--rows", "1"]) == 0
    assert "so it goes It was⟦ great⟧" in capsys.readouterr().out
    assert run(["preview", "--task", "sst2", "--data", str(rows), "--template", "{sentence}"]) == 2
    assert "--template: belongs to --data without --task" in capsys.readouterr().err
    assert run(["preview"]) == 2
    assert "--task, --data: give one of the two, or both" in capsys.readouterr().err
    bare = tmp_path / "bare.yaml"
    bare.write_text(yaml.safe_dump(OWN))
    assert run(["preview", "--task", str(bare)]) == 2
    assert "task 'bare': names no data; give --data" in capsys.readouterr().err


def test_tasks_are_shown_and_copied_to_be_changed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["tasks", "show", "rte"]) == 0
    assert 'prompt: "{premise}\\nDoes this mean' in capsys.readouterr().out
    assert run(["tasks", "cp", "sst2"]) == 0
    assert run(["tasks", "cp", "sst2", "mine.yaml"]) == 0
    assert "sst2 → mine.yaml" in capsys.readouterr().out
    assert get_task("sst2.yaml") == TASKS["sst2"]
    assert get_task("mine.yaml").name == "mine"
    tiny.write_rows(tiny.save_data(tmp_path / "rows" / "sst2") / "train.jsonl", [{"sentence": "so", "label": 1}])
    assert run(["preview", "--task", "mine.yaml", "--data-dir", "rows"]) == 0
    assert "mine, train: 1 rows" in capsys.readouterr().out
    for argv, said in (
        (["cp", "sst2"], "sst2.yaml: exists"),
        (["cp", "sst2", "a.txt"], "try a.yaml"),
        (["cp", "sst2", "no/a.yaml"], "no such folder"),
        (["show", "sst3"], "did you mean 'sst5'"),
    ):
        assert run(["tasks", *argv]) == 2
        assert said in capsys.readouterr().err
