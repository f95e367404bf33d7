"""Steps through an adapter over bases of 16, 8 and 4 bits: seconds and memory of a large shape, noise of a real model's losses.

    python benchmarks/quantised.py --shape llama-7b --folder FOLDER --output steps.json
    python benchmarks/quantised.py --noise MODEL --device cpu --output noise.json

FOLDER: where the shape is saved with random weights, unless it is there already, and loaded from as `zotune train --quantize` does.
A row of steps is one base and one kind: step_s the median of --rounds steps, peak_gib torch's allocator over them, weights_gib what
the model takes. A row of noise is one base: 32 rows of 64 tokens of prose, LoRA with B drawn at a spread of 0.01, 4 directions,
d = L(θ + εz) − L(θ − εz) of each row in bfloat16, and the same d of the base's own numbers in float32; `noise` is the root mean
square of the difference of the two, `signal` that of the second.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from steps import MODELS, batch_of, build, report_of, sync
from streaming import timed
from torch import nn

from zotune.models.loading import load_model
from zotune.models.quantized import weight_bytes
from zotune.models.schemes import get_scheme
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.tasks.scoring import candidate_losses

BASES = {"bfloat16": None, "int8": "int8", "nf4": "nf4"}
POPULATION = {"method": "leave-one-out", "groups": "batch", "queries": 4, "forward_tokens": 4096}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA, dual": ("lora", {"engine": "dual"}),
    "LoRA, lowrank": ("lora", {"engine": "lowrank"}),
    "LoRA, leave-one-out": ("lora", POPULATION),
    "prefix, dual": ("prefix", {"engine": "dual"}),
    "prefix, leave-one-out": ("prefix", POPULATION),
}
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-7b", choices=MODELS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--noise", type=Path, help="a model's folder: its losses instead of steps")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rows", default="16x32", help="rows x tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report = report_of("quantised.py", args)

    def told(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.output:
            args.output.write_text(json.dumps(report, indent=1))

    for base in args.bases:
        if args.noise:
            told({"base": base} | noise(base, args))
            continue
        for kind in args.kinds:
            try:
                told({"base": base, "kind": kind} | step(base, kind, args))
            except Exception as error:
                told({"base": base, "kind": kind, "error": f"{type(error).__name__}: {error}"[:300]})
            gc.collect()


def saved(args: Any) -> str:
    """The shape's folder, with random weights in bfloat16."""
    if not (args.folder / "config.json").exists():
        build(args.shape, "bfloat16", args.device).save_pretrained(args.folder)
        gc.collect()
    return str(args.folder)


def step(base: str, kind: str, args: Any) -> dict[str, Any]:
    scheme, options = KINDS[kind]
    began, name = time.perf_counter(), saved(args)
    model: Any = load_model(name, dtype="bfloat16", device=args.device, quantize=BASES[base])
    model = get_scheme(scheme).prepare(model)
    found: dict[str, Any] = {"load_s": time.perf_counter() - began, "weights_gib": weight_bytes(model) / GIB}
    optimizer = ZeroOrderOptimizer(model, lr=1e-9, eps=1e-3, **options)
    run = partial(optimizer.step, partial(candidate_losses, model), batch=batch_of(model, args.rows, args.device))
    for _ in range(4):
        run()
    optimizer.flush()
    sync(args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found["step_s"] = timed(run, args.device, args.rounds)
    if args.device == "cuda":
        # what a captured step holds is in graphs' own pools, so it is in what is reserved for them too
        found |= {
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_gib": torch.cuda.memory_reserved() / GIB,
        }
    graphs = optimizer.captured.graphs
    return found | {"captured": graphs is not None and graphs.usable, "why": getattr(optimizer.engine, "why", "")}


@torch.no_grad()
def noise(base: str, args: Any) -> dict[str, Any]:
    """What 16-bit activations do to differences of two close losses, beside the same base in float32."""
    model: Any = load_model(str(args.noise), dtype="bfloat16", device=args.device, quantize=BASES[base])
    tokenizer = tf.AutoTokenizer.from_pretrained(args.noise)
    text = (Path(__file__).parent.parent / "docs" / "log.md").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"][: 32 * 64], device=args.device).view(32, 64)
    torch.manual_seed(0)
    adapted = get_scheme("lora").prepare(model)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            param.normal_(0, 0.01)
    start = [p.clone() for p in trained]
    places = []
    for _ in range(4):
        z = [torch.randn_like(p, dtype=torch.float32) for p in trained]
        places += [[s.float() + sign * args.eps * d for s, d in zip(start, z, strict=True)] for sign in (1, -1)]

    def differences() -> torch.Tensor:
        losses = []
        for place in places:
            for param, value in zip(trained, place, strict=True):
                param.copy_(value)
            losses.append(row_losses(adapted, ids))
        found = torch.stack(losses).view(4, 2, -1)
        return found[:, 0] - found[:, 1]

    narrow = differences()
    widen(adapted)
    wide = differences()
    rms = [float(x.pow(2).mean().sqrt()) for x in (narrow - wide, wide)]
    return {"noise": rms[0], "signal": rms[1], "noise_to_signal": rms[0] / rms[1], "eps": args.eps}


def row_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def widen(model: nn.Module) -> None:
    """Every linear map by its own numbers in float32, and everything else in float32 too."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            weight = getattr(child, "weight", None)
            if not isinstance(child, nn.Linear) or weight is None or hasattr(child, "base_layer"):
                continue
            if getattr(weight, "quant_state", None) is not None:
                from bitsandbytes.functional import dequantize_4bit

                values = dequantize_4bit(weight.data, weight.quant_state)
            else:
                values = weight.dequantize() if hasattr(weight.data, "__tensor_flatten__") else weight.data
            if values is weight.data:
                continue
            whole = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device=values.device)
            whole.weight = nn.Parameter(values.float(), requires_grad=False)
            if child.bias is not None:
                whole.bias = nn.Parameter(child.bias.float(), requires_grad=False)
            setattr(module, name, whole)
    for param in model.parameters():
        param.data = param.data.float()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


if __name__ == "__main__":
    main()
