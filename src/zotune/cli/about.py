"""`zotune list` and `zotune env`."""

from __future__ import annotations

import platform
from importlib import metadata

from rich.console import Console
from rich.table import Table

from zotune.errors import InputError, nearest
from zotune.registry import entries

KINDS = {"methods": "method", "schemes": "scheme", "tasks": "task", "engines": "engine"}
PACKAGES = ("zotune", "torch", "transformers", "peft", "accelerate", "datasets", "numba", "numpy", "triton")


def show_kinds() -> None:
    """What `zotune list` can be asked for, with the names of each."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for kind, singular in KINDS.items():
        table.add_row(f"zotune list {kind}", ", ".join(name for name, _ in entries(singular)))
    Console().print(table)


def show(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"zotune list {kind}: {nearest(kind, KINDS)}")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, what in entries(KINDS[kind]):
        table.add_row(name, what.replace("[", r"\["))
    Console().print(table)


def environment() -> None:
    import torch

    rows = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            rows[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            rows[package] = "not installed"
    rows["cpu threads"] = str(torch.get_num_threads())
    rows["cuda"] = "none"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        rows["cuda"] = f"{torch.version.cuda}, {', '.join(names)}"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
