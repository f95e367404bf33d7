"""A few steps on random weights, measured: peak memory of a step, and its time without the first."""

from __future__ import annotations

import contextlib
import gc
import getpass
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from zotune.bench.suite import probe_config
from zotune.estimates.memory import M_MMAP_THRESHOLD, peak_bytes, reset_peak, set_malloc
from zotune.estimates.meta import model_config, without_dropout
from zotune.models.loading import DTYPES, pick_device
from zotune.models.schemes import get_scheme
from zotune.tasks.scoring import ROW_LOSSES

# Large enough for all threads to have work: each then takes buffers of its own, once.
WARM_UP = {"random": {"model_type": "llama", "vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512,
                      "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}}  # fmt: skip


def measure(options: Mapping[str, Any]) -> dict[str, Any]:
    """peak_bytes, step_seconds, trainable_parameters, forward_passes of `steps` steps, the first of which warms up.

    options: model (a name, or {random: config}), tokens, answer_tokens, checkpointing, and of `zotune train` those that
    `PROBE_OPTIONS` names: all that changes a step. Each method is zotune's own, fo-adam too.
    On the CPU the peak is the process's, less what it held before there was a model.
    """
    for name in (
        "transformers.initialization",
        "peft",
        "zotune.step.optimizer",
    ):  # not while others wait for the device
        import_module(name)
    with _alone():
        return _measure(options)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One probe of this user at a time on a GPU: of two that are started at once, one imports while the other measures."""
    which = re.sub(r"\W", "_", os.environ.get("CUDA_VISIBLE_DEVICES") or "all")
    with FileLock(Path(tempfile.gettempdir()) / f"zotune-probe-{getpass.getuser()}-{which}.lock"):
        if torch.cuda.is_available():
            _until_free()
        yield
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def _until_free(seconds: float = 10.0) -> None:
    """The driver takes a moment to hand back what a process that has ended held; until then not even a context may fit."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(RuntimeError):  # CUDA error: out of memory
            free, total = torch.cuda.mem_get_info()
            if free > 0.95 * total:
                return
        time.sleep(0.1)


def _measure(options: Mapping[str, Any]) -> dict[str, Any]:
    device = pick_device(options.get("device", "auto"))
    base = 0
    if device.type == "cpu":
        _exact_frees()
        small = {**options, "model": WARM_UP, "tokens": 64, "batch_size": 8, "answer_tokens": 1}
        _steps(small, device, 2)
        gc.collect()
        reset_peak(device)
        base = peak_bytes(device)
    measured = _steps(options, device, max(2, int(options.get("steps") or 3)))
    return measured | {
        "peak_bytes": measured["peak_bytes"] - base,
        "method": options.get("method", "zo-sgd"),
        "scheme": options.get("scheme", "full"),
        "device": _name(device),
    }


def _steps(options: Mapping[str, Any], device: torch.device, steps: int) -> dict[str, Any]:
    import transformers
    from transformers.initialization import no_init_weights

    config = model_config(options["model"])
    without_dropout(config)
    dtype = DTYPES[options["dtype"]] if options.get("dtype") else (getattr(config, "dtype", None) or torch.float32)
    torch.manual_seed(int(options.get("seed") or 0))
    with device, no_init_weights():
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.tie_weights()  # which is a part of the start that was left out
    _fill(model)
    model = get_scheme(str(options.get("scheme", "full"))).prepare(model)
    rows, tokens = int(options.get("batch_size") or 16), int(options.get("tokens") or 64)
    answer = int(options.get("answer_tokens") or 1)
    batch = {
        "input_ids": torch.randint(2, config.vocab_size, (rows, tokens), device=device),
        "positions": torch.arange(tokens - answer - 1, tokens - 1, device=device).repeat(rows, 1),
        "targets": torch.randint(2, config.vocab_size, (rows, answer), device=device),
        "target_mask": torch.ones((rows, answer), device=device),
    }
    step, count = _stepper(model, batch, options)
    # What a graph holds is allocated when it is captured, in the first step, and never again.
    counts_first = device.type == "cuda"
    if counts_first:
        reset_peak(device)
    step()
    _wait(device)
    gc.collect()
    if not counts_first:
        reset_peak(device)
    took = []
    for _ in range(steps - 1):
        began = time.perf_counter()
        step()
        _wait(device)
        took.append(time.perf_counter() - began)
    return {
        "peak_bytes": peak_bytes(device),
        "step_seconds": statistics.median(took),
        "steps": steps,
        "forward_passes": count(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random matrices, in one pass over the weights: transformers' own start takes minutes for billions of them."""
    for name, param in model.named_parameters():
        if param.dim() > 1:
            param.normal_(0, 0.02)
        else:
            param.fill_(0.0 if name.endswith("bias") else 1.0)


def _stepper(
    model: nn.Module, batch: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> tuple[Callable[[], Any], Callable[[], int]]:
    from zotune.step.optimizer import ZeroOrderOptimizer

    config = probe_config(options)
    if options.get("checkpointing"):
        inner: Any = model
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inner.enable_input_require_grads()
        model.train()
    optimizer = ZeroOrderOptimizer(
        model, config.method, lr=1e-9, seed=config.seed, **{"eps": 1e-3} | config.optimizer_options
    )
    loss = ROW_LOSSES["answer"]
    of_batch = lambda given: loss(model, given)  # noqa: E731  # one object: a graph is captured for each
    several = config.groups != 1 or batch["input_ids"].is_cuda
    step = (
        (lambda: optimizer.step(of_batch, batch=batch))
        if several
        else (lambda: optimizer.step(lambda: of_batch(batch)))
    )
    return step, lambda: optimizer.forward_passes


def _exact_frees() -> None:
    """glibc hands back what is freed at once, so that the resident set is what is in use."""
    set_malloc(M_MMAP_THRESHOLD, 1 << 16)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
