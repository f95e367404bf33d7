"""A suite's file and a program that stands in for `zotune`. Test modules that need the benchmark's extra say so themselves."""

from __future__ import annotations

import sys

import pytest
import yaml
from standin import PROGRAM, SUITE


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
