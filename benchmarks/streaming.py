"""Steps of models larger than a budget of the card: their layers stream from page-locked host memory.

    python benchmarks/streaming.py --models opt-30b opt-13b --output streaming.json

A row is one kind of step on one model. floor_s = max(bus_s, arithmetic_s). bus_s: what a step moves over the bandwidth that copies
of a block alone have here, both ways at once where it moves both. arithmetic_s: the same step with nothing copied, each block on
what its slot holds, timed on this card. of_floor = floor_s / step_s. peak_gib: torch's allocator, all of the step, weights
included. held_gib: of that what stays and the slots. Weights are random: each shape of matrix is drawn once, since time does not
depend on their values. A case that fails is a row with `error`, and the rest goes on.
--nf4: the layers' maps are of 4 bits, and only kinds through LoRA run. --files FOLDER: the model is saved there first, unless it
is, and loaded from there; layers beyond --host-memory stay in the files (kinds through LoRA); read_gb_s: of reading them alone.
With --unstreamed the same step is timed with all weights on the card, where they fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from steps import MODELS, batch_of, opt, rows_of, sync
from torch import nn

from zotune.engines.streamed import plan_of
from zotune.models.schemes import get_scheme
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.streaming import StreamedWeights, stream
from zotune.tasks.scoring import candidate_losses

SHAPES = MODELS | {
    "opt-30b": lambda: opt(7168, 48, 56),
    "llama-70b": lambda: tf.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
    "opt-wide": lambda: opt(256, 6, 4, 512),  # for a CPU
}
BUDGETS = {"opt-30b": 8.0, "opt-13b": 4.0, "llama-70b": 8.0}  # GiB
GIB = 1 << 30

# options of the optimizer, and whether through LoRA
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "leave-one-out": ({"method": "leave-one-out", "groups": "batch"}, False),
    "leave-one-out, fold every 8": ({"method": "leave-one-out", "groups": "batch", "fold_every": 8}, False),
    "two-sided": ({"groups": "batch", "estimator": "two-sided"}, False),
    "lowrank": ({"engine": "lowrank"}, False),
    "dual": ({"engine": "dual"}, False),
    "dual rademacher": ({"engine": "dual", "direction": "rademacher"}, False),
    "LoRA, dual": ({"engine": "dual"}, True),
    "LoRA, leave-one-out": ({"method": "leave-one-out", "groups": "batch"}, True),
}
MANY = ("leave-one-out", "leave-one-out, fold every 8", "two-sided", "LoRA, leave-one-out")  # that take --queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["opt-30b", "opt-13b"], choices=SHAPES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--shapes", nargs="+", default=["16x32"], help="rows x tokens")
    parser.add_argument("--queries", nargs="+", type=int, default=[4, 16], help="directions a row, of populations")
    parser.add_argument("--budget", type=float, help="GiB of the card [8 for opt-30b, 4 for opt-13b, else no bound]")
    parser.add_argument("--slots", type=int, help="blocks on the card [by the budget, 3 at most]")
    parser.add_argument("--forward-tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=25, help="no further case begins after so many")
    parser.add_argument("--unstreamed", action="store_true")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--files", type=Path)
    parser.add_argument("--host-memory", type=float, help="GiB, with --files [8]", default=8.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tried = rows_of("streaming.py", args)
    for name in args.models:
        tried({"model": name}, partial(of_model, name, args, tried))


def of_model(name: str, args: Any, tried: Any) -> dict[str, Any]:
    """Build, stream, measure the bus, and then each kind of step; the row of the model itself is returned."""
    began = time.perf_counter()
    if args.files:
        model = from_files(name, args)
    else:
        model = hollow(name, args.dtype, args.nf4)
        draw(model, args.device)
    plan = plan_of(model)
    budget = args.budget or BUDGETS.get(name)
    slots = args.slots or (3 if budget is None else plan.slots(int(budget * GIB), GIB // 4))
    weights = stream(model, plan, args.device, slots, None, int(args.host_memory * GIB) if args.files else None)
    sync(args.device)
    found = {
        "weights_gib": plan.all / GIB, "stays_gib": plan.stays / GIB, "block_gib": plan.room / GIB, "slots": slots,
        "budget_gib": budget, "build_s": time.perf_counter() - began,
    }  # fmt: skip
    if args.files:
        found |= {
            "in_files_gib": sum(block.bytes for block in weights.in_files) / GIB,
            "read_gb_s": reading(weights) / 1e9,
        }
    bus = bandwidth(weights)
    print(json.dumps({"model": name} | found | bus), flush=True)
    full = [kind for kind in args.kinds if not KINDS[kind][1] and not args.nf4 and not args.files]
    for row in cases(name, full, args):
        tried(row, partial(measure, model, weights, row, bus, args))
    adapted: Any = None
    if lora := [kind for kind in args.kinds if KINDS[kind][1]]:
        model.requires_grad_(False)
        adapted = get_scheme("lora").prepare(model)
        weights.adopt(adapted)
        for row in cases(name, lora, args):
            tried(row, partial(measure, adapted, weights, row, bus, args))
        adapted.unload()
        for param in model.parameters():
            param.requires_grad_(param.is_floating_point())
    weights.end()
    if args.unstreamed:
        model.to(args.device)
        for row in cases(name, full, args):
            tried(row | {"unstreamed": True}, partial(unstreamed, model, row, args))
    return found | {f"{way}_gb_s": value / 1e9 for way, value in bus.items()}


def cases(name: str, kinds: list[str], args: Any) -> list[dict[str, Any]]:
    return [
        {"model": name, "kind": kind, "shape": shape, "queries": queries}
        for shape in args.shapes
        for kind in kinds
        for queries in (args.queries if kind in MANY else [None])
    ]


def hollow(name: str, dtype: str, nf4: bool = False) -> Any:
    """The model with memory that nobody has written yet, on the host."""
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(SHAPES[name](), dtype=getattr(torch, dtype)).eval()
    if nf4:
        for module in [m for block in model.modules() if isinstance(block, nn.ModuleList) for m in block.modules()]:
            for child_name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, child_name, packed(child, getattr(torch, dtype)))
        model.is_loaded_in_4bit = model.is_quantized = True
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for child_name, tensor in own.items():
                if tensor is not None and tensor.is_meta:
                    empty = torch.empty_like(tensor, device="cpu")
                    own[child_name] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    rotary(model)
    model.tie_weights()
    return model


def packed(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """A map of 4 bits of the same shape, without values yet."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, get_4bit_type

    four = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        quant_type="nf4",
        compute_dtype=dtype,
        device="meta",
    )
    size = linear.weight.numel()
    state = QuantState(
        absmax=torch.empty(size // 64), shape=linear.weight.shape, code=get_4bit_type("nf4", device="cpu"), blocksize=64,
        quant_type="nf4", dtype=dtype,
    )  # fmt: skip
    data = torch.empty(size // 2, 1, dtype=torch.uint8)
    four.weight = bnb.nn.Params4bit(
        data, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=four
    )
    four.quant_state = state
    return four


def rotary(model: nn.Module) -> None:
    """Rotary embeddings anew: their frequencies are no weights, and no checkpoint has them."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(module, name, type(child)(config=model.config))


def from_files(name: str, args: Any) -> Any:
    if not (args.files / "config.json").exists():
        model = hollow(name, args.dtype)
        draw(model, args.device)
        model.save_pretrained(args.files)
        del model
        gc.collect()
    return tf.AutoModelForCausalLM.from_pretrained(args.files, dtype=getattr(torch, args.dtype)).eval()


def reading(weights: StreamedWeights) -> float:
    """Bytes a second of what is in files, brought to the device with nothing else to do; from the page cache where it fits."""
    began = time.perf_counter()
    for block in weights.in_files:
        block.arrive()
    weights.settle()
    sync(weights.device.type)
    return sum(block.bytes for block in weights.in_files) / (time.perf_counter() - began)


@torch.no_grad()
def draw(model: Any, device: str) -> None:
    """Values for every parameter: matrices of noise, drawn once a shape (on the device), vectors of ones and zeros."""
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    for name, param in model.named_parameters():
        if param.dim() < 2:
            param.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        shape = tuple(param.shape)
        if shape not in drawn:
            drawn[shape] = (
                (torch.randn(shape, dtype=param.dtype, device=device) * 0.02).cpu()
                if param.is_floating_point()
                else torch.randint(0, 256, shape, dtype=param.dtype, device=device).cpu()
            )
        param.data.copy_(drawn[shape])
        if (state := getattr(param, "quant_state", None)) is not None:
            state.absmax.fill_(0.05)


def bandwidth(weights: StreamedWeights, rounds: int = 6) -> dict[str, float]:
    """Bytes a second of copies of blocks alone, by what is moved: in, out, and both (each way, both at once)."""
    blocks = [block for block in weights.blocks if block.places is None][: max(2, rounds)]
    if weights.device.type != "cuda" or len(blocks) < 2:
        return dict.fromkeys(("in", "out", "both"), 55e9)  # a CPU has no bus: a number, so that the rest can be tried
    first, last = weights.slots[0], weights.slots[-1]
    for block in weights.blocks:  # nobody is on the device
        if block.slot is not None:
            block.slot.block = block.slot = None
    one, other = torch.cuda.Stream(), torch.cuda.Stream()

    def timed(ways: str) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for i, block in enumerate(blocks):
            if "i" in ways:
                with torch.cuda.stream(one):
                    for view, host in zip(first.views(block), block.host, strict=True):
                        view.copy_(host, non_blocking=True)
            if "o" in ways:
                back = blocks[(i + 1) % len(blocks)]
                with torch.cuda.stream(other):
                    for view, host in zip(last.views(back), back.host, strict=True):
                        host.copy_(view, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    # what is copied out has to be the blocks' own values: the last slot is given them first
    for view, host in zip(last.views(blocks[0]), blocks[0].host, strict=True):
        view.copy_(host)
    size = sum(block.bytes for block in blocks)
    return {way: size / min(timed(ways) for _ in range(2)) for way, ways in (("in", "i"), ("out", "o"), ("both", "io"))}


def made(model: Any, row: dict[str, Any], args: Any) -> tuple[ZeroOrderOptimizer, Callable[[], Any]]:
    options = dict(KINDS[row["kind"]][0])
    if row["queries"] is not None:
        options["queries"] = row["queries"]
    optimizer = ZeroOrderOptimizer(model, lr=1e-9, eps=1e-3, forward_tokens=args.forward_tokens, **options)
    batch = batch_of(model, row["shape"], args.device)
    return optimizer, partial(optimizer.step, partial(candidate_losses, model), batch=batch)


def timed(step: Callable[[], Any], device: str, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        sync(device)
        began = time.perf_counter()
        step()
        sync(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(
    model: nn.Module, weights: StreamedWeights, row: dict[str, Any], bus: dict[str, float], args: Any
) -> dict[str, Any]:
    optimizer, step = made(model, row, args)
    each = optimizer.fold_every
    began = time.perf_counter()
    # what is looked at on a first batch alone is left out: the forward that all directions share is what is measured
    optimizer.engine.trust = True
    # a fold's tables know where its weights are, and a block comes to each slot within so many steps
    for _ in range(1 + len(weights.slots)):
        step()
    sync(args.device)
    found: dict[str, Any] = {"warm_s": time.perf_counter() - began}
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    came, went, taken = weights.moved_in, weights.moved_out, 0

    def run() -> None:
        nonlocal taken
        for _ in range(each):
            step()
        taken += each

    # steady: the updates of a step are written when its blocks next come, in the step that follows
    found["step_s"] = timed(run, args.device, args.rounds if each == 1 else 1) / each
    found["in_gib"] = (weights.moved_in - came) / taken / GIB
    found["out_gib"] = (weights.moved_out - went) / taken / GIB
    if args.device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    found["held_gib"] = (weights.slot_bytes + sum(_held(p) for p in model.parameters())) / GIB
    with weights.standing():
        step()
        found["arithmetic_s"] = timed(run, args.device, 2 if each == 1 else 1) / each
        optimizer.pending.clear()
        optimizer.engine.writer.drop()
    both = min(found["in_gib"], found["out_gib"])
    one_way = max(found["in_gib"], found["out_gib"]) - both
    found["bus_s"] = (both / bus["both"] + one_way / bus["in"]) * GIB
    found["floor_s"] = max(found["bus_s"], found["arithmetic_s"])
    found["of_floor"] = found["floor_s"] / found["step_s"]
    found["usable"], found["why"] = getattr(optimizer.engine, "usable", True), getattr(optimizer.engine, "why", "")
    return found


def _held(param: nn.Parameter) -> int:
    return 0 if hasattr(param, "streamed") else param.numel() * param.element_size()


def unstreamed(model: nn.Module, row: dict[str, Any], args: Any) -> dict[str, Any]:
    optimizer, step = made(model, row, args)
    optimizer.engine.trust = True
    for _ in range(3):
        step()
    optimizer.flush()
    return {"step_s": timed(step, args.device, args.rounds)}


if __name__ == "__main__":
    main()
