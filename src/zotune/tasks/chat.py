"""Conversations → token ids by the tokenizer's chat template, with the tokens of the assistant's turns found in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zotune.errors import InputError

Messages = Sequence[Mapping[str, str]]


def check_template(tokenizer: Any) -> None:
    """Raises InputError where the tokenizer cannot write a conversation."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "messages: the tokenizer of --model has no chat template; take a chat model (its name often ends in -Instruct "
            "or -Chat), or give rows of prompt and completion"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "messages: the tokenizer of --model tells no offsets of its tokens; give prompt and completion"
        )


def question_ids(tokenizer: Any, messages: Messages, where: str) -> list[int]:
    """The conversation up to where the assistant's next turn begins."""
    text = _written(tokenizer, messages, where, True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def conversation_ids(tokenizer: Any, messages: Messages, learned: int, where: str) -> tuple[list[int], list[int]]:
    """Ids of the whole conversation, up to the last that counts, and the places in it that do.

    What counts is what the template writes for an assistant's turn (from message `learned` on) behind the words that ask for
    one: the reply and the mark of its end. A turn that the template writes otherwise once others follow it does not
    count, except as the last (Qwen3 drops the thoughts of earlier turns). Raises InputError where no turn is found.
    """
    whole = _written(tokenizer, messages, where, False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < learned:
            continue
        before = _written(tokenizer, messages[:i], where, True)
        through = _written(tokenizer, messages[: i + 1], where, False).rstrip()
        if len(before) < len(through) and through.startswith(before) and whole.startswith(through):
            spans.append((len(before), len(through)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = [
        place
        for place, (start, end) in enumerate(encoded["offset_mapping"])
        if place > 0 and start < end and any(start < last and end > first for first, last in spans)
    ]
    if not places:
        raise InputError(f"{where}: the assistant's turns are not found in what the chat template writes")
    return list(encoded["input_ids"])[: places[-1] + 1], places


def remaining(messages: Messages, learned: int) -> Iterator[tuple[Messages, int]]:
    """The conversation and `learned`, then both without its first turns, one question less each time, down to the last.

    System messages at its head stay.
    """
    head = next((i for i, message in enumerate(messages) if message["role"] in ("user", "assistant")), 0)
    yield messages, learned
    for i, message in enumerate(messages[:learned] if learned else messages):
        if i > head and message["role"] == "user":
            yield [*messages[:head], *messages[i:]], max(0, learned - (i - head))


def question_places(tokenizer: Any, messages: Messages, where: str, asks: bool) -> list[int]:
    """Places of the tokens of the longest message that is not the assistant's; none where the template changes it."""
    text = _written(tokenizer, messages, where, asks)
    content = max((m["content"].strip() for m in messages if m["role"] != "assistant"), key=len)
    start = text.find(content) if content else -1
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return places_within(text, encoded["offset_mapping"], start, start + len(content)) if start >= 0 else []


def places_within(text: str, offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Places of the tokens that hold nothing but what stands between two places of the text, and white space before it."""
    return [
        place
        for place, (first, last) in enumerate(offsets)
        if start < last <= end and first < last and not text[first : max(first, start)].strip()
    ]


def _written(tokenizer: Any, messages: Messages, where: str, asks: bool) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks))
    except jinja2.TemplateError as error:
        raise InputError(f"{where}: the tokenizer's chat template refuses these messages ({error})") from None
