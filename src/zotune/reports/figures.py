"""The curves of a run: loss and validation against steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zotune.bench.figures.drawing import COLOURS, DASHES, legend, panels
from zotune.bench.frame import unit
from zotune.reports.facts import Facts


def curves(runs: Sequence[Facts], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Figures of loss and of each validation metric with what they show, a line a run. Validation begins before step 1."""
    metrics = dict.fromkeys(run.metric for run in runs)
    for key, title in [
        ("loss", "training loss (nats)"),
        *((f"validation_{m}", f"validation {unit(m)}") for m in metrics),
    ]:
        drawn = [_points(run, key) for run in runs]
        if not any(steps for steps, _ in drawn):
            continue
        figure, (axis,) = panels(1, width=5.4, height=3.4)
        for i, (run, name, (steps, values)) in enumerate(zip(runs, names, drawn, strict=True)):
            colour, dash = COLOURS[i % 8], DASHES[(i + i // 8) % 8]
            axis.plot(
                steps, values, label=name, color=colour, linestyle=dash, marker="o" if len(steps) <= 15 else None, ms=4
            )
            if key != "loss" and (chosen := run.result.get("chosen_step")) in steps:
                axis.plot([chosen], [values[steps.index(chosen)]], "o", ms=10, mfc="none", color=colour)
        axis.set_xlabel("step")
        axis.set_ylabel(title)
        if len(runs) > 1:
            legend(figure, [axis])
        else:
            figure.tight_layout()
        yield title, figure


def _points(run: Facts, key: str) -> tuple[list[float], list[float]]:
    steps, values = run.curve(key)
    before = run.result.get("validation_before")
    if key == f"validation_{run.metric}" and before is not None:
        return [0.0, *steps], [before, *values]
    return steps, values
