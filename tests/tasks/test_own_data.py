"""A user's own rows: prompt and completion without any option, other names, Parquet."""

from __future__ import annotations

import functools
import json
import re

import pytest
import tiny

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.tasks import Task
from zotune.tasks.rows import Row, read_file, renamed
from zotune.tasks.splits import demonstrations, find_source, scored_rows, shown


@pytest.fixture
def folder(tmp_path):
    rows = [{"question": f"the film {i} was", "completion": "good" if i % 2 else "bad"} for i in range(12)]
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation", "test"):
        tiny.write_rows(data / f"{split}.jsonl", rows)
    return data


def test_prompt_and_completion_need_no_option(folder, tmp_path, capsys):
    model = tiny.save_model(tmp_path / "model")
    columns = ["--columns", json.dumps({"question": "prompt"})]
    done = tmp_path / "run"
    flags = ["--model", str(model), "--data", str(folder), "--device", "cpu", "--batch-size", "4"]
    assert run(["train", *flags, *columns, "--steps", "2", "--lr", "1e-3", "--output", str(done)]) == 0
    assert json.loads((done / "result.json").read_text())["metric"] == "f1"
    assert run(["preview", "--data", str(folder), *columns, "--rows", "1"]) == 0
    assert "the film 0 was⟦ bad⟧" in capsys.readouterr().out
    assert run(["eval", *flags]) == 2
    assert "no field 'prompt' (has 'question', 'completion'); name one by --columns" in capsys.readouterr().err


def test_a_column_that_is_not_there_is_named():
    row = Row({"a": 1, "b": 2}, "f:1")
    assert renamed(row, {"a": "x"}).fields == {"x": 1, "b": 2}
    with pytest.raises(InputError, match="no field 'c'"):
        renamed(row, {"c": "x"})


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"question": "completion"}, "--columns 'question' → 'completion' would overwrite the field 'completion'"),
        ({"question": "prompt", "completion": "prompt"}, "both 'question' and 'completion' → 'prompt'"),
    ],
)
def test_no_column_is_lost_under_another_s_name(columns, said, folder, capsys):
    assert run(["preview", "--data", str(folder), "--columns", json.dumps(columns)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_two_columns_may_change_names(folder, capsys):
    swap = json.dumps({"question": "completion", "completion": "question"})
    own = ["--template", "{question}", "--answer-field", "completion"]
    assert run(["preview", "--data", str(folder), "--columns", swap, *own, "--rows", "1"]) == 0
    assert "bad⟦ the film 0 was⟧" in capsys.readouterr().out


def test_files_that_are_no_split_are_named(folder, tmp_path, capsys):
    model = tiny.save_model(tmp_path / "model")
    (folder / "validation.jsonl").rename(folder / "dev.jsonl")
    (folder / "more.csv").write_text("a\n")
    own = ["--data", str(folder), "--template", "{question}", "--answer-field", "completion", "--device", "cpu"]
    train = ["--model", str(model), "--steps", "2", "--batch-size", "4", "--output", str(tmp_path / "run")]
    for argv in (["preview", *own[:-2]], ["train", *own, *train], ["train", *own, *train[:-1], "x", "--dry-run"]):
        assert run(argv) == 0
        streams = capsys.readouterr()
        assert "more.csv not read, for no split (train, validation, test) is called so" in (
            " ".join((streams.out + streams.err).split())
        )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_split"] == "test"


@pytest.mark.parametrize("data", ["data/missing", "rows.jsonl", "no/rows.csv", "a/b/c"])
def test_a_path_that_is_missing_is_not_looked_up_on_the_hub(data, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(f"data: {data}\nprompt: '{{question}}'\nanswer_field: completion\n")
    assert run(["preview", "--data", data]) == 2
    assert f"--data {data}: no such file or folder" in capsys.readouterr().err
    if data != "data/missing":  # a task's may be a data set whose owner's name is that of a folder
        assert run(["preview", "--task", "own.yaml"]) == 2
        assert f"task 'own': data {data}: no such file or folder" in capsys.readouterr().err


def test_parquet_rows_are_read_and_damage_is_said(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [0, 1]}), path)
    rows = read_file(path)
    assert [row.fields for row in rows] == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert rows[1].where.endswith("train.parquet:2")
    path.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="not a Parquet file"):
        read_file(path)


@pytest.mark.parametrize("answer", ["", [], [""], [None], ["yes", None], [float("nan")]])
def test_an_answer_that_is_none_is_refused(answer):
    task = Task(name="t", prompt="{question}", answer_field="answer")
    assert task.example(Row({"question": "?", "answer": ["yes", "yea"]}, "here:1")).golds == ("yes", "yea")
    with pytest.raises(InputError, match="here:2: field 'answer'"):
        task.example(Row({"question": "?", "answer": answer}, "here:2"))


def test_demonstrations_stand_before_each_prompt(folder, tmp_path, capsys):
    task = Task(name="t", prompt="{question}", answer_field="completion")
    source = find_source(task, str(folder), None)
    drawn = demonstrations(task, source, 3, 0)
    assert drawn == demonstrations(task, source, 3, 0) != demonstrations(task, source, 3, 1)
    assert shown(drawn).count("\n\n") == 3
    assert all(line.endswith((" good", " bad")) for line in shown(drawn).strip().split("\n\n"))
    model = tiny.save_model(tmp_path / "model")
    own = ["--template", "{question}", "--answer-field", "completion", "--max-length", "60"]
    flags = ["--model", str(model), "--data", str(folder), "--device", "cpu", *own]
    assert run(["eval", *flags, "--shots", "2", "--output", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["shots"] == 2
    assert run(["eval", *flags, "--shots", "99"]) == 2
    assert "has 12 training rows" in capsys.readouterr().err


@pytest.mark.parametrize("single", [True, False])
def test_no_scored_row_is_shown_with_its_answer(single, tmp_path, capsys):
    task = Task(name="t", prompt="{text} It was", words={"0": "bad", "1": "good"})
    data = tiny.save_data(tmp_path / "data", train=20)
    source = find_source(task, str(data / "train.jsonl" if single else data), None)
    rows, _ = scored_rows(source, 4)
    for seed in range(9):
        drawn = demonstrations(task, source, 16, seed, rows)
        assert len(drawn) == 16
        assert not {example.where for example in drawn} & {row.where for row in rows}
    with pytest.raises(InputError, match="has 20 training rows, 16 of them not scored; name fewer by --eval-size"):
        demonstrations(task, source, 17, 0, rows)


def test_what_asks_nothing_shows_no_examples(folder):
    for field, said in (("text_field", "is plain text"), ("messages_field", "is a conversation; earlier turns")):
        task = Task(name="t", **{field: "question"})
        with pytest.raises(InputError, match=said):
            demonstrations(task, find_source(task, str(folder), None), 2, 0)


@pytest.mark.parametrize("mask", ["<mask>", "[M]"])
def test_an_answer_that_is_shown_stands_in_the_mask_s_place(mask):
    task = Task(name="t", prompt=f"{{text}} It was {mask}.", words={"0": "bad", "1": "good"})
    examples = [task.example(Row({"text": text, "label": label}, "f:1")) for text, label in (("a", 1), ("b", 0))]
    assert shown(examples, "[M]") == "a It was good.\n\nb It was bad.\n\n"


def test_cut_rows_are_counted_wherever_rows_are_encoded(tmp_path, capsys):
    model, data = tiny.save_model(tmp_path / "model"), tiny.save_data(tmp_path / "data")
    lines = (data / "test.jsonl").read_text().splitlines()
    lines[3] = json.dumps({"text": "the film " * 40, "label": 1})
    (data / "test.jsonl").write_text("\n".join(lines))
    flags = tiny.flags(model, data, max_length=40)
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["cut_rows"] == 1
    own = ["--model", str(model), *flags[2:8], "--max-length", "40", "--device", "cpu"]
    assert run(["eval", *own, "--output", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["cut_rows"] == 1
    assert "(30 rows of test, 1 of them cut)" in capsys.readouterr().out


def test_a_cut_row_counts_once_however_often_it_is_drawn_or_scored(tmp_path, capsys):
    """Two long rows of the rare class come again, and validation, with one, is test too."""
    model = tiny.save_model(tmp_path / "model")
    long = {"text": "the film " * 40, "label": 1}
    rows = [{"text": "a film", "label": 0}] * 16
    for split, given in (("train", [*rows, long, long]), ("validation", [*rows, long])):
        tiny.write_rows(tmp_path / f"{split}.jsonl", given)
    flags = [*tiny.flags(model, tmp_path, max_length=40, steps=2), "--output", str(tmp_path / "run")]
    assert run(["train", *flags, "--balance-classes", "--dry-run"]) == 0
    assert re.search(r"cut rows +3 ", capsys.readouterr().out)
    assert run(["train", *flags, "--balance-classes"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["cut_rows"] == 3


def test_a_preview_knows_how_much_the_model_takes(tmp_path, capsys):
    model = tiny.save_model(tmp_path / "model")
    rows = tiny.write_rows(tmp_path / "a.jsonl", [{"text": "the film " * 60}])
    flags = ["preview", "--data", str(rows), "--model", str(model)]
    assert run(flags) == 2
    assert f"the text is 182 tokens, the model takes {tiny.TAKES}" in capsys.readouterr().err
    assert run([*flags, "--max-length", str(tiny.TAKES + 1)]) == 2
    assert f"--max-length {tiny.TAKES + 1}: the model takes {tiny.TAKES} tokens" in capsys.readouterr().err
    assert run([*flags, "--max-length", str(tiny.TAKES)]) == 0
    assert "1 of 1 rows cut" in capsys.readouterr().out


def test_a_preview_shows_what_eval_shows_and_the_length_that_a_scheme_leaves(folder, tmp_path, capsys):
    model = tiny.save_model(tmp_path / "model")
    own = ["preview", "--data", str(folder), "--template", "{question}", "--answer-field", "completion", "--rows", "1"]
    for more in ([], ["--model", str(model)]):
        assert run([*own, "--shots", "1", *more]) == 0
        said = capsys.readouterr().out
        assert "data, test: 12 rows" in said
        assert len(re.findall("the film [0-9]+ was", said)) == 2
        assert "\\n\\nthe film" in said  # a blank line between the two
    limit = ["--model", str(model), "--max-length", str(tiny.TAKES)]
    assert run([*own, *limit]) == 0
    for scheme, left in (("prefix", tiny.TAKES - 5), ("prompt", tiny.TAKES - 10)):
        assert run([*own, *limit, "--scheme", scheme]) == 2
        assert f"the model takes {left} tokens" in capsys.readouterr().err
    assert run([*own, "--scheme", "lara"]) == 2
    assert "did you mean 'lora'" in capsys.readouterr().err


def test_prompts_alone_are_enough_to_predict(tmp_path):
    model = tiny.save_model(tmp_path / "model")
    rows = tiny.write_rows(tmp_path / "new.jsonl", [{"prompt": f"the film {i} was"} for i in range(3)])
    flags = ["--model", str(model), "--data", str(rows), "--device", "cpu"]
    assert run(["predict", *flags, "--output", str(tmp_path / "p.jsonl")]) == 0
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 3
    assert run(["eval", *flags]) == 2


def test_a_preview_marks_what_counts_in_a_file_and_on_a_terminal(tmp_path, monkeypatch, capsys):
    import rich.console

    model = tiny.save_model(tmp_path / "model")
    rows = tiny.write_rows(tmp_path / "a.jsonl", [{"prompt": "the film was", "completion": "good"}])
    flags = ["preview", "--data", str(rows)]
    for more in ([], ["--model", str(model)]):
        assert run([*flags, *more]) == 0
        said = capsys.readouterr().out
        assert "what counts stands between ⟦ and ⟧" in said
        assert "the film was⟦ good⟧" in said
    terminal = functools.partial(rich.console.Console, force_terminal=True, color_system="standard", width=400)
    monkeypatch.setattr("zotune.cli.preview.Console", terminal)
    for more in ([], ["--model", str(model)]):
        assert run([*flags, *more]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "the film was" in line)
        place, rest = line.split("a.jsonl:1  ")
        assert place.startswith("\x1b[2m")
        assert "the film was\x1b[1;7m good\x1b[0m" in rest  # neither is dim
        assert "⟦" not in line
