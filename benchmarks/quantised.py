"""Steps through an adapter over bases of 16, 8 and 4 bits: seconds and memory of a large shape, and the noise of their losses.

    python benchmarks/quantised.py --shape llama-7b --output steps.json
    python benchmarks/quantised.py --noise MODEL --device cpu --output noise.json

A shape's weights are random and one draw for each shape of matrix, since neither time nor memory depends on their values; they are
quantised as `zotune train --quantize` does while it loads. A row of steps is one base and one kind: step_s the median of --rounds
steps; peak_gib torch's allocator over them and reserved_gib what it holds, in which graphs' own pools are; weights_gib what the
model takes, build_peak_gib the most while it was made.

A row of noise is one base: --noise-rows rows of 64 tokens (prose for a model from a folder, else random), LoRA with B drawn at a
spread of 0.01, 4 directions, d = L(θ + εz) − L(θ − εz) of each row in bfloat16, and the same d of the base's numbers in float32.
`noise` is the root mean square of the difference of the two, `signal` that of the second.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from steps import MODELS, batch_of, rows_of, sync
from streaming import timed
from torch import nn

from zotune.models.loading import load_model
from zotune.models.quantized import quantization, steadied, weight_bytes
from zotune.models.schemes import get_scheme
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.streaming.packed import unpacked
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
    parser.add_argument("--noise", type=Path, help="a model's folder: the noise of its losses, and no steps")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rows", default="16x32", help="rows x tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--noise-rows", type=int, default=32, help="0: no noise of a shape")
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--minutes", type=float, default=25, help="no further case begins after so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tried = rows_of("quantised.py", args)
    for base in args.bases:
        tried({"base": base}, partial(of_model if args.noise else of_shape, base, args, tried))


def of_model(base: str, args: Any, tried: Any) -> dict[str, Any]:
    model = load_model(str(args.noise), dtype="bfloat16", device=args.device, quantize=BASES[base])
    text = (Path(__file__).parent.parent / "docs" / "log.md").read_text(encoding="utf-8")
    ids = torch.tensor(tf.AutoTokenizer.from_pretrained(args.noise)(text)["input_ids"][: args.noise_rows * 64])
    return noise(model, ids.view(args.noise_rows, 64).to(args.device), args.eps)


def of_shape(base: str, args: Any, tried: Any) -> dict[str, Any]:
    """Make the base once, take each kind of step, then measure the noise, after which it is float32; the base's row is returned."""
    began = time.perf_counter()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = build(args.shape, BASES[base], args.device)
    sync(args.device)
    found: dict[str, Any] = {"weights_gib": weight_bytes(model) / GIB, "build_s": time.perf_counter() - began}
    if args.device == "cuda":
        found["allocated_gib"] = torch.cuda.memory_allocated() / GIB  # scales too
        found["build_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    for scheme in dict.fromkeys(KINDS[kind][0] for kind in args.kinds):
        adapted: Any = get_scheme(scheme).prepare(model)
        for kind in (kind for kind in args.kinds if KINDS[kind][0] == scheme):
            tried({"base": base, "kind": kind}, partial(step, adapted, KINDS[kind][1], args))
        model = adapted.unload() if scheme == "lora" else adapted.get_base_model()
    if args.noise_rows:
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(10, model.config.vocab_size - 10, (args.noise_rows, 64), generator=draw)
        tried({"base": base, "noise of": args.shape}, partial(noise, model, ids.to(args.device), args.eps))
    return found


def build(shape: str, quantize: str | None, device: str) -> Any:
    """As a checkpoint of the shape is loaded; its tensors of one shape are one."""
    config = MODELS[shape]()
    with torch.device("meta"):
        hollow = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    state = {}
    torch.manual_seed(0)
    for name, param in hollow.named_parameters():
        if (like := tuple(param.shape)) not in drawn:
            values = torch.randn(like, dtype=torch.bfloat16, device=device) * 0.02 if param.dim() > 1 else None
            drawn[like] = (torch.full(like, float("norm" in name)) if values is None else values).to(
                "cpu", torch.bfloat16
            )
        state[name] = drawn[like]
    more = {} if quantize is None else {"quantization_config": quantization(quantize)}
    model = type(hollow).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.bfloat16, device_map={"": torch.device(device)}, **more
    )
    return steadied(model, own_dtype=quantize is not None).eval()


def step(model: Any, options: dict[str, Any], args: Any) -> dict[str, Any]:
    optimizer = ZeroOrderOptimizer(model, lr=1e-9, eps=1e-3, **options)
    run = partial(optimizer.step, partial(candidate_losses, model), batch=batch_of(model, args.rows, args.device))
    began = time.perf_counter()
    for _ in range(4):
        run()
    optimizer.flush()
    sync(args.device)
    found: dict[str, Any] = {"warm_s": time.perf_counter() - began}
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found["step_s"] = timed(run, args.device, args.rounds)
    if args.device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["reserved_gib"] = torch.cuda.memory_reserved() / GIB
    optimizer.flush()
    graphs = optimizer.captured.graphs
    return found | {"captured": graphs is not None and graphs.usable, "why": getattr(optimizer.engine, "why", "")}


@torch.no_grad()
def noise(model: Any, ids: torch.Tensor, eps: float) -> dict[str, Any]:
    """What 16-bit activations do to differences of two close losses, beside the same base in float32."""
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
        places += [[s.float() + sign * eps * d for s, d in zip(start, z, strict=True)] for sign in (1, -1)]

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
    return {"noise": rms[0], "signal": rms[1], "noise_to_signal": rms[0] / rms[1], "eps": eps}


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
            values = unpacked(weight)
            if values is weight:
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
