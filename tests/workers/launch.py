"""N workers by torchrun, what they saw, and one process that does the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def told_by_two(script: str, folder: Path, says: str = "") -> list[dict[str, Any]]:
    """What each of two workers saw that run a script beside this file, of its RANK.json in the folder. says: on stderr, too."""
    done = torchrun(2, HERE / script, folder)
    assert done.returncode == 0, done.stderr
    assert says in done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def assert_said_once(told: list[dict[str, Any]], name: str, code: int, message: str) -> None:
    """That two workers end a run by one code, and the first alone says why."""
    first, second = told[0][name], told[1][name]
    assert message in first["message"]
    assert [first["code"], second["code"]] == [code, code]
    assert second["kind"] == "Elsewhere"  # which says nothing


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What zotune said on stderr; torchrun has much to say of its own."""
    return [line for line in done.stderr.splitlines() if line.startswith("zotune:")]


def exit_codes(done: subprocess.CompletedProcess[str]) -> set[int]:
    """Of the workers that torchrun reports as failed, but for those that it has ended itself."""
    lines = [
        line.split(":")[1].split("(")[0] for line in done.stderr.splitlines() if line.strip().startswith("exitcode")
    ]
    return {int(code) for code in lines} - {-15, -9}
