"""Accuracy over seeds: the steps of `zotune train` for each cell of a grid and each seed, many at once, and paired differences.

    python benchmarks/accuracy.py --model MODEL --task sst2 --data-dir DIR --steps 2000 --output results.json \
        --vary scheme=full,lora dtype=float32,bfloat16 --seeds 8 --at-once 8 --against dtype=float32

What is left of the flags are options of `zotune train`, for every run. Runs of one seed draw the same directions and see the
same rows in the same order, so a difference between two cells is paired; --against takes it to the cell that is the same but
for the options named.
`--cells FILE` takes a JSON list of cells (options by name) instead of, or times, the grid.

A small model leaves a GPU idle: its kernels are short, and processes take turns. So one thread gives the device a step of each run
in turn, each run on a stream of its own. Model, rows, loss, optimizer and captured steps are those of `zotune train`; checkpoints,
trajectories and the Trainer are not here, the order of rows is drawn by the seed, and a last batch that is not full is left out.
The weights that are best on validation are kept on the device, and scored on test at the end. What OUTPUT has is not run again.
With --claims FOLDER several processes, of several GPUs, share a grid: each takes the next run that no other has claimed there.
A cell with `method=in-place` is the MeZO step on the weights themselves, for comparison.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # streams that a GPU really keeps apart

import torch
import transformers as tf
from mezo import InPlaceMeZO

from zotune.errors import NonFiniteLoss
from zotune.options import TrainConfig, resolve
from zotune.prepare.prepared import LENGTHS, prepare, resolved
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.tasks.evaluation import outcome
from zotune.tasks.objectives import objective
from zotune.trainer import parameter_groups

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t for n differences, two-sided
SCORED_AT_ONCE = 256  # rows

Cell = dict[str, str]


class Run:
    """One run, a step at a time."""

    def __init__(self, name: str, options: Cell) -> None:
        self.name, self.in_place = name, options.get("method") == "in-place"
        if self.in_place:
            options = options | {"method": "zo-sgd"}
        self.ready = ready = prepare(resolve(TrainConfig, options | {"output": "unused"}, None))
        ready.config = self.config = config = resolved(ready.config, ready.model)
        self.cuda = ready.device.type == "cuda"
        self.stream: Any = torch.cuda.stream(torch.cuda.Stream()) if self.cuda else nullcontext()
        multiple = LENGTHS if self.cuda else 1
        asked = objective(config.loss, ready.task, ready.tokenizer, ready.pad_id, multiple)
        self.collate, self.row_loss = asked.collate, asked.row_loss
        self.optimizer: Any = InPlaceMeZO(ready.model, config.lr, config.eps, config.seed, config.direction)
        if not self.in_place:
            self.optimizer = ZeroOrderOptimizer(
                parameter_groups(ready.model, config.weight_decay), config.method, lr=config.lr, seed=config.seed,
                **config.optimizer_options,
            )  # fmt: skip
            self.optimizer.pairs = config.pairs // config.directions_a_row
        ready.model.eval()
        self.batches = self._batches()
        self.taken, self.passes, self.began = 0, 0, time.perf_counter()
        self.validation: list[
            tuple[int, int, float, float, float]
        ] = []  # step, forward passes, seconds, validation, test
        self.best: dict[str, torch.Tensor] = {}
        self.windows: list[float] = []  # milliseconds a step between two evaluations
        self.before = self._score(ready.test)
        self.since = (0, time.perf_counter())
        self.failed = ""

    def _batches(self) -> Iterator[Any]:
        draw, rows, size = torch.Generator().manual_seed(self.config.seed), self.ready.train, self.config.batch_size
        for _ in itertools.count():
            order = torch.randperm(len(rows), generator=draw).tolist()
            for first in range(0, len(rows) - size + 1, size):
                batch = self.collate([rows[i] for i in order[first : first + size]])
                if self.cuda:  # pinned, so that the copy waits for nothing
                    batch = {k: v.pin_memory().to("cuda", non_blocking=True) for k, v in batch.items()}
                yield batch

    def loss(self, batch: Any) -> torch.Tensor:
        return self.row_loss(self.ready.model, batch)

    @property
    def done(self) -> bool:
        return bool(self.failed) or self.taken >= self.config.steps

    def step(self) -> None:
        with self.stream:
            try:
                self._step()
            except NonFiniteLoss as error:
                self.failed = str(error)
            if self.taken % self.config.evaluates_every == 0 or self.done:
                self._time()
                self._evaluate()
                self.since = (self.taken, time.perf_counter())

    def _time(self) -> None:
        if self.cuda:
            torch.cuda.current_stream().synchronize()
        steps, began = self.taken - self.since[0], self.since[1]
        if steps:
            self.windows.append(1e3 * (time.perf_counter() - began) / steps)

    def _step(self) -> None:
        config = self.config
        if self.in_place:
            batch = next(self.batches)
            self.optimizer.step(lambda: self.loss(batch))
            self.passes += 2
        else:
            left = 1 - self.taken / config.steps if config.lr_schedule == "linear" else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = left * (config.fo_lr if config.hybrid and group.get("first_order") else config.lr)
            some = [next(self.batches) for _ in range(config.accumulate)]
            self.optimizer.step(self.loss, batch=some[0] if len(some) == 1 else some)
            self.passes = self.optimizer.forward_passes
        self.taken += 1

    def _evaluate(self) -> None:
        if not self.in_place:
            self.optimizer.flush()
        found = self._score(self.ready.validation)
        if not self.validation or found >= max(v[3] for v in self.validation):
            for name, param in self.ready.model.named_parameters():
                if param.requires_grad:
                    self.best.setdefault(name, torch.empty_like(param)).copy_(param.detach())
        test = self._score(self.ready.test)  # to show the way; nothing is chosen by it
        self.validation.append((self.taken, self.passes, round(time.perf_counter() - self.began, 2), found, test))

    def _score(self, rows: Any) -> float:
        ready = self.ready
        made = outcome(ready.model, ready.tokenizer, ready.task, rows, batch_size=SCORED_AT_ONCE, pad_id=ready.pad_id)
        return made.metric(ready.task.metric, rows)

    @torch.no_grad()
    def outcome(self) -> dict[str, Any]:
        with self.stream:
            last = self._score(self.ready.test)
            for name, param in self.ready.model.named_parameters():
                if name in self.best:
                    param.copy_(self.best[name])
            after = self._score(self.ready.test)
        graphs = getattr(self.optimizer, "_graphs", None)
        return {
            "test_before": self.before,
            "test_after": after,
            "test_of_last": last,
            "validation_best": max(v[3] for v in self.validation),
            "validation": self.validation,
            "steps": self.taken,
            "forward_passes": self.passes,
            "engine": "in place" if self.in_place else self.optimizer.engine.name,
            "captured": graphs is not None and graphs.usable,
            "skipped": 0 if self.in_place else self.optimizer.skipped_steps,
            "step_ms": round(statistics.median(self.windows[1:] or self.windows), 3),  # the first warms up
            "seconds_beside_others": round(time.perf_counter() - self.began, 1),
        } | ({"failed": self.failed} if self.failed else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vary", nargs="+", default=[], metavar="OPTION=VALUE,VALUE")
    parser.add_argument("--cells", type=Path)
    parser.add_argument("--against", metavar="OPTION=VALUE[,OPTION=VALUE]")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=8, help="runs at one time")
    parser.add_argument("--claims", type=Path, help="folder in which processes that share the grid take runs")
    parser.add_argument("--until", type=float, default=float("inf"), help="begin no run after so many seconds")
    args, flags = parser.parse_known_args()
    common = {
        flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)
    }
    axes = [[(name, value) for value in values.split(",")] for name, _, values in (v.partition("=") for v in args.vary)]
    listed: list[Cell] = json.loads(args.cells.read_text()) if args.cells else [{}]
    cells = [cell | dict(chosen) for cell in listed for chosen in itertools.product(*axes)]
    results: dict[str, Any] = json.loads(args.output.read_text())["runs"] if args.output.exists() else {}
    queue = [(name_of(cell, seed), common | cell | {"seed": str(seed)}) for seed in range(args.seeds) for cell in cells]
    queue = [(name, options) for name, options in queue if name not in results]
    began, going = time.perf_counter(), list[Run]()
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    while going or (queue and time.perf_counter() - began < args.until):
        while len(going) < args.at_once and queue and time.perf_counter() - began < args.until:
            name, options = queue.pop(0)
            if not claimed(args.claims, name):
                continue
            try:
                going.append(Run(name, options))
            except Exception as error:  # of this cell alone
                results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
                print(name, results[name], flush=True)
        for run in list(going):
            run.step()
            if run.done:
                results[run.name] = run.outcome()
                going.remove(run)
                write(args, results)
                print(run.name, results[run.name]["test_after"], f"{time.perf_counter() - began:.0f} s", flush=True)
                del run
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    write(args, results)
    print(json.dumps(summary(results, args.against), indent=1))


def claimed(folder: Path | None, name: str) -> bool:
    """Whether the run is this process's to take."""
    if folder is None:
        return True
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / name.replace("/", "-")).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def name_of(cell: Cell, seed: int) -> str:
    return ",".join([*(f"{name}={value}" for name, value in cell.items()), str(seed)])


def write(args: argparse.Namespace, results: dict[str, Any]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    args.output.write_text(
        json.dumps(
            {
                "command": "python benchmarks/accuracy.py " + " ".join(sys.argv[1:]),
                "device": device,
                "versions": {"torch": torch.__version__, "transformers": tf.__version__},
                "date": datetime.date.today().isoformat(),
                "summary": summary(results, args.against),
                "runs": results,
            },
            indent=1,
        )
    )


def halfway(result: dict[str, Any]) -> float:
    """Test at what was best on validation in the first half of the steps."""
    early = [v for v in result["validation"] if v[0] <= result["steps"] / 2] or result["validation"][:1]
    best = max(v[3] for v in early)
    return float([v for v in early if v[3] == best][-1][4])


def summary(results: dict[str, Any], against: str | None) -> dict[str, Any]:
    """Mean and spread of each cell, and the paired differences to the cell it is compared with, with their 95 % interval."""
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for name, result in results.items():
        if "test_after" in result:
            cell, _, seed = name.rpartition(",")
            cells.setdefault(cell, {})[int(seed)] = result
    said: dict[str, Any] = {}
    for cell, by_seed in sorted(cells.items()):
        values = [r["test_after"] for r in by_seed.values()]
        said[cell] = {
            "mean": round(statistics.mean(values), 2),
            "sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
            "after half the steps": round(statistics.mean(halfway(r) for r in by_seed.values()), 2),
            "of the last step": round(statistics.mean(r["test_of_last"] for r in by_seed.values()), 2),
            "validation": round(statistics.mean(r["validation_best"] for r in by_seed.values()), 2),
            "seeds": {seed: round(r["test_after"], 2) for seed, r in sorted(by_seed.items())},
        }
        if against is None:
            continue
        wanted = dict(part.split("=", 1) for part in against.split(","))
        own = [(part.partition("=")[0], part) for part in cell.split(",")]
        other = ",".join(f"{name}={wanted[name]}" if name in wanted else part for name, part in own)
        base = cells.get(other, {})
        pairs = [by_seed[s]["test_after"] - base[s]["test_after"] for s in by_seed if s in base]
        if base is not by_seed and len(pairs) > 1:
            mean = statistics.mean(pairs)
            half = T_95.get(len(pairs), 2.3) * statistics.stdev(pairs) / len(pairs) ** 0.5
            said[cell][f"minus {against}"] = {
                "mean": round(mean, 2),
                "95 %": [round(mean - half, 2), round(mean + half, 2)],
            }
    return said


if __name__ == "__main__":
    main()
