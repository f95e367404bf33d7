"""A user's own rows: the task that they are for, from the options or from the names of their columns."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.errors import InputError
from zotune.tasks import get_task
from zotune.tasks.alpaca import ask_alpaca
from zotune.tasks.chat import check_template
from zotune.tasks.encoding import Encoded, Encoder
from zotune.tasks.rows import Row, missing
from zotune.tasks.splits import SPLITS, Source, find_source
from zotune.tasks.task import Example, Task

if TYPE_CHECKING:
    from zotune.options import DataOptions

TEMPLATE = "{text}\nAnswer:"  # of labelled texts that come without one
MOST_LABELS = 50  # that are taken for classes


def data_of(options: DataOptions, labelled: bool = True) -> tuple[Task, Source]:
    """The task and the rows that the options name; without a template the columns tell the task.

    labelled: whether rows need the label or answer that they are trained on or scored by.
    """
    task = get_task(options.task).aligned(options.alignment) if options.task is not None else None
    source = find_source(
        task,
        options.data,
        options.data_dir,
        options.columns,
        options.skip_bad_rows,
        options.subset,
        options.tables,
    )
    task = task or _own_task(options, source, labelled)
    if options.max_new_tokens is not None:
        if not (task.generates or task.messages_field or ":" in getattr(options, "loss", "")):
            raise InputError(f"--max-new-tokens {options.max_new_tokens}: task {task.name!r} generates no answers")
        task = replace(task, max_new_tokens=options.max_new_tokens)
    return task, source.asking(functools.partial(task.example, labelled=labelled))


def _own_task(options: DataOptions, source: Source, labelled: bool) -> Task:
    assert options.data is not None
    name = Path(options.data).name or options.data
    if options.text_field is not None:
        return Task(name=name, text_field=options.text_field)
    label, template, words = options.label_field or "label", options.template, options.label_words
    if template is None:
        first = source.first()[1][0]
        asked = words is not None or options.label_field is not None
        if not asked and not (labelled and "text" in first.fields and label in first.fields):
            return by_columns(name, first, labelled)
        if "text" not in first.fields:
            raise InputError(
                f"--template: needed, such as '{{sentence}} It was', for {first.where} has no field 'text'"
            )
        template = TEMPLATE
    if words is None and options.choices_field is None and options.answer_field is None:
        words = _words_of(source, label)
    return Task(
        name=name,
        prompt=template,
        words=words,
        label_field=label,
        choices_field=options.choices_field,
        answer_field=options.answer_field,
    )


def _words_of(source: Source, field: str) -> dict[str, str]:
    """The labels of the rows, each its own word. Raises InputError for labels that are no words, or too many."""
    given: set[Any] = set()
    splits = ("train",) if source.single else SPLITS
    rows = [row for split in splits for row in source.rows(split) or []]
    for row in rows:
        if field not in row.fields:
            raise InputError(
                f"{row.where}: no field {field!r} (has {', '.join(map(repr, row.fields))}): give one of --label-words, "
                "--choices-field or --answer-field, or name the labels by --label-field"
            )
        if not missing(row.fields[field]):
            given.add(row.fields[field] if isinstance(row.fields[field], (str, int, float)) else str(row.fields[field]))
    labels = sorted(map(str, given))
    example = json.dumps(dict.fromkeys(labels[:3], "…"), ensure_ascii=False, allow_nan=False)
    way = f"say by --label-words '{example}' which word stands for each, or take the texts for plain text by --text-field text"
    if len(labels) < 2:
        raise InputError(
            f"{source}: one label alone in field {field!r} ({', '.join(labels)}), so there is nothing to tell apart"
        )
    if len(labels) > MOST_LABELS:
        raise InputError(f"{source}: field {field!r} holds {len(labels)} different labels; {way}")
    if not all(isinstance(label, str) and re.search(r"[^\W\d_]{2}", label) for label in given):
        raise InputError(f"{source}: field {field!r} holds labels that are no words ({', '.join(labels[:6])}); {way}")
    return {label: label for label in labels}


def described(task: Task) -> str:
    """What rows are taken for where their columns or labels tell.

    >>> described(Task(name="notes", text_field="text"))
    "notes: field 'text' is plain text, every token counts"
    """
    if task.text_field is not None:
        return f"{task.name}: field {task.text_field!r} is plain text, every token counts"
    if task.words is not None:
        said = ", ".join(list(task.words)[:8]) + ", …" * (len(task.words) > 8)
        return f"{task.name}: field {task.label_field!r} ({len(task.words)} words: {said}) is the answer to {task.prompt!r}"
    if task.messages_field is not None:
        whose = f"those of field {task.answer_field!r}" if task.answer_field else "all"
        return f"{task.name}: field {task.messages_field!r} is a conversation, of the assistant's turns {whose} count"
    if task.ask is ask_alpaca:
        return f"{task.name}: field 'output' is the answer to 'instruction' and 'input', in Alpaca's words"
    return f"{task.name}: field {task.answer_field!r} is the answer to {task.prompt!r}"


def encoded(encode: Encoder, source: Source, examples: Sequence[Example]) -> tuple[list[Example], list[Encoded]]:
    """The examples that can be encoded, and as what. What is too long is a bad row of the source.

    Raises InputError at once where the tokenizer cannot write conversations.
    """
    if any(example.messages for example in examples):
        check_template(encode.tokenizer)
    pairs = source.usable(examples, lambda example: (example, encode(example)))
    return [example for example, _ in pairs], [row for _, row in pairs]


def by_columns(name: str, row: Row, labelled: bool = True) -> Task:
    """The task of rows named as TRL names them, told by one of them; not labelled: a prompt needs no completion.

    messages                a conversation; the loss is over the assistant's turns
    conversations           the same as ShareGPT has it, of turns {from, value}
    prompt and completion   texts: an answer to generate; lists of messages: a conversation, the completion's turns count
    instruction and output  Alpaca's rows, with an input or without: an answer to generate
    text                    plain text; the loss is over all tokens

    Sources: TRL's dataset formats, https://huggingface.co/docs/trl/dataset_formats; axolotl's and LLaMA-Factory's.
    """
    has = row.fields
    if "chosen" in has and "rejected" in has:
        raise InputError(
            f"{row.where}: fields 'chosen' and 'rejected' are of preference, which is not learned from; "
            '--columns \'{"chosen": "completion"}\' takes the chosen ones as answers to a field prompt'
        )
    talks = next((field for field in ("messages", "conversations") if field in has), None)
    answered = labelled and (talks is not None or ("prompt" in has and "completion" in has))
    if rated := next((key for key in ("label", "kto_tag") if answered and isinstance(has.get(key), bool)), None):
        raise InputError(
            f"{row.where}: field {rated!r} says whether a completion is a good one (unpaired preference, as TRL has it), which is "
            "not learned from; keep the good ones without it"
        )
    if talks is not None:
        return Task(name=name, messages_field=talks)
    if "prompt" in has and ("completion" in has or not labelled):
        if isinstance(has["prompt"], list) or isinstance(has.get("completion"), list):
            return Task(name=name, messages_field="prompt", answer_field="completion")
        if has.get("tools"):
            raise InputError(
                f"{row.where}: field 'tools' is for conversations; give prompt and completion as lists of messages"
            )
        return Task(name=name, prompt="{prompt}", answer_field="completion")
    if "instruction" in has and ("output" in has or not labelled):
        return Task(name=name, ask=ask_alpaca, generates=True, metric="f1")
    if "text" in has:
        return Task(name=name, text_field="text")
    wanted = "no field 'prompt'" if "completion" in has else "no field 'completion'" if "prompt" in has else None
    wanted = wanted or "no field 'messages', 'text' or 'prompt'"
    raise InputError(
        f"{row.where}: {wanted} (has {', '.join(map(repr, has))}); name one by --columns, or say what is asked by --template "
        "with --label-words, --choices-field or --answer-field"
    )
