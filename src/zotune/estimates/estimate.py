"""Memory and time of a configuration from the model's config alone: what is counted on the meta device, the state of the method,
and on a card cuBLAS's workspaces."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from zotune.engines import ENGINES
from zotune.engines.following import WORTH_ON_CPU, most_tokens_of, rows_together
from zotune.errors import InputError, nearest
from zotune.estimates.counted import Step, counted
from zotune.estimates.meta import model_config
from zotune.estimates.needs import needs_of
from zotune.estimates.rates import Rates, rates_here, step_seconds
from zotune.models.border import reading
from zotune.models.loading import DTYPES
from zotune.models.schemes import SCHEMES
from zotune.updates.rule import TILE

# cuBLAS's workspaces of captured back-propagation: of scoring, and of each thread, the caller's and autograd's, a step's first run
# and its capture.
FIRST_ORDER_SPACES = 5
# The peak of a step whose rows have directions of their own over a plain forward's of as many rows: 1.8 to 2.3 on an H200 at 512
# places (benchmarks/results/h200-2026-12-01/pop.json and pop7b.json).
BY_ROWS = 2.1
STATE_BYTES = {"float32": 4, "bfloat16": 2}  # of an element; "parameter": those of the weight
# On the CPU a run's peak is its process's, libraries included: Python, torch, transformers' Trainer, PEFT, numba on Linux. A
# fork of a process that has imported them, as runs of the benchmark are there, maps only the pages that it touches.
PROCESS_BYTES, FORK_BYTES = 790 << 20, 630 << 20


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds and counts. `activations` is the peak less all that is named: scratch and workspaces of a step included."""

    method: str
    scheme: str
    variant: str
    weights: int
    gradients: int
    state: int
    activations: int
    trainable: int
    flops: float
    calls: int
    forwards: int
    peak: int
    step_seconds: float | None = None
    state_dtype: str = "float32"  # "parameter" where it is that of the weights


def estimate(
    config: Any,
    *,
    method: str = "zo-sgd",
    scheme: str = "full",
    batch_size: int = 16,
    seq_len: int = 256,
    dtype: str | None = None,
    checkpointing: bool = False,
    quantised: bool = False,
    answer_tokens: int = 1,
    queries: int | None = None,
    estimator: str | None = None,
    state_dtype: str | None = None,
    rounding: str = "nearest",
    rates: Rates | None = None,
    masked: bool = False,
    engine: str = "auto",
    tf32: bool = False,
    forward_tokens: int | None = None,
    groups: int | str = 1,
) -> Estimate:
    """Peak bytes and seconds of a training step of zotune.

    config: of transformers, as `model_config` gives it; it is not altered. checkpointing: of activations, first order alone.
    quantised: the base model's linear layers as NF4 (QLoRA). answer_tokens: positions with logits, K.
    state_dtype: as of `zotune train`, float32 by default; "parameter" is what torch's Adam keeps. masked: whether directions
    are sparse. engine: as of `zotune train`; "auto" is dual where that is worth it, on a CPU for small batches. tf32: whether a
    card takes float32 products by TF32. forward_tokens: as of `zotune train`, of one forward over several of a step's places; by
    default what the engines take by themselves. groups: as of `zotune train`; directions of its own for each row, or few, or made
    of its inputs, are counted as a plain forward of as many rows with what was measured over it.
    Time is that of steps which are CUDA graphs, as all are on a card but those with checkpointing. Raises InputError.
    """
    needs = needs_of(method, queries, estimator)
    by_rows = str(groups) != "1" or needs.of_rows
    asked = ((scheme, SCHEMES, "scheme"), (engine, ("auto", *ENGINES), "engine"))
    for value, known, what in asked:
        if value not in known:
            raise InputError(f"--{what} {value}: {nearest(value, known)}")
    kind = DTYPES[dtype] if dtype else (getattr(config, "dtype", None) or torch.float32)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit < seq_len:
        raise InputError(f"--seq-len {seq_len}: the model takes {limit} tokens")
    rates = rates.of_products(kind, tf32) if rates else None
    on_card = rates is not None and rates.node is not None
    # Methods with the same passes differ in their state alone.
    passes: str = needs.kind
    if needs.kind == "zeroth-order":
        worth = on_card or batch_size * seq_len <= WORTH_ON_CPU
        passes = "sequential" if masked or (engine == "auto" and not worth) else "dual" if engine == "auto" else engine
        passes = "lowrank" if needs.low_rank or by_rows else passes
    at_once = 1
    if passes in ("dual", "lowrank"):
        tokens = batch_size * seq_len
        limit = forward_tokens
        if limit is None:
            own = most_tokens_of(rates.memory or 0) if rates is not None and on_card else 2 * WORTH_ON_CPU
            limit = max(own, 2 * tokens)
        at_once = -(-rows_together(batch_size, needs.places, tokens, limit) // batch_size)
    of_step = _counted(
        config, kind, scheme, passes, at_once, on_card, batch_size, seq_len, answer_tokens, checkpointing, quantised
    )
    state_dtype = state_dtype or "float32"
    copies = needs.state_copies
    state = of_step.trained_bytes if state_dtype == "parameter" else STATE_BYTES[state_dtype] * of_step.trainable
    state = copies * state + of_step.trained_bytes * (rounding == "compensated")
    by_gradient, narrow = needs.kind == "first-order", kind != torch.float32
    widened = tiles = 0
    alike = state_dtype == "parameter" or DTYPES[state_dtype] == kind if copies else on_card or not narrow
    descends = by_gradient and on_card and not checkpointing  # as a graph, by a pass that makes no copies
    if descends:
        pass
    elif by_gradient and rounding == "nearest" and (alike or (copies and state_dtype == "float32")):
        widened = 0 if alike else 2  # weights and gradient, for torch's own kernel
    elif needs.by_tiles:  # what the rule's arithmetic on a tile takes
        kept = copies * (state_dtype == "bfloat16" or (state_dtype == "parameter" and narrow))
        tiles = 3 + narrow + (narrow or not by_gradient) + kept
    tiles = 4 * min(TILE, of_step.largest) * (tiles + widened)
    gradients = of_step.trained_bytes if by_gradient else 0
    spaces = FIRST_ORDER_SPACES if descends else 2
    peak = round(BY_ROWS * of_step.peak) if by_rows else of_step.peak
    step = max(peak, gradients + tiles) + (spaces * rates.workspace if rates is not None and on_card else 0)
    made = Estimate(
        method, scheme, " ".join(["NF4"] * quantised + ["checkpointing"] * checkpointing), of_step.weights, gradients, state,
        step - gradients, of_step.trainable, of_step.flops, of_step.calls + 2 * of_step.tensors,
        needs.forwards, of_step.weights + state + step,
        state_dtype="parameter" if STATE_BYTES.get(state_dtype) == kind.itemsize else state_dtype,
    )  # fmt: skip
    if not rates:
        return made
    how: dict[str, Any] = {"widened": widened > 0, "checkpointing": checkpointing, "masked": masked, "by_rows": by_rows}
    return replace(made, step_seconds=step_seconds(made, of_step, needs, rates, places=at_once, **how))


def _counted(config: Any, kind: torch.dtype, scheme: str, *of: Any) -> Step:
    name = getattr(config, "model_type", type(config).__name__)
    with reading(
        f"{name}, scheme {scheme}: a step cannot be counted without weights"
    ):  # by a stranger's modelling code
        return counted(config, kind, scheme, *of)


def compare(
    config: Any, chosen: Mapping[str, Any], *, left_out: list[str] | None = None, **common: Any
) -> list[Estimate]:
    """What was asked for, then plain ZO, LoRA, LoRA with checkpointing, QLoRA and full Adam beside it.

    First order beside it is at its cheapest: Adam's moments in the weights' dtype, as torch's are. left_out: gets a line for each
    row beside the first that cannot be reckoned.
    """
    adam = {"method": "fo-adam", "state_dtype": "parameter"}
    others: list[dict[str, Any]] = [
        {"method": "zo-sgd", "scheme": "full"},
        {"method": "zo-adam", "scheme": "full"},
        adam | {"scheme": "lora"},
        adam | {"scheme": "lora", "checkpointing": True},
        adam | {"scheme": "lora", "checkpointing": True, "quantised": True},
        adam | {"scheme": "full"},
        adam | {"scheme": "full", "checkpointing": True},
    ]
    made = [estimate(config, **(common | dict(chosen)))]
    for other in others:
        try:
            made.append(estimate(config, **(common | other)))
        except InputError as error:
            if left_out is None:
                raise
            left_out.append(f"{other['method']} {other['scheme']}: {error}")
    return [row for i, row in enumerate(made) if row not in made[:i]]


# Options of a run that `estimate_for` reads.
READ = (
    "method", "scheme", "batch_size", "tokens", "answer_tokens", "dtype", "checkpointing", "queries", "estimator",
    "state_dtype", "rounding", "sparsity", "mask", "engine", "tf32", "device", "blocks", "hybrid", "quantize", "groups",
    "accumulate", "forward_tokens",
)  # fmt: skip


def estimate_for(source: str | Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Peak bytes and seconds a step of one run of a suite, on this machine; rows of 64 tokens where their length is not known.

    Nothing for what `estimate` does not count (`uncounted` says why). Raises InputError.
    """
    options = {name: options[name] for name in READ if options.get(name) is not None}
    if uncounted(options):
        return {}
    config = model_config(source)
    limit = getattr(config, "max_position_embeddings", None) or 64
    on_gpu = torch.cuda.is_available() and options.get("device") != "cpu"
    made = estimate(
        config,
        method=options["method"],
        scheme=options.get("scheme", "full"),
        batch_size=int(options.get("batch_size") or 16),
        seq_len=int(options.get("tokens") or min(64, limit)),
        dtype=options.get("dtype"),
        checkpointing=bool(options.get("checkpointing")),
        queries=int(options["queries"]) if options.get("queries") else None,
        estimator=options.get("estimator"),
        state_dtype=options.get("state_dtype"),
        rounding=options.get("rounding") or "nearest",
        answer_tokens=int(options.get("answer_tokens") or 1),
        rates=rates_here(options.get("device", "auto")),
        masked=bool(options.get("sparsity")),
        tf32=bool(options.get("tf32")),
        forward_tokens=int(options["forward_tokens"]) if options.get("forward_tokens") else None,
        groups=options.get("groups") or 1,
        # a probe on a CPU steps without a batch, which one forward would need
        engine="sequential" if not on_gpu and "tokens" in options else options.get("engine") or "auto",
    )
    process = FORK_BYTES if sys.platform == "linux" else PROCESS_BYTES
    process = 0 if on_gpu or "tokens" in options else process
    seconds = (made.step_seconds or 0.0) * int(options.get("accumulate") or 1)
    return {"peak_bytes": made.peak + process, "step_seconds": seconds}


def uncounted(options: Mapping[str, Any]) -> str:
    """Why `estimate` does not know a step of these options; "" where it does.

    >>> uncounted({"blocks": "linear", "groups": "batch"}), uncounted({"mask": "random"})
    ('no estimate of --blocks linear', '')
    """
    others = {name: options.get(name) for name in ("blocks", "hybrid", "quantize")}
    others["mask"] = options.get("mask") if options.get("mask") in ("magnitude", "wanda") else None
    given = ", ".join(f"--{name} {value}" for name, value in others.items() if value)
    return f"no estimate of {given}" if given else ""
