"""Models of real size with random weights, and the kinds of step that are measured on them. Shared by engines.py and memory.py."""

from __future__ import annotations

import datetime
import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from mezo import InPlaceMeZO
from torch import Tensor

from zotune.engines.causal import as_without_capture
from zotune.models.schemes import get_scheme
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.tasks.encoding import Collator, Encoded
from zotune.tasks.scoring import candidate_losses


def opt(hidden: int, layers: int, heads: int, vocabulary: int = 50272) -> tf.PretrainedConfig:
    return tf.OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        word_embed_proj_dim=hidden, vocab_size=vocabulary,
    )  # fmt: skip


def qwen(hidden: int, inner: int, layers: int, heads: int) -> tf.PretrainedConfig:
    return tf.Qwen2Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip


MODELS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "opt-tiny": lambda: opt(64, 2, 4, 512),  # to try a benchmark on a CPU
    "opt-125m": lambda: opt(768, 12, 12),
    "opt-1.3b": lambda: opt(2048, 24, 32),
    "smollm2-135m": lambda: tf.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": lambda: qwen(896, 4864, 24, 14),
    "qwen2.5-1.5b": lambda: qwen(1536, 8960, 28, 12),
    "opt-13b": lambda: opt(5120, 40, 40),
    "llama-7b": lambda: tf.LlamaConfig(),  # LLaMA-2-7B's sizes are the defaults
}

ZERO_ORDER: dict[str, dict[str, Any]] = {
    "sequential rademacher": {"engine": "sequential", "direction": "rademacher"},
    "dual rademacher": {"engine": "dual", "direction": "rademacher"},
    "dual gaussian": {"engine": "dual"},
    "lowrank r 1": {"engine": "lowrank", "rank": 1},
    "lowrank r 4": {"engine": "lowrank", "rank": 4},
    "lowrank r 1, a direction per row": {"engine": "lowrank", "groups": "batch"},
    "lowrank rademacher, per row": {"engine": "lowrank", "groups": "batch", "direction": "rademacher"},
}
FOLDED = {f"{name}, fold every 8": options | {"fold_every": 8} for name, options in ZERO_ORDER.items()}
LORA: dict[str, dict[str, Any]] = {
    "LoRA, dual gaussian": {"engine": "dual"},
    "LoRA, lowrank per row": {"engine": "lowrank", "groups": "batch"},
}
BACK_PROPAGATION = {  # whether through LoRA, whether with gradient checkpointing
    "FO-Adam": (False, False),
    "FO-Adam + checkpointing": (False, True),
    "LoRA, back-propagation": (True, False),
    "LoRA, back-prop. + checkpointing": (True, True),
}
FLOOR, REFERENCE = "floor", "reference (MeZO)"
KINDS = (FLOOR, REFERENCE, *ZERO_ORDER, *FOLDED, *LORA, *BACK_PROPAGATION)


@dataclass
class Step:
    """run: one step. each: how many make a whole of it (a fold). After the last: notes() on how it went, then close()."""

    run: Callable[[], Any]
    each: int = 1
    notes: Callable[[], dict[str, Any]] = dict
    _close: list[Callable[[], Any]] = field(default_factory=list)

    def close(self) -> None:
        self.run = self.notes = dict
        while self._close:
            self._close.pop()()
        gc.collect()


def build(name: str, dtype: str, device: str) -> Any:
    with torch.device(device):
        return tf.AutoModelForCausalLM.from_config(MODELS[name](), dtype=getattr(torch, dtype)).eval()


def batch_of(model: Any, shape: str, device: str) -> dict[str, Tensor]:
    """Random tokens, rows x tokens, with a loss over two label words."""
    rows, tokens = map(int, shape.split("x"))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size - 10, (rows, tokens), generator=draw).tolist()
    encoded = [Encoded(tuple(row), ((11,), (12,)), 0) for row in ids]
    return {k: v.to(device) for k, v in Collator("candidates", 0)(encoded).items()}


def make_step(kind: str, model: Any, batch: dict[str, Tensor]) -> Step:
    """The step of a kind, nothing of it taken. It is the only one at its time that uses the model."""
    forward = partial(candidate_losses, model)
    if kind == FLOOR:
        doubled = {k: torch.cat([v, v]) for k, v in batch.items()}
        run = torch.no_grad()(partial(forward, doubled))
        return Step(captured(run) if doubled["input_ids"].is_cuda else run)
    if kind == REFERENCE:
        return Step(partial(InPlaceMeZO(model, 1e-9, 1e-3).step, torch.no_grad()(partial(forward, batch))))
    if kind in BACK_PROPAGATION:
        return _back_propagation(*BACK_PROPAGATION[kind], model, batch)
    if kind not in LORA:
        return _zero_order(model, batch, (ZERO_ORDER | FOLDED)[kind])
    adapted, restore = _adapted(model)
    step = _zero_order(adapted, batch, LORA[kind])
    step._close.append(restore)
    return step


def _zero_order(model: Any, batch: dict[str, Tensor], options: dict[str, Any]) -> Step:
    optimizer = ZeroOrderOptimizer(model, lr=1e-9, eps=1e-3, **options)

    def notes() -> dict[str, Any]:
        graphs = optimizer.captured.graphs
        found: dict[str, Any] = {}
        if graphs is None or not graphs.usable:
            found["note"] = "not captured"
        if not getattr(optimizer.engine, "usable", True):
            found["note"] = f"separate forwards: {optimizer.engine.why}"
        pools = [optimizer.engine.scratch] + ([graphs._scratch] if graphs else [])
        found["scratch_gib"] = sum(buffer.numel() for pool in pools for buffer in pool._free) / 2**30
        return found

    return Step(partial(optimizer.step, partial(candidate_losses, model), batch=batch), optimizer.fold_every, notes)


def _back_propagation(lora: bool, checkpointing: bool, model: Any, batch: dict[str, Tensor]) -> Step:
    trained, restore = _adapted(model) if lora else (model, lambda: None)
    adam = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-9)
    if checkpointing:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
        trained.train()

    def run() -> None:
        candidate_losses(trained, batch).mean().backward()
        adam.step()
        adam.zero_grad()

    def close() -> None:
        adam.zero_grad()
        if checkpointing:
            trained.gradient_checkpointing_disable()
        trained.eval()

    return Step(run, _close=[restore, close])


def _adapted(model: Any) -> tuple[Any, Callable[[], None]]:
    """The model under LoRA, and what takes it off again."""
    model.requires_grad_(False)
    adapted = get_scheme("lora").prepare(model)

    def restore() -> None:
        adapted.unload()
        model.requires_grad_(True)

    return adapted, restore


def captured(forward: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a CUDA graph, masks as without one."""
    graph = torch.cuda.CUDAGraph()
    with as_without_capture():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            forward()
    return graph.replay


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def report_of(script: str, args: Any) -> dict[str, Any]:
    """What a report begins with: how and where it was made."""
    given = {k: v for k, v in vars(args).items() if v}
    shown = " ".join(
        f"--{k.replace('_', '-')} {' '.join(map(_word, v)) if isinstance(v, list) else _word(v)}"
        for k, v in given.items()
    )
    return {
        "command": f"python benchmarks/{script} {shown}",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": tf.__version__},
        "date": datetime.date.today().isoformat(),
        "rows": [],
    }


def rows_of(script: str, args: Any) -> Callable[[dict[str, Any], Callable[[], dict[str, Any]]], None]:
    """What runs a case and tells its row: printed, and written to `args.output` with those before it. A case that fails is a row
    with `error`, and the rest goes on; so it is with one that would begin behind `args.minutes`."""
    report, began = report_of(script, args), time.monotonic()

    def told(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.output:
            args.output.write_text(json.dumps(report, indent=1))

    def tried(row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() - began > 60 * args.minutes:
            told(row | {"error": "no time left"})
            return
        try:
            told(row | run())
        except Exception as error:
            traceback.print_exc()
            told(row | {"error": f"{type(error).__name__}: {error}"[:500]})
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()

    return tried


def _word(value: Any) -> str:
    text = Path(value).name if isinstance(value, Path) else str(value)
    return f'"{text}"' if " " in text else text
