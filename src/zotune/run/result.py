"""What a finished run says of itself: result.json, and the model with its card."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from zotune.models.adapters import save
from zotune.models.quantized import weight_bytes
from zotune.models.schemes import trainable_parameters
from zotune.prepare.prepared import Prepared
from zotune.prepare.ready import Ready
from zotune.run.card import model_card
from zotune.run.state import RunState
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.tasks import ends


def result_of(
    ready: Prepared, state: RunState, reached: Any, optimizer: ZeroOrderOptimizer, chosen: int, test_after: float
) -> dict[str, Any]:
    """What result.json holds. reached: the Trainer's own state at the end."""
    config = ready.config
    cost = ready.adam_cost()
    weights = weight_bytes(ready.model)
    return {
        "task": ready.task.name,
        "metric": ready.task.metric,
        "test_before": state.progress["test_before"],
        "test_after": test_after,
        "test_split": ready.splits.test_split,
        "test_rows": len(ready.test),
        "train_rows": len(ready.train),
        "validation_rows": len(ready.validation),
        "rows_given": dict(ready.splits.given),
        "one_class": ready.one_class(ready.test),
        "validation_before": state.progress.get("validation_before"),  # None of a run that an older version began
        "validation_best": reached.best_metric,
        "steps": reached.global_step,
        "chosen_step": chosen,
        "resumed_at": state.progress["resumed_at"],
        "skipped_steps": optimizer.skipped_steps,
        "cut_rows": ready.cut_rows,
        "bad_rows": len(ready.bad.said),
        "stopped_early": reached.global_step < config.steps,
        "forward_passes": optimizer.forward_passes,
        "trainable_parameters": trainable_parameters(ready.model),
        "wall_seconds": round(state.wall(), 3),
        "peak_memory_bytes": state.peak,
        "evaluation_peak_bytes": state.progress.get("evaluation_peak_bytes"),
        "state_bytes": optimizer.state_bytes,
        "adam_memory_bytes": weights + cost.total,
        "method": config.method,
        "scheme": config.scheme,
        "engine": optimizer.engine.name,
        "lr": config.lr if optimizer.rate is None else optimizer.rate.so_far,
        "eps": config.eps,
        "dtype": config.dtype,
        "device": device_name(ready.device),
        "model": config.model,
        "seed": config.seed,
        "versions": versions(),
    }


def save_weights(ready: Ready, path: Path) -> None:
    """The weights as `from_pretrained` (or PEFT) loads them, with the tokenizer."""
    save(ready.model, ready.tokenizer, path)
    ends.save_beside_adapter(ready.model, path)


def save_model(ready: Prepared, path: Path, result: Mapping[str, Any]) -> None:
    """The chosen weights as `from_pretrained` (or PEFT) loads them, with tokenizer and model card."""
    save_weights(ready, path)
    model_card(ready.config, ready.task, result).save(path / "README.md")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    names = ("zotune", "torch", "transformers", "peft", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
