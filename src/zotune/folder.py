"""A run's folder: one run, one writer, nothing overwritten unasked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from zotune.errors import InputError

CHECKPOINT = "checkpoint-"
CALIBRATION = "calibration"  # what masks of wanda were made from, which a replay needs
OWN = ("config.yaml", "metrics.jsonl", "result.json", "trajectory.zot", CALIBRATION, "model", "progress.json", ".lock")
# Keys that may differ between a run and its resumption: they name no part of what is computed.
FREE = {"output", "resume", "overwrite", "dry_run", "report_to", "log_every", "device"}


class RunFolder:
    """config.yaml, metrics.jsonl, result.json, trajectory.zot, model/, calibration/ (where masks need it), and while it
    runs checkpoints and progress.json."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def check(self, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that holds another run or somebody's files. Changes nothing."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"--output {self.path}: is a file; name a folder")
        present = [p.name for p in self.path.iterdir() if p.name != ".lock"]
        if not present:
            return
        foreign = [n for n in present if n not in OWN and not n.startswith(CHECKPOINT)]
        if not (self / "config.yaml").is_file() or (overwrite and foreign):
            raise InputError(
                f"--output {self.path}: holds files that are not a run's ({', '.join(sorted(foreign or present)[:3])}); "
                "name another folder"
            )
        if overwrite:
            return
        if not resume:
            raise InputError(f"--output {self.path}: holds a run; go on with --resume, or start anew with --overwrite")
        old = yaml.safe_load((self / "config.yaml").read_text())
        changed = [k for k in config if k not in FREE and old.get(k) != config[k]]
        if changed:
            said = ", ".join(f"{k} was {old.get(k)!r}, is {config[k]!r}" for k in changed)
            raise InputError(f"--output {self.path}: holds a run of other options ({said}); --resume changes none")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; a second process is refused at once."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise InputError(f"--output {self.path}: another zotune is running in it") from None
        except OSError as error:
            raise InputError(f"--output {self.path}: cannot be written ({error.strerror})") from None
        try:
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Delete the run that is here."""
        for path in self.path.iterdir():
            if path.name == ".lock":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write_config(self, config: Mapping[str, Any]) -> None:
        write_atomically(self / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end (the Trainer writes its state last)."""
        whole = []
        for path in self.path.glob(f"{CHECKPOINT}*"):
            try:
                state = json.loads((path / "trainer_state.json").read_text())
                whole.append((int(state["global_step"]), path))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return max(whole)[1] if whole else None

    def drop_checkpoints(self) -> None:
        for path in self.path.glob(f"{CHECKPOINT}*"):
            shutil.rmtree(path)
        (self / "progress.json").unlink(missing_ok=True)

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self / name).read_text())
        except (OSError, ValueError):
            return {}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_atomically(self / name, json.dumps(value, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
