"""A task is data: where its rows are, how a row becomes a prompt, and which words stand for its labels."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zotune.errors import InputError, nearest
from zotune.tasks.conversations import is_learned, messages_of, template_options
from zotune.tasks.rows import Row, missing

CHOICE_METRICS, TEXT_METRICS = ("accuracy", "f1a", "record_f1"), ("f1", "exact_match")
METRICS = (*CHOICE_METRICS, *TEXT_METRICS, "perplexity")
MADE_BY_ASK = ("prompt", "plain", "label_field", "choices_field", "answer_field")  # keys that say nothing beside `ask`
MASK = "<mask>"  # in a template, where a masked model's answer stands
LOWER_IS_BETTER = ("perplexity", "loss")  # of the metrics; they are no percentages either


@dataclass(frozen=True)
class Asked:
    """What a task's own function makes of a row: prompt, texts that may follow it, which is right; see `Example`."""

    prompt: str
    texts: list[str]
    label: int | None
    golds: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Hub:
    """A hub data set (or a folder or file of rows): its name, subset, and the split whose labels are public and that is
    scored as test."""

    name: str
    subset: str | None = None
    test_split: str = "test"


@dataclass(frozen=True)
class Example:
    """A row as the model will be asked: a prompt, the texts that may follow it, and which of them is right.

    An empty prompt: every token of the one candidate counts (plain text). messages: a conversation, which the tokenizer's chat
    template writes; assistant turns from message number `learned` on count, but those of `weight` 0, and prompt and candidates only
    show it. template: what the row tells the chat template besides, such as `tools`. end: of an answer to generate the text behind
    it, "" for the tokenizer's end; see `zotune.tasks.ends`.
    golds: what counts as right besides: the texts that an answer is compared with. names: what each candidate answers, where
    its text says more. fields: where in the prompt the row's own texts begin and end, if a template tells. A task that generates
    has one candidate, the text it is trained on.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int | None
    where: str
    golds: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    learned: int = 0
    fields: tuple[tuple[int, int], ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    end: str | None = None


@dataclass(frozen=True)
class Task:
    """Classification by label words, multiple choice among a row's own texts, an answer that is generated, or plain text and
    conversations, whose own tokens count.

    prompt: a format string over a row's fields, `'{sentence} It was'`. plain: the same without the template's words, for
        `--alignment none`.
    words: label → word, labels compared as strings (JSON's 1 is CSV's "1"). None where rows bring their candidates.
    label_field: the right label (or, with choices_field, the right choice: a number is its index, a text its text or index).
    answer_field: the text to generate, or a list of texts that are all right, the first of which is trained on.
    text_field: a text to model as it stands. messages_field: a list of {role, content}; the loss is over assistant turns (with
        answer_field: over those of that second list alone).
    ask: a function of the row (and whether its label is wanted) where format strings do not reach; it makes prompt and answers.
    end: the text that ends an answer to generate, trained behind it and stopped at; None: the tokenizer's end token, or the one
        that a row writes itself. max_new_tokens: of a generated answer at most; None: 50, of a conversation's reply 256.
    metric: see `zotune.tasks.metrics`. validation_size: rows at most. columns: the data's names of fields → those above.
    folder: where its rows are in --data-dir, if not under its name.
    """

    name: str
    prompt: str = ""
    words: Mapping[str, str] | None = None
    label_field: str = "label"
    choices_field: str | None = None
    answer_field: str | None = None
    text_field: str | None = None
    messages_field: str | None = None
    ask: Callable[[Row, bool], Asked] | None = None
    plain: str | None = None
    source: Hub | None = None
    metric: str = "accuracy"
    generates: bool = False
    end: str | None = None
    max_new_tokens: int | None = None
    validation_size: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.models:
            field = self.text_field or self.messages_field
            others = [
                self.words,
                self.choices_field,
                self.ask,
                self.answer_field if self.text_field else None,
                self.end,
            ]
            if any(one is not None for one in others) or (self.text_field and self.messages_field):
                raise InputError(
                    f"task {self.name!r}: field {field!r} counts as it stands; give nothing else to answer"
                )
            object.__setattr__(self, "prompt", f"{{{field}}}")
            object.__setattr__(self, "metric", "perplexity")
            return
        if self.ask is not None:
            idle = [name for name in MADE_BY_ASK if getattr(self, name) != getattr(Task, name)]
            if idle:
                raise InputError(
                    f"task {self.name!r}: key {idle[0]!r} has no effect beside 'ask', whose function makes prompt and answers; "
                    "leave out one of them"
                )
        else:
            template_fields(self.prompt)
            given = [self.words, self.choices_field, self.answer_field]
            if sum(one is not None for one in given) != 1:
                raise InputError(
                    f"task {self.name!r}: give label words, a field of choices or a field of answers, one of them"
                )
        if self.answer_field is not None:
            object.__setattr__(self, "generates", True)
            object.__setattr__(self, "metric", "f1" if self.metric == "accuracy" else self.metric)
        if self.end is not None and not (self.generates and self.end):
            raise InputError(f"task {self.name!r}: end {self.end!r} must be a text, behind answers that are generated")
        fitting = TEXT_METRICS if self.generates else CHOICE_METRICS
        if self.metric not in fitting and not (self.generates and ":" in self.metric):
            raise InputError(
                f"task {self.name!r}: metric {self.metric!r} does not fit it; {nearest(self.metric, fitting)}"
            )
        if self.words is not None and not all(word.strip() for word in self.words.values()):
            raise InputError(f"task {self.name!r}: an empty label word: {dict(self.words)}")
        if self.words is not None and len({word.strip() for word in self.words.values()}) < max(2, len(self.words)):
            raise InputError(
                f"task {self.name!r}: label words must be two or more, each for one label: {dict(self.words)}"
            )

    @property
    def models(self) -> bool:
        """Whether text itself is modelled: there is nothing to choose, and a row's own tokens are scored."""
        return self.text_field is not None or self.messages_field is not None

    @property
    def asked(self) -> str:
        """The prompt in quotes, or the first sentence that the task's function says of itself."""
        if self.ask is None:
            return repr(self.prompt)
        return re.split(r"\.\s|\.$|\n", (self.ask.__doc__ or self.ask.__name__).strip())[0]

    @property
    def labels(self) -> list[str]:
        return list(self.words or ())

    def aligned(self, alignment: str) -> Task:
        """The task with its template, or with alignment "none" without the template's words."""
        if alignment == "template":
            return self
        if self.plain is None:
            raise InputError(f"--alignment {alignment}: task {self.name!r} has one form of prompt; use template")
        return replace(self, prompt=self.plain, plain=None)

    def example(self, row: Row, labelled: bool = True) -> Example:
        """The row as prompt, candidates and label. Raises InputError that names the row's place."""
        if self.ask is not None:
            asked = self.ask(row, labelled)
            candidates = tuple(join(asked.prompt, text) if text else "" for text in asked.texts)
            golds, names = tuple(asked.golds), tuple(asked.names)
            if labelled and self.generates and not all(gold.strip() for gold in golds):
                raise InputError(f"{row.where}: an answer without text in it")
            end = (self.end or "") if self.generates else None
            label = asked.label if labelled else None
            return Example(asked.prompt, candidates, label, row.where, golds, names, end=end)
        if self.messages_field is not None:
            return self._conversation(row, labelled)
        if self.text_field is not None:
            text = row[self.text_field]
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{row.where}: field {self.text_field!r} must be a text")
            return Example("", (text,), 0, row.where)
        prompt, fields = _filled(self.prompt, row)
        if not prompt.strip():
            raise InputError(f"{row.where}: an empty prompt")
        wanted = template_fields(self.prompt)
        if not any(_text(row[name]).strip() for name in wanted):
            said = " and ".join(map(repr, dict.fromkeys(wanted)))
            raise InputError(f"{row.where}: field {said} has no text, so nothing is asked")
        if self.answer_field is not None:
            end = self.end or ""
            if not labelled:
                return Example(prompt, ("",), None, row.where, fields=fields, end=end)
            answers = self._answers(row)
            return Example(prompt, (join(prompt, answers[0]),), 0, row.where, answers, fields=fields, end=end)
        texts = self._candidates(row)
        label = self._label(row, texts) if labelled else None
        return Example(prompt, tuple(join(prompt, text) for text in texts), label, row.where, fields=fields)

    def _conversation(self, row: Row, labelled: bool) -> Example:
        assert self.messages_field is not None
        messages, template = messages_of(row, self.messages_field), template_options(row)
        learned = len(messages) if self.answer_field else 0
        if self.answer_field and labelled:
            messages += messages_of(row, self.answer_field, begins=False)
        last = len(messages)
        while last > 0 and messages[last - 1]["role"] == "assistant":
            last -= 1
        if last == 0:
            raise InputError(f"{row.where}: no message before the assistant's, so nothing to answer")
        if not labelled:  # the reply is to be written
            asked = tuple(messages[:last])
            return Example(_shown(messages[:last]), ("",), None, row.where, messages=asked, template=template)
        replies = [i for i, message in enumerate(messages) if is_learned(message) and i >= learned]
        if not replies:
            spoken = any(message["role"] == "assistant" for message in messages[learned:])
            why = "; all of them are of weight 0" if spoken else ""
            raise InputError(f"{row.where}: no message of role 'assistant' to learn from{why}")
        messages, at = messages[: replies[-1] + 1], replies[-1]
        reply = messages[at]["content"]
        shown, candidates = _shown(messages[:at]), (f"assistant: {reply}",)
        return Example(shown, candidates, 0, row.where, (reply,), (), tuple(messages), learned, template=template)

    def _answers(self, row: Row) -> tuple[str, ...]:
        value = row[self.answer_field or ""]
        values = value if isinstance(value, list) else [value]
        answers = tuple(_words(v, row.where, str(self.answer_field)) for v in values)
        if not answers or not answers[0].strip() or any(map(missing, values)):
            raise InputError(f"{row.where}: field {self.answer_field!r} must be a text, or a list of texts")
        return answers

    def _candidates(self, row: Row) -> list[str]:
        if self.words is not None:
            return list(self.words.values())
        choices = row[self.choices_field or ""]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise InputError(f"{row.where}: field {self.choices_field!r} must be a list of two or more texts")
        return choices

    def _label(self, row: Row, candidates: list[str]) -> int:
        given = _read(_told(row, self.label_field))
        if self.words is not None:
            label = _label_text(given, self.words)
            if label not in self.words:
                known = ", ".join(self.words)
                raise InputError(f"{row.where}: label {label!r} has no word (labels with one: {known})")
            return self.labels.index(label)
        label = _label_text(given, candidates if isinstance(given, str) else ())
        index = int(label) if label.isdecimal() and int(label) < len(candidates) else None
        named = candidates.index(label) if label in candidates and isinstance(given, (str, bool)) else None
        if named is not None and index is not None and named != index:
            raise InputError(
                f"{row.where}: label {label!r} is the text of choice {named} and the index of another; give the index {named} "
                "as a number"
            )
        found = index if named is None else named
        if found is None:
            raise InputError(
                f"{row.where}: label {label!r} is neither one of the {len(candidates)} choices nor an index"
            )
        return found


def join(prompt: str, answer: str) -> str:
    """What the answer adds to the prompt: one space first, unless either has white space there.

    >>> join("It was", "great"), join("Answer:\\n", "Yes")
    (' great', 'Yes')
    """
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def _shown(messages: list[dict[str, Any]]) -> str:
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def label_of(row: Row, known: Mapping[str, int], field: str = "label") -> int:
    """The index that a row's label stands for. Raises InputError for another one."""
    label = _label_text(_told(row, field), known)
    if label not in known:
        raise InputError(f"{row.where}: field {field!r} is {label!r}; it must be one of {', '.join(known)}")
    return known[label]


def template_fields(template: str) -> list[str]:
    """The fields that a template names, in order. Raises InputError for anything but names in braces, which may hold spaces.

    >>> template_fields("{premise} Yes or No? {Review Text}")
    ['premise', 'Review Text']
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; write a literal brace twice") from None
    fields = [name for _, name, _, _ in parts if name is not None]
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.strip() or name.isdecimal() or set(name) & set(".[]") or spec or conversion:
            raise InputError(
                f"template {template!r}: {{{name}}} must be a plain field name in braces; a field whose name is none gets one by "
                "--columns"
            )
    if not fields:
        raise InputError(f"template {template!r} names no field; write one in braces, such as '{{text}} It was'")
    return fields


def _filled(template: str, row: Row) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The template with the row's fields in it, and where each begins and ends.

    A space that stands on both sides of a brace stands once: SST-2's sentences end in one, and a second is a token of its own.

    >>> _filled("{sentence} It was", Row({"sentence": "a fine film "}, "row 1"))
    ('a fine film It was', ((0, 11),))
    """
    text, places = "", []
    parts = list(string.Formatter().parse(template))
    for (words, name, _, _), (behind, *_) in zip(parts, [*parts[1:], ("", None, None, None)], strict=True):
        text += words
        if name is not None:
            value = _words(row[name], row.where, name)
            value = value.lstrip(" ") if text.endswith(" ") else value
            value = value.rstrip(" ") if behind.startswith(" ") else value
            places.append((len(text), len(text := text + value)))
    return text, tuple(places)


def _told(row: Row, field: str) -> Any:
    """A row's label. One without a value is not told, as one that is empty."""
    if field in row.fields and missing(row.fields[field]):
        raise InputError(f"{row.where}: field {field!r} has no value, its label is ''")
    return row[field]


def _words(value: Any, where: str, field: str) -> str:
    """A field's text. Raises InputError for what Python alone would write as one: a list, an object, bytes."""
    value = _read(value)
    if isinstance(value, (Mapping, list, tuple, set, bytes)) or getattr(value, "shape", ()) != ():
        kind = "bytes" if isinstance(value, bytes) else "an object" if isinstance(value, Mapping) else "a list"
        raise InputError(f"{where}: field {field!r} is {kind} where a text or a number was expected")
    return _text(value)


def _label_text(value: Any, known: Container[str]) -> str:
    """A label as text: 1.0 is the label 1, as tables hold whole numbers beside gaps, unless 1.0 is known itself."""
    text = _text(value)
    return text if text in known else re.sub(r"^(-?\d+)\.0$", r"\1", text)


def _text(value: Any) -> str:
    """A field as text, the same from JSON and CSV."""
    value = _read(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(value: Any) -> Any:
    """A number of NumPy or a tensor without dimensions as Python's own."""
    return value.item() if getattr(value, "shape", None) == () else value
