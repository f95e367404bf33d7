"""Tasks by zeroth and first order after a fixed budget: `zotune train` processes over several GPUs, as far as the time goes.

    python benchmarks/tasks.py --model MODEL --data-dir DATA --output OUT --at-once 4 --minutes 8 --stop-after 9
    python benchmarks/tasks.py --output OUT --table          # what is there so far, as Markdown

SST-2, RTE, BoolQ, COPA and WinoGrande (the first two also without alignment), each by zo-sgd with a direction per row, by zo-sgd
and by fo-adam; SQuAD on negative F1. Every cell runs its grid of lr and eps on seed 0; the setting that is best on validation
runs on the other seeds. Test is scored before and after, and no choice depends on it. Then zero-shot and in-context baselines.

Nothing new starts after --minutes; after --stop-after what runs is asked to stop, which it does once it has saved. The same command
again goes on: OUT/results.json holds what is done, OUT/runs the folders.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALL = ["sst2", "sst5", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "winogrande", "record", "squad", "drop"]
TRAINED = [
    ("sst2", "template"),
    ("copa", "template"),
    ("winogrande", "template"),
    ("rte", "template"),
    ("boolq", "template"),
]
TRAINED += [("sst2", "none"), ("rte", "none")]
ROW, ZO, FO, F1 = "direction per row", "zo-sgd", "fo-adam", "zo-sgd on F1"
FLAGS = {
    ROW: ["--method", "zo-sgd", "--groups", "batch"],
    ZO: ["--method", "zo-sgd"],
    FO: ["--method", "fo-adam"],
    F1: ["--method", "zo-sgd", "--loss", "f1", "--engine", "sequential"],  # nothing of generation is captured
}
GRID = {  # (lr, eps); of fo-adam eps is not used
    ROW: [("1e-5", "1e-2"), ("3e-5", "1e-2")],
    ZO: [("1e-5", "5e-3"), ("3e-5", "5e-3")],
    FO: [("1e-5", "1e-3"), ("3e-5", "1e-3")],
    F1: [("3e-5", "5e-3"), ("1e-4", "5e-3")],
}
KEPT = (
    "test_before", "test_after", "validation_best", "chosen_step", "steps", "forward_passes", "one_class", "test_rows", "metric",
    "wall_seconds", "peak_memory_bytes", "engine", "dtype", "device", "resumed_at", "skipped_steps", "versions",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A task, with or without its template, and how it is trained."""

    task: str
    alignment: str
    how: str

    @property
    def name(self) -> str:
        return f"{self.task}{'' if self.alignment == 'template' else ', unaligned'}, {self.how}"


LONG = ["squad", "boolq"]  # first, so that none of them is alone at the end
CELLS = [Cell("squad", "template", F1)]
CELLS += [Cell(task, alignment, how) for task, alignment in TRAINED for how in (ROW, ZO, FO)]
CELLS.sort(key=lambda cell: cell.task not in LONG)


@dataclass(frozen=True)
class Job:
    key: str
    flags: tuple[str, ...]
    made: Path  # the file that says that it is done


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.output
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "results.json"
        self.runs: dict[str, dict[str, Any]] = json.loads(self.file.read_text())["runs"] if self.file.exists() else {}
        self.busy: set[str] = set()
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = threading.Lock()
        self.began = time.monotonic()
        self.cells = [cell for cell in CELLS if not args.only or any(word in cell.name for word in args.only)]

    # What there is to do.

    def train(self, cell: Cell, lr: str, eps: str, seed: int) -> Job:
        args, key = self.args, f"{cell.name}, lr {lr}, eps {eps}, seed {seed}"
        folder = self.out / "runs" / key.replace(", ", "_").replace(" ", "-")
        steps = {FO: args.fo_steps, F1: args.f1_steps}.get(cell.how, args.steps)
        size = args.f1_eval_size if cell.how == F1 else args.eval_size
        flags = [
            "train",
            "--model",
            args.model,
            "--task",
            cell.task,
            "--data-dir",
            args.data_dir,
            "--output",
            str(folder),
        ]
        flags += [*FLAGS[cell.how], "--alignment", cell.alignment, "--lr", lr, "--eps", eps, "--seed", str(seed)]
        flags += ["--steps", str(steps), "--eval-every", str(max(1, steps // 8)), "--batch-size", str(args.batch_size)]
        flags += ["--dtype", args.dtype, "--device", args.device, "--log-every", str(max(1, steps // 20)), "--resume"]
        flags += ["--eval-size", str(size)] if size else []
        flags += ["--tf32"] if args.tf32 else []
        return Job(key, tuple(flags), folder / "result.json")

    def baseline(self, task: str, shots: int) -> Job:
        args, key = self.args, f"{task}, {shots} shots"
        made = self.out / "runs" / f"{task}_{shots}-shots.json"
        flags = ["eval", "--model", args.model, "--task", task, "--data-dir", args.data_dir, "--shots", str(shots)]
        flags += ["--dtype", args.dtype, "--device", args.device, "--batch-size", str(4 if shots else 16)]
        flags += ["--eval-size", str(args.eval_size)] if args.eval_size else []
        return Job(key, (*flags, "--output", str(made)), made)

    def grid(self, cell: Cell) -> list[Job]:
        return [self.train(cell, lr, eps, 0) for lr, eps in GRID[cell.how]]

    def chosen(self, cell: Cell) -> tuple[str, str] | None:
        """Its lr and eps; None until the whole grid has run. A setting that failed, on NaN say, is not chosen."""
        found = [self.runs.get(job.key, {}) for job in self.grid(cell)]
        if not all(found) or not any("validation_best" in run for run in found):
            return None
        best = max(range(len(found)), key=lambda i: found[i].get("validation_best", -1.0))
        return GRID[cell.how][best]

    def jobs(self) -> list[Job]:
        """All that can be started, in order: grids, further seeds of what was chosen, baselines."""
        jobs = list(itertools.chain.from_iterable(map(self.grid, self.cells)))
        for seed in range(1, self.args.seeds):
            jobs += [self.train(cell, *at, seed) for cell in self.cells if (at := self.chosen(cell)) and cell.how != F1]
        if self.args.baselines:
            jobs += [self.baseline(task, shots) for shots in (0, self.args.shots) for task in ALL]
        return jobs

    def next(self) -> Job | None:
        with self.lock:
            open_jobs = (job for job in self.jobs() if job.key not in self.runs and job.key not in self.busy)
            job = next(open_jobs, None) if self.minutes() < min(self.args.minutes, self.args.stop_after) else None
            if job is not None:
                self.busy.add(job.key)
            return job

    def minutes(self) -> float:
        return (time.monotonic() - self.began) / 60

    # Doing it.

    def work(self, gpu: str) -> None:
        """One process after the other on a GPU; one that finds nothing to do waits while others may give it something."""
        while True:
            job = self.next()
            if job is not None:
                self.one(job, gpu)
            elif not self.busy or self.minutes() >= min(self.args.minutes, self.args.stop_after):
                return
            else:
                time.sleep(1)

    def one(self, job: Job, gpu: str) -> None:
        job.made.parent.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"OMP_NUM_THREADS": str(self.args.threads), "NUMBA_NUM_THREADS": str(self.args.threads)}
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | (
            {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        )
        log = self.out / "logs" / (job.key.replace(", ", "_").replace(" ", "-") + ".txt")
        log.parent.mkdir(exist_ok=True)
        with open(log, "wb") as said:
            child = subprocess.Popen(
                [sys.executable, "-m", "zotune", *job.flags], env=env, stdout=said, stderr=subprocess.STDOUT
            )
            with self.lock:
                self.children[job.key] = child
            code = child.wait()
        with self.lock:
            self.busy.discard(job.key)
            del self.children[job.key]
            if code == 0:
                found = json.loads(job.made.read_text())
                self.runs[job.key] = {k: found[k] for k in (KEPT if job.flags[0] == "train" else found) if k in found}
            elif code > 0 and code not in (130, 143):
                lines = log.read_text(errors="replace").strip().splitlines() or [""]
                self.runs[job.key] = {"error": lines[-1][:300], "code": code}
            self.write()
        found = self.runs.get(job.key, {"stopped": code})
        shown = found.get("test_after", found.get("value", found))
        print(f"{self.minutes():5.1f} min  {job.key}: {shown}", flush=True)

    def write(self) -> None:
        held = {
            "command": "python benchmarks/tasks.py " + " ".join(sys.argv[1:]),
            "date": datetime.date.today().isoformat(),
            "settings": {k: str(v) for k, v in vars(self.args).items()},
            "runs": self.runs,
        }
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(held, indent=1))
        new.replace(self.file)

    def stop_late(self) -> None:
        while self.minutes() < self.args.stop_after:
            time.sleep(1)
        with self.lock:
            for child in self.children.values():
                child.send_signal(signal.SIGTERM)

    def go(self) -> None:
        failed = [key for key, run in self.runs.items() if "error" in run]
        for key in failed:  # once more, but for what training itself gave up
            if self.runs[key]["code"] != 1:
                del self.runs[key]
        places = [gpu for _ in range(self.args.at_once) for gpu in self.args.gpus]
        threading.Thread(target=self.stop_late, daemon=True).start()
        with ThreadPoolExecutor(len(places)) as pool:
            list(pool.map(self.work, places))

    # What came of it.

    def table(self) -> str:
        lines = [f"| task | n | one class | before | {ROW} | {ZO} | {FO} |", "|---|---|---|---|---|---|---|"]
        for task, alignment in TRAINED:
            cells = [Cell(task, alignment, how) for how in (ROW, ZO, FO)]
            done = [
                run for cell in cells for job in self.grid(cell) if "test_after" in (run := self.runs.get(job.key, {}))
            ]
            if done:
                name = task + ("" if alignment == "template" else ", no alignment")
                some = done[0]
                start = f"{some['test_rows']} | {some['one_class']:.1f} | {some['test_before']:.1f}"
                lines.append(f"| {name} | {start} | {' | '.join(map(self.figure, cells))} |")
        f1 = Cell("squad", "template", F1)
        runs = [self.runs.get(job.key, {}) for job in self.grid(f1)]
        if runs := [run for run in runs if "test_after" in run]:
            lines += ["", "| SQuAD on negative F1 | n | before | after |", "|---|---|---|---|"]
            before = f"{runs[0]['test_rows']} | {runs[0]['test_before']:.1f}"
            lines.append(f"| {runs[0]['steps']} steps | {before} | {self.figure(f1)} |")
        shots = self.args.shots
        rows = []
        for task in ALL:
            pair = [self.runs.get(f"{task}, {count} shots", {}) for count in (0, shots)]
            if any("value" in run for run in pair):
                some = next(run for run in pair if "value" in run)
                told = [f"{run['value']:.1f} | {run['n']}" if "value" in run else "– | –" for run in pair]
                rows.append(f"| {task} | {some['metric']} | {' | '.join(told)} |")
        if rows:
            lines += [
                "",
                f"| task | metric | zero-shot | n | {shots} in context | n |",
                "|---|---|---|---|---|---|",
                *rows,
            ]
        return "\n".join([*lines, "", *self.notes()])

    def figure(self, cell: Cell) -> str:
        """Test at the chosen setting: the mean of its seeds, and their spread."""
        at = self.chosen(cell)
        if at is None:
            done = sum("test_after" in self.runs.get(job.key, {}) for job in self.grid(cell))
            return f"– ({done} of {len(GRID[cell.how])} settings)"
        runs = [self.runs.get(self.train(cell, *at, seed).key, {}) for seed in range(self.args.seeds)]
        values = [run["test_after"] for run in runs if "test_after" in run]
        spread = f" ± {statistics.stdev(values):.1f} ({len(values)} seeds)" if len(values) > 1 else ""
        where = f"lr {at[0]}" + (f", eps {at[1]}" if len({eps for _, eps in GRID[cell.how]}) > 1 else "")
        return f"{statistics.mean(values):.1f}{spread}, {where}"

    def notes(self) -> list[str]:
        """Grids, budgets, what failed, and where it ran."""
        done = [run for run in self.runs.values() if "test_after" in run]
        budgets: dict[str, set[tuple[int, int]]] = {}
        for key, run in self.runs.items():
            if "test_after" in run:
                how = key.split(", lr ")[0].rsplit(", ", 1)[1]
                budgets.setdefault(how, set()).add((run["steps"], run["forward_passes"]))
        lines = [
            f"{how}: lr {', '.join(dict.fromkeys(lr for lr, _ in GRID[how]))}; "
            f"eps {', '.join(dict.fromkeys(eps for _, eps in GRID[how])) if how != FO else '–'}; "
            + "; ".join(f"{steps:,} steps, {passes:,} forward passes" for steps, passes in sorted(budget))
            for how, budget in budgets.items()
        ]
        failed = [f"{key}: {run['error']}" for key, run in self.runs.items() if "error" in run]
        where = sorted({f"{run['device']}, {run['dtype']}, torch {run['versions']['torch']}" for run in done})
        return [*lines, *(["failed:", *failed] if failed else []), *where]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="MODEL")
    parser.add_argument("--data-dir", default="DATA")
    parser.add_argument("--table", action="store_true", help="print the table of what is there; run nothing")
    parser.add_argument("--gpus", help="such as 0,1,2,3 [default: all]")
    parser.add_argument("--at-once", type=int, default=3, help="processes on each GPU")
    parser.add_argument("--threads", type=int, default=2, help="of each process, on the CPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run later than this")
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), help="stop what runs; it saves, and can go on"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--fo-steps", type=int, default=300)
    parser.add_argument("--f1-steps", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eval-size", type=int, help="validation and test rows at most [default: 500, 1000]")
    parser.add_argument("--f1-eval-size", type=int, default=200)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", nargs="+", help="cells whose name has one of these in it, such as 'sst2' 'zo-sgd'")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tf32", action="store_true", help="products of float32 numbers on tensor cores")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    bench = Bench(args)
    if not args.table:
        args.gpus = args.gpus.split(",") if args.gpus else visible(args.device)
        bench.go()
    print(bench.table())


def visible(device: str) -> list[str]:
    """The GPUs there are; one place without a GPU where there is none."""
    if device == "cpu":
        return [""]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())] or [""]


if __name__ == "__main__":
    main()
