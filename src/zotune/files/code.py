"""Code of a user's own, named as `package.module:NAME`. Only who types such a name has anything imported: no file does."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def named(name: str) -> Any:
    """What the module has there; modules in the working folder are found. Raises ImportError, AttributeError or ValueError."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), attribute)
