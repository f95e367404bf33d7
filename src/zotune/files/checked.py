"""Models of what users write: unknown keys are refused, and a fault is a line that says where it stands."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from zotune.errors import nearest

Positive = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """Unknown keys are refused; strings are read as the numbers they spell."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("output", check_fields=False)
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("a blank is no name; give a path")
        return value


def fault_line(error: Any, file: str | None) -> str:
    """A fault that pydantic found, in a line; file: where the key stands, None for a flag."""
    name = str(error["loc"][0])
    where = f"{file}: {name}" if file else flag(name)
    if error["type"] == "extra_forbidden":
        return f"{where}: no such option"
    if error["type"] == "missing":
        return f"{flag(name)}: required"
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] in ("value_error", "assertion_error"):
        return f"{where}: {said}"
    if error["type"] == "literal_error":
        choices = str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return (
            f"{where}: unknown {name.replace('_', ' ')} {error['input']!r:.80}; {nearest(str(error['input']), choices)}"
        )
    return f"{where}: {error['input']!r:.80} should be {said}"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
