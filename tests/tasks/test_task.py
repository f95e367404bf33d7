"""A row becomes a prompt, candidates and a label; what a template or a label may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zotune.errors import InputError
from zotune.tasks import get_task
from zotune.tasks.rows import Row
from zotune.tasks.task import Task, join, template_fields

WORDS = {"0": "bad", "1": "good"}
COPA = {"question": "cause", "premise": "It rained.", "choice1": "Clouds.", "choice2": "Sun."}


def example(prompt="{text} It was", labelled=True, task=None, **fields):
    task = task or Task(name="t", prompt=prompt, words=WORDS)
    return task.example(Row(fields, "f.jsonl:3"), labelled)


def refusal(**kwargs) -> str:
    with pytest.raises(InputError) as caught:
        example(**kwargs)
    return str(caught.value)


def test_sst2_asks_as_the_paper_does():
    asked = get_task("sst2").example(Row({"sentence": "a fine film", "label": 1}, "x:1"))
    assert asked.prompt == "a fine film It was"
    assert (asked.candidates, asked.label) == ((" terrible", " great"), 1)
    with pytest.raises(InputError, match="did you mean 'sst2'"):
        get_task("sst-2")


@pytest.mark.parametrize(
    ("prompt", "answer", "added"),
    [
        ("It was", "great", " great"),
        ("It was ", "great", "great"),
        ("It was", " great", " great"),
        ("It was\n", "great", "great"),
        ("It was", "\tgreat", "\tgreat"),
        ("It was\u3000", "great", "great"),
    ],
)
def test_one_space_joins_unless_either_side_has_white_space(prompt, answer, added):
    assert join(prompt, answer) == added


@pytest.mark.parametrize("label", [1, "1"])
def test_labels_are_compared_as_strings(label):
    assert example(text="x", label=label).label == 1


def test_braces_in_a_field_are_text_and_doubled_ones_in_a_template_too():
    assert example(prompt="{{{text}}} {text}", text="{label}", label=0).prompt == "{{label}} {label}"


def test_an_unlabelled_row_needs_no_label():
    assert example(text="x", labelled=False).label is None


def test_a_label_without_a_word_is_named_with_its_line():
    assert refusal(text="x", label=7) == "f.jsonl:3: label '7' has no word (labels with one: 0, 1)"


def test_an_empty_prompt_is_refused():
    assert refusal(prompt="{text}", text=" ", label=0) == "f.jsonl:3: an empty prompt"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("It was", "names no field"),
        ("{text It was", "write a literal brace twice"),
        ("text} It was", "write a literal brace twice"),
        ("{} It was", "plain field name"),
        ("{0} It was", "plain field name"),
        ("{text.__class__}", "plain field name"),
        ("{text[0]}", "plain field name"),
        ("{text!r}", "plain field name"),
        ("{text:>10}", "plain field name"),
    ],
)
def test_a_template_of_anything_but_plain_fields_is_refused(template, said):
    with pytest.raises(InputError, match=said) as caught:
        template_fields(template)
    assert repr(template) in str(caught.value)


@pytest.mark.parametrize("words", [{}, {"0": "good"}, {"0": "good", "1": "good"}])
def test_fewer_than_two_words_or_one_word_for_two_labels_is_refused(words):
    with pytest.raises(InputError, match="two or more, each for one label"):
        Task(name="t", prompt="{text}", words=words)


def test_words_that_differ_by_white_space_alone_are_refused():
    with pytest.raises(InputError, match="each for one label"):
        Task(name="t", prompt="{text}", words={"0": "good", "1": " good"})


def test_an_empty_word_is_refused():
    with pytest.raises(InputError, match="empty"):
        Task(name="t", prompt="{text}", words={"0": "good", "1": " "})


CHOICE = Task(name="t", prompt="{text}", choices_field="choices")


@pytest.mark.parametrize(("label", "index"), [(1, 1), ("1", 1), ("tea", 0), ("cake", 1)])
def test_a_choice_is_named_by_its_index_or_its_text(label, index):
    asked = example(task=CHOICE, text="x", choices=["tea", "cake"], label=label)
    assert (asked.candidates, asked.label) == ((" tea", " cake"), index)


NUMBERS = ["1", "2", "3", "4"]


@pytest.mark.parametrize("label", [1, 1.0, np.int64(1), torch.tensor(1), "5"])
def test_a_number_is_an_index_and_a_text_is_matched_as_text_first(label):
    assert example(task=CHOICE, text="x", choices=["5", "2", "1"], label=label).label == (0 if label == "5" else 1)


def test_a_text_that_is_one_choice_and_another_s_index_is_refused():
    said = refusal(task=CHOICE, text="x", choices=NUMBERS, label="1")
    assert said == (
        "f.jsonl:3: label '1' is the text of choice 0 and the index of another; give the index 0 as a number"
    )
    assert example(task=CHOICE, text="x", choices=["tea", "1"], label="1").label == 1  # both say the same
    assert example(task=CHOICE, text="x", choices=NUMBERS, label="4").label == 3  # there is no fifth


@pytest.mark.parametrize("label", [1.0, "1.0", np.float64(1), np.int64(1), torch.tensor(1), torch.tensor(1.0)])
def test_a_whole_number_is_a_label_in_whatever_type_it_comes(label):
    assert example(text="x", label=label).label == 1
    assert get_task("copa").example(Row(COPA | {"label": label}, "f:1")).label == 1
    assert example(prompt="{text} of", text=np.int64(3), label=1).prompt == "3 of"


def test_a_label_that_is_no_whole_number_stays_one():
    assert "label '0.5' has no word" in refusal(text="x", label=0.5)
    halves = Task(name="t", prompt="{text}", words={"1.0": "bad", "1.5": "good"})
    assert example(task=halves, text="x", label=1.0).label == 0


@pytest.mark.parametrize("choices", ["tea", ["tea"], ["tea", 2], ["tea", ""]])
def test_choices_are_a_list_of_two_or_more_texts(choices):
    assert "must be a list of two or more texts" in refusal(task=CHOICE, text="x", choices=choices, label=0)


@pytest.mark.parametrize("label", [2, -1, "milk"])
def test_a_label_that_is_no_choice_is_refused(label):
    said = refusal(task=CHOICE, text="x", choices=["tea", "cake"], label=label)
    assert said == f"f.jsonl:3: label {str(label)!r} is neither one of the 2 choices nor an index"


def test_words_and_choices_exclude_each_other():
    for kind in ({}, {"words": WORDS, "choices_field": "choices"}):
        with pytest.raises(InputError, match="one of them"):
            Task(name="t", prompt="{text}", **kind)
