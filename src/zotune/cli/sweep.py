"""`zotune sweep`: lr and eps searched, each run a process, the choice made on validation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.bench import need_extra
from zotune.cli.bench import Live, check_folder, count_gpus, show_plan
from zotune.errors import InputError
from zotune.options import SweepConfig

if TYPE_CHECKING:
    from zotune.bench.plan import Plan
    from zotune.bench.store import Record


def sweep(options: SweepConfig) -> None:
    need_extra()
    import yaml

    from zotune.bench import search
    from zotune.bench.runner import execute, sole_runner
    from zotune.bench.store import Store
    from zotune.run.folder import write_atomically

    if options.overwrite:
        raise InputError("--overwrite: a search goes on where it is; name another --output to begin anew")
    folder = Path(options.output).expanduser()
    check_folder(folder)
    lrs, epses = search.values(options)
    if options.dry_run:
        show_plan(search.plan_of(options, folder, None, lrs, epses))
        return
    gpus = count_gpus()
    jobs = options.jobs or max(1, gpus)
    with sole_runner(folder):
        store = Store(folder)

        def carry_out(plan: Plan) -> None:
            with Live(plan) as live:
                execute(plan, store, jobs=jobs, gpus=gpus, watcher=live)

        if options.trials is not None:
            runs = search.by_optuna(options, folder, store, carry_out, lrs, epses)
            first = search.plan_of(options, folder, store, lrs[:1], epses[:1]).runs[0]
            alike = _options(first.options)
            keys = {run.key for run in runs} | {r.key for r in store.all() if _options(r.options) == alike}
        else:
            plan = search.plan_of(options, folder, store, lrs, epses)
            show_plan(plan)
            carry_out(plan)
            keys = {run.key for run in plan.runs}
        records = [record for record in store.all() if record.key in keys]
        rows = search.outcome(records)
    _show(rows)
    best = rows[0]
    if not best["seeds"]:
        raise InputError(f"--output {folder}: no run of the search was finished{_why(records)}; see {folder}/logs")
    found = {key: best[key] for key in ("lr", "eps") if best[key] == best[key]}  # not every method has eps
    write_atomically(folder / "best.yaml", yaml.safe_dump(found))
    flags = " ".join(f"--{key} {value:g}" for key, value in found.items())
    print(f"chosen on validation: {flags}   ({folder / 'best.yaml'})")
    print(f"how sensitive the result is: zotune bench report {options.output}")


def _why(records: list[Record]) -> str:
    """What the first run that failed said last: mostly it is bad input, the same for all. Of bad rows also the first, as the
    last line only counts them.
    """
    for record in records:  # in the order of their first start
        if record.status in ("failed", "oom") and (lines := record.error.strip().splitlines()):
            ours = [line for line in lines if line.startswith("zotune: ")]
            said = [ours[0], lines[-1]] if len(ours) > 1 and " bad rows" in lines[-1] else lines[-1:]
            return ", the first failed: " + "; ".join(line.removeprefix("zotune: ") for line in said)
    return ""


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("lr", "eps", "seed")}


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("lr", "eps", "validation", "seeds", "failed"):
        table.add_column(name, justify="right")
    for i, row in enumerate(rows):
        score = "" if row["validation"] != row["validation"] else f"{row['validation']:.1f}"
        table.add_row(
            f"{row['lr']:g}",
            f"{row['eps']:g}" if row["eps"] == row["eps"] else "",
            score,
            str(row["seeds"]),
            str(row["failed"] or ""),
            style="" if i else "bold",
        )
    Console().print(table, highlight=False)
