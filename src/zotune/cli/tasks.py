"""`zotune tasks`: a task's definition shown, or written to a file to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zotune.errors import InputError

app = typer.Typer(help="A task's definition: show it, or copy it to a file to change.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="built-in task, see `zotune list tasks`, or a task's file")]
Target = Annotated[str | None, typer.Argument(metavar="PATH", help=r"file or folder \[default: NAME.yaml]")]


@app.command("show", help="Print a task's definition.")
def _show(name: Name) -> None:
    from zotune.tasks import get_task
    from zotune.tasks.files import written

    print(written(get_task(name)), end="")


@app.command("cp", help="Write a task's definition to a YAML file, for `--task FILE`.")
def _copy(name: Name, path: Target = None) -> None:
    from zotune.tasks import get_task
    from zotune.tasks.files import SUFFIXES, written

    task = get_task(name)
    target = Path(path or ".").expanduser()
    target = target / f"{task.name}.yaml" if target.is_dir() else target
    if target.suffix not in SUFFIXES:
        raise InputError(f"{target}: a task's file ends in .yaml; try {target.with_suffix('.yaml')}")
    if target.exists():
        raise InputError(f"{target}: exists; name another file")
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target}: no such folder")
    target.write_text(written(task, target.stem), encoding="utf-8")
    print(f"{task.name} → {target}   see it by: zotune preview --task {target}")
