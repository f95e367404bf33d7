"""The noise at work: bandwidth of θ ← θ + c·z beside a copy and torch's own `normal_`, and a check against the reference first.

    python benchmarks/noise.py [--device cuda] [--elements 268435456] [--output noise.json]

No speed is reported for a backend whose numbers are wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zotune import noise
from zotune.noise import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of the work, warm; on CUDA of 8 in a graph, so that launches by the host are left out."""
    took = []
    for _ in range(3):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(8):
                work()
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            took.append(begin.elapsed_time(end) / 8e3)
        else:
            began = time.perf_counter()
            work()
            took.append(time.perf_counter() - began)
    return statistics.median(took)


def check(device: torch.device, dtype: torch.dtype, direction: str) -> float:
    """The largest |backend − reference| over odd shapes and starts, in units of z: 0 for signs, under 1e-6 for normals."""
    worst = 0.0
    seeds = torch.tensor([123456789012345, -7], device=device)
    for n, start in ((1, 0), (127, 3), (4099, 77), (100_003, 2**33 + 5)):
        w = torch.zeros(n, dtype=dtype, device=device)
        for coefs in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.5, -0.25])):
            ours, theirs = torch.empty_like(w), torch.empty_like(w)
            noise.add_noise(ours, w, seeds, coefs.to(device), 77, direction, start)
            reference.add_noise(theirs, w, seeds, coefs.to(device), 77, direction, start)
            if dtype == torch.float32 or direction == "rademacher":
                worst = max(worst, (ours.double() - theirs.double()).abs().max().item())
            else:  # a last bit may differ where the sum lies on the edge between two 16-bit numbers
                differ = (ours != theirs).double().mean().item()
                worst = max(worst, 0.0 if differ < 2e-3 else differ)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--elements", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    n = args.elements or (1 << 28 if device.type == "cuda" else 1 << 25)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    rows: list[dict[str, Any]] = []
    for dtype_name, dtype in DTYPES.items():
        w = torch.randn(n, device=device, dtype=dtype)
        out = torch.empty_like(w)
        moved = 2 * n * w.element_size()
        copy = seconds(lambda out=out, w=w: out.copy_(w), device)
        normal = seconds(lambda out=out: out.normal_(), device, 5)
        row: dict[str, Any] = {"dtype": dtype_name, "copy GB/s": moved / copy / 1e9, "normal_ × copy": normal / copy}
        for direction in noise.DIRECTIONS:
            error = check(device, dtype, direction)
            row[f"{direction} error"] = error
            if error > (1e-6 if direction == "gaussian" else 0):
                continue
            for pairs in (1, 16):
                seeds = torch.arange(pairs, device=device)
                coefs = torch.full((pairs,), 1e-3, device=device)
                work = partial(noise.add_noise, out, w, seeds, coefs, 5, direction)
                took = seconds(work, device, 20 if pairs == 1 else 3)
                row[f"{direction} × {pairs}: share of copy"] = copy / took
        rows.append(row)
        print(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    if args.output:
        args.output.write_text(
            json.dumps(
                {
                    "device": name,
                    "torch": torch.__version__,
                    "elements": n,
                    "date": datetime.date.today().isoformat(),
                    "rows": rows,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
