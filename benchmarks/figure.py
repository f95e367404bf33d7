"""Accuracy against forward passes and against seconds, as a figure, from what `benchmarks/accuracy.py` wrote.

    python benchmarks/figure.py --output docs/accuracy.svg --title "SST-2, SmolLM2-135M" \
        --line "zo-sgd, float32=results.json:engine=dual,dtype=float32" --line "…"

A line is LABEL=FILE:CELL, the mean over the cell's seeds of accuracy at each evaluation, with its least and greatest. Seconds
are steps times what a step of the cell took in the file named by --seconds FILE (runs that had the device for themselves).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

INK = "#6b7280"  # readable on light and dark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--title", default="")
    parser.add_argument("--line", action="append", required=True)
    parser.add_argument("--seconds", type=Path)
    parser.add_argument("--of", choices=("validation", "test"), default="test")
    args = parser.parse_args()
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "zotune", "font.size": 10, "text.color": INK}
    plt.rcParams |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    figure, (by_passes, by_seconds) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    alone = json.loads(args.seconds.read_text())["runs"] if args.seconds else {}
    for line in args.line:
        label, _, rest = line.partition("=")
        file, _, cell = rest.partition(":")
        runs = of_cell(json.loads(Path(file).read_text())["runs"], cell)
        if not runs:
            raise SystemExit(f"{file}: no finished run of {cell}")
        steps = list(
            zip(*(run["validation"] for run in runs), strict=False)
        )  # by evaluation, over the seeds, as far as all go
        of = 3 if args.of == "validation" else 4
        mean = [statistics.mean(v[of] for v in step) for step in steps]
        low, high = ([end(v[of] for v in step) for step in steps] for end in (min, max))
        passes = [step[0][1] for step in steps]
        (drawn,) = by_passes.plot(passes, mean, label=f"{label} ({len(runs)} seeds)" if len(runs) > 1 else label)
        by_passes.fill_between(passes, low, high, alpha=0.15, color=drawn.get_color(), linewidth=0)
        timed = of_cell(alone, cell)
        if timed:
            took = [step[0][0] * timed[0]["step_ms"] / 1e3 for step in steps]
            by_seconds.plot(took, mean, color=drawn.get_color())
    by_passes.set_xscale("log")
    by_passes.set_xlabel("forward passes (a step of back-propagation counts 1)")
    by_seconds.set_xlabel("seconds of training, one run alone")
    by_seconds.set_xscale("log")
    by_passes.set_ylabel(f"{args.of} accuracy, %")
    for axes in (by_passes, by_seconds):
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(args.title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, transparent=True, metadata={"Date": None})
    figure.savefig(args.output.with_suffix(".png"), dpi=110, facecolor="white", metadata={"Software": None})


def of_cell(runs: dict[str, Any], cell: str) -> list[dict[str, Any]]:
    return [run for name, run in runs.items() if name.rpartition(",")[0] == cell and run.get("validation")]


if __name__ == "__main__":
    main()
