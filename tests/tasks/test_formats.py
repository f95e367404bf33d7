"""Rows as other tools' users have them: OpenAI's, TRL's, ShareGPT's and Alpaca's; what their keys say is done or refused."""

from __future__ import annotations

import ast
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_columns import CHATML, TALK, asked, chatty, counted

import zotune
from zotune.cli.app import run
from zotune.errors import InputError
from zotune.inference import write_figures
from zotune.tasks import get_task
from zotune.tasks.encoding import Encoder
from zotune.tasks.own import by_columns, described
from zotune.tasks.rows import Row
from zotune.tasks.splits import find_source
from zotune.tasks.task import Task

SHAREGPT = [
    {"from": "human", "value": "was the film good?"},
    {"from": "gpt", "value": "good"},
    {"from": "human", "value": "and the day"},
    {"from": "gpt", "value": "terrible\nbad"},
]
TOOLED = (  # a template that writes tools and calls, as Qwen's does
    "{% if tools %}<s>tools\n{{ tools | tojson }}</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "day", "parameters": {}}}]


def test_sharegpt_s_turns_are_the_same_conversation():
    tokenizer = chatty()
    one, other = (
        Encoder(tokenizer, None)(asked(fields)) for fields in ({"messages": TALK}, {"conversations": SHAREGPT})
    )
    assert one == other
    assert by_columns("t", Row({"conversations": SHAREGPT}, "f:1")).metric == "perplexity"


@pytest.mark.parametrize("form", [{"messages": TALK}, {"conversations": SHAREGPT}])
def test_a_field_of_the_system_s_words_begins_the_conversation(form):
    tokenizer = chatty()
    with_field = Encoder(tokenizer, None)(asked(form | {"system": "be a film"}))
    written = Encoder(tokenizer, None)(asked({"messages": [{"role": "system", "content": "be a film"}, *TALK]}))
    assert with_field == written
    assert Encoder(tokenizer, None)(asked(form | {"system": None})) == Encoder(tokenizer, None)(asked(form))


def test_parts_of_type_text_are_their_texts():
    parts = [
        {
            "role": m["role"],
            "content": [{"type": "text", "text": m["content"][:3]}, {"type": "text", "text": m["content"][3:]}],
        }
        for m in TALK
    ]
    assert Encoder(chatty(), None)(asked({"messages": parts})) == Encoder(chatty(), None)(asked({"messages": TALK}))


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ({"weight": 0}, {"weight": 1}, "terrible\nbad</s>"),
        ({"weight": 0.0}, {}, "terrible\nbad</s>"),
        ({"train": False}, {"train": True}, "terrible\nbad</s>"),
        ({}, {"weight": 0}, "good</s>"),
        ({"weight": None}, {"weight": 1}, "good</s>terrible\nbad</s>"),
    ],
)
@pytest.mark.parametrize("talk", [TALK, SHAREGPT])
def test_a_turn_of_weight_0_is_not_learned(first, second, wanted, talk):
    tokenizer = chatty()
    turns = [talk[0], talk[1] | first, talk[2], talk[3] | second]
    encoded = Encoder(tokenizer, None)(asked({"messages": turns}))
    assert counted(tokenizer, encoded) == wanted
    if second != {"weight": 0}:  # it is still read
        assert "<s>assistant\ngood</s>" in tokenizer.decode(list(encoded.prompt + encoded.candidates[0]))


def test_tools_and_calls_are_written_by_the_template_or_refused():
    call = {"id": "1", "type": "function", "function": {"name": "day", "arguments": '{"n": 1}'}}
    talk = [
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        TALK[1],
    ]
    for tools in (TOOLS, json.dumps(TOOLS)):
        tokenizer = chatty(TOOLED)
        encoded = Encoder(tokenizer, None)(asked({"messages": talk, "tools": tools}))
        written = tokenizer.decode(list(encoded.prompt + encoded.candidates[0]))
        assert written.startswith("<s>tools\n[{")
        assert counted(tokenizer, encoded) == 'day({"n": 1})</s>good</s>'
        assert Encoder(tokenizer, None)(asked({"messages": talk, "tools": tools}, False)).tokens > 0
    said = [
        {"from": "human", "value": TALK[0]["content"]},
        {"from": "function_call", "value": '{"name": "day", "arguments": {"n": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "good"},
    ]
    assert Encoder(tokenizer, None)(asked({"conversations": said, "tools": json.dumps(TOOLS)})).tokens == encoded.tokens
    with pytest.raises(InputError, match="f:3: field 'tools': the chat template of --model writes no tools"):
        Encoder(chatty(), None)(asked({"messages": TALK, "tools": TOOLS}))
    with pytest.raises(InputError, match="f:3: 'tool_calls': the chat template of --model writes none"):
        Encoder(chatty(), None)(asked({"messages": talk}))
    assert Encoder(chatty(), None)(asked({"messages": TALK, "tools": []})).tokens


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"messages": [TALK[0], TALK[1] | {"weight": 0.5}]},
            "weight 0.5 of a message; a turn is learned .1. or not .0.",
        ),
        ({"messages": [TALK[0] | {"weight": 1}, TALK[1]]}, "weight 1 of a message of role 'user'"),
        ({"messages": [TALK[0], TALK[1] | {"weight": 0}]}, "to learn from; all of them are of weight 0"),
        ({"messages": [TALK[0], TALK[1] | {"function_call": {"name": "f"}}]}, "old form of 'tool_calls'"),
        ({"messages": TALK, "functions": [{"name": "f"}]}, "old form of tools"),
        ({"messages": TALK, "tools": "f"}, "field 'tools' must be a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TALK[1]]}, "a part of type 'image_url'"),
        ({"conversations": [{"from": "humen", "value": "a"}]}, "a message from 'humen'; did you mean 'human'"),
        ({"conversations": SHAREGPT, "system": 7}, "field 'system' must be a text"),
        ({"prompt": "a", "completion": "b", "label": False}, "unpaired preference"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "are of preference"),
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "field 'tools' is for conversations"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "field 'history' has earlier turns"),
        ({"instruction": "a", "output": ""}, "field 'output' must be a text"),
        ({"instruction": None, "output": "b"}, "field 'instruction' has no value"),
        ({"instruction": "a", "output": "b", "images": ["a.png"]}, "field 'images' is of what is seen or heard"),
        ({"conversations": SHAREGPT, "audios": ["a.wav"]}, "field 'audios' is of what is seen or heard"),
        ({"messages": TALK, "image": "a.png"}, "field 'image' is of what is seen or heard"),
        ({"conversations": SHAREGPT, "label": True}, "field 'label' says whether a completion is a good one"),
        ({"messages": TALK, "kto_tag": False}, "field 'kto_tag' says whether a completion is a good one"),
        ({"messages": [TALK[0], TALK[1] | {"content": " "}]}, "a message of the assistant's without text"),
        (
            {"messages": [TALK[0], TALK[1] | {"train_detail": [{"train": False}]}]},
            "a turn is learned as a whole or not",
        ),
    ],
)
def test_what_a_key_says_and_is_not_done_is_refused(fields, said):
    with pytest.raises(InputError, match=f"f:3: .*{said}"):
        asked(fields)


def test_thoughts_are_written_by_the_template_or_refused():
    """Qwen's and DeepSeek's reasoning_content, gpt-oss's thinking."""
    thinking = CHATML.replace(
        "{{ m.content }}", "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    )
    talk = [TALK[0], TALK[1] | {"reasoning_content": "a film"}]
    encoded = Encoder(chatty(thinking), None)(asked({"messages": talk}))
    assert counted(chatty(thinking), encoded) == "(a film)good</s>"
    for key in ("reasoning_content", "thinking"):
        talk = [TALK[0], TALK[1] | {key: "a film"}]
        with pytest.raises(InputError, match=f"f:3: {key!r}: the chat template of --model writes none"):
            Encoder(chatty(), None)(asked({"messages": talk}))
    assert Encoder(chatty(), None)(asked({"messages": [TALK[0], TALK[1] | {"thinking": ""}], "images": []})).tokens


def test_who_speaks_is_written_by_the_template_or_refused():
    only_two = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role in ['user', 'assistant'] %}")
    for talk in (
        [{"role": "system", "content": "be a film"}, *TALK],
        [*TALK[:1], {"role": "tool", "content": "3"}, *TALK[1:]],
    ):
        assert "\n" in counted(chatty(), Encoder(chatty(), None)(asked({"messages": talk})))
        role = next(message["role"] for message in talk if message["role"] in ("system", "tool"))
        with pytest.raises(
            InputError, match=f"f:3: a message of role '{role}': the chat template of --model writes none"
        ):
            Encoder(chatty(only_two), None)(asked({"messages": talk}))
    with pytest.raises(InputError, match="f:3: a message of role 'system'"):
        Encoder(chatty(only_two), None)(asked({"conversations": SHAREGPT, "system": "be a film"}))
    assert Encoder(chatty(only_two), None)(asked({"messages": [{"role": "system", "content": " "}, *TALK]})).tokens


def test_a_conversation_that_the_assistant_begins_is_learned_from_its_first_turn():
    trimming = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
    for template, begins in ((CHATML, "a film"), (trimming, " a film\n")):
        talk = [{"role": "assistant", "content": begins}, *TALK]
        encoded = Encoder(chatty(template), None)(asked({"messages": talk}))
        assert counted(chatty(template), encoded) == "a film</s>good</s>terrible\nbad</s>"


def test_whatever_a_template_raises_is_a_line():
    strange = chatty("{{ messages[5].content.nothing() }}")
    with pytest.raises(InputError, match="f:3: the tokenizer's chat template refuses these messages: "):
        Encoder(strange, None)(asked({"messages": TALK}))


@pytest.mark.parametrize("value", [["a", "b"], {"text": "a"}, b"a", np.zeros(2)])
def test_what_is_no_text_is_no_part_of_a_prompt_or_an_answer(value):
    """Python would write it as one: ['a', 'b']."""
    kind = "an object" if isinstance(value, dict) else "bytes" if isinstance(value, bytes) else "a list"
    for fields in ({"text": value, "answer": "b"}, {"text": "a", "answer": value if kind != "a list" else [value]}):
        task = Task(name="t", prompt="{text}", answer_field="answer")
        with pytest.raises(
            InputError, match=f"f:1: field '(text|answer)' is {kind} where a text or a number was expected"
        ):
            task.example(Row(fields, "f:1"))


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("squad", {"context": "a", "question": "b", "answers": {"text": [" "]}}),
        ("squad", {"context": "a", "question": "b", "answers": {"text": ["c", ""]}}),
        ("squad", {"context": "a", "question": " ", "answers": {"text": ["c"]}}),
        ("drop", {"passage": "a", "question": "b", "answers": ["c", " "]}),
        ("drop", {"passage": "a", "question": "", "answers": ["c"]}),
    ],
)
def test_a_question_and_its_answers_have_text(task, fields):
    with pytest.raises(InputError, match=r"f:1: (an answer without text in it|field 'question' has no text)"):
        get_task(task).example(Row(fields, "f:1"))


@pytest.mark.parametrize("text", ["", "  ", "\t\n"])
def test_nothing_is_asked_of_a_text_of_white_space(text):
    with pytest.raises(InputError, match="f:1: field 'text' has no text, so nothing is asked"):
        Task(name="t", prompt="{text} It was", words={"0": "bad", "1": "good"}).example(
            Row({"text": text, "label": 0}, "f:1")
        )


def test_alpaca_s_rows_are_asked_in_its_words():
    bare = asked({"instruction": "Name a film.", "input": "", "output": "Good", "text": "all of it"})
    assert bare.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a film.\n\n### Response:\n"
    )
    assert (bare.candidates, bare.golds, bare.end) == (("Good",), ("Good",), "")
    more = asked({"instruction": "Name a film.", "input": "A great one.", "output": "Good"})
    assert "paired with an input" in more.prompt
    assert more.prompt.endswith("### Instruction:\nName a film.\n\n### Input:\nA great one.\n\n### Response:\n")
    own = asked({"instruction": "Name a film.", "output": "Good", "system": "Be short."})
    assert own.prompt.startswith("Be short.\n\n### Instruction:")
    unlabelled = Row({"instruction": "Name a film."}, "f:1")
    assert by_columns("t", unlabelled, labelled=False).example(unlabelled, labelled=False).prompt == bare.prompt
    task = by_columns("t", Row({"instruction": "a", "output": "b"}, "f:1"))
    assert (task.metric, task.generates) == ("f1", True)
    assert "in Alpaca's words" in described(task)


def test_a_header_with_a_space_is_a_field_like_others(tmp_path, capsys):
    rows = "Review Text,Rating\nthe film was great,1\nthe day was bad,0\n"
    (tmp_path / "a.csv").write_text(rows)
    own = ["--template", "{Review Text} It was", "--label-field", "Rating", "--label-words", tiny.WORDS]
    assert run(["preview", "--data", str(tmp_path / "a.csv"), *own]) == 0
    assert "the film was great It was⟦ good⟧" in capsys.readouterr().out


@pytest.mark.parametrize("label", [-1, "-1", -1.0, None])
def test_labels_that_are_not_told_are_one_line_with_the_way_out(label, tmp_path, capsys):
    data = tiny.save_data(tmp_path / "data")
    tiny.write_rows(data / "test.jsonl", [{"text": "a film", "label": label}] * 8)
    model = tiny.save_model(tmp_path / "model")
    flags = tiny.flags(model, data)
    for argv in (["train", *flags, "--output", str(tmp_path / "run")], ["eval", *flags[:8], "--device", "cpu"]):
        assert run(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        told = "empty" if label is None else -1
        assert f"test.jsonl:1: the label is {told}, here and in 7 other rows: not told, as in GLUE's test split" in line
        assert "test_split: validation" in line
    assert run(["predict", *flags[:8], "--device", "cpu", "--output", str(tmp_path / "p.jsonl")]) == 0


def test_an_empty_label_of_a_task_s_own_test_split_is_not_told_either(tmp_path):
    rows = [{"sentence": "Ann beat Eve because _ trained.", "option1": "Ann", "option2": "Eve", "answer": ""}] * 3
    source = find_source(None, str(tiny.write_rows(tmp_path / "a.jsonl", rows)), None).asking(
        get_task("winogrande").example
    )
    with pytest.raises(InputError, match=r"a\.jsonl:1: the label is empty, here and in 2 other rows: not told"):
        source.rows("train")


def test_predict_says_how_many_rows_were_cut(tmp_path, capsys):
    model, data = tiny.save_model(tmp_path / "model"), tiny.save_data(tmp_path / "data", test=3)
    argv = ["predict", *tiny.flags(model, data)[:8], "--device", "cpu", "--output", str(tmp_path / "p.jsonl")]
    for length, said in (("6", "3 of 3 rows are cut to 6 tokens (--max-length)"), ("60", "")):
        assert run([*argv, "--overwrite", "--max-length", length]) == 0
        assert said in (err := " ".join(capsys.readouterr().err.split()))
        assert ("cut" in err) == bool(said)


def test_how_many_rows_of_how_many_is_said_and_recorded(tmp_path, capsys):
    model, data = tiny.save_model(tmp_path / "model"), tiny.save_data(tmp_path / "data", train=50, test=30)
    flags = tiny.flags(model, data, train_size=20, eval_size=8, steps=2)
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "rows: 20 of 50 to train on, 8 (of the same 50) to choose by, 8 of 30 to test on" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["train_rows"], result["validation_rows"], result["test_rows"]) == (20, 8, 8)
    assert result["rows_given"] == {"train": 50, "test": 30}
    own = ["--model", str(model), *flags[2:8], "--device", "cpu", "--eval-size", "8"]
    assert run(["eval", *own, "--output", str(tmp_path / "f.json")]) == 0
    assert "(8 of 30 rows of test)" in capsys.readouterr().out
    figures = json.loads((tmp_path / "f.json").read_text())
    assert (figures["n"], figures["rows_given"]) == (8, 30)
    assert run(["predict", *own, "--output", str(tmp_path / "p.jsonl")]) == 0
    assert "rows: 8 of 30 of test (--eval-size 8)" in " ".join(capsys.readouterr().err.split())


def broken(folder, value):
    model = tiny.causal_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    model.save_pretrained(folder)
    tiny.tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("form", ["words", "text", "answer"])
def test_what_is_no_number_is_refused_and_never_written(value, form, tmp_path, capsys):
    model = broken(tmp_path / "model", value)
    rows = [{"text": "the film was great", "label": 1}] * 3
    own = {
        "words": ["--template", tiny.TEMPLATE, "--label-words", tiny.WORDS],
        "text": ["--text-field", "text"],
        "answer": ["--template", "{text}", "--answer-field", "label"],
    }[form]
    flags = ["--model", str(model), "--data", str(tiny.write_rows(tmp_path / "a.jsonl", rows)), *own, "--device", "cpu"]
    for command, code in (("eval", 2), ("predict", 2), ("train", 1)):
        assert run([command, *flags, "--output", str(tmp_path / "out")]) == code
        line = capsys.readouterr().err.splitlines()[-1]
        assert ("1 of 1 row: " if command == "train" else "3 of 3 rows: ") in line
        assert "not finite in float32; its weights are not (model.layers.1.mlp.down_proj.weight is the first)" in line
        assert not (tmp_path / "out").exists() or not (tmp_path / "out" / "result.json").exists()


def test_every_json_that_is_made_says_that_it_holds_no_nan():
    """But what is made to be looked at or hashed."""
    calls = {}
    for path in Path(zotune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                calls.setdefault(said.get("allow_nan"), []).append(path.name)
    assert set(calls) == {"False", "True"}
    assert sorted(calls["True"]) == ["api.py", "rows.py"]


def test_rows_in_memory_name_their_fields_by_texts(tmp_path):
    with pytest.raises(InputError, match=r"^data: names of fields are texts"):
        zotune.evaluate(
            model="no", data=[{"text": "a", 1: 0}], template="{text}", label_words={"0": "bad", "1": "good"}
        )


def test_a_number_that_json_has_none_of_is_never_written(tmp_path):
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match=r"f\.json: not written, for a figure is not a finite number"):
            write_figures({"value": value}, tmp_path / "f.json")
    assert not (tmp_path / "f.json").exists()


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl.gz"])
def test_every_command_and_python_read_what_a_file_s_name_says(name, tmp_path, capsys):
    model, rows = tiny.save_model(tmp_path / "model"), tiny.text_rows(20)
    path = tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else json.dumps(rows).encode())
    flags = tiny.flags(model, path, steps=2)
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    own = {"model": str(model), "template": tiny.TEMPLATE, "label_words": json.loads(tiny.WORDS), "device": "cpu"}
    assert zotune.evaluate(data=str(path), **own) == zotune.evaluate(data=rows, **own) | {"split": "file", "task": name}
    assert zotune.predict(data=str(path), **own) == zotune.predict(data=rows, **own)


def test_a_template_of_two_fields_may_have_one_without_text():
    task = Task(name="t", prompt="{a} {b} It was", words={"0": "bad", "1": "good"})
    assert task.example(Row({"a": "x", "b": "", "label": 1}, "f:1")).label == 1
    with pytest.raises(InputError, match="f:2: field 'a' and 'b' has no text, so nothing is asked"):
        task.example(Row({"a": "", "b": "", "label": 1}, "f:2"))


def test_conversations_train_from_the_command_line(tmp_path, capsys):
    folder = tmp_path / "model"
    tiny.causal_model().save_pretrained(folder)
    chatty(CHATML).save_pretrained(folder)
    data = tiny.write_rows(tmp_path / "a.jsonl", [{"conversations": SHAREGPT}] * 6)
    flags = ["--model", str(folder), "--data", str(data), "--device", "cpu"]
    assert run(["train", *flags, "--steps", "2", "--batch-size", "2", "--output", str(tmp_path / "run")]) == 0
    assert run(["preview", *flags[:4], "--rows", "1"]) == 0
    assert "⟦good⟧" in capsys.readouterr().out.replace("</s>", "")
