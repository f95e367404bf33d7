"""The benchmark: a suite → its runs → a store → a report. Light to import; what needs the extra asks for it first.

suite.py     YAML → cells of a grid → the options of each run
pace.py      seconds a step, where budgets are of seconds
plan.py      runs with their keys, what is done, what the rest will take
choice.py    which lr and eps: validation decides
store.py     results in SQLite
runner.py    a process a run
shared.py    a run that the workers of a launcher take together
warm.py      processes that begin with the libraries loaded
search.py    lr and eps by grid or Optuna
probe.py     memory and time of a step, measured
report.py    tables (tables.py) and figures (figures/) as a page
"""

from __future__ import annotations

from importlib.util import find_spec

from zotune.errors import InputError

FINAL = ("done", "failed", "oom")  # a run in one of these is not started again unasked
DATABASE = "results.sqlite"
EXTRA = ("sqlalchemy", "jinja2", "itables", "matplotlib", "optuna", "pandas")


def need_extra(what: str = "zotune bench") -> None:
    """Raises InputError where `zotune[bench]` is not installed. what: the command that needs it."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise InputError(f"{what} needs zotune[bench] (missing: {', '.join(missing)}): pip install 'zotune[bench]'")


class Stopped(Exception):
    """The benchmark was asked to stop; what was under way is saved. `code`: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
