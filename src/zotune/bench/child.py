"""Runs a command that dies with the process that started it: `python -m zotune.bench.child PARENT_PID COMMAND …`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Linux kills this process when the thread of `parent` that started it ends. Kept across execve."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # one that died before this line has been replaced by another
        os._exit(1)


def main(argv: list[str]) -> None:
    parent, command = int(argv[0]), argv[1:]
    die_with(parent)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
