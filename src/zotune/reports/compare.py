"""Zeroth order beside back-propagation on somebody's own rows: the same time, passes or memory, and a sentence of what to use.

A contender is a suite of its own: rates are tried for a quarter of its budget, validation chooses, and the chosen one runs whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from zotune.bench.search import entries
from zotune.bench.suite import Expanded, Suite, expand, together
from zotune.options import CompareConfig, StepOptions
from zotune.reports.facts import Facts
from zotune.tasks.intervals import gain
from zotune.tasks.metrics import figure
from zotune.tasks.task import LOWER_IS_BETTER

if TYPE_CHECKING:
    from zotune.bench.store import Record

TRIAL = 4  # a tried rate gets so small a part of the steps
FEW = 100  # steps of zeroth order: fewer say little of it
ROOM = 1.1  # times zeroth order's memory: what still is the same
RATES = {  # of Adam by back-propagation; those of 7 billion parameters are ten times smaller
    "full": (5e-6, 2e-5, 1e-4),
    "lora": (1e-4, 5e-4, 2e-3),
}
BIG = 1e9  # parameters from which on a rate is divided by ten


OF_A_CONTENDER = {"scheme", *StepOptions.model_fields}  # options that are given for zeroth order alone


@dataclass(frozen=True)
class Contender:
    """A way to train. rates: those that are tried; () where it has one, or finds its own."""

    name: str
    options: dict[str, Any]
    rates: tuple[float, ...] = ()


def contenders(options: CompareConfig, default_lr: float, parameters: int) -> list[Contender]:
    """Zeroth order as the options say, Adam by back-propagation on LoRA, and on all parameters."""
    own = options.model_dump(include=OF_A_CONTENDER, exclude_unset=True, exclude_none=True)
    own |= {"method": options.method, "scheme": options.scheme}
    rates = () if options.lr is not None else tuple(float(f"{default_lr * by:.1g}") for by in (0.3, 1, 3))
    by = 0.1 if parameters >= BIG else 1.0
    through = "" if options.scheme == "full" else f", {options.scheme}"
    found = [Contender(f"{options.method}{through}", own, rates)]
    for scheme, name in (("lora", "Adam on LoRA"), ("full", "Adam on all weights")):
        tried = tuple(float(f"{rate * by:.1g}") for rate in RATES[scheme])
        found.append(Contender(name, {"method": "fo-adam", "scheme": scheme}, tried))
    return found


def steps_of(equal: str, minutes: float, passes: int | None, step_seconds: float, forwards: int) -> int:
    """Steps that the time, or the forward passes, pay for; at least two, so that a tried rate has fewer."""
    if equal == "passes":
        assert passes is not None
        return max(2, passes // forwards)
    return max(2, int(60 * minutes / step_seconds))


def plan_for(options: CompareConfig, runs: Sequence[tuple[Contender, int]]) -> Expanded:
    """The runs of all contenders, each with its steps."""
    model, task, models, tasks, common = entries(options)
    common = {key: value for key, value in common.items() if key not in OF_A_CONTENDER}
    suites = []
    for contender, steps in runs:
        own = {key: value for key, value in contender.options.items() if key not in ("method", "scheme")}
        rules = [{"when": {}, "search": {"lr": list(contender.rates)}}] if contender.rates else []
        suite = {
            "name": "compare", "models": models, "tasks": tasks, "defaults": common | own, "rules": rules,
            "grid": {
                "model": [model], "task": [task], "method": [contender.options["method"]],
                "scheme": [contender.options["scheme"]], "seed": options.seeds or [options.seed],
            },
            "budget": {"steps": steps}, "search": {"budget": {"steps": max(1, steps // TRIAL)}, "seed": options.seed},
        }  # fmt: skip
        suites.append(expand(Suite.model_validate(suite)))
    return together(suites)


def row_of(contender: Contender, records: Sequence[Record], steps: int, folder: Path) -> dict[str, Any]:
    """What a contender came to: means over seeds of its whole runs. folder: of the comparison."""
    whole = [
        r for r in records
        if r.method == contender.options["method"] and r.scheme == contender.options["scheme"] and r.status == "done"
        and r.options["steps"] == steps
    ]  # fmt: skip
    if not whole:
        failed = next(
            (r.status for r in records if r.method == contender.options["method"] and r.status != "done"), "failed"
        )
        return {"name": contender.name, "status": failed}
    mean = lambda key: fmean(float(r.result[key]) for r in whole)  # noqa: E731
    return {
        "name": contender.name, "status": "done", "seeds": len(whole), "metric": whole[0].result["metric"],
        "before": mean("test_before"), "after": mean("test_after"), "validation": mean("validation_best"),
        "lr": whole[0].result["lr"], "steps": steps, "forward_passes": int(mean("forward_passes")),
        "seconds": mean("wall_seconds"), "peak_memory_bytes": int(max(r.result["peak_memory_bytes"] for r in whole)),
        "folders": [str(folder / r.folder) for r in whole],
    }  # fmt: skip


def verdict(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Facts], equal: str) -> str:
    """A sentence of what to use. Validation decides; where test rows cannot tell two apart the one of less memory is named.

    rows: zeroth order first. facts: of each contender's first run.
    """
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        return "Nothing was finished, so nothing can be said."
    fits = done
    if equal == "memory" and rows[0]["status"] == "done":
        limit = ROOM * rows[0]["peak_memory_bytes"]
        fits = [row for row in done if row["peak_memory_bytes"] <= limit]
    sign = -1 if done[0]["metric"] in LOWER_IS_BETTER else 1
    best = max(fits, key=lambda row: sign * row["validation"])
    least = min(fits, key=lambda row: row["peak_memory_bytes"])
    shown = lambda row: figure(row["metric"], row["after"], " %")  # noqa: E731
    if len(fits) == 1 and len(done) > 1:
        return f"Use {best['name']}: {shown(best)}; the others need more memory than it does."
    if best["peak_memory_bytes"] <= ROOM * least["peak_memory_bytes"]:
        return f"Use {best['name']}: {shown(best)}, and none of these needs much less memory."
    more = best["peak_memory_bytes"] / least["peak_memory_bytes"]
    apart = _apart(facts.get(best["name"]), facts.get(least["name"]))
    if apart is not None and apart[1] <= 0 <= apart[2]:
        return (
            f"Use {least['name']}: {shown(least)}, which these rows cannot tell from the {shown(best)} of {best['name']} "
            f"(95 % interval of the difference {apart[1]:+.1f} to {apart[2]:+.1f} points), at 1/{more:.1f} of the memory."
        )
    return (
        f"Use {best['name']}: {shown(best)} against {shown(least)} of {least['name']}, if {more:.1f} times its memory is there; "
        f"else {least['name']}."
    )


def too_few(row: Mapping[str, Any], equal: str) -> str:
    """What to say where zeroth order's row is of so few steps that a loss says little about it; else ""."""
    if row["status"] != "done" or row["steps"] >= FEW:
        return ""
    more = math.ceil(FEW / row["steps"])
    given = "passes" if equal == "passes" else "minutes"
    return (
        f"{row['name']} got {row['steps']} steps, where it takes hundreds: {more} times the --{given}, or fewer rows a step "
        "(--batch-size), would be a fair trial."
    )


def _apart(one: Facts | None, other: Facts | None) -> tuple[float, float, float] | None:
    """Points that the first is better by on the same test rows, and the 95 % interval; None where it cannot be told."""
    mine = one.scores("after") if one is not None else None
    theirs = other.scores("after") if other is not None else None
    if mine is None or theirs is None or len(mine) != len(theirs):
        return None
    mean, low, high = gain(theirs, mine)
    return (100 * mean, 100 * low, 100 * high) if not math.isnan(mean) else None


def facts_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Facts]:
    return {row["name"]: Facts.read(Path(row["folders"][0])) for row in rows if row["status"] == "done"}
