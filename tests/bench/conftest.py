"""Skip where the benchmark's extra is not installed."""

from __future__ import annotations

import sys

import pytest
import yaml
from standin import PROGRAM, SUITE

for name in ("sqlalchemy", "jinja2", "itables", "matplotlib", "optuna", "pandas"):
    pytest.importorskip(name, reason="zotune[bench] is not installed")


@pytest.fixture
def suite_file(tmp_path):
    def write(**changes) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(SUITE | changes))
        return str(path)

    return write


@pytest.fixture
def program(tmp_path) -> tuple[str, ...]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return (sys.executable, str(path))
