"""Bars on a terminal; lines where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from zotune.cli.expected import Expected, busy, expected, load_of_others
from zotune.prepare.listener import Listener
from zotune.prepare.prepared import Prepared
from zotune.rewards.shown import table_of


class Bars(Listener):
    """A `Listener` that draws. Use as a context manager: the terminal is put right at the end, whatever happens."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description:<13}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.expected = Expected()
        self._load = load_of_others()
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, str] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.progress.stop()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def answered(self, step: int, shown: Sequence[dict[str, Any]]) -> None:
        """A table of some answers with their rewards."""
        self.console.print(table_of(step, shown))

    def prepared(self, ready: Prepared) -> None:
        """What the run is expected to take, from its model's config and its rows alone."""
        self.expected = expected(ready)
        said = busy(ready.device.type, self._load) if self.expected.seconds else ""
        self.say(f"expected: {self.expected}" + (f" alone; {said}" if said else ""))

    def begin(self, what: str, total: int) -> None:
        self._tasks[what] = self.progress.add_task(what, total=total, shown="")

    def advance(self, what: str, done: int, **shown: float) -> None:
        fine = ("loss", "reward", "held-out", "± members", "alike", "cut")
        text = "  ".join(
            f"{name} {value:.3f}" if name in fine else f"{name} {value:.1f}" for name, value in shown.items()
        )
        extra: Any = {"shown": text} if text else {}
        self.progress.update(self._tasks[what], advance=done, **extra)

    def end(self, what: str) -> None:
        if what in self._tasks:
            task = self._tasks.pop(what)
            self.progress.update(task, visible=what == "train")
            self.progress.stop_task(task)
