"""Tokens a second of members that write, beside the same engine without directions, `generate`, and what the memory allows.

    python benchmarks/decode.py --models smollm2-135m qwen2.5-0.5b qwen2.5-1.5b --slots 64 256 1024 --output decode.json
    python benchmarks/decode.py --path MODEL --device cpu --dtype float32 --prompts 4 --members 8 --slots 32 --prompt-tokens 38 \
        --new-tokens 16 --kinds members plain generate

members: a direction a member, as many answers at once as there are slots. plain: the same loop without directions. dense: members
with dense directions, one after the other. generate, static: transformers', with its growing and its static cache (compiled on
CUDA), as many rows at once. Each kind writes prompts · members answers (of as many prompts as slots, by one member each, where
nothing is said), prefill included, and no answer ends early. Medians of rounds, kinds in turn; seconds by the clock and of the
processor. share: seconds of the processor (of the clock on CUDA) beside as many times `generate` of the prompts alone as there are
members. roofline: weights and half-filled keys and values read once a step, at the bandwidth of a copy. Without --path weights are
random.

On CUDA members and plain have more: step_ms, of a captured step replayed from the prompts' end to the last token; kernels, of one
step; kernels_ms, the time within them; launch_ms, as many that do nothing in a graph, another bound beside roofline_ms.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from steps import MODELS, build, report_of, sync
from transformers import AutoModelForCausalLM, GenerationConfig

from zotune.decode import Member, Request, Settings, decoder_for
from zotune.directions import Directions

KINDS = ("members", "plain", "dense", "generate", "static")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], choices=MODELS)
    parser.add_argument("--path", type=Path, help="a model's folder, in the place of --models")
    parser.add_argument("--slots", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--prompts", type=int, help="[slots]")
    parser.add_argument("--members", type=int, help="that answer each prompt [one; each prompt its own]")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--direction", default="gaussian")
    parser.add_argument("--kinds", nargs="+", default=[k for k in KINDS if k != "dense"], choices=KINDS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--profile", action="store_true", help="print the kernels of a replayed step that take most of it"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report = report_of("decode.py", args)
    for name in [str(args.path)] if args.path else args.models:
        model = load(name, args)
        for slots in args.slots:
            for row in measure(model, slots, args):
                report["rows"].append({"model": Path(name).name, "slots": slots} | row)
                print(json.dumps(report["rows"][-1]), flush=True)
                if args.output:
                    args.output.write_text(json.dumps(report, indent=1))
        del model
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def load(name: str, args: Any) -> Any:
    if not args.path:
        return build(name, args.dtype, args.device)
    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype)).to(args.device).eval()


def measure(model: Any, slots: int, args: Any) -> list[dict[str, Any]]:
    prompts, members = args.prompts or slots, args.members or 1
    draw = torch.Generator().manual_seed(0)
    ids_PT = torch.randint(10, model.config.vocab_size - 10, (prompts, args.prompt_tokens), generator=draw)
    of_each = [Member(1000 + m, 1) for m in range(args.members or prompts)]
    requests = [
        Request(tuple(ids), row, m if args.members else row)
        for m in range(members)
        for row, ids in enumerate(ids_PT.tolist())
    ]
    settings = Settings(args.new_tokens, args.temperature, pad=0)
    directions = Directions([list(model.named_parameters())], args.direction)

    decoders: dict[str, Any] = {}

    def ours(kind: str, rank: int | None, some: list[Request], chosen: list[Member]) -> Callable[[], Any]:
        decoder, _ = decoders[kind], _ = decoder_for(model, directions, 1e-2, rank=rank, slots=slots, name="slots")

        def run() -> None:
            decoder.generate(some, chosen, settings=settings, seed=0, step=0)
            assert decoder.name == "slots"

        return run

    runs = {
        "members": ours("members", args.rank, requests, of_each),
        "plain": ours("plain", args.rank, [Request(r.prompt, r.row) for r in requests], []),
        "dense": ours("dense", None, requests, of_each),
        "generate": partial(theirs, model, ids_PT, args.new_tokens, None),
        "static": partial(theirs, model, ids_PT, args.new_tokens, "static"),
    }
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in args.kinds}
    rows: list[dict[str, Any]] = []
    for turn in range(args.rounds + 1):  # the first warms up
        for kind in [*found]:
            try:
                taken = timed(runs[kind], args.device)
            except Exception as error:  # the others are measured all the same
                rows.append({"kind": kind, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})
                del found[kind]
                continue
            if turn:
                found[kind].append(taken)
    bound = roofline(model, slots, args)
    written = len(requests) * args.new_tokens
    for kind, rounds in found.items():
        seconds, processor, memory = (statistics.median(column) for column in zip(*rounds, strict=True))
        tokens = prompts * args.new_tokens if kind in ("generate", "static") else written
        row = {"kind": kind, "seconds": seconds, "processor_seconds": processor, "tokens_per_second": tokens / seconds}
        if args.device == "cuda":
            row["peak_gib"] = memory
        row |= {"of_roofline": tokens / seconds / bound, "roofline_tokens_per_second": bound}
        if kind in decoders and args.device == "cuda":
            row |= {"roofline_ms": 1000 * slots / bound} | of_a_step(decoders[kind], args)
        rows.append(row)
    plain = next((row for row in rows if row["kind"] == "generate" and "error" not in row), None)
    clock = "seconds" if args.device == "cuda" else "processor_seconds"
    for row in rows:
        if plain is not None and "error" not in row and row["kind"] not in ("generate", "static"):
            row["share"] = row[clock] / (members * plain[clock])
    return rows


@torch.no_grad()
def theirs(model: Any, ids_PT: torch.Tensor, new_tokens: int, cache: str | None) -> None:
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, cache_implementation=cache
    )  # fmt: skip
    own, model.generation_config = model.generation_config, config
    try:
        ids = ids_PT.to(model.device)
        assert model.generate(ids, attention_mask=torch.ones_like(ids)).shape[1] == ids.shape[1] + new_tokens
    finally:
        model.generation_config = own


def timed(run: Callable[[], Any], device: str) -> tuple[float, float, float]:
    """Seconds by the clock and of the processor, and GiB of the card at the peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sync(device)
    clock, processor = time.perf_counter(), time.process_time()
    run()
    sync(device)
    taken = time.perf_counter() - clock, time.process_time() - processor
    return (*taken, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0)


def roofline(model: Any, slots: int, args: Any) -> float:
    """Tokens a second where a step reads the weights and the keys and values so far, and nothing else takes time."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    read = weights + slots * each * (args.prompt_tokens + args.new_tokens / 2)
    return slots * bandwidth(args.device) / read


def of_a_step(decoder: Any, args: Any) -> dict[str, Any]:
    """Milliseconds and kernels of the decoder's captured step of all slots, and of as many kernels that do nothing."""
    captured = [kept for kept in decoder._kept.values() if kept._graph is not None]
    if not captured:
        return {}
    loop = max(captured, key=lambda kept: len(kept.slots))
    board, steps = loop.board, args.new_tokens - 1

    def begin() -> None:
        """Each answer has its first token."""
        board.alive_S.fill_(True)
        board.count_S.fill_(1)
        board.limit_S.fill_(args.new_tokens + 2)  # nobody's ends meanwhile
        board.start_S.fill_(args.prompt_tokens)
        loop.slots.at_S.fill_(args.prompt_tokens)

    def replay(count: int) -> None:
        for _ in range(count):
            loop._graph.replay()

    begin()
    seconds = timed(partial(replay, steps), "cuda")[0] / steps
    begin()
    replay(steps // 2)
    sync("cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay(1)
        sync("cuda")
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if args.profile:
        print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60))
    return {
        "step_ms": 1000 * seconds,
        "kernels": len(kernels),
        "kernels_ms": sum(e.device_time_total for e in kernels) / 1000,
        "launch_ms": 1000 * launch() * len(kernels),
    }


@functools.cache
def launch() -> float:
    """Seconds of a kernel that does next to nothing, in a graph of a thousand of them one after the other."""
    one, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    one.add_(1)
    sync("cuda")
    with torch.cuda.graph(graph):
        for _ in range(1000):
            one.add_(1)
    return min(timed(graph.replay, "cuda")[0] for _ in range(5)) / 1000


def bandwidth(device: str) -> float:
    """Bytes a second, of a copy: what is read and what is written."""
    size = 1 << (32 if device == "cuda" else 28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(timed(partial(target.copy_, source), device)[0] for _ in range(5))
    return 2 * size / best


if __name__ == "__main__":
    main()
