"""Peak memory of each kind of step, each in a process of its own, on models of real size with random weights.

    python benchmarks/memory.py --models opt-13b llama-7b --shapes 16x256 4x2048 --output memory.json

The peak is reset once the model and the batch are there, so it holds what a graph is captured with and what the first steps
keep. On CUDA it is what torch allocated (held: with what its allocator keeps for captured graphs), on the CPU the resident set,
interpreter and compilers included. Targets for steps without back-propagation on all parameters: weights + 1.0 GiB where the
model is OPT-13B at 16x256, and everywhere 1.05 × the floor's peak plus the step's scratch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from steps import FLOOR, KINDS, MODELS, ZERO_ORDER, batch_of, build, make_step, report_of, sync

from zotune.estimates.memory import peak_bytes, reset_peak

GIB = 2**30
SHOWN = [kind for kind in KINDS if "fold" not in kind and "r 4" not in kind and "rademacher, per row" not in kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["opt-1.3b"], choices=MODELS)
    parser.add_argument("--shapes", nargs="+", default=["16x256"], help="rows x tokens")
    parser.add_argument("--only", nargs="+", help="rows whose name holds one of these, and the floor")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a kind, measured in this process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    report = report_of("memory.py", args)
    for name in args.models:
        for shape in args.shapes:
            floor = None
            for kind in SHOWN:
                if kind != FLOOR and args.only and not any(part in kind for part in args.only):
                    continue
                row = {"model": name, "shape": shape, "step": kind} | in_a_process(kind, name, shape, args)
                if kind == FLOOR:
                    floor = row.get("peak_gib")
                judge(row, floor)
                report["rows"].append(row)
                print(line(row), flush=True)
                if args.output:
                    args.output.write_text(json.dumps(report, indent=1))


def in_a_process(kind: str, model: str, shape: str, args: Any) -> dict[str, Any]:
    own = ["--one", kind, "--models", model, "--shapes", shape, "--dtype", args.dtype, "--device", args.device]
    done = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"note": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, args: Any) -> dict[str, Any]:
    """Two steps, or one fold and a step, from a fresh peak on."""
    device = torch.device(args.device)
    model = build(args.models[0], args.dtype, args.device)
    batch = batch_of(model, args.shapes[0], args.device)
    row: dict[str, Any] = {"weights_gib": sum(p.numel() * p.element_size() for p in model.parameters()) / GIB}
    sync(args.device)
    if args.device == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)
    row["before_gib"] = peak_bytes(device) / GIB
    try:
        step = make_step(kind, model, batch)
        for _ in range(step.each + 1):
            step.run()
        sync(args.device)
    except torch.OutOfMemoryError:
        return row | {"note": "does not fit"}
    row |= {"peak_gib": peak_bytes(device) / GIB} | step.notes()
    if args.device == "cuda":
        row["held_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return row


def judge(row: dict[str, Any], floor: float | None) -> None:
    """The row's shares, and whether it meets its targets."""
    peak = row.get("peak_gib")
    if peak is None:
        return
    row["over_weights_gib"] = peak - row["weights_gib"]
    if floor is not None:
        row["of_floor"] = peak / floor
    if row["step"] not in ZERO_ORDER:
        return
    if floor is not None:
        row["within_floor_target"] = peak <= 1.05 * floor + row["scratch_gib"]
    if (row["model"], row["shape"]) == ("opt-13b", "16x256"):
        row["within_weights_target"] = peak <= row["weights_gib"] + 1.0


def line(row: dict[str, Any]) -> str:
    name = f"{row['model']:<10}{row['shape']:<8}{row['step']:<34}"
    if "peak_gib" not in row:
        return f"{name}{row['note']}"
    met = [("missed", "met")[value] for key, value in row.items() if key.endswith("_target")]
    return (
        f"{name}{row['peak_gib']:>9.3f} GiB{row['over_weights_gib']:>+9.3f} over the weights"
        f"{row.get('of_floor', float('nan')):>7.3f} × floor{row.get('scratch_gib', 0):>8.3f} scratch"
        f"{row.get('held_gib', float('nan')):>9.3f} held  {', '.join(met)} {row.get('note', '')}"
    )


if __name__ == "__main__":
    main()
