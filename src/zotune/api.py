"""`zotune.train`, `reward`, `compare`, `evaluate` and `predict`: the commands as functions, on files or on rows in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any, TypeVar

from zotune.errors import InputError
from zotune.options import CompareConfig, EvalConfig, PredictConfig, RewardConfig, RowOptions, TrainConfig, resolve
from zotune.prepare.listener import Listener
from zotune.tasks.splits import SPLITS

T = TypeVar("T", bound=RowOptions)


def train(*, listener: Listener | None = None, **options: Any) -> dict[str, Any]:
    """Fine-tune a model as `zotune train` does, into the folder `output`. Returns what result.json holds.

    options: those of the command with underscores, `zotune.train(model=…, data=…, output=…, lr=1e-5)`. Beside what the command
    takes, `data` may be a list of dicts, a `datasets.Dataset`, or a mapping (a `DatasetDict`) of train, validation and test to
    these; `task` may be a `zotune.tasks.Task` or its keys and values. listener: told of progress.
    With dry_run=True it prints what `--dry-run` prints, and returns {}. Raises InputError for what the command refuses.
    """
    from zotune.run.train import train

    config = _resolved(TrainConfig, options)
    if config.dry_run:
        from zotune.cli.train import dry_run

        dry_run(config)
        return {}
    return train(config, listener)


def compare(**options: Any) -> dict[str, Any]:
    """What `zotune compare` says: its `rows`, a way to train each, and the `verdict`, a sentence. options: as of `train`, with
    those of the command; `data` in memory is written into the folder `output`, since the runs are processes of their own.
    """
    from zotune.cli.compare import compare

    data = options.get("data")
    if data is not None and not isinstance(data, (str, Path)):
        folder = Path(options["output"]).expanduser() / "made" / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in _tables(data).items():
            lines = "".join(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
            (folder / f"{split or 'train'}.jsonl").write_text(lines, encoding="utf-8")
        options = options | {"data": folder}
    return compare(_resolved(CompareConfig, options))


def reward(*, listener: Listener | None = None, **options: Any) -> dict[str, Any]:
    """Raise a reward on what a model writes as `zotune reward` does, into the folder `output`. Returns what result.json holds.

    options: those of the command with underscores. Beside what the command takes, `data` may be rows in memory as of `train`, and
    `reward` a function by TRL's signature, or a list of functions and names. Raises InputError for what the command refuses, and
    `zotune.rewards.RewardError` where a function fails.
    """
    from zotune.run.reward import reward

    given = options.get("reward")
    functions = given if isinstance(given, (list, tuple)) else [given] if given is not None else []
    if odd := next((one for one in functions if not (isinstance(one, str) or callable(one))), None):
        raise InputError(f"reward: a {type(odd).__name__} is no function")
    config = _resolved(RewardConfig, options | ({"reward": [_name_of(one) for one in functions]} if functions else {}))
    config.set_functions(list(functions))
    if config.dry_run:
        from zotune.cli.reward import dry_run

        dry_run(config)
        return {}
    return reward(config, listener)


def _name_of(function: Any) -> str:
    """How a run's record calls a function."""
    if isinstance(function, str):
        return function
    kind = type(function)
    module, name = (getattr(function, k, getattr(kind, k)) for k in ("__module__", "__qualname__"))
    return f"{module}:{name}"


def evaluate(*, listener: Listener | None = None, **options: Any) -> dict[str, Any]:
    """The figures of `zotune eval`: task, metric, value, n and split. options: as of `train`; a list is scored whole.

    output: a JSON file that they are written to as well.
    """
    from zotune.inference import evaluation, output_file, write_figures

    config = _resolved(EvalConfig, options)
    path = output_file(config.output) if config.output else None
    figures = evaluation(config, listener or Listener())
    if path is not None:
        write_figures(figures, path)
    return figures


def predict(*, listener: Listener | None = None, **options: Any) -> list[dict[str, Any]]:
    """What `zotune predict` writes of each row, as a list. options: as of `train`; no label or answer is needed.

    output: a .jsonl file that it is written to as well.
    """
    from zotune.inference import output_file, predictions, write_lines

    path = output_file(options["output"], bool(options.get("overwrite"))) if options.get("output") else None
    told = predictions(_resolved(PredictConfig, {"output": "-"} | options), listener or Listener())[0]
    if path is not None:
        write_lines(told, path)
    return told


def _resolved(kind: type[T], given: dict[str, Any]) -> T:
    data, tables = given.get("data"), None
    if data is not None and not isinstance(data, (str, Path)):
        tables = _tables(data)
        try:
            written = json.dumps(tables, default=str, sort_keys=True, allow_nan=True)  # for a digest alone
        except TypeError:
            raise InputError("data: names of fields are texts; a row has one that is not: rename it") from None
        digest = hashlib.sha256(written.encode()).hexdigest()
        given = given | {"data": f"rows-{digest[:12]}"}  # names them in the run's record: others do not resume it
    options = resolve(kind, {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}, None)
    options.set_tables(tables)
    return options


def _tables(data: Any) -> dict[str, list[Any]]:
    """Rows by split; "" for rows that were given without one."""
    if isinstance(data, Mapping):
        if not data or not set(data) <= set(SPLITS):
            raise InputError(f"data: splits {', '.join(map(repr, data)) or 'none'}; name them {', '.join(SPLITS)}")
        return {str(split): _rows(rows, str(split)) for split, rows in data.items()}
    return {"": _rows(data, "rows")}


def _rows(rows: Any, what: str) -> list[Any]:
    if not isinstance(rows, Iterable) or not isinstance(rows, Sized):
        raise InputError(f"data: {what} are a {type(rows).__name__}; give a list of dicts or a datasets.Dataset")
    return list(rows)
