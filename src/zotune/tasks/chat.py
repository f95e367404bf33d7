"""Conversations → token ids by the tokenizer's chat template, with the tokens of the assistant's turns found in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zotune.errors import InputError
from zotune.models.border import reading
from zotune.tasks.conversations import THOUGHTS, is_learned
from zotune.tasks.ends import marks

Messages = Sequence[Mapping[str, Any]]
SPEAKERS = ("user", "assistant")  # whom every template lets speak
HONOURED = ("tool_calls", *THOUGHTS)  # keys of messages that the template writes, or the row is refused
Said = Mapping[str, Any]  # what a row tells the template besides, such as `tools`


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


def check_honoured(tokenizer: Any, messages: Messages, where: str, said: Said) -> None:
    """Raises InputError where the messages come with tools, calls of them, thoughts or other speakers, and the template writes none
    of these."""
    keys = [key for key in HONOURED if any(message.get(key) for message in messages)]
    others = [i for i, message in enumerate(messages) if message["role"] not in SPEAKERS and message["content"].strip()]
    if not keys and not others and "tools" not in said:
        return
    whole = _written(tokenizer, messages, where, False, said)
    told = "; take a model whose template does, or rows without"
    without = {key: value for key, value in said.items() if key != "tools"}
    if "tools" in said and _written(tokenizer, messages, where, False, without) == whole:
        raise InputError(f"{where}: field 'tools': the chat template of --model writes no tools{told}")
    for key in keys:
        bare = [{name: value for name, value in message.items() if name != key} for message in messages]
        if _written(tokenizer, bare, where, False, said) == whole:
            raise InputError(f"{where}: {key!r}: the chat template of --model writes none{told}")
    for i in others:
        if messages[i]["content"].strip() in whole:
            continue
        try:
            unseen = _written(tokenizer, [*messages[:i], *messages[i + 1 :]], where, False, said) == whole
        except InputError:  # it is asked for
            continue
        if unseen:
            role = messages[i]["role"]
            raise InputError(f"{where}: a message of role {role!r}: the chat template of --model writes none{told}")


def end_marks(tokenizer: Any) -> set[int]:
    """The token that the template writes behind a reply, if it is one that may end an answer."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, _ = conversation_ids(tokenizer, talk, 0, "")
    except InputError:  # a template that wants other messages
        return set()
    return {ids[-1]} & marks(tokenizer)


def question_ids(tokenizer: Any, messages: Messages, where: str, said: Said = {}) -> list[int]:  # noqa: B006  # it is only read
    """The conversation up to where the assistant's next turn begins."""
    text = _written(tokenizer, messages, where, True, said)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def conversation_ids(
    tokenizer: Any,
    messages: Messages,
    learned: int,
    where: str,
    said: Said = {},  # noqa: B006
) -> tuple[list[int], list[int]]:
    """Ids of the whole conversation, up to the last that counts, and the places in it that do.

    What counts is what the template writes for an assistant's turn (from message `learned` on, but those of weight 0) behind the
    words that ask for one: the reply and the mark of its end. Where it writes none, the tokenizer's end stands behind the last
    reply. A turn that the template writes otherwise once others follow it does not count, except as the last (Qwen3 drops the
    thoughts of earlier turns). Raises InputError where no turn is found.
    """
    whole = _written(tokenizer, messages, where, False, said)
    spans = []
    for i, message in enumerate(messages):
        if not is_learned(message) or i < learned:
            continue
        through = _written(tokenizer, messages[: i + 1], where, False, said).rstrip()
        if i:
            before = _written(tokenizer, messages[:i], where, True, said)
        else:  # nobody has spoken, and no template asks for a turn then
            before, found, _ = through.partition(message["content"].strip())
            before = before if found else through
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
    ids = list(encoded["input_ids"])[: places[-1] + 1]
    if ids[-1] not in marks(tokenizer) and spans[-1][1] >= len(whole.rstrip()) and tokenizer.eos_token_id is not None:
        places.append(len(ids))
        ids.append(tokenizer.eos_token_id)
    return ids, places


def remaining(messages: Messages, learned: int) -> Iterator[tuple[Messages, int]]:
    """The conversation and `learned`, then both without its first turns, one question less each time, down to the last.

    System messages at its head stay.
    """
    head = next((i for i, message in enumerate(messages) if message["role"] in ("user", "assistant")), 0)
    yield messages, learned
    for i, message in enumerate(messages[:learned] if learned else messages):
        if i > head and message["role"] == "user":
            yield [*messages[:head], *messages[i:]], max(0, learned - (i - head))


def question_places(tokenizer: Any, messages: Messages, where: str, asks: bool, said: Said = {}) -> list[int]:  # noqa: B006
    """Places of the tokens of the longest message that is not the assistant's; none where the template changes it."""
    text = _written(tokenizer, messages, where, asks, said)
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


def _written(tokenizer: Any, messages: Messages, where: str, asks: bool, said: Said) -> str:
    bare = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    with reading(f"{where}: the tokenizer's chat template refuses these messages"):
        return str(tokenizer.apply_chat_template(bare, tokenize=False, add_generation_prompt=asks, **said))
