"""Rows of instruction, input and output, as Stanford's Alpaca has them, asked in its own words."""

from zotune.errors import InputError
from zotune.tasks.conversations import refuse_seen
from zotune.tasks.rows import Row, missing
from zotune.tasks.task import Asked

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def ask_alpaca(row: Row, labelled: bool) -> Asked:
    """The instruction, the input if there is one, and the output as the answer, under Alpaca's headings. A field 'system' stands in
    the place of the sentence that begins it.
    """
    refuse_seen(row)
    given = _optional(row, "input")
    if row.fields.get("history"):
        raise InputError(f"{row.where}: field 'history' has earlier turns; give them as 'messages' or 'conversations'")
    system = _optional(row, "system") or (WITH_INPUT if given else WITHOUT)
    parts = [system, f"### Instruction:\n{_text(row, 'instruction')}"]
    parts += [f"### Input:\n{given}"] if given else []
    prompt = "\n\n".join([*parts, "### Response:\n"])
    if not labelled:
        return Asked(prompt, [""], None)
    answer = _text(row, "output")
    return Asked(prompt, [answer], 0, [answer])


def _optional(row: Row, field: str) -> str:
    value = row.fields.get(field)
    return "" if missing(value) or not str(value).strip() else _text(row, field)


def _text(row: Row, field: str) -> str:
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{row.where}: field {field!r} must be a text")
    return value
