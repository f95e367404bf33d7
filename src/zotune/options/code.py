"""Code that options name, and files from which none is imported: a run's folder may be a stranger's. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zotune.errors import InputError
from zotune.files.checked import flag

RECORDS = ("metrics.jsonl", "trajectory.zot", "progress.json", "result.json")  # beside a config.yaml: it is a run's


def is_record(file: str) -> bool:
    """Whether a file of options is a run's own record of them."""
    folder = Path(file).expanduser().parent
    return any((folder / name).exists() for name in RECORDS)


def refuse_code(where: str, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises InputError, a line each, for code that a run's record names and who asks does not name again.

    given: what is said beside the record.
    """
    lines = [
        f"{where}: {option} {name!r:.80}: a run's record has no code imported; where you know it, name it again by {flag(option)}"
        for option, name in _named(recorded)
        if given.get(option) is None
    ]
    if lines:
        raise InputError("\n".join(lines))


def _named(recorded: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for option in ("method", "loss"):
        if isinstance(name := recorded.get(option), str) and ":" in name:
            yield option, name
    if isinstance(task := recorded.get("task"), Mapping):
        for key in ("metric", "ask"):
            if isinstance(name := task.get(key), str) and ":" in name:
                yield "task", name
