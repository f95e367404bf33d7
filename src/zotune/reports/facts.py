"""A finished run's folder, read: its options, its figures with how sure they are, its curves, and what it changed."""

# N test rows.

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from zotune.errors import InputError
from zotune.files.reading import load_yaml
from zotune.run.predictions import PREDICTIONS
from zotune.tasks.intervals import confusion, gain, interval
from zotune.tasks.metrics import figure

MOST_LABELS = 30  # of a confusion matrix that can be read


@dataclass(frozen=True)
class Facts:
    """A run. predictions: a line a test row, as `zotune.run.predictions` writes them; [] of a run that kept none."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """Raises InputError for a folder that is not a finished run's."""
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        config, result = folder / "config.yaml", folder / "result.json"
        if not config.is_file():
            raise InputError(
                f"{folder}: not a run's folder (no config.yaml in it); name the --output of `zotune train`"
            )
        if not result.is_file():
            raise InputError(f"{folder}: this run is not finished; go on with it by --resume")
        try:
            told = json.loads(result.read_text(encoding="utf-8"))
            options = load_yaml(config, str(config))
            rows = [_lines(folder / name) for name in ("metrics.jsonl", PREDICTIONS)]
            if not isinstance(told, dict) or not isinstance(options, dict):
                raise ValueError("not an object")
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: cannot be read ({error})") from None
        return cls(folder, options, told, *rows)

    @property
    def name(self) -> str:
        task = self.result.get("task") or "rows"
        return f"{Path(str(self.result.get('model'))).name} on {task}, {self.result.get('method')}, {self.result.get('scheme')}"

    @property
    def rewarded(self) -> bool:
        """Whether it is a run on rewards."""
        return "reward_before" in self.result

    @property
    def metric(self) -> str:
        return str(self.result.get("metric", "score"))

    @property
    def unit(self) -> float:
        """What a score of 1 is shown as."""
        return 1.0 if self.rewarded else 100.0

    def value(self, when: str) -> float | None:
        """The figure of the test rows, "before" or "after"."""
        found = self.result.get(f"{'reward' if self.rewarded else 'test'}_{when}")
        return None if found is None else float(found)

    def shown(self, value: float | None) -> str:
        return "–" if value is None else figure(self.metric, value, " %")

    def scores(self, when: str) -> list[float] | None:
        """Of each row, 0 to 1; None where the metric is no mean over rows, or none were kept."""
        found = [line.get(when, {}).get("score") for line in self.predictions]
        return None if not found or any(score is None for score in found) else found

    def interval(self, when: str) -> tuple[float, float] | None:
        """95 %, in percent; of rewards in their own unit. when: "before" or "after"."""
        if (found := self.scores(when)) is None or not all(0 <= score <= 1 for score in found):
            return None
        low, high = interval(found)
        return self.unit * low, self.unit * high

    @cached_property
    def gained(self) -> tuple[float, float, float] | None:
        """Points of the metric, or reward, that the run has gained on the test rows, and their 95 % interval, row by row."""
        before, after = self.scores("before"), self.scores("after")
        if before is None or after is None:
            return None
        mean, low, high = gain(before, after)
        return self.unit * mean, self.unit * low, self.unit * high

    @property
    def said(self) -> str:
        """In a sentence, whether the run has gained anything."""
        if self.gained is None:
            return ""
        mean, low, high = self.gained
        digits, points = (".3f", "") if self.rewarded else (".1f", " points")
        rows = f"the same {len(self.predictions):,} rows scored twice"
        span = f"{mean:+{digits}}{points} (95 % interval {low:+{digits}} to {high:+{digits}}, {rows})"
        if low > 0:
            return f"Better than before: {span}."
        if high < 0:
            return f"Worse than before: {span}."
        return f"No difference that these rows can tell: {span}."

    @property
    def of_one_class(self) -> str:
        """A line where the run ends no better than one answer for all rows."""
        constant = self.result.get("one_class") or 0.0
        if self.metric != "accuracy" or not constant or (self.result.get("test_after") or 0.0) > constant:
            return ""
        return (
            f"No better than always answering the most frequent label ({constant:.1f} %): try more steps, another learning rate "
            "(zotune sweep), --loss candidates, or rows balanced by --balance-classes."
        )

    @cached_property
    def labels(self) -> list[str]:
        """All that are right or given, in the order of the scores; [] where rows bring their own answers."""
        named = list(
            dict.fromkeys(name for line in self.predictions for name in line.get("after", {}).get("scores", {}))
        )
        right = {line.get("right") for line in self.predictions}
        return named if right and right <= set(named) and 2 <= len(named) <= MOST_LABELS else []

    def confusion(self, when: str) -> list[list[int]] | None:
        """Rows by their right label, columns by the one given."""
        if not self.labels or any(when not in line for line in self.predictions):
            return None
        return confusion(((line["right"], line[when]["label"]) for line in self.predictions), self.labels)

    def changed(self, better: bool) -> list[dict[str, Any]]:
        """Rows that the run has mended, or spoilt, those that moved furthest first."""
        moved = [
            (line["after"]["score"] - line["before"]["score"], i)
            for i, line in enumerate(self.predictions)
            if line.get("before", {}).get("score") is not None and line.get("after", {}).get("score") is not None
        ]
        wanted = sorted((m for m in moved if (m[0] > 0) == better and m[0]), key=lambda m: (-abs(m[0]), m[1]))
        return [
            {
                "prompt": line["prompt"],
                "right": line["right"],
                "before": answer_in(line["before"]),
                "after": answer_in(line["after"]),
            }
            for line in (self.predictions[i] for _, i in wanted)
        ]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a key of metrics.jsonl."""
        points = [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]
        return [float(step) for step, _ in points], [float(value) for _, value in points]


def answer_in(told: dict[str, Any]) -> str:
    return str(told.get("label", told.get("answer", told.get("loss", ""))))


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
