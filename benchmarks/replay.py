"""A replay at work: steps a second by which a trajectory becomes weights, and what 20,000 steps of 1e9 parameters would take.

    python benchmarks/replay.py [--device cuda] [--model opt-1.3b|small] [--seconds 5] [--only gaussian …] [--output replay.json]

Random weights and records: time depends on neither. Before each figure the same code replays a few steps of a small model, which
have to be, bit for bit, what the optimizer's own steps make of it one by one; no speed is reported otherwise. GB/s: what the
steps one by one would read and write of the weights, a pass each, in this time; where steps share a pass, more than a device can.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zotune
from zotune import ZeroOrderOptimizer, replay
from zotune.record.trajectory import Record

BFLOAT16 = torch.bfloat16
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "gaussian": (BFLOAT16, {"engine": "sequential"}),
    "gaussian float32": (torch.float32, {"engine": "sequential"}),
    "rademacher": (BFLOAT16, {"engine": "sequential", "direction": "rademacher"}),
    "4 queries": (BFLOAT16, {"engine": "sequential", "queries": 4}),
    "fold_every 16": (BFLOAT16, {"engine": "sequential", "fold_every": 16}),
    "lowrank": (BFLOAT16, {"engine": "lowrank"}),
    "16 directions": (BFLOAT16, {"engine": "lowrank", "groups": 16}),
    "16 directions float32": (torch.float32, {"engine": "lowrank", "groups": 16}),
    "16 directions, fold_every 8": (BFLOAT16, {"engine": "lowrank", "groups": 16, "fold_every": 8}),
    "weight decay": (BFLOAT16, {"engine": "sequential", "weight_decay": 0.1}),
    "zo-sgd-sign": (BFLOAT16, {"engine": "sequential", "method": "zo-sgd-sign"}),
    "zo-sgd-mmt": (BFLOAT16, {"engine": "sequential", "method": "zo-sgd-mmt"}),
    "zo-adam": (BFLOAT16, {"engine": "sequential", "method": "zo-adam"}),
}
SHAPES = {  # layers, width, inner width, vocabulary
    "opt-1.3b": (24, 2048, 8192, 50272),
    "small": (2, 256, 1024, 4000),
    "tiny": (1, 40, 72, 100),
}


def weights(model: str, device: torch.device, dtype: torch.dtype) -> nn.ParameterDict:
    """The matrices and vectors of a decoder, random."""
    layers, width, inner, vocabulary = SHAPES[model]
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary, width)}
    for i in range(layers):
        shapes |= {f"{i}_{name}": (width, width) for name in "qkvo"} | {f"{i}_{name}_bias": (width,) for name in "qkvo"}
        shapes |= {
            f"{i}_up": (inner, width),
            f"{i}_up_bias": (inner,),
            f"{i}_down": (width, inner),
            f"{i}_norm": (width,),
        }
    made = {name: torch.empty(shape, device=device, dtype=dtype).normal_(0, 0.02) for name, shape in shapes.items()}
    return nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in made.items()})


def optimizer_of(params: nn.ParameterDict, options: dict[str, Any]) -> ZeroOrderOptimizer:
    return ZeroOrderOptimizer(list(params.items()), lr=0.0, seed=1, **options)


def records(optimizer: ZeroOrderOptimizer, first: int, count: int) -> list[Record]:
    """g of each pair, as a run of the optimizer would have recorded them."""
    draw = torch.Generator().manual_seed(first)
    pairs = optimizer.method.estimator.queries * optimizer.pairs
    decay = tuple(float(group["weight_decay"]) for group in optimizer.param_groups)
    g_SP = torch.randn(count, pairs, generator=draw).tolist()
    return [Record(first + s, 1.0, 1.0, tuple(g_P), (1e-5,), decay) for s, g_P in enumerate(g_SP)]


def check(device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> bool:
    """Whether a replay gives the bits of the steps one by one."""
    one = weights("tiny", device, dtype)
    many = copy.deepcopy(one)
    first, second = optimizer_of(one, options), optimizer_of(many, options)
    some = records(first, 0, 48)
    for record in some:
        first.apply_record(record)
    replay.apply(second, some)
    return all(torch.equal(one[name], many[name]) for name in one) and first.steps == second.steps


def measure(
    device: torch.device, params: nn.ParameterDict, options: dict[str, Any], seconds: float
) -> dict[str, float]:
    """Steps are doubled until they take long enough."""
    optimizer, count = optimizer_of(params, options), 16
    replay.apply(optimizer, records(optimizer, 0, 16))  # compiles
    while True:
        some = records(optimizer, optimizer.steps, count)
        _wait(device)
        began = time.perf_counter()
        replay.apply(optimizer, some)
        _wait(device)
        took = time.perf_counter() - began
        if took >= seconds or count >= 20_000:
            break
        count = min(20_000, max(2 * count, int(count * seconds / max(took, 1e-3))) // 16 * 16)
    elements = sum(p.numel() for p in params.values())
    size = sum(p.numel() * p.element_size() for p in params.values())
    return {
        "steps": count,
        "seconds": took,
        "steps_a_second": count / took,
        "equivalent_gb_a_second": 2 * size * count / took / 1e9,
        "minutes_for_20000_steps_of_1e9": 20_000 * took / count * 1e9 / elements / 60,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--only", nargs="*", choices=CASES)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model = args.model or ("opt-1.3b" if device.type == "cuda" else "small")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    about = {"device": name, "torch": torch.__version__, "zotune": zotune.__version__, "model": model}
    print(f"{name}, torch {torch.__version__}, weights of {model}\n")
    print(f"{'':28} {'steps/s':>9} {'GB/s':>8} {'minutes for 20,000 steps of 1e9':>32}")
    done: dict[str, Any] = {}
    for case in args.only or CASES:
        dtype, options = CASES[case]
        if not check(device, dtype, options):
            print(f"{case:28} WRONG: not the bits of the steps one by one")
            done[case] = None
            continue
        params = weights(model, device, dtype)
        done[case] = found = measure(device, params, options, args.seconds)
        del params
        steps, rate, minutes = (
            found[key] for key in ("steps_a_second", "equivalent_gb_a_second", "minutes_for_20000_steps_of_1e9")
        )
        print(f"{case:28} {steps:9.1f} {rate:8.1f} {minutes:32.2f}", flush=True)
    if args.output:
        about["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        args.output.write_text(json.dumps(about | {"cases": done}, indent=2) + "\n")


if __name__ == "__main__":
    main()
