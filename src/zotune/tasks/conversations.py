"""Conversations as the formats of others write them → messages of role and content.

OpenAI's and TRL's {role, content} with `weight`, `tools`, `tool_calls` and parts of type text; ShareGPT's {from, value}, as axolotl
and LLaMA-Factory read it. What a format's key says is done, or the row is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from zotune.errors import InputError, nearest
from zotune.tasks.rows import Row, missing

Message = dict[str, Any]

SPEAKERS = {  # ShareGPT's names of who speaks → roles
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip
LEARNS = ("weight", "train", "training")  # keys of a turn that say whether it is learned: OpenAI's, axolotl's


SEEN = ("images", "image", "videos", "video", "audios", "audio")  # fields of what is seen or heard beside the texts
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a turn that templates of models that think write


def messages_of(row: Row, field: str, begins: bool = True) -> list[Message]:
    """The field's messages, each of texts `role` and `content`; `weight` 0 where a turn is not learned.

    begins: whether they begin a conversation, so that a field `system` of the row stands before them.
    """
    value = row[field]
    if not isinstance(value, list) or not value:
        raise InputError(f"{row.where}: field {field!r} must be a list of messages, each of role and content")
    made = [_message(one, f"{row.where}: field {field!r}") for one in value]
    system = row.fields.get("system")
    if begins and not missing(system) and system and made[0]["role"] != "system":
        if not isinstance(system, str):
            raise InputError(f"{row.where}: field 'system' must be a text")
        made.insert(0, {"role": "system", "content": system})
    return made


def template_options(row: Row) -> dict[str, Any]:
    """What the row says to the chat template beside its messages: `tools`, and TRL's `chat_template_kwargs`."""
    if given := next((key for key in ("functions", "function_call") if row.fields.get(key)), None):
        raise InputError(f"{row.where}: field {given!r} is OpenAI's old form of tools; give 'tools' and 'tool_calls'")
    refuse_seen(row)
    made: dict[str, Any] = {}
    for key, kind, wanted in (("tools", list, "a list"), ("chat_template_kwargs", Mapping, "an object")):
        value = row.fields.get(key)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = key  # refused below
        if missing(value) or value == "" or value == []:
            continue
        if not isinstance(value, kind):
            raise InputError(f"{row.where}: field {key!r} must be {wanted}, or one as a JSON text")
        made |= {"tools": value} if key == "tools" else dict(value)
    return made


def refuse_seen(row: Row) -> None:
    """Raises InputError where the row has pictures or sound, which no text says."""
    for key in SEEN:
        value: Any = row.fields.get(key)
        if not missing(value) and not (hasattr(value, "__len__") and len(value) == 0):
            raise InputError(f"{row.where}: field {key!r} is of what is seen or heard; texts alone are read")


def is_learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise InputError(f"{where} has a message without texts 'role' and 'content'")
    message = {key: value for key, value in given.items() if key not in LEARNS and value is not None}
    if "from" in message and "value" in message:
        message = _of_sharegpt(message, where)
    if message.get("function_call"):
        raise InputError(f"{where}: 'function_call' is OpenAI's old form of 'tool_calls'; give that")
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
        message.setdefault("content", "")
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_part(part, where) for part in message["content"])
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise InputError(f"{where} has a message without texts 'role' and 'content'")
    if not _learns(given, message["role"], where):
        message["weight"] = 0
    elif message["role"] == "assistant" and not calls and not message["content"].strip():
        raise InputError(f"{where} has a message of the assistant's without text")
    return message


def _learns(given: Mapping[str, Any], role: str, where: str) -> bool:
    """False where a key says that the turn is not learned."""
    if key := next((key for key in ("train_detail", "training_detail") if given.get(key)), None):
        raise InputError(f"{where}: {key} of a message; a turn is learned as a whole or not, which `train` says")
    said = {key: given[key] for key in LEARNS if given.get(key) is not None}
    for key, value in said.items():
        if not (isinstance(value, (bool, int, float)) and value in (0, 1)):
            raise InputError(f"{where}: {key} {value!r} of a message; a turn is learned (1) or not (0)")
        if value and role != "assistant":
            raise InputError(
                f"{where}: {key} {value!r} of a message of role {role!r}; the assistant's alone are learned"
            )
    return all(said.values())


def _of_sharegpt(message: Message, where: str) -> Message:
    speaker = str(message.pop("from"))
    role = SPEAKERS.get(speaker.lower())
    if role is None:
        raise InputError(f"{where}: a message from {speaker!r}; {nearest(speaker, SPEAKERS)}")
    said = message.pop("value")
    if role != "function_call":
        return {"role": role, "content": said} | message
    try:
        calls = json.loads(said)
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{where}: a message from {speaker!r} must be JSON of name and arguments") from None
    return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _call(call: Any, where: str) -> Message:
    """A call as chat templates read it: {type, function: {name, arguments}}, arguments as an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} has a tool call without a function's name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI's form; a template would write its quotes once more
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InputError(f"{where} has a tool call whose arguments are no JSON") from None
    kept = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    return {"type": "function"} | kept | {"function": {"name": function["name"], "arguments": arguments or {}}}


def _part(part: Any, where: str) -> str:
    """The text of a part of type text; others are refused."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InputError(f"{where} has a part of type {kind!r}; texts alone are read")
    return str(part["text"])
