"""A user's own rows: the task that they are for, from the options or from the names of their columns."""

from __future__ import annotations

from pathlib import Path

from zotune.config import DataOptions
from zotune.errors import InputError
from zotune.tasks import get_task
from zotune.tasks.rows import Row
from zotune.tasks.splits import Source, find_source
from zotune.tasks.task import Task


def data_of(options: DataOptions) -> tuple[Task, Source]:
    """The task and the rows that the options name; without a template the columns tell the task."""
    if options.task is not None:
        task = get_task(options.task).aligned(options.alignment)
        return task, find_source(task, options.data, options.data_dir, options.columns)
    assert options.data is not None
    name = Path(options.data).name or options.data
    source = find_source(None, options.data, options.data_dir, options.columns)
    if options.template is None:
        return by_columns(name, source.first()[1][0]), source
    task = Task(
        name=name,
        prompt=options.template,
        words=options.label_words,
        label_field=options.label_field or "label",
        choices_field=options.choices_field,
        answer_field=options.answer_field,
    )
    return task, source


def by_columns(name: str, row: Row) -> Task:
    """The task of rows named as TRL names them, told by one of them.

    messages                a conversation; the loss is over the assistant's turns
    prompt and completion   texts: an answer to generate; lists of messages: a conversation, the completion's turns count
    text                    plain text; the loss is over all tokens

    Source: TRL's dataset formats, https://huggingface.co/docs/trl/dataset_formats.
    """
    has = row.fields
    if "messages" in has:
        return Task(name=name, messages_field="messages")
    if "prompt" in has and "completion" in has:
        if isinstance(has["prompt"], list) or isinstance(has["completion"], list):
            return Task(name=name, messages_field="prompt", answer_field="completion")
        return Task(name=name, prompt="{prompt}", answer_field="completion")
    if "text" in has:
        return Task(name=name, text_field="text")
    wanted = "no field 'prompt'" if "completion" in has else "no field 'completion'" if "prompt" in has else None
    wanted = wanted or "no field 'messages', 'text' or 'prompt'"
    raise InputError(
        f"{row.where}: {wanted} (has {', '.join(map(repr, has))}); name one by --columns, or say what is asked by --template "
        "with --label-words, --choices-field or --answer-field"
    )
