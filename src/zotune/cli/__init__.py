"""The command line: a command a file, its options made from the models in `zotune.options`."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> None:
    """`zotune`. Exits 0 when done; 2 on bad usage or input; 1 on a stop or an I/O error; 130, 143 after a saved interrupt."""
    from zotune.cli.app import run

    sys.exit(run(argv))
