"""`zotune compare`: zeroth order beside back-propagation on one's own rows, and a sentence of what to use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zotune.bench import need_extra
from zotune.errors import InputError
from zotune.options import CompareConfig, TrainConfig

BUDGET = "made/budget.json"  # the steps of each, as they were timed when the comparison began


def compare(options: CompareConfig) -> dict[str, Any]:
    """Plans, runs what has not run yet, prints the table and the sentence; compare.json and compare.html in the folder."""
    need_extra("zotune compare")
    from zotune.bench.plan import foresee, make_plan
    from zotune.bench.runner import execute, sole_runner
    from zotune.bench.store import Store
    from zotune.cli.bench import Live, check_folder, count_gpus, show_plan
    from zotune.reports.compare import facts_of, plan_for, row_of, too_few, verdict
    from zotune.reports.page import make_page
    from zotune.run.folder import as_json, write_atomically

    if options.overwrite:
        raise InputError("--overwrite: a comparison goes on where it is; name another --output to begin anew")
    folder = Path(options.output).expanduser()
    check_folder(folder)
    runs = _sized(options, folder)
    expanded = plan_for(options, runs)
    gpus = count_gpus()
    if options.dry_run:
        plan = make_plan(expanded, folder)
        foresee(plan)
        show_plan(plan)
        return {}
    with sole_runner(folder):
        store = Store(folder)
        plan = make_plan(expanded, folder, store)
        foresee(plan, store)
        show_plan(plan)
        with Live(plan) as live:
            execute(plan, store, jobs=options.jobs or max(1, gpus), gpus=gpus, watcher=live)
        keys = {run.key for run in plan.runs if not run.cell.trial}
        records = [record for record in store.all() if record.key in keys]
        rows = [row_of(contender, records, steps, folder) for contender, steps in runs]
        store.close()
    facts = facts_of(rows)
    if not facts:
        raise InputError(f"--output {folder}: no run was finished; see {folder}/logs")
    said = verdict(rows, facts, options.equal)
    told = {"equal": options.equal, "verdict": said, "rows": rows}
    write_atomically(folder / "compare.json", as_json(told, indent=2) + "\n")
    _show(rows)
    print("Adam trains by back-propagation, zeroth order by forward passes alone.")
    print(said)
    if hint := too_few(rows[0], options.equal):
        print(hint)
    if len(options.seeds or [0]) < 3:
        print("One seed cannot carry a ranking: --seeds 0,1,2 says how much of this is luck.")
    page = make_page(
        [Path(row["folders"][0]) for row in rows if row["status"] == "done"], folder / "compare.html", list(facts)
    )
    print(f"{page}   (runs: zotune bench report {options.output})")
    return told


def _sized(options: CompareConfig, folder: Path) -> list[tuple[Any, int]]:
    """The contenders, each with the steps that the budget pays for. Timed once: a comparison goes on with what it began with."""
    from zotune.options import resolve
    from zotune.prepare.prepared import prepare, resolved
    from zotune.reports.compare import OF_A_CONTENDER, contenders, steps_of
    from zotune.run.folder import as_json, write_atomically
    from zotune.run.timing import timed

    given = options.model_dump(include=set(TrainConfig.model_fields), exclude_unset=True)
    asked = options.model_dump(include={"equal", "minutes", "passes", "steps", "batch_size", "accumulate"})
    known = _known(folder / BUDGET, asked)
    passes = options.passes
    sized: list[tuple[Any, int]] = []
    base = prepare(resolve(TrainConfig, given | {"dry_run": True}, None))
    parameters = sum(p.numel() for p in base.model.parameters())
    default = resolved(base).lr
    for contender in contenders(options, float(default if isinstance(default, float) else 1e-5), parameters):
        if (steps := known.get(contender.name)) is None:
            own = {key: value for key, value in given.items() if key not in OF_A_CONTENDER}
            own |= contender.options | {"dry_run": True}
            ready = prepare(resolve(TrainConfig, own, None))
            ready.config = resolved(ready)
            seconds, _, forwards, _ = timed(ready)
            if passes is None and options.equal == "passes":
                passes = options.steps * forwards  # zeroth order is the first
            steps = steps_of(options.equal, options.minutes, passes, seconds, forwards)
        sized.append((contender, steps))
    if not options.dry_run:
        (folder / BUDGET).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / BUDGET, as_json({"asked": asked, "steps": {c.name: steps for c, steps in sized}}) + "\n"
        )
    return sized


def _known(path: Path, asked: dict[str, Any]) -> dict[str, int]:
    """The steps of each contender where the same was asked for before."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return dict(value["steps"]) if value["asked"] == asked else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from zotune.estimates.memory import readable
    from zotune.estimates.words import time_of
    from zotune.tasks.metrics import figure

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "before", "after", "lr", "steps", "passes", "time", "memory"):  # within 80 columns
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        if row["status"] != "done":
            table.add_row(row["name"], "", "did not fit" if row["status"] == "oom" else "failed")
            continue
        before, after = (figure(row["metric"], row[when]) for when in ("before", "after"))
        table.add_row(
            row["name"], before, after, f"{row['lr']:g}", f"{row['steps']:,}", f"{row['forward_passes']:,}",
            time_of(row["seconds"]), readable(row["peak_memory_bytes"]),
        )  # fmt: skip
    Console().print(table, highlight=False)
