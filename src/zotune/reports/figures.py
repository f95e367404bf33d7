"""The curves of a run against steps: loss and validation; of rewards what was got, and what was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from zotune.bench.figures.drawing import COLOURS, DASHES, legend, panels
from zotune.bench.frame import unit
from zotune.reports.facts import Facts


class Curve(NamedTuple):
    """key: of metrics.jsonl. spread: the key of one standard deviation up and down, drawn as a band. held: of held-out rows."""

    key: str
    title: str
    spread: str = ""
    held: bool = False


WRITTEN = (
    Curve("completions/mean_length", "tokens an answer"),
    Curve("completions/clipped_ratio", "share of answers cut"),
    Curve("tokens_per_second", "tokens a second"),
)


def curves(runs: Sequence[Facts], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Figures with what they show, a line a run. Validation begins before step 1."""
    for curve in _wanted(runs):
        drawn = [_points(run, curve) for run in runs]
        if not any(steps for steps, _ in drawn):
            continue
        figure, (axis,) = panels(1, width=5.4, height=3.4)
        for i, (run, name, (steps, values)) in enumerate(zip(runs, names, drawn, strict=True)):
            colour, dash = COLOURS[i % 8], DASHES[(i + i // 8) % 8]
            marker = "o" if len(steps) <= 15 else None
            axis.plot(steps, values, label=name, color=colour, linestyle=dash, marker=marker, ms=4)
            if curve.spread and len(spread := run.curve(curve.spread)[1]) == len(values):
                low, high = ([v + sign * s for v, s in zip(values, spread, strict=True)] for sign in (-1, 1))
                axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            if curve.held and (chosen := run.result.get("chosen_step")) in steps:
                axis.plot([chosen], [values[steps.index(chosen)]], "o", ms=10, mfc="none", color=colour)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(curve.title)
        if len(runs) > 1:
            legend(figure, [axis])
        else:
            figure.tight_layout()
        yield curve.title, figure


def _wanted(runs: Sequence[Facts]) -> Iterator[Curve]:
    if not all(run.rewarded for run in runs):
        yield Curve("loss", "training loss (nats)")
    rewarded = [run for run in runs if run.rewarded]
    if rewarded:
        yield Curve("reward", "reward of the members", "reward_std")
    for metric in dict.fromkeys(run.metric for run in runs):
        title = "reward, held-out prompts" if metric == "reward" else f"validation {unit(metric)}"
        yield Curve(f"validation_{metric}", title, held=True)
    functions = dict.fromkeys(name for run in rewarded for name in run.result.get("rewards", {}))
    if len(functions) > 1:
        for name in functions:
            yield Curve(f"rewards/{name}/mean", name, f"rewards/{name}/std")
    if rewarded:
        yield from WRITTEN


def _points(run: Facts, curve: Curve) -> tuple[list[float], list[float]]:
    if run.rewarded and curve.key == "loss":
        return [], []  # −R
    steps, values = run.curve(curve.key)
    before = run.result.get("validation_before")
    if curve.held and curve.key == f"validation_{run.metric}" and before is not None:
        return [0.0, *steps], [before, *values]
    return steps, values
