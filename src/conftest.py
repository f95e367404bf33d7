"""Doctests of modules that import an extra are skipped where it is not installed."""

from importlib.util import find_spec

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if any(find_spec(name) is None for name in ("triton", "itables", "matplotlib", "sqlalchemy")):
        config.option.doctest_ignore_import_errors = True
