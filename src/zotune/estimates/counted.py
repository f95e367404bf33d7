"""A step counted on the meta device: the real step (a probe, or forward and backward), while every storage that would have been
allocated is counted until it is freed.

What the meta device cannot show is added: the scratch that the engine keeps, and 4-bit weights.
"""

# B rows, T tokens, K answer positions.

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from zotune.directions import Displacement
from zotune.engines.dual import is_small, plan
from zotune.engines.forward_mode import ForwardModeEngine
from zotune.engines.sequential import SequentialEngine
from zotune.estimates.meta import build, with_scheme
from zotune.estimates.tally import Allocations, CountedScratch, Still, forward_cost, fused_attention
from zotune.tasks.scoring import ROW_LOSSES

NF4_BYTES = (4 + 8 / 64 + 32 / 64 / 256) / 8  # 4 bits, a quantised scale for each block of 64, a scale of 256 scales


@dataclass(frozen=True)
class Step:
    """What was counted.

    weights, trained_bytes: bytes; trainable, largest: elements of all that trains, of the largest tensor of it; tensors: how
    many. flops, calls: of a plain forward. peak: bytes of a step beside the weights. written: bytes that it writes in all.
    """

    weights: int
    trainable: int
    trained_bytes: int
    tensors: int
    largest: int
    flops: float
    calls: int
    peak: int
    written: int


_steps: dict[tuple[Any, ...], Step] = {}
_costs: dict[tuple[Any, ...], tuple[float, int]] = {}  # FLOP and calls of a forward, whatever the step


def counted(config: Any, *of: Any) -> Step:
    """The step, counted once: config and the arguments of `_count`. The config is not altered."""
    key = (config.to_json_string(), *of)
    if key not in _steps:
        _steps[key] = _count(copy.deepcopy(config), *of)
    return _steps[key]


def _count(
    config: Any,
    kind: torch.dtype,
    scheme: str,
    passes: str,
    places: int,
    on_card: bool,
    batch_size: int,
    seq_len: int,
    answer_tokens: int,
    checkpointing: bool,
    quantised: bool,
) -> Step:
    """passes: "first-order", "forward-mode", or by an engine "sequential", "dual", "lowrank"; of the last two one forward
    evaluates so many places.
    """
    model, extra = with_scheme(build(config, kind), scheme, tangents=passes == "forward-mode")
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    batch = _batch(batch_size, seq_len + extra, answer_tokens)
    loss = lambda: ROW_LOSSES["answer"](model, batch).mean()  # noqa: E731
    held = 0
    shape = (config.to_json_string(), kind, scheme, passes == "forward-mode", batch_size, seq_len, answer_tokens)
    if shape not in _costs:
        _costs[shape] = forward_cost(model, loss)
    flops, calls = _costs[shape]
    # forward mode has a derivative of the plain formula alone
    attention = nullcontext() if passes == "forward-mode" else fused_attention()
    with attention, Allocations(model) as live:
        if passes == "first-order":
            with set_checkpoint_early_stop(False):  # the exception that stops would keep alive what was recomputed
                kept = _forward(model, loss, checkpointing)
            kept.backward()
        elif passes == "forward-mode":
            engine = ForwardModeEngine(Still([_trainable(model)]))
            engine.derivative(loss, Displacement((0,), ((1.0,),)))
        elif passes in ("dual", "lowrank"):
            tokens = batch_size * (seq_len + extra)
            small, tile = _copy_bytes(model, tokens, batch_size * answer_tokens, on_card)
            held = places * small + min(places, 2) * tile * (passes == "dual")
            batch = _batch(places * batch_size, seq_len + extra, answer_tokens)
            with torch.no_grad():
                loss()
        else:
            held = _probe(model, loss, live)
    step = live.peak + held
    if quantised:
        saved, scratch = _quantised(model)
        weights -= saved
        step += scratch
    sizes = [p.numel() for p in trained]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    return Step(weights, sum(sizes), trained_bytes, len(sizes), max(sizes), flops, calls, step, live.written)


def _probe(model: nn.Module, loss: Callable[[], Tensor], live: Allocations) -> int:
    """One probe by the sequential engine; the bytes of scratch that it keeps."""
    engine = SequentialEngine(Still([_trainable(model)]))
    engine.unread = []
    engine.scratch = scratch = CountedScratch(live)
    engine.loss(loss, Displacement((0,), ((1.0,),)))
    return scratch.most


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _copy_bytes(model: nn.Module, tokens: int, answers: int, on_card: bool) -> tuple[int, int]:
    """A place's copies of all small parameters, and a copy of the largest tile of a product with so many tokens.

    answers: positions that the output head sees.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    small, largest = sum(p.numel() * p.element_size() for p in trained if is_small(p)), 0
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter):  # of a table rows alone are read
            continue
        if weight.requires_grad and weight.dim() == 2 and not is_small(weight):
            has_bias = getattr(module, "bias", None) is not None
            rows, _ = plan(weight, answers if module is head else tokens, has_bias, on_card)
            largest = max(largest, rows * weight.shape[1] * weight.element_size())
    return small, largest


def _forward(model: nn.Module, loss: Callable[[], Tensor], checkpointing: bool) -> Tensor:
    """The loss, with what autograd keeps for its gradients."""
    inner: Any = model
    if checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()
    return loss()


def _batch(rows: int, tokens: int, answer_tokens: int) -> dict[str, Tensor]:
    """What `Collator("answer", …)` makes, without values."""
    shape = (rows, answer_tokens)
    return {
        "input_ids": torch.zeros((rows, tokens), dtype=torch.long, device="meta"),
        "positions": torch.zeros(shape, dtype=torch.long, device="meta"),
        "targets": torch.zeros(shape, dtype=torch.long, device="meta"),
        "target_mask": torch.zeros(shape, device="meta"),
    }


def _quantised(model: nn.Module) -> tuple[int, int]:
    """Bytes that NF4 saves on the linear layers (not the head, not an adapter), and of the largest of them, dequantised."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    weights = [
        m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad and "lora_" not in name
    ]
    sizes = [w.numel() * w.element_size() for w in weights]
    kept = sum(int(w.numel() * NF4_BYTES) for w in weights)
    return sum(sizes) - kept, max(sizes, default=0)
