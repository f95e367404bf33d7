"""Rows named as TRL names them need no option: plain text, prompt and completion, conversations; and what of them counts."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.tasks.encoding import Collator, Encoder
from zotune.tasks.metrics import perplexity, token_loss
from zotune.tasks.own import by_columns
from zotune.tasks.rows import Row
from zotune.tasks.scoring import answer_losses, row_losses

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
FORGETFUL = (  # as Qwen3's: thoughts stand in the last turn alone
    "{% for m in messages %}<s>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}(thinks)\n{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "was the film good?"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "and the day"},
    {"role": "assistant", "content": "terrible\nbad"},
]


def chatty(template: str = CHATML):
    made = tiny.tokenizer(bos=True)
    made.chat_template = template
    return made


def asked(fields: dict, labelled: bool = True):
    return by_columns("t", Row(fields, "f:3")).example(Row(fields, "f:3"), labelled)


def counted(tokenizer, encoded) -> str:
    places = encoded.counted or range(len(encoded.candidates[0]))
    return tokenizer.decode([encoded.candidates[0][place] for place in places])


@pytest.mark.parametrize(
    ("fields", "metric"),
    [
        ({"text": "a"}, "perplexity"),
        ({"prompt": "a", "completion": "b"}, "f1"),
        ({"prompt": TALK[:1], "completion": TALK[1:2]}, "perplexity"),
        ({"messages": TALK, "text": "a"}, "perplexity"),
    ],
)
def test_the_columns_tell_the_task(fields, metric):
    assert by_columns("t", Row(fields, "f:1")).metric == metric


def test_columns_that_tell_nothing_are_said_with_the_way_out():
    with pytest.raises(
        InputError, match=r"f:1: no field .*\(has 'sentence'\); name one by --columns, or .* --template"
    ):
        by_columns("t", Row({"sentence": "a"}, "f:1"))


def test_every_token_of_a_plain_text_counts_and_so_does_its_end():
    tokenizer = tiny.tokenizer(bos=True)
    encoded = Encoder(tokenizer, None)(asked({"text": "the film was good"}))
    ids = tokenizer("the film was good")["input_ids"]
    assert list(encoded.prompt + encoded.candidates[0]) == [*ids, tokenizer.eos_token_id]
    assert encoded.prompt == (tokenizer.bos_token_id,)
    cut = Encoder(tokenizer, 64, 4)(asked({"text": "the film was good"}))
    assert cut.prompt + cut.candidates[0] == tuple(ids[:4])  # a text loses its end
    assert cut.cut == len(ids) + 1 - 4
    with pytest.raises(InputError, match=r"f:3: the text is \d+ tokens, the model takes 5; .*--max-length 5"):
        Encoder(tokenizer, 5)(asked({"text": "the film was good"}))


def test_the_assistants_turns_and_their_end_count_and_nothing_else():
    tokenizer = chatty()
    encoded = Encoder(tokenizer, None)(asked({"messages": TALK}))
    assert counted(tokenizer, encoded) == "good</s>terrible\nbad</s>"
    whole = tokenizer.apply_chat_template(TALK, tokenize=False).rstrip()
    assert tokenizer.decode(list(encoded.prompt + encoded.candidates[0])) == whole
    assert tokenizer.decode(list(encoded.asked)).endswith("and the day</s>\n<s>assistant\n")
    assert encoded.golds == ("terrible\nbad",)


def test_of_prompt_and_completion_as_conversations_the_completion_counts():
    tokenizer = chatty()
    encoded = Encoder(tokenizer, None)(asked({"prompt": TALK[:3], "completion": TALK[3:]}))
    assert counted(tokenizer, encoded) == "terrible\nbad</s>"
    assert encoded.asked == encoded.prompt


def test_a_turn_that_the_template_writes_otherwise_later_counts_as_the_last_alone():
    tokenizer = chatty(FORGETFUL)
    assert counted(tokenizer, Encoder(tokenizer, None)(asked({"messages": TALK}))) == "(thinks)\nterrible\nbad</s>"


def test_without_a_label_the_assistant_is_asked_for_its_next_turn():
    tokenizer = chatty()
    for fields in ({"messages": TALK}, {"messages": TALK[:3]}, {"prompt": TALK[:3]}):
        task = by_columns("t", Row(fields, "f:1"), labelled=False)
        encoded = Encoder(tokenizer, None)(task.example(Row(fields, "f:1"), labelled=False))
        assert tokenizer.decode(list(encoded.prompt)).endswith("and the day</s>\n<s>assistant\n")


def words(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


SYSTEM = {"role": "system", "content": "be a film"}


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_a_long_conversation_loses_whole_turns_from_the_oldest_on(system):
    tokenizer = chatty()
    whole = Encoder(tokenizer, None)(asked({"messages": [*system, *TALK]}))
    for limit in (whole.tokens - 1, words(tokenizer, written(tokenizer, [*system, *TALK[2:]]))):
        encoded = Encoder(tokenizer, 999, limit)(asked({"messages": [*system, *TALK]}))
        kept = tokenizer.decode(list(encoded.prompt + encoded.candidates[0]))
        assert kept == written(tokenizer, [*system, *TALK[2:]])
        assert counted(tokenizer, encoded) == "terrible\nbad</s>"
        assert encoded.cut == whole.tokens - encoded.tokens > 0


def written(tokenizer, messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False).rstrip()


@pytest.mark.parametrize("labelled", [True, False])
def test_of_the_last_question_that_is_too_long_the_start_is_cut_and_no_header(labelled):
    tokenizer = chatty()
    last = [SYSTEM, {"role": "user", "content": "a long day " * 30 + "was it good?"}, TALK[1]]
    rest = written(tokenizer, last) if labelled else written(tokenizer, last[:2]) + "\n<s>assistant\n"
    limit = words(tokenizer, rest) - 40
    for messages in (last, [SYSTEM, *TALK[:2], *last[1:]]):
        example = asked({"messages": messages}, labelled)
        encoded = Encoder(tokenizer, 999, limit)(example)
        kept = tokenizer.decode(list(encoded.prompt + encoded.candidates[0]))
        assert encoded.tokens == limit
        assert kept.startswith("<s>system\nbe a film</s>\n<s>user\n")
        assert kept.endswith(rest.split("a long day a long day ")[-1])
        if labelled:
            assert counted(tokenizer, encoded) == "good</s>"
    for limit in (1, 2, words(tokenizer, rest.replace(last[1]["content"], ""))):
        with pytest.raises(InputError, match=f"f:3: --max-length {limit} leaves no room for the question"):
            Encoder(tokenizer, 999, limit)(asked({"messages": last}, labelled))


def test_of_prompt_and_completion_only_turns_of_the_prompt_are_left_out():
    tokenizer = chatty()
    fields = {"prompt": TALK[:3], "completion": [TALK[3], TALK[0], TALK[1]]}
    whole = Encoder(tokenizer, None)(asked(fields))
    encoded = Encoder(tokenizer, 999, whole.tokens - 1)(asked(fields))
    assert tokenizer.decode(list(encoded.prompt + encoded.candidates[0])) == written(tokenizer, [*TALK[2:], *TALK[:2]])
    assert counted(tokenizer, encoded) == "terrible\nbad</s>good</s>"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": "hello"}, "must be a list of messages"),
        ({"messages": [{"role": "user"}]}, "without texts 'role' and 'content'"),
        ({"messages": TALK[:1]}, "no message of role 'assistant'"),
        ({"messages": TALK[1:2]}, "no message before the assistant's"),
        ({"text": 7}, "field 'text' must be a text"),
        ({"text": " "}, "field 'text' must be a text"),
    ],
)
def test_what_is_no_conversation_or_text_is_named(fields, said):
    with pytest.raises(InputError, match=f"f:3: .*{said}"):
        asked(fields)


def test_a_template_that_refuses_says_its_reason():
    tokenizer = chatty("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"f:3: .*chat template refuses these messages: .*roles must alternate"):
        Encoder(tokenizer, None)(asked({"messages": TALK}))


def test_the_loss_is_over_the_tokens_that_count_alone():
    model, tokenizer = tiny.causal_model(), chatty()
    rows = [Encoder(tokenizer, None)(asked(fields)) for fields in ({"messages": TALK}, {"text": "the film was good"})]
    expected = []
    for row in rows:
        ids = row.prompt + row.candidates[0]
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [len(row.prompt) + place for place in row.counted or range(len(row.candidates[0]))]
        expected.append(-torch.stack([log_p[place - 1, ids[place]] for place in places]).mean())
    torch.testing.assert_close(answer_losses(model, Collator("answer", 0)(rows)), torch.stack(expected))
    losses = row_losses(model, rows, batch_size=1, pad_id=0)
    n = [row.learned for row in rows]
    mean = sum(e.item() * k for e, k in zip(expected, n, strict=True)) / sum(n)
    assert token_loss(losses, rows) == pytest.approx(mean, rel=1e-5)
    assert perplexity(losses, rows) == pytest.approx(math.exp(mean), rel=1e-5)
    assert perplexity([1e9, 1e9], rows) == math.inf


@pytest.fixture
def model(tmp_path):
    folder = tiny.save_model(tmp_path / "model")
    chatty().save_pretrained(folder)
    return folder


def save(folder, rows):
    folder.mkdir()
    for split in ("train", "validation", "test"):
        tiny.write_rows(folder / f"{split}.jsonl", rows)
    return folder


KINDS = {
    "text": [{"body": f"the film was {word} {i}"} for i in range(6) for word in ("good", "bad")],
    "messages": [{"body": TALK[:2]}] * 12,
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_messages_train_score_predict_and_preview_by_columns_alone(kind, model, tmp_path, capsys):
    data = save(tmp_path / "data", KINDS[kind])
    own = ["--data", str(data), "--columns", json.dumps({"body": kind})]
    flags = ["--model", str(model), *own, "--device", "cpu", "--batch-size", "4"]
    done = tmp_path / "run"
    train = ["train", *flags, "--steps", "6", "--eval-every", "2", "--lr", "1e-2", "--output", str(done)]
    assert run([*train, "--dry-run"]) == 0
    assert run(train) == 0
    result = json.loads((done / "result.json").read_text())
    scores = {}
    for line in map(json.loads, (done / "metrics.jsonl").read_text().splitlines()):
        if "validation_perplexity" in line:
            scores[line["step"]] = line["validation_perplexity"]
    assert result["validation_best"] == min(scores.values()) < max(scores.values())  # the lower the better
    assert scores[result["chosen_step"]] == min(scores.values())
    said = capsys.readouterr()
    assert f"data: field '{kind}' is " in said.err
    assert "perplexity before" in said.out
    assert "one class" not in said.out
    assert run(["eval", "--model", str(done / "model"), *flags[2:], "--output", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["value"] == pytest.approx(result["test_after"])
    assert figures["value"] == pytest.approx(math.exp(figures["loss"]))
    assert run(["predict", *flags, "--output", str(tmp_path / "p.jsonl")]) == 0
    written = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(written) == 12
    assert all(("answer" if kind == "messages" else "perplexity") in line for line in written)
    assert run(["preview", *own, "--rows", "1"]) == 0
    assert run(["preview", *own, "--rows", "1", "--model", str(model)]) == 0
    assert "good" in capsys.readouterr().out
    for loss in ("candidates", "accuracy", "f1"):
        assert run(["train", *flags, "--loss", loss, "--output", str(tmp_path / "x")]) == 2
        assert "use answer" in capsys.readouterr().err
    assert run(["eval", *flags, "--shots", "2"]) == 2
    assert "--shots 2" in capsys.readouterr().err


def test_a_tokenizer_without_a_chat_template_is_said_once(model, tmp_path, capsys):
    data = save(tmp_path / "data", [{"messages": TALK}] * 6)
    tiny.save_model(tmp_path / "plain")
    assert run(["eval", "--model", str(tmp_path / "plain"), "--data", str(data)]) == 2
    said = capsys.readouterr().err
    assert said.count("has no chat template") == 1
    assert "f:" not in said


def length_of_the_reply(prompt: str, answer: str, golds: list[str]) -> float:
    assert prompt.endswith("assistant\n")
    assert golds == ["good"]
    return float(len(answer))


def test_a_function_scores_the_reply_of_a_conversation(model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    data = save(tmp_path / "data", [{"messages": TALK[:2]}] * 6)
    flags = ["--model", str(model), "--data", str(data), "--device", "cpu", "--batch-size", "2", "--steps", "1"]
    loss = f"{__name__}:length_of_the_reply"
    assert run(["train", *flags, "--lr", "1e-3", "--loss", loss, "--output", str(tmp_path / "run")]) == 0
