"""The errors that a user meets, and the line that suggests a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message says what, where, and what to try, in one line. The command line exits with 2."""


class OptionError(ValueError):
    """An option whose value cannot be, or not beside others. option: its name, for who writes `--option` before the message."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class NotFinite(InputError):
    """What a model computes of rows is NaN or infinite, so that there is nothing to say of them."""


class StorageError(OSError):
    """A run's folder cannot be written: a full disk, an I/O error. One line; the command line exits with 1."""


class NonFiniteLoss(RuntimeError):
    """Too many steps in a row whose loss was NaN or infinite. The command line exits with 1."""


class WorkerError(RuntimeError):
    """The workers of a run cannot go on together: some are gone, or differ. One line; the command line exits with 1."""


class Elsewhere(RuntimeError):
    """Another worker of the run has failed, and says why. code: with which this one's command line exits, without a word."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


SHOWN = 20  # names at most


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an error about a wrong name: the nearest known one, else all of them, or the first of many.

    >>> nearest("zo-sdg", ["zo-sgd", "zo-adam"])
    "did you mean 'zo-sgd'?"
    >>> nearest("x", ["full", "lora"])
    'choose from: full, lora'
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    many = f", … ({len(known)} in all)" if len(known) > SHOWN else ""
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(known[:SHOWN])}{many}"


def plain(text: str) -> str:
    """A line that may hold a stranger's words, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
