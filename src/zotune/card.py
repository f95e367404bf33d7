"""The model card of a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from zotune.config import TrainConfig
from zotune.tasks import Task
from zotune.tasks.metrics import figure


def model_card(config: TrainConfig, task: Task, result: Mapping[str, Any]) -> ModelCard:
    """What was trained, on what, how, with which outcome, and the command that does it again."""
    data = ModelCardData(
        library_name="peft" if config.scheme in ("lora", "prefix", "prompt") else "transformers",
        tags=["zotune", "zeroth-order", config.method],
        base_model=None if Path(config.model).exists() else config.model,
    )
    words = ", ".join(f"{label} → {word}" for label, word in (task.words or {}).items())
    rows, steps = result["test_rows"], f"{result['steps']}, batch {config.batch_size}"
    before, after = (figure(task.metric, result[when]) for when in ("test_before", "test_after"))
    one_class = f"; one class always: {result['one_class']:.1f}" if result["one_class"] else ""
    split = "held-out test" if result["test_split"] == "test" else "validation"
    text = f"""---
{data.to_yaml()}
---

# {Path(config.model).name}, fine-tuned on {task.name} without back-propagation

| | |
|---|---|
| base model | {config.model} |
| task | {task.name}: `{task.prompt}`{f" ({words})" if words else ""} |
| method | {config.method}, {config.direction} directions, scheme {config.scheme}, lr {config.lr}, eps {config.eps} |
| steps | {steps}, {result["forward_passes"]} forward passes; kept: step {result["chosen_step"]} |
| {task.metric}, {split} | {before} before, {after} after ({rows} rows{one_class}) |
| device, dtype | {result["device"]}, {config.dtype}{f", base in {config.quantize}" if config.quantize else ""} |

Made by [zotune](https://pypi.org/project/zotune/) {result["versions"]["zotune"]}:

```
{command(config)}
```
"""
    return ModelCard(text)


def command(config: TrainConfig) -> str:
    """The `zotune train` command that describes the same run."""
    defaults = TrainConfig.model_construct()
    parts = ["zotune train"]
    for key, value in config.model_dump(exclude={"resume", "overwrite", "dry_run"}).items():
        if value is None or value == getattr(defaults, key, None):
            continue
        text = (
            json.dumps(value) if isinstance(value, dict) else ",".join(value) if isinstance(value, list) else str(value)
        )
        parts.append(f"--{key.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(text)}"))
    return " \\\n  ".join(parts)
