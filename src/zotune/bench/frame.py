"""The store's rows as data frames: every run, and the runs of each configuration taken together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import pandas as pd

from zotune.bench.suite import _text
from zotune.methods import METHODS, has_eps
from zotune.models.schemes import SCHEMES
from zotune.step.choices import AUTO
from zotune.tasks.task import LOWER_IS_BETTER

if TYPE_CHECKING:
    from zotune.bench.store import Record

GROUP = ["kind", "model", "task", "method", "scheme", "variant"]  # what names a configuration, seeds and lr, eps aside
SEARCHED = ("lr", "eps")  # among several values of these the best on validation is taken


def runs_frame(records: Sequence[Record]) -> pd.DataFrame:
    """A row a run, in the order of `_place`. Bytes, seconds, percent; NaN where a run has no such figure."""
    seen: dict[str, int] = {}
    for record in records:
        for name in (record.model, record.task):
            seen.setdefault(name, len(seen))
    return pd.DataFrame([_row(record) for record in sorted(records, key=lambda record: _place(record, seen))])


def _place(record: Record, seen: dict[str, int]) -> tuple[Any, ...]:
    """Models and tasks as they came, configurations before their variants, methods and schemes as `zotune list` has them."""
    labels = {k: v for k, v in record.labels.items() if k not in (*SEARCHED, "search") and v is not False}
    index = lambda name, names: (names.index(name) if name in names else len(names), name)  # noqa: E731
    numbers = [(k, v if isinstance(v, int | float) else 0.0, _text(v)) for k, v in sorted(labels.items())]
    return (
        record.kind != "train", seen[record.model], seen[record.task], bool(labels), index(record.method, list(METHODS)),
        index(record.scheme, list(SCHEMES)), numbers, record.seed, record.started,
    )  # fmt: skip


def _row(record: Record) -> dict[str, Any]:
    result, options = record.result or {}, record.options
    labels = {k: v for k, v in record.labels.items() if k not in (*SEARCHED, "search")}
    number = lambda *names: next((float(result[n]) for n in names if result.get(n) is not None), math.nan)  # noqa: E731
    return {
        "key": record.key,
        "kind": record.kind,
        "suite": record.suite,
        "model": record.model,
        "task": record.task,
        "method": record.method,
        "scheme": record.scheme,
        "seed": record.seed,
        "variant": " ".join(filter(None, (said(k, v) for k, v in sorted(labels.items())))),
        "labels": labels,
        "search": bool(record.labels.get("search")),
        "status": record.status,
        "lr": math.nan
        if options.get("lr") == AUTO
        else _number(result.get("lr", options.get("lr"))),  # each seed finds its own
        "eps": _number(result.get("eps", options.get("eps"))) if has_eps(record.method, recorded=True) else math.nan,
        "queries": int(options.get("queries") or 1),
        "tokens": _number(options.get("tokens")),
        "batch_size": _number(options.get("batch_size")),
        "score": number("test_after"),
        "before": number("test_before"),
        "validation": number("validation_best"),
        "forward_passes": number("forward_passes"),
        "seconds": number("wall_seconds"),
        # as it was timed alone, where it was: runs that share a device slow each other
        "step_seconds": number("step_seconds")
        if record.kind == "probe"
        else _number((record.planned or {}).get("pace", step_seconds(record.metrics))),
        "pace": _number((record.planned or {}).get("pace")),
        "peak_bytes": number("peak_memory_bytes", "peak_bytes"),
        "planned_bytes": _number((record.planned or {}).get("peak_bytes")),
        "trainable": number("trainable_parameters"),
        "device": result.get("device", ""),
        "dtype": result.get("dtype", options.get("dtype", "")),
        "metric": str(result.get("metric") or ""),
        "metrics": record.metrics or [],
        "options": options,
        "command": record.command,
        "code": record.code,
        "folder": record.folder,
        "error": record.error,
    }


def said(name: str, value: Any) -> str:
    """
    >>> said("sparsity", 0.5), said("checkpointing", True), said("checkpointing", False)
    ('sparsity=0.5', 'checkpointing', '')
    """
    if isinstance(value, bool):
        return name if value else ""
    return f"{name}={_text(value)}"


def step_seconds(metrics: Sequence[dict[str, Any]]) -> float:
    """Seconds a step: the median over the lines of metrics.jsonl, the first, which warms up, left out.

    >>> step_seconds([{"step": 10 * s, "step_seconds": t} for s, t in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.1))])
    0.1
    """
    lines = [line["step_seconds"] for line in metrics if "step_seconds" in line]
    return median(lines[1:] or lines) if lines else math.nan


def groups_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a configuration, its chosen lr and eps: mean and spread over seeds, and its rank among the methods.

    sd is the sample's (n − 1), NaN for one seed. rank 1 is the best mean of the methods of a model, task, scheme and variant;
    equals share a rank, and a method without another has none, nor has one that a search alone has run.
    """
    rows = []
    for names, group in runs.groupby(GROUP, sort=False, dropna=False):
        done = group[group.status == "done"]
        chosen = choose(done[~done.search] if (~done.search).any() else done)
        row = dict(zip(GROUP, names, strict=True))
        rows.append(
            row
            | {
                "group": "g-" + str(group.key.iloc[0]),
                "keys": list(group.key),
                "chosen": list(chosen.key),
                "labels": group.labels.iloc[0],
                "metric": next(filter(None, [*chosen.metric, *group.metric]), ""),
                "n": len(chosen),
                # by a search alone, which has a budget of its own
                "tried": bool(len(chosen) and chosen.search.all()),
                "lost": next((kind for kind in ("oom", "failed") if (group[~group.search].status == kind).any()), ""),
                "failed": int((group.status == "failed").sum()),
                "oom": int((group.status == "oom").sum()),
                "mean": chosen.score.mean() if len(chosen) else math.nan,
                "sd": chosen.score.std(ddof=1) if len(chosen) > 1 else math.nan,
                "before": chosen.before.mean() if len(chosen) else math.nan,
                "lr": chosen.lr.iloc[0] if len(chosen) else math.nan,
                "eps": chosen.eps.iloc[0] if len(chosen) else math.nan,
                "searched": len(done[list(SEARCHED)].drop_duplicates()),
                "forward_passes": chosen.forward_passes.median() if len(chosen) else math.nan,
                "seconds": chosen.seconds.median() if len(chosen) else math.nan,
                "step_seconds": chosen.step_seconds.median() if len(chosen) else math.nan,
                "peak_bytes": chosen.peak_bytes.max() if len(chosen) else math.nan,
                "queries": int(group.queries.iloc[0]),
                "tokens": group.tokens.iloc[0],
                "batch_size": group.batch_size.iloc[0],
            }
        )
    frame = pd.DataFrame(rows)
    goodness = frame["mean"].where(~frame.metric.isin(LOWER_IS_BETTER), -frame["mean"])
    goodness = goodness.where(~frame.tried)
    among = goodness.groupby([frame[name] for name in ("model", "task", "scheme", "variant")])
    frame["rank"] = among.rank(ascending=False, method="min").where(among.transform("count") > 1)
    return frame


def metric_of(frame: pd.DataFrame) -> str:
    """What the runs or configurations are scored by: the one metric of all, else "score"."""
    names = set(frame.metric) - {""}
    return "score" if len(names) > 1 else next(iter(names), "accuracy")


def unit(metric: str) -> str:
    """
    >>> unit("f1"), unit("perplexity")
    ('f1 (%)', 'perplexity')
    """
    return f"{metric} (%)" if percentage(metric) else metric


def percentage(metric: str) -> bool:
    return metric != "score" and metric not in LOWER_IS_BETTER and ":" not in metric


def choose(done: pd.DataFrame) -> pd.DataFrame:
    """The runs whose lr and eps are best on validation, mean over seeds, of those with the most seeds; test decides nothing."""
    if not len(done):
        return done
    pairs = done.groupby(list(SEARCHED), dropna=False)["validation"]
    means = pairs.mean()[pairs.size() == pairs.size().max()]
    if len(pairs) < 2 or means.isna().all():
        return done
    lr, eps = means.idxmin() if done.metric.isin(LOWER_IS_BETTER).any() else means.idxmax()
    same = lambda column, value: (column == value) | (column.isna() & (value != value))  # noqa: E731
    return done[same(done.lr, lr) & same(done.eps, eps)]


def label(row: Any) -> str:
    """A configuration's name within its model, task and scheme."""
    return f"{row.method} {row.variant}".strip()


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
