"""A step of N directions for each row against its floor: a plain forward of as many rows, as a CUDA graph.

    python benchmarks/populations.py --models smollm2-135m opt-1.3b llama-7b --queries 4 16 64 --output populations.json

The floor evaluates as many rows as the step's places have, 2·N·B for two-sided estimates, in as many forwards as the step takes,
with the loss over two label words and the model's plain weights. Medians of whole steps and of floors, taken in turn. floor_gib,
step_gib: memory that each takes beside the weights. Weights are random; time does not depend on their values.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from steps import MODELS, batch_of, build, captured, report_of, sync

from zotune.engines.following import most_tokens
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.tasks.scoring import candidate_losses

SHAPES = {"smollm2-135m": "16x24"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], choices=MODELS)
    parser.add_argument("--shape", help="rows x tokens [16x24 for SmolLM2, else 16x32]")
    parser.add_argument("--queries", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--estimator", default="two-sided")
    parser.add_argument("--forward-tokens", nargs="+", type=int, help="budgets of one forward [by memory]")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.dtype == "float32":
        torch.backends.cuda.matmul.allow_tf32 = True
    report = report_of("populations.py", args)
    for name in args.models:
        model = build(name, args.dtype, args.device)
        for queries in args.queries:
            for tokens in args.forward_tokens or [None]:
                row = {"model": name, "queries": queries, "forward_tokens": tokens} | measure(
                    model, name, queries, tokens, args
                )
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                if args.output:
                    args.output.write_text(json.dumps(report, indent=1))
        del model
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def measure(model: Any, name: str, queries: int, tokens: int | None, args: Any) -> dict[str, Any]:
    shape = args.shape or SHAPES.get(name, "16x32")
    batch = batch_of(model, shape, args.device)
    rows, length = batch["input_ids"].shape
    copies = {"two-sided": 2 * queries, "one-sided": queries + 1, "leave-one-out": queries}[args.estimator]
    limit = tokens or most_tokens(batch["input_ids"].device)
    forwards = -(-copies * rows // max(1, limit // length))
    some = {k: v.repeat(-(-copies // forwards), *[1] * (v.dim() - 1)) for k, v in batch.items()}

    @torch.no_grad()
    def plain() -> None:
        for _ in range(forwards):
            candidate_losses(model, some)

    on_card = args.device == "cuda"
    floor, floor_bytes = peak(lambda: captured(plain) if on_card else plain, on_card)
    optimizer = ZeroOrderOptimizer(
        model, lr=1e-9, eps=1e-3, groups="batch", queries=queries, estimator=args.estimator, forward_tokens=tokens
    )
    step = partial(optimizer.step, partial(candidate_losses, model), batch=batch)

    def warm() -> Any:
        for _ in range(3):
            step()
        return step

    _, step_bytes = peak(warm, on_card)
    found: dict[str, list[float]] = {"floor": [], "step": []}
    for _ in range(args.rounds):
        for kind, run in (("floor", floor), ("step", step)):
            sync(args.device)
            began = time.perf_counter()
            for _ in range(3):
                run()
            sync(args.device)
            found[kind].append((time.perf_counter() - began) / 3)
    ms = {kind: 1e3 * statistics.median(seconds) for kind, seconds in found.items()}
    graphs = optimizer.captured.graphs
    notes = "" if not on_card or (graphs is not None and graphs.usable) else "not captured"
    return {
        "shape": shape, "places": copies * rows, "forwards": forwards, "floor_ms": ms["floor"], "step_ms": ms["step"],
        "of_floor": ms["step"] / ms["floor"], "floor_gib": floor_bytes / 2**30, "step_gib": step_bytes / 2**30,
        "usable": optimizer.engine.usable, "why": optimizer.engine.why, "note": notes,
    }  # fmt: skip


def peak(make: Any, on_card: bool) -> tuple[Any, int]:
    """What a function makes, and the most memory that was taken beside what was there."""
    gc.collect()
    if not on_card:
        return make(), 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = make()
    torch.cuda.synchronize()
    return made, torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
