"""What is trained is what stops: one end of an answer for all forms of rows, in training, prediction and the saved model."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers as tf
from test_columns import CHATML

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.options import PreviewConfig, resolve
from zotune.tasks import ends
from zotune.tasks.encoding import Encoder
from zotune.tasks.files import definition, make_task
from zotune.tasks.own import data_of
from zotune.tasks.rows import Row
from zotune.tasks.task import Task

QUESTION, ANSWER = "the great day was?", "bad film"
MARK = "<|im_end|>"


def chat_tokenizer():
    made = tiny.tokenizer(bos=True)
    made.add_special_tokens({"additional_special_tokens": [MARK]})
    made.chat_template = CHATML.replace("</s>", MARK)
    return made


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny.causal_model(tie=False).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


FORMS = {  # rows, options, the token that ends
    "completion": ({"prompt": QUESTION, "completion": f" {ANSWER}"}, [], "</s>"),
    "own end": ({"prompt": QUESTION, "completion": f" {ANSWER}{MARK}\n"}, [], MARK),
    "answer field": ({"q": QUESTION, "a": [ANSWER, "no"]}, ["--template", "{q}", "--answer-field", "a"], "</s>"),
    "squad": (
        {"context": "a", "question": QUESTION, "answers": {"text": [ANSWER]}}, ["--task", "squad"], "\n"
    ),
    "messages": (
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}, [], MARK
    ),
    "alpaca": ({"instruction": QUESTION, "input": "", "output": ANSWER}, ["--max-length", "40"], "</s>"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", ["full", "lora"])
def test_an_answer_that_was_learned_is_written_and_ends(form, scheme, model, tmp_path, capsys):
    row, options, end = FORMS[form]
    data = tiny.write_rows(tmp_path / "rows.jsonl", [row] * 8)
    own = ["--data", str(data), *options, "--device", "cpu"]
    assert run(["preview", "--data", str(data), *options, "--model", str(model), "--rows", "1"]) == 0
    shown = "\\n" if end == "\n" else end
    assert f"{ANSWER}⟧⟦{shown}⟧" in capsys.readouterr().out
    done = tmp_path / "run"
    learn = ["--method", "fo-adam", "--scheme", scheme, "--steps", "40", "--eval-every", "40", "--batch-size", "4"]
    learn += ["--lr", "1e-2" if scheme == "full" else "5e-2"]
    assert run(["train", "--model", str(model), *own, *learn, "--output", str(done)]) == 0
    given = ["--model", str(done / "model")]
    if scheme == "lora":
        given = ["--model", str(model), "--adapter", str(done / "model")]
    assert run(["predict", *given, *own, "--output", str(tmp_path / "p.jsonl")]) == 0
    assert {json.loads(line)["answer"] for line in (tmp_path / "p.jsonl").read_text().splitlines()} == {ANSWER}
    assert "do not end" not in capsys.readouterr().err
    if scheme == "lora":
        assert run(["merge", *given, "--output", str(tmp_path / "merged")]) == 0
    # whoever generates with the saved model stops there too
    saved = tmp_path / "merged" if scheme == "lora" else done / "model"
    tokenizer, plain = tf.AutoTokenizer.from_pretrained(saved), tf.AutoModelForCausalLM.from_pretrained(saved)
    named = dict(zip([flag[2:].replace("-", "_") for flag in options[::2]], options[1::2], strict=True))
    task, _ = data_of(resolve(PreviewConfig, {"data": str(data)} | named, None), labelled=False)
    prompt = Encoder(tokenizer, None, 40)(task.example(Row(row, "f:1"), labelled=False)).prompt
    written = plain.generate(input_ids=torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
    assert tokenizer.decode(written).strip(" ") == ANSWER + end


def chat(**fields):
    return Row({"prompt": QUESTION} | fields, "f:1")


TASK = Task(name="t", prompt="{prompt}", answer_field="completion")


@pytest.mark.parametrize(
    ("tokenizer", "completion", "wanted"),
    [
        (tiny.tokenizer(bos=True), "bad", " bad</s>"),
        (tiny.tokenizer(bos=True, eos=True), "bad", " bad</s>"),  # one that the tokenizer adds is not a second
        (tiny.tokenizer(), "bad</s>", " bad</s>"),
        (tiny.tokenizer(eos=True), "bad</s>\n", " bad</s>"),
        (chat_tokenizer(), f"bad{MARK}", f" bad{MARK}"),
        (chat_tokenizer(), f"bad{MARK} film", f" bad{MARK} film</s>"),
    ],
)
def test_an_answer_has_one_end_which_is_the_row_s_if_it_writes_one(tokenizer, completion, wanted):
    encoded = Encoder(tokenizer, None)(TASK.example(chat(completion=completion)))
    assert tokenizer.decode(list(encoded.candidates[0])) == wanted
    assert encoded.ended
    text = Encoder(tokenizer, None)(Task(name="t", text_field="prompt").example(chat(prompt="a" + completion)))
    assert tokenizer.decode(list(text.prompt + text.candidates[0])).removeprefix("<s>") == "a" + wanted[1:]


def test_an_answer_of_several_lines_is_one_answer_and_a_line_ends_where_a_task_says_so():
    tokenizer = chat_tokenizer()
    lines = TASK.example(chat(completion="bad\nfilm"))
    assert tokenizer.decode(list(Encoder(tokenizer, None)(lines).candidates[0])) == " bad\nfilm</s>"
    by_line = Task(name="t", prompt="{prompt}", answer_field="completion", end="\n")
    assert make_task(definition(by_line)) == by_line
    for completion in ("bad", "bad\n"):
        encoded = Encoder(tokenizer, None)(by_line.example(chat(completion=completion)))
        assert tokenizer.decode(list(encoded.candidates[0])) == " bad\n"
        assert ends.taught([encoded], tokenizer, "\n") == set(tokenizer("\n", add_special_tokens=False)["input_ids"])
    for end, given in (("", {"answer_field": "completion"}), ("\n", {"words": {"0": "a", "1": "b"}})):
        with pytest.raises(InputError, match="must be a text, behind answers that are generated"):
            Task(name="t", prompt="{prompt}", end=end, **given)


def test_a_tokenizer_without_an_end_is_refused_where_the_row_writes_none():
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(
        InputError, match="f:1: nothing ends the answer, since the tokenizer of --model has no end token"
    ):
        Encoder(tokenizer, None)(TASK.example(chat(completion="bad")))
    assert Encoder(tokenizer, None)(TASK.example(chat(completion=f"bad{MARK}"))).ended


def test_a_chat_template_that_writes_no_end_gets_the_tokenizer_s():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    task = Task(name="t", messages_field="messages")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad"}]
    encoded = Encoder(tokenizer, None)(task.example(Row({"messages": talk * 2}, "f:1")))
    assert tokenizer.decode(list(encoded.candidates[0])).endswith("assistant: bad</s>")
    assert encoded.ended


def test_words_to_choose_from_have_no_end():
    task = Task(name="t", prompt="{prompt}", words={"0": "bad", "1": "good"})
    encoded = Encoder(tiny.tokenizer(), None)(task.example(chat(label=1)))
    assert not encoded.ended
    assert not any(1 in ids for ids in encoded.candidates)


def test_a_text_that_begins_with_the_tokenizer_s_start_gets_no_second_one():
    tokenizer = tiny.tokenizer(bos=True)
    for begins in ("", "<s>"):
        for task, fields in (
            (TASK, {"completion": "bad"}),
            (Task(name="t", prompt=begins + "{prompt}", words={"0": "bad", "1": "good"}), {"label": 0}),
            (Task(name="t", text_field="prompt"), {}),
        ):
            encoded = Encoder(tokenizer, None)(task.example(chat(prompt=begins + QUESTION, **fields)))
            ids = encoded.prompt + encoded.candidates[0]
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == (
                2 if begins and task.words else 1
            )  # one in the field's own text
    for kind in ("causal", "classifier"):
        task = Task(name="t", prompt="<s>{prompt}", words={"0": "bad", "1": "good"})
        encoded = Encoder(tokenizer, None, kind=kind)(task.example(chat(label=0)))
        assert encoded.prompt.count(tokenizer.bos_token_id) == 1
        long = Encoder(tokenizer, 999, 20, kind)(task.example(chat(prompt="film " * 40, label=0)))
        assert long.prompt[0] == tokenizer.bos_token_id


def test_an_end_alone_is_no_answer():
    for answer in ("</s>", " </s>\n", MARK):
        with pytest.raises(InputError, match=r"f:1: the answer is .*, an end, and nothing before it"):
            Encoder(chat_tokenizer(), None)(TASK.example(chat(completion=answer)))


def test_a_prompt_that_ends_itself_gets_no_second_end_before_a_head():
    tokenizer, task = (
        tiny.tokenizer(bos=True, eos=True),
        Task(name="t", prompt="{prompt}", words={"0": "bad", "1": "good"}),
    )
    one, other = (
        Encoder(tokenizer, None, kind="classifier")(task.example(chat(prompt=text, label=0))).prompt
        for text in ("a", "a</s>")
    )
    assert one == other


def test_answers_without_an_end_are_counted_and_said(model, tmp_path, capsys):
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": QUESTION, "completion": "bad"}] * 3)
    flags = ["--model", str(model), "--data", str(data), "--device", "cpu", "--max-new-tokens", "2"]
    assert run(["eval", *flags, "--output", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["unended_answers"] == 3
    assert "3 of 3 answers do not end within the tokens that they may have" in " ".join(capsys.readouterr().err.split())


def test_behind_examples_a_blank_line_ends_an_answer_as_it_does_theirs(model, tmp_path, capsys):
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "film", "completion": "bad"}] * 4)
    flags = ["--data", str(data), "--shots", "1", "--eval-size", "1", "--model", str(model)]
    assert run(["preview", *flags, "--rows", "1"]) == 0
    assert "film bad\\n\\nfilm⟦ bad⟧⟦\\n\\n⟧" in capsys.readouterr().out
    assert run(["eval", *flags, "--device", "cpu"]) == 0


def test_a_text_ends_what_is_written_in_whichever_token_it_comes():
    tokenizer = chat_tokenizer()
    for text, end, ended in (("bad\nfilm", "\n", True), ("bad film", "\n", False), ("a day", "a d", True)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        until = ends.Until(end, tokenizer, 2)
        found = [bool(until(torch.tensor([[9, 9, *ids[: i + 1]]]), None)[0]) for i in range(len(ids))]
        assert any(found) == ended
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert not ends.Until("\n", tokenizer, 2)(torch.tensor([[*line, *line, 40]]), None)[0]  # the prompt's ends nothing


def test_a_rebuilt_model_stops_where_the_run_s_does(model, tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "film", "completion": f"bad{MARK}"}] * 4)
    flags = ["--model", str(model), "--data", str(data), "--device", "cpu", "--steps", "2", "--batch-size", "2"]
    for scheme in ("full", "lora"):
        done, again = tmp_path / scheme, tmp_path / f"{scheme}-again"
        assert run(["train", *flags, "--scheme", scheme, "--output", str(done)]) == 0
        trajectory = ["--trajectory", str(done / "trajectory.zot"), "--output", str(again)]
        assert run(["replay", "--model", str(model), "--device", "cpu", *trajectory]) == 0
        one, other = (tf.GenerationConfig.from_pretrained(path).eos_token_id for path in (done / "model", again))
        assert one == other
        assert chat_tokenizer().convert_tokens_to_ids(MARK) in one
