"""`ZOTrainer` under torchrun, where each process has batches of its own, and alone with batches as large as all of theirs."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import steps
import tiny
import torch
from torch import nn

import zotune

KINDS: dict[str, dict[str, Any]] = {
    "row losses": {},
    "rows with directions": {"groups": "batch", "queries": 2},
    "the model's own loss": {"row_loss": False},
    "accumulated": {"gradient_accumulation_steps": 2},
}


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def trained(folder: Path, rows: int, **options: Any) -> dict[str, Any]:
    """rows: of a step, over all processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    row_loss = steps.row_losses if options.pop("row_loss", True) else None
    data = [{"input_ids": steps.batch_of(i, 1)["input_ids"][0]} for i in range(20)]
    args = zotune.ZOTrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=rows // size, learning_rate=1e-2, logging_steps=1,
        save_strategy="steps", save_steps=3, seed=3, use_cpu=True, report_to=[], disable_tqdm=True,
        micro_batch=2 if row_loss is not None else None, **options,
    )  # fmt: skip
    model: nn.Module = tiny.causal_model()
    before = steps.digest(model)
    trainer = zotune.ZOTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data[:6], data_collator=collate, row_loss=row_loss
    )
    trainer.train()
    after = steps.digest(model)
    assert after != before
    return {"weights": after, "evaluated": trainer.evaluate()["eval_loss"], "saved": (folder / "checkpoint-5").is_dir()}


if __name__ == "__main__":
    gc.freeze()  # imports stay: the collector, which each run calls, passes over them
    place = Path(sys.argv[1])
    found = {name: trained(place / name.replace(" ", "-"), 4, **options) for name, options in KINDS.items()}
    (place / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
