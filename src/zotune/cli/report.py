"""`zotune report`."""

from __future__ import annotations

from pathlib import Path

from zotune.bench import DATABASE, need_extra
from zotune.errors import InputError


def report(runs: list[str], output: str | None) -> None:
    """The page of finished runs, beside the first one's files where nothing else is said."""
    need_extra("zotune report")
    folders = [Path(run).expanduser() for run in runs]
    for folder in folders:
        if (folder / DATABASE).is_file():
            raise InputError(f"{folder}: a benchmark's results; zotune bench report {folder} makes their page")
    target = Path(output).expanduser() if output else folders[0] / "report.html"
    if not target.absolute().parent.is_dir():
        raise InputError(f"--output {target}: no such folder")
    from zotune.reports.page import make_page

    print(make_page(folders, target))
