"""A task is data: where its rows are, how a row becomes a prompt, and which words stand for its labels."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zotune.errors import InputError
from zotune.tasks.rows import Row


@dataclass(frozen=True)
class Hub:
    """A hub data set: its name, subset, and the split whose labels are public and that is scored as test."""

    name: str
    subset: str | None = None
    test_split: str = "test"


@dataclass(frozen=True)
class Example:
    """A row as the model will be asked: a prompt, the texts that may follow it, and which of them is right."""

    prompt: str
    candidates: tuple[str, ...]
    label: int | None
    where: str


@dataclass(frozen=True)
class Task:
    """Classification by label words, or multiple choice among a row's own texts.

    prompt: a format string over a row's fields, `'{sentence} It was'`.
    words: label → word, labels compared as strings (JSON's 1 is CSV's "1"). None where rows bring their candidates.
    label_field: the right label (or, with choices_field, the index or the text of the right choice).
    """

    name: str
    prompt: str
    words: Mapping[str, str] | None = None
    label_field: str = "label"
    choices_field: str | None = None
    source: Hub | None = None
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        template_fields(self.prompt)
        if (self.words is None) == (self.choices_field is None):
            raise InputError(f"task {self.name!r}: give label words or a field of choices, one of the two")
        if self.words is not None and not all(word.strip() for word in self.words.values()):
            raise InputError(f"task {self.name!r}: an empty label word: {dict(self.words)}")
        if self.words is not None and len({word.strip() for word in self.words.values()}) < max(2, len(self.words)):
            raise InputError(
                f"task {self.name!r}: label words must be two or more, each for one label: {dict(self.words)}"
            )

    @property
    def labels(self) -> list[str]:
        return list(self.words or ())

    def example(self, row: Row, labelled: bool = True) -> Example:
        """The row as prompt, candidates and label. Raises InputError that names the row's place."""
        values = {field: _text(row[field]) for field in template_fields(self.prompt)}
        prompt = self.prompt.format(**values)
        if not prompt.strip():
            raise InputError(f"{row.where}: an empty prompt")
        candidates = self._candidates(row)
        label = self._label(row, candidates) if labelled else None
        return Example(prompt, tuple(join(prompt, text) for text in candidates), label, row.where)

    def _candidates(self, row: Row) -> list[str]:
        if self.words is not None:
            return list(self.words.values())
        choices = row[self.choices_field or ""]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise InputError(f"{row.where}: field {self.choices_field!r} must be a list of two or more texts")
        return choices

    def _label(self, row: Row, candidates: list[str]) -> int:
        label = _text(row[self.label_field])
        if self.words is not None:
            if label not in self.words:
                known = ", ".join(self.words)
                raise InputError(f"{row.where}: label {label!r} has no word (labels with one: {known})")
            return self.labels.index(label)
        if label in candidates:
            return candidates.index(label)
        if label.isdecimal() and int(label) < len(candidates):
            return int(label)
        raise InputError(f"{row.where}: label {label!r} is neither one of the {len(candidates)} choices nor an index")


def join(prompt: str, answer: str) -> str:
    """What the answer adds to the prompt: one space first, unless either has white space there.

    >>> join("It was", "great"), join("Answer:\\n", "Yes")
    (' great', 'Yes')
    """
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def template_fields(template: str) -> list[str]:
    """The fields that a template names, in order. Raises InputError for anything but plain names in braces.

    >>> template_fields("{premise} Yes or No? {hypothesis}")
    ['premise', 'hypothesis']
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; write a literal brace twice") from None
    fields = [name for _, name, _, _ in parts if name is not None]
    for _, name, spec, conversion in parts:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise InputError(f"template {template!r}: {{{name}}} must be a plain field name in braces")
    if not fields:
        raise InputError(f"template {template!r} names no field; write one in braces, such as '{{text}} It was'")
    return fields


def _text(value: Any) -> str:
    """A field as text, the same from JSON and CSV."""
    return str(value).lower() if isinstance(value, bool) else str(value)
