"""Processes that take one run together: each has the model and all rows, evaluates some of a step's, and applies all of it.

Scalars travel, over gloo, and nothing else: `message` says which.
"""

from zotune.workers.group import Workers, join, joined

__all__ = ["Workers", "join", "joined"]
