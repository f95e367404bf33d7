"""Seconds a step, side by side in one run: two forwards of the batch, zotune's step, and the MeZO step in place.

    python benchmarks/step_time.py --model MODEL [--tokens 24] [--batch 16] [--dtype float32] [--methods zo-adam …]
        [--only dual auto …] [--output step_time.json]

All take the loss over label words, with logits at the last position alone and no key-value cache, from the same tokens. A round
takes each once, in turn, so that a busy machine slows all alike; the ratios are medians over the rounds. Memory is the process's
resident set on the CPU, what torch allocated on CUDA, at the peak of one step; evaluation is one forward, in the same process.
"dual" leaves its update to the next step's read of the weights, "auto" is what the optimizer takes if nothing is named.
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
import transformers
from mezo import InPlaceMeZO

from zotune.estimates.memory import keep_freed, peak_bytes, reset_peak
from zotune.models.loading import load_model, pick_device
from zotune.models.schemes import get_scheme
from zotune.run.result import device_name
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.tasks.encoding import Collator, Encoded
from zotune.tasks.scoring import candidate_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", nargs="*", default=[], help="a step of these too; their state counts in the peaks")
    parser.add_argument("--only", nargs="*", default=[], help="the steps whose name holds one of these")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    keep_freed()  # as `zotune train` does; all steps here profit
    device = pick_device(args.device)
    model = load_model(args.model, dtype=args.dtype, device=device, gguf_file=args.gguf_file)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens = torch.randint(10, vocabulary - 10, (args.batch, args.tokens), generator=torch.Generator().manual_seed(0))
    rows = [Encoded(tuple(ids), ((11,), (12,)), 0) for ids in tokens.tolist()]
    batch = {k: v.to(device) for k, v in Collator("candidates", 0)(rows).items()}
    forward = torch.no_grad()(partial(candidate_losses, model, batch))

    forward()
    reset_peak(device)
    forward()
    evaluation = peak_bytes(device)
    steps: dict[str, Callable[[], Any]] = {"two forwards": lambda: (forward(), forward())}
    loss_of = partial(candidate_losses, model)
    for direction in ("rademacher", "gaussian"):
        for engine in ("sequential", "dual", "auto"):
            optimizer = ZeroOrderOptimizer(model, lr=1e-9, eps=1e-3, direction=direction, engine=engine)
            steps[f"zotune {engine}, {direction}"] = partial(optimizer.step, loss_of, batch=batch)
    for every in (1, 8):
        optimizer = ZeroOrderOptimizer(model, lr=1e-9, eps=1e-3, engine="lowrank", fold_every=every)
        name = "zotune lowrank" + (f", fold every {every}" if every > 1 else "")
        steps[name] = partial(optimizer.step, loss_of, batch=batch)
    per_row = ZeroOrderOptimizer(model, lr=1e-9, eps=1e-3, groups="batch")
    steps["zotune lowrank, a direction per row"] = partial(per_row.step, loss_of, batch=batch)
    for method in args.methods:
        other = ZeroOrderOptimizer(model, method, lr=1e-9, eps=1e-3)
        steps[f"zotune {method}, gaussian"] = partial(other.step, loss_of, batch=batch)
    steps = chosen(steps, args.only)
    peak = peaks(steps, device)  # before the step in place, which leaves the process larger than it found it
    for direction in ("rademacher", "gaussian"):
        reference = InPlaceMeZO(model, 1e-9, 1e-3, direction=direction)
        steps[f"MeZO in place, {direction}"] = partial(reference.step, forward)
    steps = chosen(steps, args.only)
    peak |= peaks({name: step for name, step in steps.items() if name not in peak}, device)
    took = rounds(steps, device, args.rounds)

    adapted = get_scheme("lora").prepare(model)
    forward_lora = torch.no_grad()(partial(candidate_losses, adapted, batch))
    lora_loss = partial(candidate_losses, adapted)
    lora_steps: dict[str, Callable[[], Any]] = {"two forwards": lambda: (forward_lora(), forward_lora())}
    for engine in ("sequential", "dual", "auto"):
        optimizer = ZeroOrderOptimizer(adapted, lr=1e-9, eps=1e-3, engine=engine)
        lora_steps[f"zotune LoRA, {engine}, gaussian"] = partial(optimizer.step, lora_loss, batch=batch)
    lora_steps = chosen(lora_steps, args.only)
    peak_lora = peaks(lora_steps, device)
    took_lora = rounds(lora_steps, device, args.rounds)

    report: dict[str, Any] = {
        "command": "python benchmarks/step_time.py",
        "arguments": {k: str(v) for k, v in vars(args).items() if v is not None},
        "device": device_name(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.date.today().isoformat(),
        "evaluation_peak_bytes": evaluation,
        "rows": [],
    }
    print(f"{'step':<38}{'seconds':>9}{'× two forwards':>16}{'peak MiB':>10}{'× evaluation':>14}")
    for times, peak_of in ((took, peak), (took_lora, peak_lora)):
        floor = times["two forwards"]
        for name, seconds in times.items():
            ratio = statistics.median(s / f for s, f in zip(seconds, floor, strict=True))
            row = {
                "step": name,
                "seconds": statistics.median(seconds),
                "ratio": ratio,
                "peak_bytes": peak_of[name],
                "of_evaluation": peak_of[name] / evaluation,
            }
            report["rows"].append(row)
            print(
                f"{name:<38}{row['seconds']:>9.4f}{ratio:>16.2f}{peak_of[name] / 2**20:>10.0f}{row['of_evaluation']:>14.2f}"
            )
    if args.output:
        args.output.write_text(json.dumps(report, indent=1))


def chosen(steps: dict[str, Callable[[], Any]], only: list[str]) -> dict[str, Callable[[], Any]]:
    """The floor, and the steps that are asked for."""
    return {k: v for k, v in steps.items() if not only or k == "two forwards" or any(part in k for part in only)}


def peaks(steps: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, int]:
    """The peak of memory of one warm step each, in the order given."""
    peak: dict[str, int] = {}
    for name, step in steps.items():
        step()
        reset_peak(device)
        step()
        peak[name] = peak_bytes(device)
    return peak


def rounds(steps: dict[str, Callable[[], Any]], device: torch.device, count: int) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    took: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            began = now(device)
            step()
            took[name].append(now(device) - began)
    return took


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
