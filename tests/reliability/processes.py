"""`zotune` in processes of its own, forked from a server that has torch loaded; and what two runs are compared by."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
# Only imports: a process that has run OpenMP threads cannot be forked.
SERVER.set_forkserver_preload(
    ["zotune.cli.train", "zotune.noise.cpu", "transformers.models.llama.modeling_llama", "peft", "accelerate", "faults"]
)


@dataclass
class Done:
    """How a process ended. code: negative for a signal. said: what it wrote to the terminal."""

    code: int
    said: str


class Zotune:
    """A running command. arm: called in the child before the command, to set up its fate; its result is kept alive."""

    def __init__(self, argv: list[str], said: Path, arm: Any = None) -> None:
        self.said = said
        said.unlink(missing_ok=True)
        _ended(said).unlink(missing_ok=True)
        self.process = SERVER.Process(target=_main, args=(argv, str(said), arm))
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()

    def end(self, seconds: float = 120) -> Done:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self.said.read_text())
        code = self.process.exitcode
        if code == 255:  # the fork server lost it: no command ends so
            code = int(_ended(self.said).read_text()) if _ended(self.said).exists() else -9
        self.process.close()
        return Done(code, self.said.read_text() if self.said.exists() else "")


def zotune(argv: list[str], said: Path, arm: Any = None) -> Done:
    return Zotune(argv, said, arm).end()


def _main(argv: list[str], said: str, arm: Any) -> None:
    terminal = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    from zotune.cli.app import run

    gc.freeze()  # what the server imported stays: the collector, which each run calls, passes over it
    armed = arm() if arm is not None else None
    code: int | None = 70
    try:
        code = run(argv)
    finally:
        if armed is not None:
            armed.report()
        if code != 70:
            sys.stdout.flush()
            _ended(Path(said)).write_text(str(code))
            os._exit(code)


def _ended(said: Path) -> Path:
    """Where a process that was not killed leaves its exit code."""
    return said.with_name(f"{said.name}.code")


def outcome(folder: Path) -> dict[str, Any]:
    """All that two runs of the same options have in common, to the bit: the rest is time, memory and resumptions."""
    apart = ("wall_seconds", "peak_memory_bytes", "evaluation_peak_bytes", "resumed_at")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    trajectory = folder / "trajectory.zot"
    return {
        "weights": {p.name: p.read_bytes() for p in sorted(folder.glob("model/*.safetensors"))},
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != ".lock"),
        "metrics": [{k: v for k, v in line.items() if k not in ("seconds", "step_seconds")} for line in lines],
        "trajectory": trajectory.read_bytes() if trajectory.exists() else None,
        "result": {k: v for k, v in result.items() if k not in apart},
    }


def assert_same(folder: Path, whole: dict[str, Any]) -> None:
    """Tolerance zero."""
    found = outcome(folder)
    for part in ("files", "metrics", "result"):
        assert found[part] == whole[part], part
    for part in ("trajectory", "weights"):
        assert found[part] == whole[part], f"{part} differ"
    assert found["weights"]


def number(name: str, default: int) -> int:
    """A soak's count, from the environment: ZOTUNE_SOAK_NAME."""
    return int(os.environ.get(f"ZOTUNE_SOAK_{name}", default))
