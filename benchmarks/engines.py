"""A zeroth-order step against its floor, on models of real size with random weights, in one process.

    python benchmarks/engines.py --models opt-1.3b llama-7b opt-13b --shapes 16x32 16x256 --output engines.json

floor: one forward over the doubled batch with logits at one position, as a CUDA graph. reference: the MeZO step, one kernel
at a time. Medians of whole steps; memory is what torch allocated at the peak, from before the first step on. Time and memory do not
depend on the weights' values. LoRA with back-propagation stands beside, with and without gradient checkpointing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from mezo import InPlaceMeZO

from zotune.models.schemes import get_scheme
from zotune.optimizer import ZeroOrderOptimizer
from zotune.tasks.encoding import Collator, Encoded
from zotune.tasks.scoring import candidate_losses


def opt(hidden: int, layers: int, heads: int) -> tf.PretrainedConfig:
    return tf.OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        word_embed_proj_dim=hidden, vocab_size=50272,
    )  # fmt: skip


MODELS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "opt-125m": lambda: opt(768, 12, 12),
    "opt-1.3b": lambda: opt(2048, 24, 32),
    "opt-13b": lambda: opt(5120, 40, 40),
    "llama-7b": lambda: tf.LlamaConfig(),  # LLaMA-2-7B's sizes are the defaults
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["opt-1.3b"], choices=MODELS)
    parser.add_argument("--shapes", nargs="+", default=["16x32", "16x256"], help="rows x tokens")
    parser.add_argument("--only", nargs="+", help="rows whose name holds one of these")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python benchmarks/engines.py " + " ".join(f"--{k} {v}" for k, v in vars(args).items() if v),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": tf.__version__},
        "date": datetime.date.today().isoformat(),
        "rows": [],
    }
    for name in args.models:
        config = MODELS[name]()
        with torch.device(args.device):
            model = tf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
        for shape in args.shapes:
            rows, tokens = map(int, shape.split("x"))
            for row in measure(model, rows, tokens, args):
                row |= {"model": name, "shape": shape}
                report["rows"].append(row)
                print(
                    f"{name:<10}{shape:<8}{row['step']:<34}{row['ms']:>9.2f} ms{row.get('of_floor', 1):>7.2f} × floor"
                    f"{row.get('speedup', 0):>7.2f} × reference{row['peak_gib']:>8.2f} GiB  {row.get('note', '')}",
                    flush=True,
                )
                if args.output:
                    args.output.write_text(json.dumps(report, indent=1))
        del model
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def measure(model: Any, rows: int, tokens: int, args: Any) -> Iterator[dict[str, Any]]:
    cuda = args.device == "cuda"
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size - 10, (rows, tokens), generator=draw).tolist()
    encoded = [Encoded(tuple(row), ((11,), (12,)), 0) for row in ids]
    batch = {k: v.to(args.device) for k, v in Collator("candidates", 0)(encoded).items()}
    doubled = {k: torch.cat([v, v]) for k, v in batch.items()}

    def timed(
        name: str, step: Callable[[], Any], warm: int = 3, rounds: int | None = None, each: int = 1
    ) -> dict[str, Any]:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(warm * each):
            step()
        seconds = []
        for _ in range(rounds or args.rounds):
            sync(cuda)
            began = time.perf_counter()
            for _ in range(each):
                step()
            sync(cuda)
            seconds.append((time.perf_counter() - began) / each)
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        return {"step": name, "ms": 1e3 * statistics.median(seconds), "peak_gib": peak / 2**30}

    forward = torch.no_grad()(partial(candidate_losses, model, doubled))
    floor = timed("floor", captured(forward) if cuda else forward)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    yield floor | {"weights_gib": weights / 2**30}
    reference: dict[str, Any] | None = None

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        row["of_floor"] = row["ms"] / floor["ms"]
        if reference is not None:
            row["speedup"] = reference["ms"] / row["ms"]
        return row

    def wanted(name: str) -> bool:
        return not args.only or any(part in name for part in args.only)

    if wanted("reference"):
        mezo = InPlaceMeZO(model, 1e-9, 1e-3)
        plain = torch.no_grad()(partial(candidate_losses, model, batch))
        reference = timed("reference (MeZO)", partial(mezo.step, plain), warm=1, rounds=3)
        yield finish(reference)
    model.requires_grad_(True)
    loss_of = partial(candidate_losses, model)
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("sequential rademacher", {"engine": "sequential", "direction": "rademacher"}),
        ("dual rademacher", {"engine": "dual", "direction": "rademacher"}),
        ("dual gaussian", {"engine": "dual"}),
        ("lowrank r 1", {"engine": "lowrank", "rank": 1}),
        ("lowrank r 4", {"engine": "lowrank", "rank": 4}),
        ("lowrank r 1, a direction per row", {"engine": "lowrank", "groups": "batch"}),
        ("lowrank rademacher, per row", {"engine": "lowrank", "groups": "batch", "direction": "rademacher"}),
    ]
    kinds += [(f"{name}, fold every 8", options | {"fold_every": 8}) for name, options in kinds]
    for name, options in kinds:
        if wanted(name):
            yield finish(attempt(name, model, loss_of, batch, options, timed))
    model.requires_grad_(False)
    adapted = get_scheme("lora").prepare(model)
    loss_of = partial(candidate_losses, adapted)
    for name, options in [
        ("LoRA, dual gaussian", {"engine": "dual"}),
        ("LoRA, lowrank per row", {"engine": "lowrank", "groups": "batch"}),
    ]:
        if wanted(name):
            yield finish(attempt(name, adapted, loss_of, batch, options, timed))
    for name, checkpointing in (("LoRA, back-propagation", False), ("LoRA, back-prop. + checkpointing", True)):
        if wanted(name):
            yield finish(back_propagation(name, adapted, batch, checkpointing, timed))
    adapted.unload()
    model.requires_grad_(True)


def attempt(
    name: str, model: Any, loss_of: Any, batch: Any, options: dict[str, Any], timed: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    optimizer = ZeroOrderOptimizer(model, lr=1e-9, eps=1e-3, **options)
    try:
        row = timed(name, partial(optimizer.step, loss_of, batch=batch), each=optimizer.fold_every)
    except torch.OutOfMemoryError:
        return {"step": name, "ms": float("nan"), "peak_gib": float("nan"), "note": "does not fit"}
    if optimizer._graphs is None or not optimizer._graphs.usable:
        row["note"] = "not captured"
    if not getattr(optimizer.engine, "usable", True):
        row["note"] = f"separate forwards: {optimizer.engine.why}"
    del optimizer
    gc.collect()
    return row


def back_propagation(
    name: str, model: Any, batch: Any, checkpointing: bool, timed: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    def step() -> None:
        candidate_losses(model, batch).mean().backward()
        adam.step()
        adam.zero_grad()

    try:
        return timed(name, step, warm=2, rounds=3)
    except torch.OutOfMemoryError:
        return {"step": name, "ms": float("nan"), "peak_gib": float("nan"), "note": "does not fit"}
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()


def captured(forward: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return graph.replay


def sync(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
