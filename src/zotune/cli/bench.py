"""`zotune bench`: run a suite, report on it. Loads nothing of the extra until a command runs."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zotune import quiet
from zotune.errors import InputError, nearest
from zotune.workers import launcher

if TYPE_CHECKING:
    from zotune.bench.plan import Plan, Run
    from zotune.bench.runner import Active, State

app = typer.Typer(
    name="bench",
    help="Suites of runs: every method, scheme, model and task of a grid, resumable, with a report.",
    no_args_is_help=True,
)
EXECUTORS = ("local", "ray")


@app.callback()
def _before(context: typer.Context) -> None:
    launcher.refuse_shared(f"bench {context.invoked_subcommand}", ("bench run",))
    quiet.libraries()


@app.command("run", help="Run a suite, or go on with it; shows the plan first.")
def run(
    suites: Annotated[
        list[str],
        typer.Argument(
            metavar="SUITE…", help="a shipped suite, see `zotune bench list`, or a .yaml file; several go together"
        ),
    ],
    output: Annotated[str, typer.Option("--output", help="folder of the results")],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="replace an axis or an option, budget.steps too; may be repeated"
        ),
    ] = None,
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="as of `zotune train`, for every run")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", help=r"runs at one time \[default: one for each GPU, else 1]")
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--for", metavar="MINUTES", help="stop after so many; no run is started that is not expected to end by then"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan, run nothing")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="run again what failed or did not fit")] = False,
    any_version: Annotated[
        bool, typer.Option("--any-version", help="count as done what another version of the code has done")
    ] = False,
    executor: Annotated[
        str, typer.Option("--executor", metavar="local|ray", help="where the runs go: here, or over a Ray cluster")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", help=r"of the cluster, such as auto or HOST:6379 \[default: one that is started here]"
        ),
    ] = None,
) -> None:
    from zotune.bench import DATABASE, need_extra

    need_extra()
    if executor not in EXECUTORS:
        raise InputError(f"--executor {executor}: {nearest(executor, EXECUTORS)}")
    if ray_address is not None and executor != "ray":
        raise InputError(f"--ray-address {ray_address}: needs --executor ray")
    if executor == "ray":
        from zotune.bench.cluster import need_ray

        need_ray()
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs {jobs}: one or more")
    if time_limit is not None and not time_limit > 0:
        raise InputError(f"--for {time_limit:g}: minutes, more than 0")
    began = time.monotonic()
    from zotune.bench.pace import Paces, time_all
    from zotune.bench.plan import foresee, make_plan
    from zotune.bench.runner import Waiting, execute, sole_runner
    from zotune.bench.shared import crew_of, refuse_unshared
    from zotune.bench.store import Store
    from zotune.bench.suite import expand, load_suite, together

    with crew_of(jobs, executor) as crew:
        given = parse_changes(changes or []) | ({"data_dir": data_dir} if data_dir else {})
        folder = Path(output).expanduser()
        check_folder(folder)
        paces = Paces(folder)
        loaded = [load_suite(suite, given) for suite in suites]
        expanded = together([expand(suite, paces) for suite in loaded])
        if crew is not None:
            refuse_unshared(expanded.cells, crew.size)
        until = began + 60 * time_limit if time_limit is not None else float("inf")
        if paces.missing and not dry_run:
            with sole_runner(folder):
                in_time = time_all(expanded, paces, folder, until, lambda line: print(line, file=sys.stderr))
            if not in_time:
                print("the time is up before all paces are known: the same command goes on")
                return
            paces = Paces(folder)
            expanded = together([expand(suite, paces) for suite in loaded])
        if dry_run and not (folder / DATABASE).is_file():
            plan = make_plan(expanded, folder)
            foresee(plan)
            show_plan(plan)
            return
        gpus = count_gpus()
        with sole_runner(folder):
            store = Store(folder)
            plan = make_plan(expanded, folder, store, retry=retry, any_version=any_version)
            forecast = foresee(plan, store)
            show_plan(plan)
            if dry_run:
                return
            if not plan.to_do:
                show_done(plan, output)
                return
            seconds = None if time_limit is None else until - time.monotonic()
            waiting = Waiting(plan, store, forecast, seconds)
            with Live(plan) as live:
                if executor == "ray":
                    from zotune.bench.cluster import execute_on_ray

                    state = execute_on_ray(plan, store, address=ray_address, jobs=jobs, watcher=live, waiting=waiting)
                else:
                    jobs = 1 if crew is not None else jobs or max(1, gpus)
                    state = execute(plan, store, jobs=jobs, gpus=gpus, watcher=live, waiting=waiting, crew=crew)
            show_end(state, output)
        if unexpected(state):
            raise typer.Exit(1)


@app.command("report", help="Make DIR/report/: a page, tables and figures of the results in DIR, or in several.")
def report(
    folders: Annotated[list[str], typer.Argument(metavar="DIR…", help="folders that `zotune bench run` filled")],
    output: Annotated[str | None, typer.Option("--output", help="another folder for the report")] = None,
    compact: Annotated[bool, typer.Option("--compact", help="for a repository: small pictures, no SVG files")] = False,
) -> None:
    from zotune.bench import need_extra

    need_extra()
    from zotune.bench.report import make_report

    target = Path(output).expanduser() if output else None
    page = make_report(*(Path(folder).expanduser() for folder in folders), target=target, compact=compact)
    print(f"report: {page}")


@app.command("list", help="The suites that come with zotune.")
def list_suites() -> None:
    from rich.console import Console
    from rich.table import Table

    from zotune.bench.suite import load_suite, shipped

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name in shipped():
        table.add_row(name, load_suite(name).about)
    Console().print(table)


@app.command("probe", hidden=True, help="A few timed steps on random weights, as one run of a suite.")
def probe(options: str, output: Annotated[str, typer.Option("--output")]) -> None:
    from zotune.bench.probe import measure

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(options + "\n", encoding="utf-8")  # JSON is YAML
    from zotune.run.folder import write_atomically

    write_atomically(folder / "result.json", json.dumps(measure(json.loads(options)), indent=2, allow_nan=False) + "\n")


@app.command("pace", hidden=True, help="Seconds a step of some runs' options, for budgets of seconds.")
def pace(asked: str, output: Annotated[str, typer.Option("--output")]) -> None:
    from zotune.bench.pace import measure

    measure(Path(asked), Path(output))


def parse_changes(changes: list[str]) -> dict[str, Any]:
    """KEY=VALUE of --set; a value is YAML, and "a,b" a list."""
    import yaml

    parsed: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise InputError(f"--set {change}: write KEY=VALUE, such as seed=0,1,2 or budget.steps=100")
        plain = not text.startswith(("[", "{", '"', "'"))
        try:
            value = [yaml.safe_load(t) for t in text.split(",")] if plain and "," in text else yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--set {change}: {text!r} is not YAML") from None
        parsed[key.strip() if key.startswith("models.") else key.strip().replace("-", "_")] = value
    return parsed


def check_folder(folder: Path) -> None:
    """Refuse a file, and a folder of somebody's own."""
    from zotune.bench import DATABASE

    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file; name a folder")
    if folder.is_dir() and not (folder / DATABASE).is_file():
        foreign = [p.name for p in folder.iterdir() if p.name not in (".lock", "made")]
        if foreign:
            raise InputError(f"--output {folder}: holds files that are not a benchmark's ({foreign[0]}); name another")


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def show_plan(plan: Plan) -> None:
    """Runs, forward passes, expected time and memory, what is done already."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    from zotune.bench import FINAL

    suite, to_do = plan.expanded.suite, {run.key for run in plan.to_do}
    runs_all = [*plan.runs, *plan.held]
    axes = {"model": {r.cell.model for r in runs_all}, "task": {r.cell.task for r in runs_all}}
    same = [next(iter(found)).rsplit("/", 1)[-1] for found in axes.values() if len(found) == 1]
    told = ", ".join(name for name in same if name)
    table = Table(
        title=f"suite{'s' * (', ' in suite.name)} {suite.name}" + (f": {told}" if told else ""),
        title_justify="left", box=None, padding=(0, 1, 0, 0),
    )  # fmt: skip
    varied = [name for name, found in axes.items() if len(found) > 1]
    for name in varied:
        table.add_column(name, overflow="fold")
    for name in ("method", "scheme"):
        table.add_column(name, no_wrap=True)
    for name in ("runs", "done", "steps", "passes", "GiB", "minutes"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[Any]] = {}
    for run in runs_all:
        cell = run.cell
        groups.setdefault(
            (cell.model, cell.task, cell.options["method"], cell.options.get("scheme", "full")), []
        ).append(run)
    for names, runs in groups.items():
        steps = {run.options["steps"] for run in runs}
        done = sum(run.status in FINAL for run in runs)
        peaks = [run.planned["peak_bytes"] for run in runs if run.planned.get("peak_bytes")]
        seconds = [run.planned.get("seconds") for run in runs if run.key in to_do or run.cell.open]
        table.add_row(
            *(names[i].rsplit("/", 1)[-1] for i, axis in enumerate(("model", "task")) if axis in varied),
            *names[2:],
            str(len(runs)),
            str(done),
            f"{min(steps):,}" if len(steps) == 1 else f"{min(steps):,}-{max(steps):,}",
            f"{sum(run.cell.forward_passes for run in runs):,}",
            f"{max(peaks) / 2**30:.2f}" if peaks else "?",
            minutes(seconds),
        )
    console.print(table, highlight=False)
    for line in left_out(plan.expanded.left_out):
        console.print(line, highlight=False, markup=False)
    for line in [*searches(plan), *unknown(runs_all)]:
        console.print(line, highlight=False, markup=False)
    waiting = [*plan.to_do, *plan.held]
    expected = duration([run.planned.get("seconds") for run in waiting])
    count = len(plan.runs) + len(plan.held)
    console.print(
        f"{count} runs, {plan.forward_passes:,} forward passes; {count - len(waiting)} done, "
        f"{len(waiting)} to do, about {expected} one after the other",
        highlight=False,
    )


def unknown(runs: Sequence[Run]) -> list[str]:
    """Why memory, and time where no run like it has told it, are not known beforehand: a line a reason."""
    reasons = Counter(str(run.planned["why"]) for run in runs if run.planned.get("why"))
    return [f"{why} ({count} run{'s' * (count > 1)})" for why, count in reasons.items()]


def searches(plan: Plan) -> list[str]:
    """What the plan says of lr and eps that are searched."""
    tried = [run for run in plan.runs if run.cell.search]
    said = []
    if tried:
        pairs, groups = len(tried), len({run.cell.group for run in tried})
        said.append(f"lr and eps: {pairs} of the runs try them for {groups} configurations, validation chooses")
    if plan.held:
        said.append(f"{len(plan.held)} runs wait for that choice")
    if plan.hopeless:
        said.append(f"not run, as no lr and eps that were tried work: {', '.join(r.cell.name for r in plan.hopeless)}")
    return said


def left_out(reasons: dict[str, int]) -> list[str]:
    """What this version lacks, a line a kind, and what does not go together.

    >>> left_out({"method 'zo-x' is not in this version": 2, "method 'zo-y' is not in this version": 1})
    ["left out, not in this version: method 'zo-x' (2 runs), 'zo-y' (1 run)"]
    >>> left_out({"--blocks: method 'zo-sgd-cons' compares one move of all weights; use zo-sgd": 1})
    ["left out: --blocks: method 'zo-sgd-cons' compares one move of all weights; use zo-sgd (1 run)"]
    """
    lacking = " is not in this version"
    kinds: dict[str, list[str]] = {}
    others = []
    for reason, count in reasons.items():
        runs = f"({count} run{'s' if count > 1 else ''})"
        if reason.endswith(lacking):
            kind, name = reason.removesuffix(lacking).split(" ", 1)
            kinds.setdefault(kind, []).append(f"{name} {runs}")
        else:
            others.append(f"left out: {reason} {runs}")
    return [f"left out, not in this version: {kind} {', '.join(names)}" for kind, names in kinds.items()] + others


def minutes(seconds: list[float | None]) -> str:
    known = [s for s in seconds if s is not None]
    if not seconds:
        return "0"
    return "?" if not known else f"{sum(known) / 60:.1f}" + ("+" if len(known) < len(seconds) else "")


def duration(seconds: list[float | None]) -> str:
    """
    >>> duration([30.0, 60.0]), duration([9000.0, None]), duration([None])
    ('1.5 minutes', '2.5 hours or more', '? minutes')
    """
    from zotune.estimates.words import time_of

    known = [s for s in seconds if s is not None]
    if seconds and not known:
        return "? minutes"
    return time_of(sum(known)) + (" or more" if len(known) < len(seconds) else "")


def show_done(plan: Plan, output: str) -> None:
    """There is nothing to run."""
    failed = [run.cell.name for run in plan.runs if run.status == "failed"]
    said = f"all done, {len(failed)} of {len(plan.runs)} failed: --retry runs them again" if failed else "all done"
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    print(f"{said}; zotune bench report {output}")


def unexpected(state: State) -> bool:
    """Whether a run failed. Want of memory is a result, and so is an lr or eps of a search that does not work, unless none does."""
    failed = any(record.status == "failed" and not run.cell.search for run, record in state.finished)
    return failed or bool(state.plan.hopeless)


def show_end(state: State, output: str) -> None:
    counts: dict[str, int] = {}
    for run, record in state.finished:
        counts[record.status] = counts.get(record.status, 0) + 1
        if record.status == "failed":
            last = (record.error.strip().splitlines() or ["no word"])[-1]
            print(f"failed: {run.cell.name}: {last}", file=sys.stderr)
    said = ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing run"
    if "failed" in counts:
        said += " (--retry runs failed ones again)"
    left = len(state.plan.to_do) + len(state.plan.held)
    if state.late:
        said += f"; the time is up, {left} runs are left: the same command goes on"
    print(f"{said}; zotune bench report {output}")


def left(active: Active) -> float | None:
    """Seconds that a run under way still takes, by its own pace where it has one."""
    took, steps = time.monotonic() - active.began, int(active.run.options["steps"])
    if active.step:
        return took * (steps - active.step) / active.step
    planned = active.run.planned.get("seconds")
    return None if planned is None else max(0.0, planned - took)


class Live:
    """A table of what runs, redrawn on a terminal; elsewhere a line for each run that ends."""

    def __init__(self, plan: Plan) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        from zotune.estimates.memory import readable

        self.readable = readable
        self.console = Console(stderr=True)
        self.live = RichLive(console=self.console, refresh_per_second=2, transient=True)
        self.said = 0
        self.total = len(plan.to_do) + len(plan.held)
        self.began = time.monotonic()

    def __enter__(self) -> Live:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.stop()

    def changed(self, state: State) -> None:
        for run, record in state.finished[self.said :]:
            self.said += 1
            after = record.result.get("test_after")
            figure = f"{after:.1f}" if after is not None and record.status == "done" else record.status
            took = record.finished - record.started
            line = f"[{self.said}/{self.total}] {run.cell.name}  {figure}  {took:.0f} s"
            if (seconds := run.planned.get("seconds")) is not None:
                line += f" (predicted {seconds:.0f})"
            peak = record.result.get("peak_memory_bytes", record.result.get("peak_bytes"))
            if peak is not None and run.planned.get("peak_bytes"):
                line += f"  {self.readable(peak)} (predicted {self.readable(run.planned['peak_bytes'])})"
            self.console.print(line, markup=False, highlight=False)
        if self.console.is_terminal:
            self.live.update(self._table(state))

    def _table(self, state: State) -> Any:
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("run", "step", "loss", "seconds"):
            table.add_column(name, justify="left" if name == "run" else "right")
        for active in state.active:
            loss = "" if active.loss is None else f"{active.loss:.3f}"
            steps = f"{active.step}/{active.run.options['steps']}"
            table.add_row(active.run.cell.name, steps, loss, f"{time.monotonic() - active.began:.0f}")
        at_once = max(1, len(state.active))
        expected = [left(one) for one in state.active]
        expected += [run.planned.get("seconds") for run in [*state.waiting, *state.plan.held]]
        shared = [None if seconds is None else seconds / at_once for seconds in expected]
        took = time.monotonic() - self.began
        table.caption = f"{self.said} of {self.total} done, {took:.0f} s, left about {duration(shared)}"
        return table
