"""Rows scored and answered by a model: what `zotune eval` and `zotune predict` do, without their printing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zotune.errors import InputError
from zotune.models.adapters import put_adapter, refuse_other_tokens, unproven
from zotune.models.ids import pad_id
from zotune.models.partial import refuse_untrained
from zotune.options import EvalConfig, PredictConfig
from zotune.prepare.listener import Listener
from zotune.prepare.model import encoder_for, load
from zotune.run.folder import write_atomically
from zotune.tasks import Example, Task, ends
from zotune.tasks.encoding import Encoded
from zotune.tasks.evaluation import Outcome, also, outcome
from zotune.tasks.intervals import confusion, interval
from zotune.tasks.own import data_of, encoded
from zotune.tasks.splits import (
    BETWEEN_SHOTS,
    Source,
    after_shots,
    demonstrations,
    given_rows,
    scored_rows,
    some_of,
)
from zotune.tasks.told import right_of, row_scores, told

TABLES = {".csv": ",", ".tsv": "\t"}  # files of predictions that are tables, and what parts their cells

Loader = Callable[[EvalConfig | PredictConfig, Task], tuple[Any, Any]]


def evaluation(options: EvalConfig, listener: Listener, loader: Loader | None = None) -> dict[str, Any]:
    """The figures of the rows that a run of these options scores as test. loader: gives model and tokenizer."""
    task, source = data_of(options)
    rows, split = scored_rows(source, options.eval_size, seed=options.seed)
    examples = [task.example(row) for row in rows]
    shots = demonstrations(task, source, options.shots, options.seed, rows) if options.shots else []
    if split == "validation":
        listener.say("no test split here: these are validation's figures")
    examples, scored, found = _outcome(options, task, source, examples, listener, loader, shots=shots)
    details = _details(task, examples, scored, found) if options.details else {}
    given = given_rows(source, split)
    cut = sum(bool(row.cut) for row in scored)
    return {
        "task": task.name,
        "metric": task.metric,
        "value": found.metric(task.metric, scored),
        "n": len(scored),
        "split": split,
        **({"shots": options.shots} if options.shots else {}),
        **{name: found.metric(name, scored) for name in also(task)},
        **details,
        **({"rows_given": given} if given != len(scored) else {}),
        **({"cut_rows": cut} if cut else {}),
        **({"unended_answers": found.unended} if found.unended else {}),
        **({"bad_rows": len(source.bad.said)} if source.bad.said else {}),
    }


def _details(task: Task, examples: Sequence[Example], rows: Sequence[Encoded], found: Outcome) -> dict[str, Any]:
    """`interval`: 95 %, in percent, where the metric is a mean over rows. `labels` and `confusion`, rows by the right label, where
    all rows have the same labels."""
    details: dict[str, Any] = {}
    scores = row_scores(task.metric, found, rows)
    if scores and all(0 <= score <= 1 for score in scores) and ":" not in task.metric:
        details["interval"] = [100 * end for end in interval(scores)]
    if task.labels and found.scores:
        given = [line["label"] for line in told(task, examples, found)]
        right = [str(right_of(task, example)) for example in examples]
        details["labels"] = task.labels
        details["confusion"] = confusion(zip(right, given, strict=True), task.labels)
    return details


def output_file(name: str, overwrite: bool = True) -> Path:
    """Where figures or predictions will go. Raises InputError before anything is computed."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"--output {name}: is a folder; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"--output {name}: exists; name another file, or pass --overwrite")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output {name}: no such folder")
    return path


def write_figures(figures: Mapping[str, Any], path: Path) -> None:
    """As one JSON object. Raises InputError for a number that JSON has none of."""
    write_atomically(path, _json(figures, path, indent=2) + "\n")


def write_lines(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A JSON object a line; as a table where the file is named .csv or .tsv, a score a column, what is no text or number as JSON.

    Raises InputError for a number that JSON has none of.
    """
    written = [_json(line, path, ensure_ascii=False) for line in lines]
    if path.suffix.lower() not in TABLES:
        write_atomically(path, "".join(line + "\n" for line in written))
        return
    flat = [_flat(line) for line in lines]
    text = io.StringIO()
    table = csv.DictWriter(
        text,
        dict.fromkeys(key for line in flat for key in line),
        delimiter=TABLES[path.suffix.lower()],
        lineterminator="\n",
    )
    table.writeheader()
    table.writerows(flat)
    write_atomically(path, text.getvalue())


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    plain = lambda value: value is None or isinstance(value, (str, int, float))  # noqa: E731
    cells = {
        key: value if plain(value) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        for key, value in line.items()
        if key != "scores"
    }
    scores = {f"score {name}": score for name, score in line.get("scores", {}).items()}
    return cells | scores


def _json(value: Mapping[str, Any], path: Path, **how: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        raise InputError(
            f"{path}: not written, for a figure is not a finite number, which JSON has none of: {value!r:.200}; try --dtype float32"
        ) from None


def predictions(
    options: PredictConfig, listener: Listener, loader: Loader | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Each row's fields and what is told of it, in the order of the rows, and the split that they are of.

    A field that is named as what is told (`label`, `answer`) is kept as `given_label`.
    Rows that are skipped as bad ones have no place in it; with --skip-bad-rows each says which `row` it is of.
    """
    task, source = data_of(options, labelled=False)
    rows, split = scored_rows(source, options.eval_size, in_order=True)
    examples = [task.example(row, labelled=False) for row in rows]
    if len(rows) < (given := given_rows(source, split)):
        listener.say(f"rows: {some_of(len(rows), given)} of {split} (--eval-size {options.eval_size})")
    examples, asked, found = _outcome(options, task, source, examples, listener, loader, replies=True)
    if cut := sum(bool(row.cut) for row in asked):
        listener.say(f"{cut} of {len(asked)} rows are cut to {options.max_length} tokens (--max-length)")
    fields = {row.where: row.fields for row in rows}
    lines = []
    for example, line in zip(examples, told(task, examples, found), strict=True):
        place = {"row": example.where} if options.skip_bad_rows else {}
        lines.append(_beside(fields[example.where], place | line))
    return lines, split


def _beside(fields: Mapping[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    """A row's own fields with what is told of it; a field of the same name is kept as given_NAME."""
    return {f"given_{name}" if name in line else name: value for name, value in fields.items()} | line


def _outcome(
    options: EvalConfig | PredictConfig,
    task: Task,
    source: Source,
    examples: Sequence[Example],
    listener: Listener,
    loader: Loader | None,
    replies: bool = False,
    shots: Sequence[Example] = (),
) -> tuple[list[Example], list[Encoded], Outcome]:
    """What the model makes of the examples, and those of them that it could be asked. shots: shown before each."""
    model, tokenizer = loader(options, task) if loader is not None else load(options, task, seed=options.seed)
    if options.adapter:
        model = put_adapter(model, options.adapter, options.allow_pickle)
        refuse_other_tokens(options.adapter, tokenizer)
        ends.take_from_adapter(model, options.adapter)
        if said := unproven(options.adapter, options.model):
            listener.say(said)
    if not getattr(options, "trajectory", None):  # whose steps have trained what its run drew
        refuse_untrained(model, f"--model {options.model}")
    if shots:
        examples = after_shots(examples, shots, tokenizer.mask_token)
        if task.generates:  # an answer ends as those that are shown do
            task = replace(task, end=task.end or BETWEEN_SHOTS)
    examples, rows = encoded(encoder_for(model, tokenizer, options, task), source, examples)
    if source.unread:
        listener.say(source.unread)
    if source.bad.said:
        listener.say(f"bad rows: {source.bad}")
    listener.begin("rows", len(rows))
    found = outcome(
        model,
        tokenizer,
        task,
        rows,
        batch_size=2 * options.batch_size,
        pad_id=pad_id(tokenizer, model),
        replies=replies,
        advance=lambda n: listener.advance("rows", n),
    )
    listener.end("rows")
    if found.unended:
        listener.say(
            f"{found.unended} of {len(rows)} answers do not end within the tokens that they may have, and are cut there "
            "(--max-new-tokens)"
        )
    return examples, rows, found
