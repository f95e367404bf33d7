"""Pages that are made of the code: `<!-- options: train -->` becomes the options of a command, `<!-- list: methods -->` a table,
`<!-- docstring: module -->` what a module says of itself, `<!-- decisions -->` the list of the dated pages.

Called by mkdocs (mkdocs.yml, hooks) and by tests/test_pages.py.
"""

from __future__ import annotations

import inspect
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from zotune.cli.about import KINDS
from zotune.cli.app import COMMANDS, metavar
from zotune.options.groups import grouped
from zotune.registry import entries

DECISIONS = Path(__file__).parents[1] / "decisions"


def on_post_build(config: Any, **_: Any) -> None:
    """The benchmark's one page stands beside its README, which is the site's page of the name that it has in docs/."""
    shutil.copyfile(
        Path(config.docs_dir) / "benchmark" / "index.html", Path(config.site_dir) / "benchmark" / "report.html"
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = re.sub(r"<!-- options: (\w+)(?: beyond (\w+))? -->", lambda m: of_command(m[1], m[2]), markdown)
    markdown = re.sub(r"<!-- list: (\w+) -->", lambda m: of_kind(m[1]), markdown)
    markdown = markdown.replace("<!-- decisions -->", of_decisions())
    markdown = markdown.replace("[index.html](index.html)", '<a href="report.html">The whole report</a>')
    return re.sub(r"<!-- docstring: ([\w.]+) -->", lambda m: of_module(m[1]), markdown)


def of_command(name: str, beyond: str | None = None) -> str:
    """The options of a command under their headings; with `beyond` those alone that the other command has not."""
    kind = COMMANDS[name]
    known = COMMANDS[beyond].model_fields if beyond else {}
    parts = []
    for title, fields in grouped(kind).items():
        rows = [_row(field, kind.model_fields[field]) for field in fields if field not in known]
        if rows:
            parts.append(
                "\n".join([f"**{title}**\n", "| option | value | default | |", "|---|---|---|---|", *rows, ""])
            )
    return "\n".join(parts)


def of_kind(kind: str) -> str:
    rows = [f"| `{name}` | {_cell(what)} |" for name, what in entries(KINDS[kind])]
    return "\n".join(["| | |", "|---|---|", *rows, ""])


def of_decisions() -> str:
    """Newest first, each by its heading."""
    pages = sorted(DECISIONS.glob("2*.md"), key=lambda page: page.name[:10], reverse=True)
    said = [(page.name, page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")) for page in pages]
    return "\n".join(f"- {name[:10]}: [{title}]({name})" for name, title in said)


def of_module(name: str) -> str:
    text = inspect.cleandoc(import_module(name).__doc__ or "")
    return f"```text\n{text}\n```"


def _row(name: str, field: Any) -> str:
    flag = "--" + name.replace("_", "-")
    value = "" if field.annotation is bool else ", ".join(f"`{part}`" for part in metavar(field.annotation).split("|"))
    told, _, default = (field.description or "").rpartition(" [default: ")
    told, default = (told, _cell(default.rstrip("]"))) if told else (field.description or "", "")
    if field.is_required():
        default = "**required**"
    elif not default and field.default not in (None, False, []):
        default = f"`{field.default}`"
    return f"| `{flag}` | {value} | {default} | {_cell(told)} |"


def _cell(text: str) -> str:
    """Text in a cell, in which a `*`, a `<` or a brace is no markup."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [p if p.startswith("`") else re.sub(r"([*_<>{}\[\]])", r"\\\1", p) for p in parts]
    return "".join(plain).replace("|", "\\|").replace("\n", " ")
