"""`zotune bench report`: a page that needs no network, and its tables and figures as files."""

from __future__ import annotations

import datetime
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import itables
import jinja2
import pandas as pd
import yaml
from itables.javascript import generate_init_offline_itables_html
from markupsafe import Markup

import zotune
from zotune.bench import figures, quoted, tables
from zotune.bench.frame import groups_frame, runs_frame
from zotune.bench.store import Store
from zotune.errors import InputError

NUMBERS = ("accuracy", "before", "forward passes", "minutes a run", "ms a step", "peak GiB", "predicted GiB", "status")


def make_report(folder: Path) -> Path:
    """DIR/report/: index.html, and CSV, Markdown, LaTeX, SVG and PNG files beside it. Returns the page's path.

    Of each configuration the newest finished run counts. Raises InputError where nothing has finished.
    """
    store = Store(folder, create=False)
    records = store.latest()
    waiting = [record for record in store.all() if record.status in ("running", "interrupted")]
    store.close()
    if not records:
        raise InputError(f"{folder}: no run has finished yet; `zotune bench run` goes on with it")
    runs = runs_frame(records)
    groups = groups_frame(runs)
    report = folder / "report"
    partial = folder / ".report.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    drawn = _figures(runs, groups, partial)
    matrices = tables.accuracy(groups[groups.kind == "train"])
    _files(partial, matrices, tables.summary(groups), tables.runs(runs))
    page = _environment().get_template("page.html.j2").render(
        title=", ".join(sorted(set(runs.suite))),
        made=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=zotune.__version__,
        codes=sorted(set(runs.code)),
        devices=sorted({device for device in runs.device if device}),
        counts={status: int((runs.status == status).sum()) for status in ("done", "failed", "oom")},
        waiting=len(waiting),
        matrices=[
            {"name": name, "columns": list(table.columns), "rows": list(zip(table.index, table.to_numpy(), strict=True))}
            for name, table in matrices.items()
        ],
        is_cell=lambda value: isinstance(value, tables.Cell),
        figures=drawn,
        quoted=_quoted(runs),
        scripts=Markup(generate_init_offline_itables_html(Path(itables.options.dt_bundle))),
        summary=_sortable(tables.summary(groups), "group", "summary"),
        runs=_sortable(_with_anchor(tables.runs(runs)), "anchor", "runs"),
        groups=_groups(runs, groups),
    )  # fmt: skip
    (partial / "index.html").write_text(page, encoding="utf-8")
    shutil.rmtree(report, ignore_errors=True)
    partial.replace(report)
    return report / "index.html"


def _environment() -> jinja2.Environment:
    text = files("zotune.bench").joinpath("page.html.j2").read_text(encoding="utf-8")
    return jinja2.Environment(
        loader=jinja2.DictLoader({"page.html.j2": text}), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _figures(runs: pd.DataFrame, groups: pd.DataFrame, folder: Path) -> list[dict[str, Any]]:
    drawn = []
    for module in figures.modules():
        with figures.style():
            figure = module.draw(runs, groups)
            if figure is None:
                continue
            figure.savefig(folder / f"{module.NAME}.png", dpi=200, bbox_inches="tight")
            (folder / f"{module.NAME}.svg").write_text(figures.plain_svg(figure, module.NAME), encoding="utf-8")
            svg = figures.as_svg(figure, module.NAME, module.TITLE)
        drawn.append({"name": module.NAME, "title": module.TITLE, "about": module.ABOUT, "svg": Markup(svg)})
    return drawn


def _files(folder: Path, matrices: dict[str, pd.DataFrame], summary: pd.DataFrame, runs: pd.DataFrame) -> None:
    summary.drop(columns="group").to_csv(folder / "summary.csv", index=False)
    runs.to_csv(folder / "runs.csv", index=False)
    text = [f"## {tables.plain(name)}\n\n{tables.markdown(table, 'method')}" for name, table in matrices.items()]
    text.append("## All configurations\n\n" + tables.markdown(tables.written(summary.drop(columns="group"))))
    (folder / "tables.md").write_text("\n".join(text), encoding="utf-8")
    tex = [tables.latex(table, f"Test accuracy: {name}") for name, table in matrices.items()]
    tex.append(tables.latex(tables.written(summary.drop(columns="group")), "All configurations"))
    (folder / "tables.tex").write_text("\n".join(tex), encoding="utf-8")


def _sortable(table: pd.DataFrame, anchor: str, name: str) -> Markup:
    """A table that sorts and filters, by itables, with nothing fetched. Its cells are escaped by `tables.linked`."""
    html = itables.to_html_datatable(
        tables.linked(table.drop(columns=anchor), table[anchor], NUMBERS), connected=False, allow_html=True, showIndex=False,
        display_logo_when_loading=False, classes="display compact nowrap", paging=name == "runs" and len(table) > 25, pageLength=25,
        table_id=f"table-{name}", maxBytes=0, maxColumns=0, style="width:100%",
    )  # fmt: skip
    return Markup(html)


def _with_anchor(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(anchor="run-" + table.key).drop(columns="key")


def _groups(runs: pd.DataFrame, groups: pd.DataFrame) -> list[dict[str, Any]]:
    """Each configuration with its runs: options as YAML, the exact command, what went wrong."""
    by_key = {row.key: row for row in runs.itertuples()}
    return [
        {
            "anchor": group.group,
            "name": " · ".join(n for n in (group.model, group.task, group.method, group.scheme, group.variant) if n),
            "figure": tables.mean_sd(group) if group.kind == "train" else "",
            "searched": group.searched,
            "lr": f"{group.lr:g}",
            "eps": f"{group.eps:g}",
            "runs": [
                {
                    "anchor": f"run-{key}",
                    "seed": by_key[key].seed,
                    "status": by_key[key].status,
                    "accuracy": tables._written("accuracy", by_key[key].accuracy),
                    "options": yaml.safe_dump(by_key[key].options, sort_keys=False, allow_unicode=True, width=100),
                    "command": by_key[key].command,
                    "code": by_key[key].code,
                    "folder": by_key[key].folder,
                    "error": by_key[key].error,
                }
                for key in group.keys
            ],
        }
        for group in groups.itertuples()
    ]


def _quoted(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """The study's own figures, where a task of theirs was run."""
    shown: list[dict[str, Any]] = []
    tasks = set(runs.task)
    if "sst2" in tasks:
        shown.append({"title": quoted.SST2_TITLE, "columns": quoted.SST2_COLUMNS, "rows": quoted.SST2})
    if tasks & {"sst2-plain", "rte-plain"}:
        columns = quoted.ALIGNMENT_COLUMNS
        shown.append({"title": quoted.ALIGNMENT_TITLE, "columns": columns, "rows": quoted.ALIGNMENT})
    return shown
