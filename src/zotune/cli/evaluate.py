"""`zotune eval` and `zotune predict`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from zotune.cli.progress import Bars
from zotune.cli.replay import rebuilt
from zotune.config import EvalConfig, PredictConfig
from zotune.errors import InputError
from zotune.folder import write_atomically
from zotune.models.adapters import put_adapter
from zotune.run import encoder_for, load, pad_id, task_of
from zotune.tasks.scoring import accuracy, score_rows
from zotune.tasks.splits import find_source, scored_rows


def evaluate(options: EvalConfig) -> None:
    task = task_of(options)
    source = find_source(task, options.data, options.data_dir)
    rows, split = scored_rows(source, options.eval_size, seed=options.seed)
    examples = [task.example(row) for row in rows]
    if options.output and not Path(options.output).expanduser().absolute().parent.is_dir():
        raise InputError(f"--output {options.output}: no such folder")
    if split == "validation":
        print("no test split here: these are validation's figures")
    encoded, scores = _scores(options, examples)
    figures = {
        "task": task.name,
        "metric": task.metric,
        "value": accuracy(scores, encoded),
        "n": len(rows),
        "split": split,
    }
    print(f"{task.name}  {task.metric} {figures['value']:.1f}  ({len(rows)} rows of {split})")
    if options.output:
        write_atomically(Path(options.output).expanduser(), json.dumps(figures, indent=2) + "\n")


def predict(options: PredictConfig) -> None:
    output = Path(options.output).expanduser()
    if output.exists() and not options.overwrite:
        raise InputError(f"--output {output}: exists; name another file, or pass --overwrite")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: no such folder")
    task = task_of(options)
    rows, split = scored_rows(find_source(task, options.data, options.data_dir), options.eval_size, in_order=True)
    examples = [task.example(row, labelled=False) for row in rows]
    _, scores = _scores(options, examples)
    temporary = output.with_name(f".{output.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for example, row_scores in zip(examples, scores, strict=True):
            best = max(range(len(row_scores)), key=row_scores.__getitem__)
            names = task.labels or [text.strip() for text in example.candidates]
            shares = _softmax(row_scores)
            line: dict[str, Any] = {
                "label": names[best],
                "scores": dict(zip(names, row_scores, strict=True)),
                "probability": shares[best],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(temporary, output)
    print(f"{len(rows)} rows of {split} → {output}")


def _scores(options: EvalConfig | PredictConfig, examples: list[Any]) -> tuple[list[Any], list[list[float]]]:
    trajectory = getattr(options, "trajectory", None)
    if trajectory:
        model, tokenizer, line = rebuilt(options, trajectory)
        print(line)
    else:
        model, tokenizer = load(options)
    if options.adapter:
        model = put_adapter(model, options.adapter)
    encode = encoder_for(model, tokenizer, options)
    encoded = [encode(example) for example in examples]
    with Bars() as bars:
        bars.begin("rows", len(encoded))
        scores = score_rows(
            model,
            encoded,
            batch_size=2 * options.batch_size,
            pad_id=pad_id(tokenizer),
            advance=lambda n: bars.advance("rows", n),
        )
    return encoded, scores


def _softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]
