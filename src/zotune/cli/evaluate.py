"""`zotune eval` and `zotune predict`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from zotune import inference
from zotune.cli.progress import Bars
from zotune.cli.replay import rebuilt
from zotune.models.heads import label_names, outputs_of
from zotune.models.kinds import kind_of
from zotune.options import EvalConfig, PredictConfig
from zotune.prepare.model import check_kind, load
from zotune.tasks import Task
from zotune.tasks.metrics import figure
from zotune.tasks.splits import some_of
from zotune.tasks.task import METRICS


def evaluate(options: EvalConfig) -> None:
    path = inference.output_file(options.output) if options.output else None
    with Bars() as bars:
        figures = inference.evaluation(options, bars, lambda options, task: _loaded(options, task, bars))
    shown = [(figures["metric"], figures["value"])]
    shown += [(name, value) for name, value in figures.items() if name in (*METRICS, "loss")]
    cut = f", {figures['cut_rows']} of them cut" if "cut_rows" in figures else ""
    said = "  ".join(f"{name} {figure(name, value)}" for name, value in shown)
    rows = some_of(figures["n"], figures.get("rows_given", 0))
    print(f"{figures['task']}  {said}  ({rows} rows of {figures['split']}{cut})")
    if options.details:
        _show(figures)
    if path is not None:
        inference.write_figures(figures, path)


def _show(figures: dict[str, Any]) -> None:
    """The interval and the confusion matrix under the figures' line."""
    if span := figures.get("interval"):
        print(f"95 % interval {span[0]:.1f} to {span[1]:.1f}")
    if labels := figures.get("labels"):
        table = Table("right ↓ given →", *labels, box=None, padding=(0, 2, 0, 0))
        for label, row in zip(labels, figures["confusion"], strict=True):
            table.add_row(label, *map(str, row))
        Console().print(table)


def predict(options: PredictConfig) -> None:
    output = inference.output_file(options.output, options.overwrite)
    with Bars() as bars:
        told, split = inference.predictions(options, bars)
    inference.write_lines(told, output)
    print(f"{len(told)} rows of {split} → {output}")


def _loaded(options: EvalConfig | PredictConfig, task: Task, bars: Bars) -> tuple[Any, Any]:
    """The model as it is, or as a run's trajectory makes it."""
    if trajectory := getattr(options, "trajectory", None):
        model, tokenizer, line = rebuilt(options, trajectory, bars=bars)
        check_kind(kind_of(model), task)
        if kind_of(model) == "classifier":
            outputs_of(label_names(model.config), task.words or {}, f"--trajectory {trajectory}")
        bars.say(line)
        return model, tokenizer
    return load(options, task, seed=options.seed)
