"""Prompt and answer are the ids of their whole text; what is too long is cut at its start or refused; batches pad right."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_builtin import GOLDEN

from zotune.errors import InputError
from zotune.tasks import get_task
from zotune.tasks.encoding import Collator, Encoded, Encoder
from zotune.tasks.rows import Row
from zotune.tasks.task import Example, Task

TASK = Task(name="t", prompt="{text} It was", words={"0": "terrible nonsense", "1": "good", "2": "zo"})
TOKENIZERS = {(bos, eos): tiny.tokenizer(bos, eos) for bos in (False, True) for eos in (False, True)}
PLAIN, BOS = TOKENIZERS[False, False], TOKENIZERS[True, False]
variants = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=["plain", "eos", "bos", "bos+eos"])


def asked(text: str, task: Task = TASK, label: int = 1) -> Example:
    return task.example(Row({"text": text, "label": label}, "f.jsonl:3"))


@variants
@given(text=st.text(min_size=1).filter(lambda text: "<" not in text and text.strip()))
def test_the_ids_are_those_of_the_whole_text_with_its_start_and_without_its_end(tokenizer, text):
    example = asked(text)
    encoded = Encoder(tokenizer, None)(example)
    for answer, ids in zip(example.candidates, encoded.candidates, strict=True):
        whole = tokenizer(example.prompt + answer)["input_ids"]
        whole = whole[:-1] if whole[-1] == tokenizer.eos_token_id else whole
        assert list(encoded.prompt + ids) == whole
        assert tokenizer.eos_token_id not in whole
    assert (encoded.prompt[0] == tokenizer.bos_token_id) == (tokenizer(text)["input_ids"][0] == 0)
    assert min(map(len, encoded.candidates)) >= 1
    assert (encoded.label, encoded.cut) == (1, 0)


def test_a_word_may_have_several_tokens_and_an_unlabelled_row_has_label_minus_one():
    encoded = Encoder(BOS, None)(asked("a day"))
    assert len({len(ids) for ids in encoded.candidates}) > 1
    assert encoded.tokens == len(encoded.prompt) + max(map(len, encoded.candidates))
    assert Encoder(BOS, None)(TASK.example(Row({"text": "x"}, "f:1"), labelled=False)).label == -1


def test_an_answer_that_merges_with_the_prompts_end_takes_that_token_with_it():
    """ "goo" and "d" are more ids apart than "good": the answer begins where the ids of the whole text part from the prompt's."""
    encoded = Encoder(PLAIN, None)(Example("It was goo", ("d", "t"), 0, "f:1"))
    assert list(encoded.prompt + encoded.candidates[0]) == PLAIN("It was good")["input_ids"]
    assert PLAIN.decode(list(encoded.prompt)) == "It was"


@pytest.mark.parametrize("tokenizer", [PLAIN, BOS], ids=["plain", "bos"])
@pytest.mark.parametrize("limit", [12, 17, 23])
def test_a_long_prompt_loses_its_start_and_keeps_bos_and_answer(tokenizer, limit):
    long = asked("the film " * 40)
    whole, cut = Encoder(tokenizer, None)(long), Encoder(tokenizer, 64, max_length=limit)(long)
    assert cut.tokens == limit
    assert cut.candidates == whole.candidates
    assert cut.cut == len(whole.prompt) - len(cut.prompt)
    head = 1 if tokenizer is BOS else 0
    assert cut.prompt[:head] == whole.prompt[:head]
    assert cut.prompt[head:] == whole.prompt[head - len(cut.prompt) :]


def test_what_just_fits_is_not_cut():
    whole = Encoder(BOS, None)(asked("a day"))
    for encoder in (Encoder(BOS, whole.tokens), Encoder(BOS, 64, max_length=whole.tokens)):
        assert encoder(asked("a day")) == whole
    with pytest.raises(InputError):
        Encoder(BOS, whole.tokens - 1)(asked("a day"))


def test_a_text_longer_than_the_model_takes_is_refused_with_its_line_and_the_way_out():
    with pytest.raises(InputError, match=r"f\.jsonl:3: prompt and answer are \d+ tokens, the model takes 20") as caught:
        Encoder(BOS, 20)(asked("the film " * 40))
    assert "--max-length 20" in str(caught.value)


def test_a_max_length_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="--max-length 65: the model takes 64"):
        Encoder(BOS, 64, max_length=65)
    with pytest.raises(InputError, match=r"f\.jsonl:3: --max-length 2 leaves no room for the prompt"):
        Encoder(BOS, 64, max_length=2)(asked("a day"))


def test_an_answer_without_a_token_is_refused():
    with pytest.raises(InputError, match="f:1: the answer '' adds no token"):
        Encoder(PLAIN, None)(Example("It was", ("", "x"), 0, "f:1"))


rows = st.lists(
    st.builds(
        Encoded,
        st.lists(st.integers(2, 99), min_size=1, max_size=9).map(tuple),
        st.lists(st.lists(st.integers(2, 99), min_size=1, max_size=4).map(tuple), min_size=2, max_size=4).map(tuple),
        st.just(1),
    ),
    min_size=1,
    max_size=6,
)


@given(rows=rows, multiple=st.sampled_from([1, 8, 16]), loss=st.sampled_from(["answer", "candidates"]))
def test_a_batch_holds_each_sequence_padded_on_the_right_alone(rows, multiple, loss):
    batch = Collator(loss, 0, multiple)(rows)
    if loss == "answer":
        pairs = [(row.prompt, row.candidates[1]) for row in rows]
    elif "candidates" in batch:
        pairs = [(row.prompt, row.candidates[0]) for row in rows]
        assert batch["candidates"].tolist() == [[ids[0] for ids in row.candidates] for row in rows]
    else:
        most = max(len(row.candidates) for row in rows)
        padded = [row.candidates + row.candidates[:1] * (most - len(row.candidates)) for row in rows]
        pairs = [(row.prompt, ids) for row, candidates in zip(rows, padded, strict=True) for ids in candidates]
        counts = [len(row.candidates) for row in rows]
        assert batch["present"].tolist() == [[c < count for c in range(most)] for count in counts]
    ids = batch["input_ids"]
    longest = max(len(p) + len(a) - 1 for p, a in pairs)
    assert longest <= ids.shape[1] < longest + multiple
    assert ids.shape[1] % multiple == 0
    for s, (prompt, answer) in enumerate(pairs):
        fed = prompt + answer[:-1]
        assert ids[s].tolist() == list(fed) + [0] * (ids.shape[1] - len(fed))
        where = batch["target_mask"][s]
        assert where.sum() == len(answer)
        assert batch["targets"][s][where].tolist() == list(answer)
        assert batch["positions"][s][where].tolist() == [len(prompt) - 1 + k for k in range(len(answer))]
    assert batch["labels"].tolist() == [1] * len(rows)
    assert not torch.is_floating_point(ids)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
@pytest.mark.parametrize("name", ["wic", "own", "cb"])
def test_a_question_that_stands_first_is_kept_and_the_longest_field_is_cut(name, kind):
    own = Task(name="own", prompt="Question: {q}\nContext: {c}\nAnswer:", words={"0": "bad", "1": "good"})
    task, field, before, after = {
        "wic": (get_task("wic"), "sentence2", 'Does the word "bank" have the same meaning in these two', "."),
        "own": (own, "c", "Question: Is it good?\nContext:", " was.\nAnswer:"),
        "cb": (get_task("cb"), "premise", "Suppose", ' Can we infer that "It is wet."? Yes, No, or Maybe?\n'),
    }[name]
    row = {"q": "Is it good?", "label": 1} if name == "own" else GOLDEN[name][0]
    example = task.example(Row(row | {field: "the film was good. " * 40 + "It was."}, "f:1"))
    whole, encoded = (Encoder(BOS, 999, limit, kind)(example) for limit in (None, 150))
    kept = BOS.decode(list(encoded.prompt), skip_special_tokens=True)
    assert encoded.tokens == 150
    assert encoded.cut == whole.tokens - 150
    assert encoded.candidates == whole.candidates
    assert kept.startswith(before)
    assert kept.rstrip("\n").endswith(after.rstrip("\n"))


def test_examples_before_a_question_go_first():
    from dataclasses import replace

    long = asked("the film " * 20)
    shots = replace(long, prompt="a day It was good\n\n" * 3 + long.prompt, fields=())
    encoded = Encoder(BOS, 999, Encoder(BOS, None)(long).tokens)(shots)
    assert BOS.decode(list(encoded.prompt[1:])).endswith(long.prompt)


LONG = {  # the fields whose start may go; the question stays
    "rte": ("premise", 'Does this mean that "It is wet." is true? Yes or No?\n'),
    "boolq": ("passage", "Is tea a drink?\n"),
    "wsc": ("text", 'does the pronoun "she" refer to Eve? Yes or No?\n'),
    "multirc": ("paragraph", 'Question: Who ate?\nI found this answer "Bo". Is that correct? Yes or No?\n'),
    "record": ("passage", "\n- So"),
    "squad": ("context", "Question: Who ate?\nAnswer:"),
    "drop": ("passage", "Question: How many?\nAnswer:"),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_cut_of_a_long_row_is_not_its_question_or_answer(name, labelled):
    field, question = LONG[name]
    row = GOLDEN[name][0] | {field: "the film was good. " * 200}
    example = get_task(name).example(Row(row, "f:1"), labelled)
    encoded = Encoder(PLAIN, 512, max_length=120)(example)
    kept = PLAIN.decode(list(encoded.prompt))
    assert encoded.cut > 0
    assert kept.endswith(question)
    assert "the film was good" in kept
    whole = Encoder(PLAIN, None)(example)
    assert encoded.candidates == whole.candidates
    assert encoded.prompt == whole.prompt[encoded.cut :]
