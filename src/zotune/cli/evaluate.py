"""`zotune eval` and `zotune predict`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zotune.cli.progress import Bars
from zotune.cli.replay import rebuilt
from zotune.config import EvalConfig, PredictConfig
from zotune.errors import InputError
from zotune.folder import write_atomically
from zotune.models.adapters import put_adapter
from zotune.run import encoder_for, load, pad_id
from zotune.tasks import Example, Task
from zotune.tasks.encoding import Encoded
from zotune.tasks.evaluation import Outcome, also, outcome
from zotune.tasks.metrics import figure
from zotune.tasks.own import data_of, encoded
from zotune.tasks.splits import Source, demonstrations, scored_rows


def evaluate(options: EvalConfig) -> None:
    task, source = data_of(options)
    rows, split = scored_rows(source, options.eval_size, seed=options.seed)
    examples = [task.example(row) for row in rows]
    if options.shots:
        shown = demonstrations(task, source, options.shots, options.seed)
        examples = [replace(example, prompt=shown + example.prompt) for example in examples]
    if options.output and not Path(options.output).expanduser().absolute().parent.is_dir():
        raise InputError(f"--output {options.output}: no such folder")
    if split == "validation":
        print("no test split here: these are validation's figures")
    _, rows_encoded, found = _outcome(options, task, source, examples)
    figures: dict[str, Any] = {
        "task": task.name,
        "metric": task.metric,
        "value": found.metric(task.metric, rows_encoded),
        "n": len(rows_encoded),
        "split": split,
    }
    if options.shots:
        figures["shots"] = options.shots
    figures |= {name: found.metric(name, rows_encoded) for name in also(task)}
    cut = sum(bool(row.cut) for row in rows_encoded)
    figures |= {"cut_rows": cut} if cut else {}
    figures |= {"bad_rows": len(source.bad.said)} if source.bad.said else {}
    shown = "  ".join(f"{name} {figure(name, found.metric(name, rows_encoded))}" for name in (task.metric, *also(task)))
    print(f"{task.name}  {shown}  ({len(rows_encoded)} rows of {split}{f', {cut} of them cut' if cut else ''})")
    if source.bad.said:
        print(f"bad rows: {source.bad}")
    if options.output:
        write_atomically(Path(options.output).expanduser(), json.dumps(figures, indent=2) + "\n")


def predict(options: PredictConfig) -> None:
    output = Path(options.output).expanduser()
    if output.exists() and not options.overwrite:
        raise InputError(f"--output {output}: exists; name another file, or pass --overwrite")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: no such folder")
    task, source = data_of(options, labelled=False)
    rows, split = scored_rows(source, options.eval_size, in_order=True)
    examples = [task.example(row, labelled=False) for row in rows]
    examples, _, found = _outcome(options, task, source, examples, replies=True)
    lines = [*_predicted(task, examples, found)]
    if options.skip_bad_rows:  # lines no longer follow the rows one for one
        lines = [{"row": example.where} | line for example, line in zip(examples, lines, strict=True)]
    temporary = output.with_name(f".{output.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    os.replace(temporary, output)
    print(f"{len(lines)} rows of {split} → {output}")
    if source.bad.said:
        print(f"bad rows: {source.bad}")


def _predicted(task: Task, examples: Sequence[Example], found: Outcome) -> Iterator[dict[str, Any]]:
    """What is written of each row: the best label and the scores, the answer, or how well the text is predicted."""
    for loss in found.losses:
        yield {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    for answer in found.answers:
        yield {"answer": answer}
    for example, scores in zip(examples if found.scores else [], found.scores, strict=True):
        best = max(range(len(scores)), key=scores.__getitem__)
        names = task.labels or list(example.names) or [text.strip() for text in example.candidates]
        yield {
            "label": names[best],
            "scores": dict(zip(names, scores, strict=True)),
            "probability": _softmax(scores)[best],
        }


def _outcome(
    options: EvalConfig | PredictConfig,
    task: Task,
    source: Source,
    examples: Sequence[Example],
    replies: bool = False,
) -> tuple[list[Example], list[Encoded], Outcome]:
    """What the model makes of the examples, and those of them that it could be asked."""
    trajectory = getattr(options, "trajectory", None)
    if trajectory:
        model, tokenizer, line = rebuilt(options, trajectory)
        print(line)
    else:
        model, tokenizer = load(options)
    if options.adapter:
        model = put_adapter(model, options.adapter)
    encode = encoder_for(model, tokenizer, options)
    examples, rows = encoded(encode, source, examples)
    with Bars() as bars:
        bars.begin("rows", len(rows))
        found = outcome(
            model,
            tokenizer,
            task,
            rows,
            batch_size=2 * options.batch_size,
            pad_id=pad_id(tokenizer),
            replies=replies,
            advance=lambda n: bars.advance("rows", n),
        )
    return examples, rows, found


def _softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]
