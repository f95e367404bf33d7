"""SST-2 accuracy over seeds: `zotune train` once for each (scheme, dtype, seed), several at once, and the paired differences.

    python benchmarks/accuracy.py --model MODEL --data-dir DIR --output results.json \
        --schemes full lora --dtypes float32 bfloat16 --seeds 8 --jobs 8

Runs of one seed draw the same directions and see the same rows in the same order whatever their dtype, so the difference of
two formats is paired. Finished runs are kept in RUNS and not run again. `--in-place` adds the MeZO step that perturbs the
weights themselves, for comparison.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t for n differences, two-sided


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--schemes", nargs="+", default=["full", "lora"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--until", type=float, default=float("inf"), help="start no run after so many seconds")
    args, flags = parser.parse_known_args()  # what is left goes to `zotune train`
    began = time.monotonic()
    kinds = ["zotune"] + (["in-place"] if args.in_place else [])
    grid = list(itertools.product(range(args.seeds), args.schemes, args.dtypes, kinds))
    results: dict[str, Any] = {}

    def run(cell: tuple[int, str, str, str]) -> None:
        seed, scheme, dtype, kind = cell
        if (kind == "in-place" and scheme != "full") or time.monotonic() - began > args.until:
            return
        name = "-".join((scheme, dtype, kind, str(seed)))
        folder = args.runs / name
        command = [sys.executable, "-m", "zotune.cli"] if kind == "zotune" else [sys.executable, __file__, "in-place"]
        command += ["train"] * (kind == "zotune") + [
            "--model",
            args.model,
            "--task",
            "sst2",
            "--data-dir",
            args.data_dir,
        ]
        command += [
            "--scheme",
            scheme,
            "--dtype",
            dtype,
            "--seed",
            str(seed),
            "--output",
            str(folder),
            "--resume",
            *flags,
        ]
        error = None
        if not (folder / "result.json").exists():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            error = done.stderr.strip().splitlines()[-1:] if done.returncode else None
        if error is not None:
            results[name] = {"error": error}
        else:
            results[name] = json.loads((folder / "result.json").read_text())
            lines = (folder / "metrics.jsonl").read_text().splitlines() if kind == "zotune" else []
            results[name]["validation"] = [
                (m["step"], m["validation_accuracy"]) for m in map(json.loads, lines) if "validation_accuracy" in m
            ]
        write(args.output, args, flags, results)
        print(
            name,
            results[name].get("test_after", results[name].get("error")),
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, grid))
    print(json.dumps(summary(results), indent=1))


def write(path: Path, args: argparse.Namespace, flags: list[str], results: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(
            {
                "command": "python benchmarks/accuracy.py " + " ".join(sys.argv[1:]),
                "flags": flags,
                "date": datetime.date.today().isoformat(),
                "summary": summary(results),
                "runs": dict(results),
            },
            indent=1,
        )
    )


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Mean and spread of each cell, and the paired differences to float32 with their 95 % interval."""
    cells: dict[str, dict[int, float]] = {}
    for name, result in results.items():
        if "test_after" in result:
            cell, seed = name.rsplit("-", 1)
            cells.setdefault(cell, {})[int(seed)] = result["test_after"]
    said: dict[str, Any] = {}
    for cell, by_seed in sorted(cells.items()):
        values = list(by_seed.values())
        said[cell] = {
            "mean": round(statistics.mean(values), 2),
            "sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
            "seeds": {seed: round(v, 2) for seed, v in sorted(by_seed.items())},
        }
        scheme, dtype, kind = cell.split("-", 2)
        base = cells.get(f"{scheme}-float32-{kind}", {})
        pairs = [by_seed[s] - base[s] for s in by_seed if s in base]
        if dtype != "float32" and len(pairs) > 1:
            mean = statistics.mean(pairs)
            half = T_95.get(len(pairs), 2.3) * statistics.stdev(pairs) / len(pairs) ** 0.5
            said[cell]["minus float32"] = {
                "mean": round(mean, 2),
                "95 %": [round(mean - half, 2), round(mean + half, 2)],
            }
    return said


def in_place(argv: list[str]) -> None:
    """One run with the reference step: the same rows, batches drawn by seed, scored at the end."""
    import random

    from mezo import InPlaceMeZO

    from zotune import run as runs
    from zotune.config import TrainConfig, resolve
    from zotune.tasks.encoding import Collator
    from zotune.tasks.scoring import ROW_LOSSES

    pairs = [argument.removeprefix("--").replace("-", "_") for argument in argv if argument != "--resume"]
    config = resolve(TrainConfig, dict(zip(pairs[::2], argv_values(argv), strict=True)), None)
    ready = runs.prepare(config)
    ready.config = config = runs.resolved(config, ready.model)
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
    result = {"test_before": before, "test_after": last, "test_of_best_validation": best[1], "validation_best": best[0]}
    (Path(config.output) / "result.json").write_text(json.dumps(result))


def argv_values(argv: list[str]) -> list[str]:
    return [argument for argument in argv if argument != "--resume"][1::2]


if __name__ == "__main__":
    if sys.argv[1:2] == ["in-place"]:
        in_place(sys.argv[2:])
    else:
        main()
