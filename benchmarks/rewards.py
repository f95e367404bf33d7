"""Rewards against seconds, answers and tokens: how soon `RewardTrainer` learns, and how far the model drifts from what it was.

    python benchmarks/rewards.py --model MODEL --data DATA --cells benchmarks/cells/rewards.json --seeds 0 1 2 --at-once 3 \
        --seconds 300 --output rewards
    python benchmarks/rewards.py --model MODEL --task sums --members 8 --batch-size 4 --steps 3 --device cpu --dtype float32 \
        --seconds 60 --output rewards

A run is a process, --at-once of them at a time on one device. Each writes a line a step and a line a look to OUTPUT/NAME-SEED.jsonl
as it goes, and stops at --steps, or after so many --seconds of its own steps (looks, loading and the first two steps, which
capture, are not counted). Where no --steps are given the first five tell how many the seconds hold, and the schedule is laid for
these. A look asks held-out prompts without perturbation: what is `seen` (see rewarded.py), the reward that is trained for, and the
loss on prose. --cells has a JSON list of cells, options of this script by name; what a cell does not say is the flag's. --summary
reads OUTPUT again. DATA is a folder with squad/{train,validation,test}.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

MANY = 10_000  # steps, until it is known how many there will be


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cells", type=Path)
    parser.add_argument("--only", nargs="+", help="cells by name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--look-every", type=float, default=20.0, help="seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--task", default="sums", help="squad, json or sums")
    parser.add_argument("--method", default="es")
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=0, help="[as many as the seconds hold]")
    parser.add_argument("--sigma", type=float)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: further ones of RewardTrainingArguments")
    parser.add_argument("--summary", action="store_true", help="say what OUTPUT has, and run nothing")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return run(json.loads(args.run), args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.summary:
        everything(args)
    from rewarded import summary  # here, since it loads torch, of which a parent of processes has no need

    print(summary(args.output))


def everything(args: Any) -> None:
    """All cells of all seeds, so many at a time, each a process of its own."""
    of_flags = {
        k: v
        for k, v in vars(args).items()
        if k not in ("output", "cells", "only", "seeds", "at_once", "summary", "run")
    }
    cells = json.loads(args.cells.read_text()) if args.cells else [{}]
    named = {cell.get("name") or cell.get("task") or args.task: of_flags | cell for cell in cells}
    queue = [(f"{name}-{seed}", cell | {"seed": seed}) for seed in args.seeds for name, cell in named.items()]
    queue = [(name, cell) for name, cell in queue if not args.only or name.rpartition("-")[0] in args.only]
    going: dict[str, Any] = {}
    while queue or going:
        while queue and len(going) < args.at_once:
            name, cell = queue.pop(0)
            command = [
                sys.executable,
                __file__,
                "--output",
                str(args.output / f"{name}.jsonl"),
                "--run",
                json.dumps(cell, default=str),
            ]
            with open(args.output / f"{name}.log", "w") as log:
                going[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        time.sleep(0.2)
        for name in [name for name, process in going.items() if process.poll() is not None]:
            code = going.pop(name).returncode
            last = (args.output / f"{name}.log").read_text().splitlines()[-1:]
            print(name, "done" if not code else f"exit {code}: {last}", flush=True)


def run(cell: dict[str, Any], path: Path) -> None:
    """One run, in this process."""
    import torch
    import transformers as tf
    from rewarded import Watch, ends_of_lines, plain_texts, task_of, text_loss

    import zotune

    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    data = Path(cell["data"]) if cell.get("data") else None
    task = task_of(cell["task"], data)
    tokenizer = tf.AutoTokenizer.from_pretrained(cell["model"])
    model: Any = tf.AutoModelForCausalLM.from_pretrained(cell["model"], dtype=getattr(torch, cell["dtype"]))
    model = model.to(cell["device"]).eval()
    prose = plain_texts(data, tokenizer)
    cell["answers"] = cell["members"] * cell["batch_size"]

    def answer() -> list[str]:
        return [one.text for one in trainer.scored(trainer.eval_dataset)[1]]

    watch = Watch(path, cell, task, answer, lambda: text_loss(model, prose))
    given = {"sigma": cell["sigma"], "learning_rate": cell["lr"]}
    with tempfile.TemporaryDirectory() as folder:
        trainer = zotune.RewardTrainer(
            model,
            reward_funcs=[task.reward],
            args=zotune.RewardTrainingArguments(
                output_dir=folder, max_steps=cell["steps"] or MANY, method=cell["method"], members=cell["members"],
                per_device_train_batch_size=cell["batch_size"], temperature=cell["temperature"], slots=cell["slots"],
                max_completion_length=task.tokens, chat=task.chat, seed=cell["seed"], report_to=[], save_strategy="no",
                logging_steps=1, disable_tqdm=True, use_cpu=cell["device"] == "cpu",
                **{k: v for k, v in given.items() if v is not None}, **cell["options"],
            ),
            train_dataset=task.train,
            eval_dataset=task.held,
            processing_class=tokenizer,
            callbacks=[watch],
        )  # fmt: skip
        if task.line:
            ends = tuple(sorted({*trainer.settings.ends, *ends_of_lines(tokenizer)}))
            trainer.settings = replace(trainer.settings, ends=ends)
        decoder = trainer.decoder.name
        if not cell["steps"]:
            watch.plan = lambda steps: plan(trainer, steps)
        watch.begin(sigma=trainer.args.sigma, lr=trainer.args.learning_rate, decoder=decoder)
        trainer.train()


def plan(trainer: Any, steps: int) -> None:
    """The rate is laid out anew, for so many steps; σ follows `state.max_steps` by itself."""
    rate = trainer.zo_optimizer.rate
    if rate is not None:
        rate.plan(steps, lambda step: trainer.args.factor(step, steps))


if __name__ == "__main__":
    main()
