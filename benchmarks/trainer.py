"""What the Trainer adds to a step: data loading, collation, schedule, callbacks and logging, on a model of real size.

    python benchmarks/trainer.py --model opt-1.3b --shape 16x32 --engine lowrank --groups batch --output trainer.json

Random weights, rows of random tokens. Both ways take the same steps in one process: `optimizer.step` on one batch that is on the
device, and `ZOTrainer.train` on a data set of rows, with a line of logs every ten steps. Milliseconds a step are those of the
second half of the steps, between two synchronisations.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from steps import MODELS

from zotune import ZeroOrderOptimizer, ZOTrainer, ZOTrainingArguments
from zotune.tasks.encoding import Collator, Encoded
from zotune.tasks.scoring import candidate_losses


class Timed(ZOTrainer):
    """Milliseconds a step between two of its steps. No callback: with one of one's own, each step settles the weights."""

    first: int
    last: int

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == self.first:
            sync()
            self.began = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == self.last - 1:
            sync()
            self.ms = 1e3 * (time.perf_counter() - self.began) / (self.last - self.first)
        return loss


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-1.3b", choices=MODELS)
    parser.add_argument("--shape", default="16x32", help="rows x tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--groups", default="1")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3, help="each way in turn, so often")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows, tokens = map(int, args.shape.split("x"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = tf.AutoModelForCausalLM.from_config(MODELS[args.model](), dtype=getattr(torch, args.dtype)).eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size - 10, (64 * rows, tokens), generator=draw).tolist()
    data = [Encoded(tuple(row), ((11,), (12,)), 0) for row in ids]
    collate = Collator("candidates", 0)
    chosen = {"engine": args.engine, "groups": args.groups if args.groups == "batch" else int(args.groups)}
    found: dict[str, list[float]] = {"bare": [], "trainer": []}
    for _ in range(args.rounds):
        found["bare"].append(bare(model, collate(data[:rows]), device, args.steps, chosen))
        found["trainer"].append(trained(model, data, collate, rows, args.steps, chosen))
    best = {name: min(times) for name, times in found.items()}
    report = {
        "command": "python benchmarks/trainer.py " + " ".join(f"--{k} {v}" for k, v in vars(args).items() if v),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": tf.__version__},
        "date": datetime.date.today().isoformat(),
        "ms": found,
        "trainer / bare": best["trainer"] / best["bare"],
    }
    print(json.dumps(report, indent=1))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1))


def bare(model: Any, batch: Any, device: str, steps: int, chosen: dict[str, Any]) -> float:
    optimizer = ZeroOrderOptimizer(model, lr=1e-9, eps=1e-3, **chosen)
    loss_of = partial(candidate_losses, model)
    batch = {k: v.to(device) for k, v in batch.items()}
    for step in range(steps):
        if step == steps // 2:
            sync()
            began = time.perf_counter()
        optimizer.step(loss_of, batch=batch)
    sync()
    return 1e3 * (time.perf_counter() - began) / (steps - steps // 2)


def trained(model: Any, data: Any, collate: Any, rows: int, steps: int, chosen: dict[str, Any]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        args = ZOTrainingArguments(
            output_dir=folder, method="zo-sgd", eps=1e-3, learning_rate=1e-9, max_steps=steps, logging_steps=10,
            per_device_train_batch_size=rows, save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(), **chosen,
        )  # fmt: skip
        trainer = Timed(model, args, train_dataset=data, data_collator=collate, row_loss=candidate_losses)
        trainer.first, trainer.last = steps // 2, steps
        trainer.remove_callback(tf.PrinterCallback)
        trainer.train()
    return trainer.ms


if __name__ == "__main__":
    main()
