"""`zotune bench report`: a page that needs no network, and its tables and figures as files."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import itables
import pandas as pd
import yaml
from itables.javascript import generate_init_offline_itables_html
from markupsafe import Markup
from PIL import Image

import zotune
from zotune.bench import figures, quoted, tables
from zotune.bench.figures import drawing
from zotune.bench.findings import findings
from zotune.bench.frame import groups_frame, metric_of, percentage, runs_frame
from zotune.bench.pages import template
from zotune.bench.positions import SOURCE, Answer, claims, positions
from zotune.bench.store import Record, Store
from zotune.errors import InputError

SPREAD = (
    "mean ± one standard deviation over seeds; a figure without ± is one seed's. Where several learning rates or eps were "
    "tried, the one best on validation; (search) where only the search has run, whose budget is shorter."
)
EQUAL = (
    "Seconds are of each run's own steps, as they were timed alone on the device. At their end the test score; on the way there "
    "the best validation until then, of runs whose rate had not ended, mean over seeds. Blank: not so many passes were spent."
)
CLAIMED = (
    "Of these models, tasks and rates alone. Held, or not, where the difference is more than chance explains, seed by seed. At "
    "equal passes by the best validation until the run with fewer had ended; the other's rate may not have."
)
NUMBERS = ("before", "forward passes", "minutes a run", "ms a step", "peak GiB", "predicted GiB", "status")


def make_report(*folders: Path, target: Path | None = None, compact: bool = False) -> Path:
    """index.html, and README.md, CSV, LaTeX, SVG and PNG files beside it, in `target` (DIR/report). Returns the page's path.

    Of each configuration the newest finished run in any of the folders counts. compact: small pictures, no SVG files.
    Raises InputError where nothing has finished, and for a target that is not a report's.
    """
    report = target or folders[0] / "report"
    if report.exists() and not report.is_dir():
        raise InputError(f"--output {report}: is a file; name a folder")
    if report.exists() and any(report.iterdir()) and not (report / "runs.csv").is_file():
        raise InputError(f"--output {report}: holds files that are not a report's; name another folder")
    newest: dict[str, Record] = {}
    waiting = 0
    for folder in folders:
        store = Store(folder, create=False)
        for record in store.latest():
            known = newest.get(record.config_key)
            if known is None or record.finished >= known.finished:
                newest[record.config_key] = record
        waiting += sum(record.status in ("running", "interrupted") for record in store.all())
        store.close()
    records = list(newest.values())
    if not records:
        raise InputError(f"{folders[0]}: no run has finished yet; `zotune bench run` goes on with it")
    runs = runs_frame(records)
    groups = groups_frame(runs)
    partial = report.with_name(f".{report.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    drawn = _figures(runs, groups[~groups.tried], partial, compact)  # a search's budget is another
    found = findings(runs, groups)
    others = {"positions": positions(runs, groups), "claims": claims(runs, groups)}
    equal = tables.equal(runs, groups)
    matrices = tables.scores(groups[groups.kind == "train"])
    scored = "Test " + metric_of(runs) + " in percent" * percentage(metric_of(runs))
    _files(partial, matrices, scored, tables.summary(groups), tables.runs(runs))
    _readme(partial, found, others, equal, matrices, scored, drawn, runs)
    page = template("page.html.j2").render(
        title=", ".join(sorted(set(runs.suite))),
        made=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=zotune.__version__,
        codes=sorted(set(runs.code)),
        devices=sorted({device for device in runs.device if device}),
        counts={status: int((runs.status == status).sum()) for status in ("done", "failed", "oom")},
        waiting=waiting,
        svg_files=not compact,
        findings=found,
        source=SOURCE,
        **others,
        equal=_rows(equal),
        about_equal=EQUAL,
        about_claims=CLAIMED,
        matrices=_rows(matrices),
        scored=scored,
        spread=SPREAD,
        is_cell=lambda value: isinstance(value, tables.Cell),
        figures=drawn,
        quoted=_quoted(runs),
        scripts=Markup(generate_init_offline_itables_html(Path(itables.options.dt_bundle))),
        summary=_sortable(tables.summary(groups), "group", "summary", metric_of(groups)),
        runs=_sortable(_with_anchor(tables.runs(runs)), "anchor", "runs", metric_of(runs)),
        groups=_groups(runs, groups),
    )  # fmt: skip
    (partial / "index.html").write_text(page, encoding="utf-8")
    shutil.rmtree(report, ignore_errors=True)
    partial.replace(report)
    return report / "index.html"


def _figures(runs: pd.DataFrame, groups: pd.DataFrame, folder: Path, compact: bool) -> list[dict[str, Any]]:
    drawn, metric = [], metric_of(runs)
    for module in figures.modules():
        with drawing.style():
            figure = module.draw(runs, groups)
            if figure is None:
                continue
            png = folder / f"{module.NAME}.png"
            figure.savefig(png, dpi=110 if compact else 200, bbox_inches="tight")
            if compact:
                with Image.open(png) as image:
                    image.convert("RGB").quantize(32).save(png, optimize=True)
            else:
                (folder / f"{module.NAME}.svg").write_text(drawing.plain_svg(figure, module.NAME), encoding="utf-8")
            title = module.TITLE.replace("Accuracy", metric[0].upper() + metric[1:])
            about = module.ABOUT.replace("accuracy", metric)
            svg = drawing.as_svg(figure, module.NAME, title)
        drawn.append({"name": module.NAME, "title": title, "about": about, "svg": Markup(svg)})
    return drawn


def _rows(found: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Tables as a page has them."""
    return [
        {"name": name, "columns": list(table.columns), "rows": list(zip(table.index, table.to_numpy(), strict=True))}
        for name, table in found.items()
    ]


def _files(
    folder: Path, matrices: dict[str, pd.DataFrame], scored: str, summary: pd.DataFrame, runs: pd.DataFrame
) -> None:
    summary.drop(columns="group").to_csv(folder / "summary.csv", index=False)
    runs.to_csv(folder / "runs.csv", index=False)
    text = [f"## {tables.plain(name)}\n\n{tables.markdown(table, 'method')}" for name, table in matrices.items()]
    text.append("## All configurations\n\n" + tables.markdown(tables.written(summary.drop(columns="group"))))
    (folder / "tables.md").write_text("\n".join(text), encoding="utf-8")
    tex = [tables.latex(table, f"{scored}: {name}") for name, table in matrices.items()]
    tex.append(tables.latex(tables.written(summary.drop(columns="group")), "All configurations"))
    (folder / "tables.tex").write_text("\n".join(tex), encoding="utf-8")


def _readme(
    folder: Path,
    found: list[str],
    others: dict[str, list[Answer]],
    equal: dict[str, pd.DataFrame],
    matrices: dict[str, pd.DataFrame],
    scored: str,
    drawn: list[dict[str, Any]],
    runs: pd.DataFrame,
) -> None:
    """The tables and figures as a page of Markdown, which forges show."""
    devices = ", ".join(sorted({tables.plain(device) for device in runs.device if device}))
    suites = ", ".join(map(tables.plain, sorted(set(runs.suite))))
    done = int((runs.status == "done").sum())
    lines = [
        f"# Benchmark: {suites}\n",
        f"{done} runs done, {int((runs.status == 'oom').sum())} did not fit in memory, "
        f"{int((runs.status == 'failed').sum())} failed. {devices}. Code: {', '.join(sorted(set(runs.code)))}.\n",
        "[index.html](index.html) sorts and filters, and has each run's configuration and exact command; "
        "[tables.md](tables.md), [tables.tex](tables.tex), [summary.csv](summary.csv), [runs.csv](runs.csv).\n",
    ]
    if found:
        lines.append("## Findings\n\n" + "\n".join(f"- {tables.plain(one)}" for one in found) + "\n")
    if others["positions"]:
        lines.append(f"## What the authors ask for ({SOURCE})\n")
        lines.append("\n".join(f"- **{one.to}.** {tables.plain(one.said)}" for one in others["positions"]) + "\n")
    if others["claims"]:
        lines.append(f"## Published claims\n\n{CLAIMED}\n")
        lines.append(
            "\n".join(f"- {one.to}: **{one.verdict}**. {tables.plain(one.said)}" for one in others["claims"]) + "\n"
        )
    if equal:
        lines.append(f"## Equal seconds, equal passes\n\n{EQUAL}\n")
        lines += [f"### {tables.plain(name)}\n\n{tables.markdown(table, 'method')}" for name, table in equal.items()]
    if matrices:
        lines.append(f"{scored}, {SPREAD}\n")
    lines += [f"## {tables.plain(name)}\n\n{tables.markdown(table, 'method')}" for name, table in matrices.items()]
    lines += [f"## {one['title']}\n\n{one['about']}\n\n![{one['title']}]({one['name']}.png)\n" for one in drawn]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _sortable(table: pd.DataFrame, anchor: str, name: str, metric: str) -> Markup:
    """A table that sorts and filters, by itables, with nothing fetched. Its cells are escaped by `tables.linked`."""
    cells = tables.linked(table.drop(columns=anchor), table[anchor], (*NUMBERS, metric))
    html = itables.to_html_datatable(
        cells, connected=False, allow_html=True, showIndex=False,
        display_logo_when_loading=False, classes="display compact nowrap", paging=name == "runs" and len(table) > 25, pageLength=25,
        table_id=f"table-{name}", maxBytes=0, maxColumns=0, style="width:100%",
        text_in_header_can_be_selected=False,  # a click anywhere on a header sorts
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
            "lr": f"{group.lr:g}" if group.lr == group.lr else "",
            "eps": f"{group.eps:g}" if group.eps == group.eps else "",
            "runs": [
                {
                    "anchor": f"run-{key}",
                    "seed": by_key[key].seed,
                    "search": by_key[key].search,
                    "lr": f"{by_key[key].lr:g}" if by_key[key].lr == by_key[key].lr else "",
                    "status": by_key[key].status,
                    "score": tables.cell_text(by_key[key].metric, by_key[key].score),
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
