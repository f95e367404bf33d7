"""What the parts of a run under way have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zotune.record.trajectory import Header, Record, Records, TrajectoryWriter
from zotune.run.folder import RunFolder
from zotune.workers.group import Workers

MADE_OF = "made_of"  # key of progress.json: rows, tokenizer, template and task by content


@dataclass
class RunState:
    """A run's place on the disk and how far it has come. It holds none of those that share it.

    progress: what progress.json holds; `save` writes it. checkpoint: what the run goes on from. header: of its trajectory, None
    where a step is no list of scalars (back-propagation). recorded: steps that were taken before a kill, to be applied again.
    rebuilt: the steps before the checkpoint, where its weights are not to be had and follow from these. asked: the signal that this
    process was sent. workers: that take the run together. peak: bytes, of the steps alone.
    """

    folder: RunFolder
    progress: dict[str, Any]
    checkpoint: Path | None = None
    header: Header | None = None
    trajectory: TrajectoryWriter | None = None
    recorded: Records | None = None
    rebuilt: Sequence[Record] | None = None
    asked: int | None = None
    workers: Workers = field(default_factory=lambda: Workers(0, 1))
    peak: int = 0
    began: float = field(default_factory=time.monotonic)
    earlier: float = 0.0  # seconds before this process

    @classmethod
    def found(cls, folder: RunFolder, workers: Workers | None = None) -> RunState:
        """Of the run that the folder holds, or of one that begins."""
        fresh: dict[str, Any] = {"resumed_at": [], "wall_seconds": 0.0}
        progress = fresh | folder.read_json("progress.json")
        return cls(
            folder,
            progress,
            folder.last_checkpoint(),
            workers=workers or Workers(0, 1),
            earlier=progress["wall_seconds"],
        )

    def wall(self) -> float:
        return self.earlier + time.monotonic() - self.began

    def save(self) -> None:
        self.folder.write_json("progress.json", self.progress)

    def ask_to_stop(self, number: int) -> None:
        self.asked = self.workers.asked = number

    @property
    def stop(self) -> int | None:
        """The signal by which the run ends: of several workers, one that all have heard of at the same step."""
        return self.asked if self.workers.size == 1 else self.workers.stop
