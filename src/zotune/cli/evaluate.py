"""`zotune eval` and `zotune predict`."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from zotune.cli.progress import Bars
from zotune.cli.replay import rebuilt
from zotune.config import EvalConfig, PredictConfig
from zotune.errors import InputError
from zotune.folder import write_atomically
from zotune.models.adapters import put_adapter
from zotune.models.kinds import kind_of
from zotune.run import check_kind, encoder_for, load, pad_id, task_of
from zotune.tasks import Task
from zotune.tasks.evaluation import Outcome, also, outcome
from zotune.tasks.splits import demonstrations, find_source, scored_rows


def evaluate(options: EvalConfig) -> None:
    task = task_of(options)
    source = find_source(task, options.data, options.data_dir, options.columns)
    rows, split = scored_rows(source, options.eval_size, seed=options.seed)
    examples = [task.example(row) for row in rows]
    if options.shots:
        shown = demonstrations(task, source, options.shots, options.seed)
        examples = [replace(example, prompt=shown + example.prompt) for example in examples]
    if options.output and not Path(options.output).expanduser().absolute().parent.is_dir():
        raise InputError(f"--output {options.output}: no such folder")
    if split == "validation":
        print("no test split here: these are validation's figures")
    encoded, found = _outcome(options, task, examples)
    figures: dict[str, Any] = {
        "task": task.name,
        "metric": task.metric,
        "value": found.metric(task.metric, encoded),
        "n": len(rows),
        "split": split,
    }
    if options.shots:
        figures["shots"] = options.shots
    figures |= {name: found.metric(name, encoded) for name in also(task)}
    more = "".join(f"  {name} {figures[name]:.1f}" for name in also(task))
    print(f"{task.name}  {task.metric} {figures['value']:.1f}{more}  ({len(rows)} rows of {split})")
    if options.output:
        write_atomically(Path(options.output).expanduser(), json.dumps(figures, indent=2) + "\n")


def predict(options: PredictConfig) -> None:
    output = Path(options.output).expanduser()
    if output.exists() and not options.overwrite:
        raise InputError(f"--output {output}: exists; name another file, or pass --overwrite")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: no such folder")
    task = task_of(options)
    rows, split = scored_rows(
        find_source(task, options.data, options.data_dir, options.columns), options.eval_size, in_order=True
    )
    examples = [task.example(row, labelled=False) for row in rows]
    _, found = _outcome(options, task, examples)
    temporary = output.with_name(f".{output.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for answer in found.answers:
            file.write(json.dumps({"answer": answer}, ensure_ascii=False) + "\n")
        for example, row_scores in zip(examples if found.scores else [], found.scores, strict=True):
            best = max(range(len(row_scores)), key=row_scores.__getitem__)
            names = task.labels or list(example.names) or [text.strip() for text in example.candidates]
            shares = _softmax(row_scores)
            line: dict[str, Any] = {
                "label": names[best],
                "scores": dict(zip(names, row_scores, strict=True)),
                "probability": shares[best],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(temporary, output)
    print(f"{len(rows)} rows of {split} → {output}")


def _outcome(options: EvalConfig | PredictConfig, task: Task, examples: list[Any]) -> tuple[list[Any], Outcome]:
    trajectory = getattr(options, "trajectory", None)
    if trajectory:
        model, tokenizer, line = rebuilt(options, trajectory)
        print(line)
        check_kind(kind_of(model), task)
    else:
        model, tokenizer = load(options, task, seed=options.seed)
    if options.adapter:
        model = put_adapter(model, options.adapter)
    encode = encoder_for(model, tokenizer, options)
    encoded = [encode(example) for example in examples]
    with Bars() as bars:
        bars.begin("rows", len(encoded))
        found = outcome(
            model,
            tokenizer,
            task,
            encoded,
            batch_size=2 * options.batch_size,
            pad_id=pad_id(tokenizer),
            advance=lambda n: bars.advance("rows", n),
        )
    return encoded, found


def _softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]
