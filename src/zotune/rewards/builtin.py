"""The reward functions that need nothing but the answer and its row. Each maker takes what stands behind the name's colon."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zotune.errors import InputError
from zotune.tasks.metrics import exact, text_f1
from zotune.tasks.rows import missing

GIVEN = (
    "prompts",
    "completion_ids",
    "completions_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)  # beside the rows' columns
ANSWER = "answer"  # the column that holds what is right, where none is named


def text_of(completion: Any) -> str:
    """What was written: of a conversation the content of its messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content", "")) for message in completion)


def compared(score: Callable[[str, Sequence[str]], float]) -> Callable[[str], Callable[..., Any]]:
    """A metric of the answer and the texts of a column: None where the row has none."""

    def make(column: str) -> Callable[..., Any]:
        column = column or ANSWER

        def call(completions: Sequence[Any], **columns: Any) -> list[float | None]:
            if column not in columns:
                known = [name for name in columns if name not in GIVEN]
                raise ValueError(f"the rows have no column {column!r} (but {', '.join(map(repr, known))})")
            return [
                None if missing(gold) else score(text_of(text).strip(), _golds(gold))
                for text, gold in zip(completions, columns[column], strict=True)
            ]

        return call

    return make


def _golds(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def valid_json(schema: str) -> Callable[..., Any]:
    """1 where the whole answer is JSON and as the schema says, else 0."""
    check: Callable[[Any], bool] = lambda value: True  # noqa: E731
    if schema:
        check = _schema_of(Path(schema).expanduser())

    def call(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(_holds(text_of(text), check)) for text in completions]

    return call


def _holds(text: str, check: Callable[[Any], bool]) -> bool:
    try:
        return check(json.loads(text))
    except (ValueError, RecursionError):
        return False


def _schema_of(path: Path) -> Callable[[Any], bool]:
    try:
        import jsonschema
    except ImportError:
        raise InputError(
            "a schema needs jsonschema: install zotune[reward] (json alone asks for JSON of any kind)"
        ) from None
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    except jsonschema.SchemaError as error:
        raise InputError(f"{path}: no JSON schema ({error.message})") from None
    return lambda value: bool(kind(schema).is_valid(value))


def near_length(wanted: str) -> Callable[..., Any]:
    """1 − |tokens − N|/N, at least 0."""
    if not wanted.isdecimal() or int(wanted) < 1:
        raise InputError("write length:N, N tokens")
    most = int(wanted)

    def call(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [max(0.0, 1 - abs(len(ids) - most) / most) for ids in completion_ids]

    return call


def matches(pattern: str) -> Callable[..., Any]:
    """1 where the pattern is found in the answer."""
    if not pattern:
        raise InputError("write regex:PATTERN")
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise InputError(f"no regular expression ({error})") from None

    def call(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(found.search(text_of(text)) is not None) for text in completions]

    return call


BUILT_IN: dict[str, Callable[[str], Callable[..., Any]]] = {
    "exact-match": compared(exact),
    "token-f1": compared(text_f1),
    "json": valid_json,
    "length": near_length,
    "regex": matches,
}
