"""The report's tables: as frames of plain text, and as HTML, CSV, Markdown and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from zotune.bench.curves import reached
from zotune.bench.frame import label, metric_of, percentage
from zotune.tasks.metrics import figure


def scores(groups: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each model and task: methods × schemes, cells (text, group), and the mean rank where methods compete.

    It is over the schemes in which every method (of the same variant) that is ranked at all has a rank.
    """
    tables = {}
    scored = groups[(groups["mean"].notna()) | (groups.kind == "train")]
    for (model, task), here in scored.groupby(["model", "task"], sort=False):
        names = list(dict.fromkeys(label(row) for row in here.itertuples()))
        schemes = list(dict.fromkeys(here.scheme))
        table = pd.DataFrame("", index=names, columns=schemes, dtype=object)
        for row in here.itertuples():
            table.loc[label(row), row.scheme] = Cell(mean_sd(row), row.group)
        ranks = pd.Series("", index=names, dtype=object)
        for _, same in here[here["rank"].notna()].groupby("variant"):
            ranked = same.pivot(index="method", columns="scheme", values="rank").dropna(axis="columns")
            for row in same.itertuples() if len(ranked.columns) else ():
                ranks[label(row)] = f"{ranked.loc[row.method].mean():.1f}"
        if any(ranks):
            table["mean rank"] = ranks
        tables[f"{model}, {task}"] = table
    return tables


PASSES, PARTS = (
    (1_000, 4_000, 16_000),
    (3,),
)  # where the runs are compared on their way: forward passes, and parts of their seconds


def equal(runs: pd.DataFrame, groups: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each model and task of runs whose budget was seconds: what each had reached after equal seconds and equal passes.

    The last of the seconds by the test score, what is on the way there by the best validation until then, of a rate that has not
    ended: mean over seeds. Blank where a run has not spent so much, or was not scored before.
    """
    tables, by_key = {}, runs.set_index("key")
    scored = groups[(groups.kind == "train") & groups["mean"].notna() & ~groups.tried]
    for (model, task), here in scored.groupby(["model", "task"], sort=False):
        rows: dict[str, dict[str, Any]] = {}
        for row in here.itertuples():
            chosen = [run for run in by_key.loc[row.chosen].itertuples() if run.pace == run.pace]
            if not chosen:
                continue
            whole = round(max(run.pace * run.options["steps"] for run in chosen))
            name = label(row) if row.scheme == "full" else f"{label(row)}, {row.scheme}"
            own = rows.setdefault(name, {})
            own[f"{whole} s, test"] = Cell(mean_sd(row), row.group)
            ends = {
                f"{whole / part:.0f} s": ("step", {run.Index: whole / part / run.pace for run in chosen})
                for part in PARTS
            }
            ends |= {f"{p:,} passes": ("forward_passes", dict.fromkeys((r.Index for r in chosen), p)) for p in PASSES}
            for column, (along, until) in ends.items():
                found = [
                    reached(run, until[run.Index], along)
                    for run in chosen
                    if along == "step" or run.forward_passes >= until[run.Index]
                ]
                mean = sum(found) / len(found) if found else math.nan
                own[column] = cell_text(row.metric, mean)
        if rows:
            columns = list(dict.fromkeys(column for own in rows.values() for column in own))
            order = sorted(columns, key=lambda name: ("passes" in name, float(name.split()[0].replace(",", ""))))
            frame = pd.DataFrame("", index=list(rows), columns=order, dtype=object)
            for name, own in rows.items():
                for column, text in own.items():
                    frame.loc[name, column] = text
            tables[f"{model}, {task}"] = frame
    return tables


class Cell(str):
    """A cell's text, with the group that it comes from."""

    group: str

    def __new__(cls, text: str, group: str) -> Cell:
        made = super().__new__(cls, text)
        made.group = group
        return made


def mean_sd(row: Any) -> str:
    """`91.2 ± 0.4`, or why there is no figure. "(search)" behind one that a search found, within its budget."""
    if row.mean != row.mean:
        return "does not fit" if row.oom else "failed" if row.failed else "not run"
    if row.tried and row.lost:  # its own run, after the search
        return "does not fit" if row.lost == "oom" else "failed"
    spread = f" ± {figure(row.metric, row.sd)}" if row.sd == row.sd else ""
    return figure(row.metric, row.mean) + spread + " (search)" * row.tried


def summary(groups: pd.DataFrame) -> pd.DataFrame:
    """A row a configuration, columns as the files and the sortable table have them; the score's has the metric's name."""
    metric = metric_of(groups)
    return pd.DataFrame(
        [
            {
                "model": row.model, "task": row.task, "method": row.method, "scheme": row.scheme, "variant": row.variant,
                **({"metric": row.metric} if metric == "score" else {}),
                metric: row.mean, "sd": row.sd, "seeds": row.n, "rank": row.rank,
                "from": "search" * row.tried, "before": row.before,
                "lr": row.lr, "eps": row.eps, "forward passes": row.forward_passes, "minutes a run": row.seconds / 60,
                "ms a step": row.step_seconds * 1000, "peak GiB": row.peak_bytes / 2**30,
                "failed": row.failed, "does not fit": row.oom, "group": row.group,
            }
            for row in groups.itertuples()
        ]
    )  # fmt: skip


FORMATS: dict[str, Callable[[float], str]] = {
    "sd": lambda v: f"{v:.1f}", "before": lambda v: f"{v:.1f}",
    "rank": lambda v: f"{v:.0f}", "lr": lambda v: f"{v:g}", "eps": lambda v: f"{v:g}",
    "forward passes": lambda v: f"{v:.0f}", "minutes a run": lambda v: f"{v:.2f}", "ms a step": lambda v: f"{v:.2f}",
    "peak GiB": lambda v: f"{v:.3f}", "predicted GiB": lambda v: f"{v:.3f}", "tokens": lambda v: f"{v:.0f}",
}  # fmt: skip


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a run."""
    metric = metric_of(frame)
    return pd.DataFrame(
        [
            {
                "model": row.model, "task": row.task, "method": row.method, "scheme": row.scheme, "variant": row.variant,
                "seed": row.seed, "status": row.status, **({"metric": row.metric} if metric == "score" else {}),
                metric: row.score, "before": row.before, "lr": row.lr,
                "eps": row.eps, "forward passes": row.forward_passes, "minutes a run": row.seconds / 60,
                "ms a step": row.step_seconds * 1000, "peak GiB": row.peak_bytes / 2**30,
                "predicted GiB": row.planned_bytes / 2**30, "code": row.code, "key": row.key,
            }
            for row in frame.itertuples()
        ]
    )  # fmt: skip


def written(table: pd.DataFrame) -> pd.DataFrame:
    """Every value as the text that a reader sees; columns that are empty throughout are left out."""
    out = pd.DataFrame(index=table.index)
    metric = next(
        (str(column) for column in table.columns if column not in FORMATS and not percentage(str(column))), ""
    )
    for column in table.columns:
        name = metric if metric and column in ("sd", "before") else str(column)
        text = [cell_text(name, value) for value in table[column]]
        if any(text):
            out[column] = pd.Series(text, index=table.index, dtype=object)
    return out


def cell_text(column: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if column in FORMATS:
        return FORMATS[column](value)
    return figure(column, value) if isinstance(value, float) else str(value)


def linked(table: pd.DataFrame, anchors: pd.Series, columns: tuple[str, ...]) -> pd.DataFrame:
    """The table as HTML text, escaped, its numbers linked to where they come from."""
    out = written(table)
    for column in out.columns:
        if column in columns:
            out[column] = [
                str(Markup('<a href="#{}">{}</a>').format(anchor, text)) if text else ""
                for text, anchor in zip(out[column], anchors, strict=True)
            ]
        else:
            out[column] = [str(escape(text)) for text in out[column]]
    return out


def plain(text: Any) -> str:
    """A text that means nothing to Markdown and HTML."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def markdown(table: pd.DataFrame, corner: str = "") -> str:
    """A Markdown table; bars and angle brackets in it are escaped."""
    named = not isinstance(table.index, pd.RangeIndex)
    head = ([corner] if named else []) + list(table.columns)
    lines = [f"| {' | '.join(map(plain, head))} |", f"|{' --- |' * len(head)}"]
    for index, row in zip(table.index, table.itertuples(index=False), strict=True):
        lines.append(f"| {' | '.join(map(plain, ([index] if named else []) + list(row)))} |")
    return "\n".join(lines) + "\n"


def latex(table: pd.DataFrame, caption: str) -> str:
    """A booktabs table; TeX's own characters are escaped."""
    texts = table.map(str)
    named = not isinstance(table.index, pd.RangeIndex)
    texts.index = pd.Index([_tex(name) for name in texts.index]) if named else texts.index
    texts = texts.map(_tex)
    texts.columns = [_tex(name) for name in texts.columns]
    return texts.to_latex(
        escape=False, index=named, caption=_tex(caption), column_format="l" * (len(texts.columns) + named)
    )


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: "\\" + c for c in "&%$#_{}"} | {"<": r"\textless{}", ">": r"\textgreater{}", "†": r"\textdagger{}"}
    return "".join(special.get(c, c) for c in str(text))
