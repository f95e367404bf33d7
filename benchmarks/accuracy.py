"""Accuracy over seeds: `zotune train` once for each cell of a grid and each seed, many at once, and paired differences.

    python benchmarks/accuracy.py --model MODEL --data-dir DIR --output results.json \
        --vary scheme=full,lora dtype=float32,bfloat16 --seeds 8 --processes 2 --threads 8 --against dtype=float32

What is left of the flags goes to every run. Runs of one seed draw the same directions and see the same rows in the same
order, so a difference between two cells is paired; --against takes it to the cell that differs in that value alone.
`--cells FILE` takes a JSON list of cells (options by name) instead of, or times, the grid.

A small model leaves a GPU idle, and processes take turns on it: runs of one process, each on a thread and a stream of its own,
overlap. Peaks of memory are not those of one run then. Finished runs are kept in RUNS and not run again. A cell with
`method=in-place` is the MeZO step on the weights themselves, for comparison.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t for n differences, two-sided

Cell = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--vary", nargs="+", default=[], metavar="OPTION=VALUE,VALUE")
    parser.add_argument("--cells", type=Path)
    parser.add_argument("--against", metavar="OPTION=VALUE")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="runs at once in each process")
    parser.add_argument("--until", type=float, default=float("inf"), help="start no run after so many seconds")
    args, flags = parser.parse_known_args()
    common = {
        flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)
    }
    axes = [[(name, value) for value in values.split(",")] for name, _, values in (v.partition("=") for v in args.vary)]
    listed: list[Cell] = json.loads(args.cells.read_text()) if args.cells else [{}]
    cells = [cell | dict(chosen) for cell in listed for chosen in itertools.product(*axes)]
    began, results, queue = time.time(), dict[str, Any](), list[Cell]()
    for seed in range(args.seeds):
        queue += [common | cell | {"seed": str(seed), "output": str(args.runs / name_of(cell, seed))} for cell in cells]
    lock = threading.Lock()

    def work(_: int) -> None:
        """One process after the other; each takes runs from the queue until it is empty."""
        child = subprocess.Popen(
            [sys.executable, __file__, "together", str(args.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None

        def give() -> None:
            with lock:
                late = time.time() - began > args.until
                print(json.dumps(queue.pop(0)) if queue and not late else "", file=child.stdin, flush=True)

        for _ in range(args.threads):
            give()
        for line in child.stdout:
            name, found = json.loads(line)
            with lock:
                results[name] = found
                write(args, results)
            print(name, found.get("test_after", found.get("error")), f"{time.time() - began:.0f} s", flush=True)
            give()
        child.wait()

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(work, range(args.processes)))
    print(json.dumps(summary(results, args.against), indent=1))


def name_of(cell: Cell, seed: int) -> str:
    return ",".join([*(f"{name}={value}" for name, value in cell.items()), str(seed)]).replace("/", "-")


def together(threads: int) -> None:
    """Runs from stdin, a JSON object a line, so many at once; an empty line ends a thread."""
    import torch
    import transformers
    from accelerate.state import AcceleratorState

    from zotune import run as runs
    from zotune.engines import graphs

    taking, giving, loading = threading.Lock(), threading.Lock(), threading.Lock()
    prepare = runs.prepare

    def one_at_a_time(config: Any) -> runs.Prepared:
        """An adapter's first values come from torch's generator."""
        with loading:
            return prepare(config)

    runs.prepare = one_at_a_time
    # a new Trainer resets the state that all threads share; it is the same for all of them
    AcceleratorState._reset_state = staticmethod(lambda *args, **kwargs: None)
    seed = transformers.set_seed

    def between_captures(*args: Any) -> None:
        """A loss that moves torch's generator is not captured; another thread's seed must not look like one."""
        with graphs._ONE_AT_A_TIME:
            seed(*args)

    transformers.set_seed = transformers.trainer.set_seed = between_captures
    sys.setswitchinterval(1e-4)  # a thread that comes back from the device waits for the interpreter
    said, sys.stdout = sys.stdout, sys.stderr

    def work() -> None:
        cuda = torch.cuda.is_available()
        with torch.cuda.stream(torch.cuda.Stream() if cuda else None):
            while True:
                with taking:
                    line = sys.stdin.readline().strip()
                if not line:
                    return
                options = json.loads(line)
                try:
                    found = one(options, loading)
                except Exception as error:
                    found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
                with giving:
                    print(json.dumps([Path(options["output"]).name, found]), file=said, flush=True)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def one(options: Cell, loading: threading.Lock) -> dict[str, Any]:
    """A run, new or gone on with."""
    from zotune import run as runs
    from zotune.config import TrainConfig, resolve

    folder = Path(options["output"])
    if (folder / "result.json").exists():
        return outcome(folder)
    if options.get("method") == "in-place":
        in_place(resolve(TrainConfig, options | {"method": "zo-sgd"}, None), loading)
        return outcome(folder)
    runs.train(resolve(TrainConfig, options | {"resume": "true"}, None))
    return outcome(folder)


def outcome(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    if (folder / "metrics.jsonl").exists():
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        found["validation"] = [
            (m["step"], m["seconds"], m["validation_accuracy"]) for m in lines if "validation_accuracy" in m
        ]
    return found


def in_place(config: Any, loading: threading.Lock) -> None:
    """One run with the reference step: the same rows, batches drawn by seed; torch's generator, so one at a time."""
    from mezo import InPlaceMeZO

    from zotune import run as runs
    from zotune.tasks.encoding import Collator
    from zotune.tasks.scoring import ROW_LOSSES

    ready = runs.prepare(config)
    ready.config = config = runs.resolved(config, ready.model)
    with loading:
        before = ready.score(ready.test, runs.Listener(), "")
        optimizer = InPlaceMeZO(ready.model, config.lr or 0, config.eps or 1e-3, config.seed, config.direction)
        order, collate = random.Random(config.seed), Collator(config.loss, ready.pad_id)
        best: tuple[float, float] = (-1.0, 0.0)
        for step in range(1, config.steps + 1):
            rows = order.sample(ready.train, config.batch_size)
            batch = {k: v.to(ready.device) for k, v in collate(rows).items()}
            optimizer.step(lambda batch=batch: ROW_LOSSES[config.loss](ready.model, batch))
            if step % config.evaluates_every == 0:
                validation = ready.score(ready.validation, runs.Listener(), "")
                best = max(best, (validation, ready.score(ready.test, runs.Listener(), "")))
        last = ready.score(ready.test, runs.Listener(), "")
    Path(config.output).mkdir(parents=True, exist_ok=True)
    result = {"test_before": before, "test_after": best[1], "test_of_last": last, "validation_best": best[0]}
    (Path(config.output) / "result.json").write_text(json.dumps(result))


def write(args: argparse.Namespace, results: dict[str, Any]) -> None:
    args.output.write_text(
        json.dumps(
            {
                "command": "python benchmarks/accuracy.py " + " ".join(sys.argv[1:]),
                "date": datetime.date.today().isoformat(),
                "summary": summary(results, args.against),
                "runs": results,
            },
            indent=1,
        )
    )


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
            "validation": round(statistics.mean(r["validation_best"] for r in by_seed.values()), 2),
            "seeds": {seed: round(r["test_after"], 2) for seed, r in sorted(by_seed.items())},
        }
        if against is None:
            continue
        option = against.partition("=")[0]
        base = cells.get(",".join(against if part.startswith(f"{option}=") else part for part in cell.split(",")), {})
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
    if sys.argv[1:2] == ["together"]:
        together(int(sys.argv[2]))
    else:
        main()
