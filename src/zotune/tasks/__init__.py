"""Built-in tasks. A further one is a `Task` in a file of its family and a line here."""

from collections.abc import Mapping
from typing import Any

from zotune.errors import InputError, nearest
from zotune.tasks.choice import copa, record, winogrande
from zotune.tasks.inference import boolq, cb, multirc, rte, wic, wsc
from zotune.tasks.reading import drop, squad
from zotune.tasks.sentiment import sst2, sst5
from zotune.tasks.task import Example, Task

TASKS: dict[str, Task] = {
    task.name: task for task in (sst2, sst5, rte, cb, boolq, wsc, wic, multirc, copa, winogrande, record, squad, drop)
}

__all__ = ["TASKS", "Example", "Task", "get_task"]


def get_task(name: str | Mapping[str, Any]) -> Task:
    """A built-in task, that of a YAML file, or that of a definition; see `zotune.tasks.files`."""
    from zotune.tasks.files import SUFFIXES, make_task, read_task

    if not isinstance(name, str):
        return make_task(name)
    if name.endswith(SUFFIXES):
        return make_task(read_task(name))
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; {nearest(name, TASKS)}")
    return TASKS[name]
