"""A zeroth-order step against its floor, on models of real size with random weights, in one process.

    python benchmarks/engines.py --models opt-1.3b llama-7b opt-13b --shapes 16x32 16x256 --output engines.json

floor: one forward over the doubled batch with logits at one position, as a CUDA graph. reference: the MeZO step, one kernel
at a time. Medians of whole steps. of inference: the rows of a batch a second that a step trains on, as a share of those that the
floor's forward reads a second; at most 50 % where a step reads each row twice. Time does not depend on the weights' values. Adam by
back-propagation stands beside, on all parameters and through LoRA, with and without gradient checkpointing. Memory: memory.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from steps import BACK_PROPAGATION, FLOOR, KINDS, MODELS, REFERENCE, batch_of, build, make_step, report_of, sync

OTHERS = (REFERENCE, *BACK_PROPAGATION)  # take long, and vary little


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["opt-1.3b"], choices=MODELS)
    parser.add_argument("--shapes", nargs="+", default=["16x32", "16x256"], help="rows x tokens")
    parser.add_argument("--only", nargs="+", help="rows whose name holds one of these; =NAME: that row")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--in-a-row", type=int, default=4, help="steps between two waits for the device: it is given the next early"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report = report_of("engines.py", args)
    for name in args.models:
        model = build(name, args.dtype, args.device)
        for shape in args.shapes:
            for row in measure(model, shape, args):
                row |= {"model": name, "shape": shape}
                report["rows"].append(row)
                print(
                    f"{name:<10}{shape:<8}{row['step']:<34}{row['ms']:>9.2f} ms{row['of_floor']:>7.2f} × floor"
                    f"{row.get('speedup', 0):>7.2f} × reference{100 * row['of_inference']:>7.1f} % of inference"
                    f"  {row.get('note', '')}",
                    flush=True,
                )
                if args.output:
                    args.output.write_text(json.dumps(report, indent=1))
        del model
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def measure(model: Any, shape: str, args: Any) -> Iterator[dict[str, Any]]:
    batch = batch_of(model, shape, args.device)
    floor = reference = None
    for kind in KINDS:
        if kind != FLOOR and args.only and not any(f"={kind}" == part or part in kind for part in args.only):
            continue
        row = {"step": kind} | timed(kind, model, batch, args)
        if kind == FLOOR:
            floor = row["ms"]
        elif kind == REFERENCE:
            reference = row["ms"]
        assert floor is not None
        row["of_floor"] = row["ms"] / floor
        row["of_inference"] = 1.0 if kind == FLOOR else floor / 2 / row["ms"]
        if reference is not None:
            row["speedup"] = reference / row["ms"]
        yield row


def timed(kind: str, model: Any, batch: Any, args: Any) -> dict[str, Any]:
    warm, rounds = (1, min(3, args.rounds)) if kind in OTHERS else (3, args.rounds)
    step = None
    try:
        step = make_step(kind, model, batch)
        in_a_row = step.each * -(-(1 if kind in OTHERS else args.in_a_row) // step.each)
        for _ in range(warm * step.each):
            step.run()
        seconds = []
        for _ in range(rounds):
            sync(args.device)
            began = time.perf_counter()
            for _ in range(in_a_row):
                step.run()
            sync(args.device)
            seconds.append((time.perf_counter() - began) / in_a_row)
        return {"ms": 1e3 * statistics.median(seconds)} | step.notes()
    except torch.OutOfMemoryError:
        return {"ms": float("nan"), "note": "does not fit"}
    finally:
        if step is not None:
            step.close()
        del step
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
