"""`zotune train`: the run with its cost told before, its progress shown, and its table at the end."""

from __future__ import annotations

from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zotune.cli.expected import Expected, busy, load_of_others
from zotune.cli.expected import expected as foreseen
from zotune.cli.preview import MARKS, show_row
from zotune.cli.progress import Bars
from zotune.estimates.memory import keep_freed, peak_bytes, readable
from zotune.estimates.words import time_of
from zotune.models.quantized import weight_bytes
from zotune.models.schemes import trainable_parameters
from zotune.options import TrainConfig
from zotune.options.defaults import flags_of
from zotune.prepare.prepared import prepare, resolved, taken_by_default
from zotune.run import train as run
from zotune.run.arguments import check_reporters
from zotune.run.folder import RunFolder
from zotune.run.result import device_name
from zotune.run.timing import timed
from zotune.tasks.metrics import figure
from zotune.workers.launcher import is_first


def train(config: TrainConfig) -> None:
    first = is_first()  # of the workers that torchrun has started
    if config.dry_run:
        if first:
            dry_run(config)
        return
    keep_freed()
    if not first:
        run.train(config)
        return
    with Bars() as bars:
        result = run.train(config, bars)
    summary(result, config.output, bars.expected)


def summary(result: dict[str, Any], output: str, expected: Expected | None = None) -> None:
    """The table at the end of a run; what was expected of it stands beside what it took."""
    told = expected if expected is not None and expected.peak_bytes else None
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    split = "held-out texts" if result["test_split"] == "test" else "validation texts (there is no test split)"
    metric = result["metric"]
    early = "; stopped early" if result.get("stopped_early") else ""
    before, after = (figure(metric, result[when], " %") for when in ("test_before", "test_after"))
    table.add_row(f"{metric} before", f"{before}   on {result['test_rows']} {split}")
    table.add_row(
        f"{metric} after",
        f"{after}   step {result['chosen_step']} of {result['steps']}, best on validation{early}",
    )
    if result["one_class"]:
        table.add_row("always one class", f"{result['one_class']:.1f} %{_no_better(result)}")
    table.add_row("forward passes", f"{result['forward_passes']:,}")
    took = time_of(result["wall_seconds"]) + (f" (expected {time_of(told.seconds)})" if told else "")
    table.add_row("wall time", f"{took}   {result['device']}")
    peak = readable(result["peak_memory_bytes"]) + (f" (expected {readable(told.peak_bytes)})" if told else "")
    table.add_row("peak memory", f"{peak}   evaluation alone: {readable(result['evaluation_peak_bytes'])}")
    alone = ", the process's own left out" if result["device"].startswith("cpu") else ""
    table.add_row("with Adam", f"{readable(result['adam_memory_bytes'])}   computed{alone}")
    if result["skipped_steps"]:
        table.add_row("skipped steps", f"{result['skipped_steps']}   their loss was not finite")
    if result["cut_rows"]:
        table.add_row("cut rows", f"{result['cut_rows']}   longer than --max-length")
    if result.get("bad_rows"):
        table.add_row("bad rows", f"{result['bad_rows']}   left out")
    table.add_row("run", output)
    Console().print(table)


def _no_better(result: dict[str, Any]) -> str:
    """Where a run ends no better than one answer for all rows: what to try."""
    if result["metric"] != "accuracy" or result["test_after"] > result["one_class"]:
        return ""
    return "   no better than that: try more steps, another lr (zotune sweep), --loss candidates or --balance-classes"


def dry_run(config: TrainConfig) -> None:
    """What a run would do and cost. Writes nothing; steps at lr 0 are timed, which leaves every weight as it is."""
    load = load_of_others()
    check_reporters(config.report_to)
    folder = RunFolder(config.output)
    folder.check({}, resume=True, overwrite=False)
    ready = prepare(config)
    given, ready.config = config, resolved(ready)
    config = ready.config
    console = Console()
    console.print(Text("configuration", style="bold"))
    console.print(
        yaml.safe_dump(config.model_dump(exclude={"dry_run"}), sort_keys=False, allow_unicode=True),
        markup=False,
        highlight=False,
    )
    how = "in reverse" if console.is_terminal else f"between {MARKS[0]} and {MARKS[1]}"
    console.print(Text(f"rows as the model will see them (answer {how})", style="bold"))
    for example, encoded in list(zip(ready.splits.train, ready.train, strict=True))[:3]:
        show_row(console, example, encoded, ready.tokenizer)
    step_seconds, row_seconds, forwards, engine = timed(ready, foreseen(ready).step_seconds)
    evaluations = -(-config.steps // config.evaluates_every)
    scored = len(ready.test) * 2 + len(ready.validation) * (1 + evaluations)
    lengths = [row.tokens for row in ready.train]
    weights = weight_bytes(ready.model)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    table.add_row("rows", ready.splits.described().removeprefix("rows: "))
    if ready.cut_rows:
        table.add_row("cut rows", f"{ready.cut_rows}   longer than --max-length")
    if ready.bad.said:
        table.add_row("bad rows", str(ready.bad))
    table.add_row("tokens a row", f"{sum(lengths) / len(lengths):.0f} mean, {max(lengths)} most")
    if one_class := ready.one_class(ready.test):
        table.add_row("always one class", f"{one_class:.1f} %")
    table.add_row("trainable", f"{trainable_parameters(ready.model):,} parameters")
    if taken := taken_by_default(ready, given):
        table.add_row("for want of options", flags_of(taken))
    table.add_row("engine", engine)
    table.add_row(
        "forward passes",
        f"{config.steps * forwards * config.accumulate:,}",
    )
    table.add_row(
        "memory", f"{readable(weights)} weights, {readable(peak_bytes(ready.device))} peak so far, loading included"
    )
    if ready.placed is not None:
        table.add_row("streams", ready.placed.line)
    table.add_row("with Adam", f"{readable(weights + ready.adam_cost().total)}")
    minutes = (config.steps * step_seconds + scored * row_seconds) / 60
    table.add_row("time", f"{minutes:.1f} minutes ({step_seconds:.2f} s a step)   {device_name(ready.device)}")
    if said := busy(ready.device.type, load):
        table.add_row("", f"{said}: alone it would be faster")
    console.print(table)
    if ready.unread:
        console.print(Text(ready.unread))
    console.print("nothing was written")
