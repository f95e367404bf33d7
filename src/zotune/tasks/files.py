"""A task as one small YAML file, or a block of one: read, checked, and written."""

from __future__ import annotations

import inspect
import math
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from zotune.errors import InputError, nearest
from zotune.files.checked import Options, Positive, fault_line
from zotune.files.code import named
from zotune.files.reading import read_yaml
from zotune.tasks.task import MADE_BY_ASK, METRICS, Hub, Task

SUFFIXES = (".yaml", ".yml")


class Definition(Options):
    """The keys of a task's file: those of `Task`, with its source as `data`, `subset`, `test_split`, and `ask` by name."""

    name: str
    data: str | None = None
    subset: str | None = None
    test_split: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    folder: str | None = None
    prompt: str = ""
    plain: str | None = None
    words: dict[str, str] | None = None
    label_field: str = "label"
    choices_field: str | None = None
    answer_field: str | None = None
    text_field: str | None = None
    messages_field: str | None = None
    ask: str | None = None
    generates: bool = False
    end: str | None = None
    max_new_tokens: Positive | None = None
    metric: str | None = None
    validation_size: int | None = None

    @field_validator("words", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key).lower() if isinstance(key, bool) else str(key): word for key, word in value.items()}
        return value

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in METRICS and ":" not in value:
            raise ValueError(f"unknown metric {value!r}; {nearest(value, METRICS)}, or package.module:function")
        return value

    def task(self) -> Task:
        given = self.model_dump(exclude={"data", "subset", "test_split", "ask", "metric"})
        if self.data is not None:
            given["source"] = Hub(self.data, self.subset, self.test_split or "test")
        if self.ask is not None:
            given["ask"] = named_function(self.ask, "ask")
        if self.metric is not None:
            given["metric"] = self.metric
            if ":" in self.metric:
                own_score(self.metric, "metric")  # says now what cannot be imported
        return Task(**given)


def read_task(path: str) -> dict[str, Any]:
    """The definition in a YAML file. Its name is the file's, unless it has one."""
    return {"name": Path(path).stem, **read_yaml(path, "--task")}


def make_task(definition: Mapping[str, Any]) -> Task:
    """The task of a definition. Raises InputError, a line a fault."""
    given = {str(key).replace("-", "_"): value for key, value in definition.items()}
    given.setdefault("name", "own")
    known = Definition.model_fields
    problems = [
        f"task {given['name']!r}: unknown key {key!r}; {nearest(key, known)}" for key in given if key not in known
    ]
    try:
        read = Definition.model_validate({key: value for key, value in given.items() if key in known})
    except ValidationError as error:
        problems += [fault_line(one, f"task {given['name']!r}") for one in error.errors()]
    if problems:
        raise InputError("\n".join(problems))
    return read.task()


def definition(task: Task) -> dict[str, Any]:
    """What `make_task` makes the task of; only what differs from the defaults. Raises InputError for a nameless `ask`."""
    found: dict[str, Any] = {"name": task.name}
    if task.source is not None:
        found |= {"data": task.source.name, "subset": task.source.subset, "test_split": task.source.test_split}
    for field in fields(Task):
        value = getattr(task, field.name)
        if field.name in Definition.model_fields and field.name not in found:
            found[field.name] = dict(value) if isinstance(value, Mapping) else value
    if task.ask is not None:
        found = {key: value for key, value in found.items() if key not in MADE_BY_ASK}
    if task.models:
        del found["prompt"]  # follows from the field
    if task.ask is not None:
        found["ask"] = f"{task.ask.__module__}:{task.ask.__qualname__}"
        if getattr(sys.modules.get(task.ask.__module__), task.ask.__qualname__, None) is not task.ask:
            raise InputError(
                f"task {task.name!r}: its function `ask` must be one of a module, to be found again by name"
            )
    bare = Definition(name=task.name)
    return {key: value for key, value in found.items() if key == "name" or value != getattr(bare, key)}


def written(task: Task, name: str | None = None) -> str:
    """The task as YAML, with a comment where a function asks."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Texts of several lines in quotes, with their ends written out."""

    def scalar(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\n" in value else None)

    Dumper.add_representer(str, scalar)
    block = definition(task)
    if name and name != task.name:  # a copy finds the rows of what it is a copy of
        block |= {"name": name, "folder": task.folder or task.name}
    text = str(yaml.dump(block, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000))
    if task.ask is None:
        return text
    note = f"# {block['ask']} makes prompt and answers; for other ones name a function of your own, or give prompt instead of ask"
    return f"{note}\n{text}"


def named_function(name: str, option: str) -> Callable[..., Any]:
    """The function of `package.module:function`; modules in the working folder are found."""
    try:
        found = named(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{option} {name}: cannot be imported ({error})") from None
    if not callable(found):
        raise InputError(f"{option} {name}: is no function")
    return found


def own_score(name: str, option: str) -> Callable[[str, str, Sequence[str]], float]:
    """The named function of prompt, answer and right answers, as a score. Raises InputError where it gives no finite number."""
    function = named_function(name, option)
    told = f"{option} {name}: called with prompt, answer and golds it"
    try:
        inspect.signature(function).bind("", "", [])
    except TypeError as error:
        raise InputError(f"{told} does not fit ({error})") from None
    except ValueError:
        pass  # one that tells no signature

    def score(prompt: str, answer: str, golds: Sequence[str]) -> float:
        try:
            found = function(prompt, answer, list(golds))
        except Exception as error:  # anything a stranger's function may raise
            said = (str(error).splitlines() or ["no message"])[0]
            raise InputError(f"{told} raises {type(error).__name__} ({said})") from error
        try:
            value = float(found)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{told} gives {reprlib.repr(found)}; a finite number is wanted")
        return value

    return score
