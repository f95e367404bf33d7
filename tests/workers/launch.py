"""N workers by torchrun, and one process that does the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    paths = [str(HERE), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"} | more


def torchrun(
    workers: int, *command: object, how: tuple[str, ...] = ("--standalone",)
) -> subprocess.CompletedProcess[str]:
    """A script or `-m module`, with its arguments."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *how, f"--nproc-per-node={workers}"]
    return subprocess.run(
        [*launcher, *map(str, command)], env=environment(), text=True, capture_output=True, timeout=300
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What zotune said on stderr; torchrun has much to say of its own."""
    return [line for line in done.stderr.splitlines() if line.startswith("zotune:")]


def exit_codes(done: subprocess.CompletedProcess[str]) -> set[int]:
    """Of the workers that torchrun reports as failed, but for those that it has ended itself."""
    lines = [
        line.split(":")[1].split("(")[0] for line in done.stderr.splitlines() if line.strip().startswith("exitcode")
    ]
    return {int(code) for code in lines} - {-15, -9}
