"""What a launcher such as torchrun has told this process by its environment. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Collection

from zotune.errors import InputError

# What a launcher sets, and what others in the process would begin groups of their own by.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def asked_for() -> int:
    """How many processes the launcher has started; 1 without one."""
    if "RANK" not in os.environ:
        return 1
    try:
        return max(1, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError:
        raise InputError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: no number; a launcher such as torchrun sets it"
        ) from None


def launch() -> str:
    """The launch that this process belongs to, the same when an elastic launcher starts its group again; "" for others."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def is_first() -> bool:
    """Whether this is the process that talks: the only one, or that of rank 0."""
    return asked_for() == 1 or os.environ.get("RANK", "0") == "0"


def refuse_shared(command: str | None, shared: Collection[str]) -> None:
    """Raises InputError for a command that the processes of a launcher do not take together, as they do those of `shared`."""
    if (count := asked_for()) > 1 and command not in shared:
        raise InputError(
            f"zotune {command}: is one process's work, torchrun has started {count}; run it without torchrun"
        )
