"""Rows as prompts: texts, or conversations that the tokenizer's chat template writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from zotune.errors import InputError
from zotune.tasks.chat import check_template, end_marks, question_ids
from zotune.tasks.conversations import messages_of, template_options
from zotune.tasks.encoding import Encoder
from zotune.tasks.rows import Row
from zotune.tasks.task import Example

PROMPT = "prompt"


@dataclass(frozen=True)
class Prompt:
    """What is asked. ids: as the model reads it. prompt: as functions get it, text or messages. columns: the row's others."""

    ids: tuple[int, ...]
    prompt: Any
    where: str
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def asked(row: Row, template: str | None = None) -> tuple[Any, dict[str, Any]]:
    """A row's prompt, a text or messages, and its other columns. template: a format string over the row's fields, in the place of a
    field `prompt`. Raises InputError, which names the row."""
    if template is not None:
        named = {name for _, name, _, _ in Formatter().parse(template) if name}
        return template.format_map({name: str(row[name]) for name in named}), dict(row.fields)
    if PROMPT not in row.fields:
        has = ", ".join(map(repr, row.fields))
        raise InputError(
            f"{row.where}: no field 'prompt' (has {has}); name one by --columns, or say what is asked by --template"
        )
    others = {name: value for name, value in row.fields.items() if name != PROMPT}
    if isinstance(row.fields[PROMPT], str):
        return row[PROMPT], others
    if not isinstance(row[PROMPT], list):
        raise InputError(
            f"{row.where}: field 'prompt' is a {type(row[PROMPT]).__name__}; a text is wanted, or a list of messages"
        )
    messages = messages_of(row, PROMPT)
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{row.where}: the prompt ends with the assistant's turn, which is the model's to write")
    return messages, others


class PromptEncoder:
    """Rows → prompts. chat: a text is asked through the chat template, as a user's message (and reward functions get it as one).

    Raises InputError for a row that cannot be asked: no text, messages and no chat template, or no room for an answer.
    """

    def __init__(self, tokenizer: Any, encode: Encoder, *, template: str | None = None, chat: bool = False) -> None:
        self.tokenizer, self.encode, self.template, self.chat = tokenizer, encode, template, chat
        self.conversational = False  # whether any prompt was
        if chat:
            check_template(tokenizer)

    def __call__(self, row: Row) -> Prompt:
        prompt, columns = asked(row, self.template)
        said: dict[str, Any] = {}
        if isinstance(prompt, str) and self.chat:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            ids = tuple(self.encode(Example(prompt, ("",), None, row.where)).prompt) if prompt else ()
        else:
            check_template(self.tokenizer)
            said = template_options(row)
            ids = tuple(question_ids(self.tokenizer, prompt, row.where, said))
            self.conversational = True
        if not ids:
            raise InputError(f"{row.where}: the prompt has no token")
        takes = self.encode.model_takes
        limit = min(filter(None, (takes, self.encode.max_length)), default=None)
        if limit is not None and len(ids) >= limit:
            raise InputError(
                f"{row.where}: a prompt of {len(ids)} tokens leaves no room to answer, the model takes {limit}; shorten it, or "
                "leave it out by --skip-bad-rows"
            )
        return Prompt(ids, prompt, row.where, columns)


def ends_of(tokenizer: Any, own: Sequence[int], conversational: bool) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's end, the model's own, and behind a turn the mark of the chat template."""
    marks = end_marks(tokenizer) if conversational else set()
    return tuple(sorted({*own, tokenizer.eos_token_id} - {None} | marks))
