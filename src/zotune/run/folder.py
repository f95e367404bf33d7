"""A run's folder: one run, one writer, nothing overwritten unasked, and nothing half written under its own name."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from zotune.errors import InputError, StorageError
from zotune.files.reading import load_yaml

CHECKPOINT = "checkpoint-"
CALIBRATION = "calibration"  # what masks of wanda were made from, which a replay needs
STAGING = ".tmp"  # what is being written or deleted; a suffix too, of single files
CARD = "README.md"
STEPS, COMPLETIONS = "steps.jsonl", "completions.jsonl"  # of a run on rewards
OWN = (
    "config.yaml", "metrics.jsonl", "result.json", "predictions.jsonl", "report.html", "trajectory.zot", CALIBRATION,
    "model", CARD, "progress.json", STEPS, COMPLETIONS,
)  # fmt: skip
# Keys that may differ between a run and its resumption: they name no part of what is computed.
FREE = {
    "output",
    "resume",
    "overwrite",
    "dry_run",
    "report_to",
    "device",
    "max_gpu_memory",
    "max_host_memory",
    "save_every",
    "keep",
    "sync_every",
    "worker_timeout",
}
BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # the disk's fault, not the folder's


class RunFolder:
    """config.yaml, metrics.jsonl, result.json, predictions.jsonl, trajectory.zot with a README.md, model/,
    calibration/ (where masks need it), and while it runs checkpoints and progress.json."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def staging(self) -> Path:
        return self / STAGING

    def check(self, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that holds another run or somebody's files. Changes nothing."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"--output {self.path}: is a file; name a folder")
        try:
            present = [p.name for p in self.path.iterdir() if p.name != ".lock" and not p.name.endswith(STAGING)]
        except OSError as error:
            raise InputError(f"--output {self.path}: cannot be read ({error.strerror})") from None
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
        old = self._config()
        changed = [change for k in config if k not in FREE for change in _changes(k, old.get(k), config[k])]
        if changed:
            said = ", ".join(f"{k} was {was!r:.80}, is {now!r:.80}" for k, was, now in changed)
            raise InputError(f"--output {self.path}: holds a run of other options ({said}); --resume changes none")

    def recorded(self, option: str) -> Any:
        """What config.yaml holds of an option; None where there is none yet."""
        return self._config().get(option) if (self / "config.yaml").is_file() else None

    def _config(self) -> dict[str, Any]:
        old = load_yaml(self / "config.yaml", str(self / "config.yaml"))
        if not isinstance(old, dict):
            raise InputError(f"{self / 'config.yaml'}: not the options of a run; start anew with --overwrite")
        return old

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; a second process is refused at once. One that was made for it, and got nothing, is gone again."""
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            sync(self.path.parent)
            lock = FileLock(self / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise InputError(f"--output {self.path}: another zotune is running in it") from None
        except OSError as error:
            if error.errno in BROKEN:
                raise
            raise InputError(f"--output {self.path}: cannot be written ({error.strerror}); name another") from None
        try:
            yield
        finally:
            with suppress(OSError):
                if made and [p.name for p in self.path.iterdir()] == [".lock"]:
                    (self / ".lock").unlink()
                    self.path.rmdir()
            lock.release()

    @contextmanager
    def storing(self) -> Iterator[None]:
        """A failure of the disk under this folder as one line: what failed, and how to go on."""
        try:
            yield
        except OSError as error:
            if not self._under(error):
                raise
            said = error.strerror or str(error)
            raise StorageError(
                f"--output {self.path}: {said}; what was saved is whole: clear the cause, then go on with the same "
                "command and --resume"
            ) from error

    def _under(self, error: OSError) -> bool:
        """Whether the folder's disk has failed, rather than a network, or a file elsewhere."""
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
            return isinstance(error, StorageError)
        named = isinstance(error.filename, (str, os.PathLike))
        return not named or Path(error.filename).absolute().is_relative_to(self.path.absolute())

    def clear(self) -> None:
        """Delete the run that is here. config.yaml goes last: until then it is a run's folder."""
        first = sorted(self.path.iterdir(), key=lambda p: (p.name == "config.yaml", p.name != "result.json"))
        for path in first:
            if path.name != ".lock":
                self._remove(path)
        sync(self.path)

    def tidy(self) -> None:
        """Delete what a killed process was writing or deleting."""
        for path in self.path.glob(f"*{STAGING}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write_config(self, config: Mapping[str, Any]) -> None:
        write_atomically(self / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """A path to write a folder to, which gets its name when all of it is on the disk: it is there whole or not at all."""
        path = self.staging / name
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        try:
            yield path
        except (SafetensorError, RuntimeError) as error:  # how torch and safetensors say that a write has failed
            raise StorageError(f"{name}: {str(error).splitlines()[0]}") from error
        _sync_tree(path)
        self._remove(self / name)
        os.replace(path, self / name)
        sync(self.path)

    def _remove(self, path: Path) -> None:
        """A folder leaves its name at once, its files after that."""
        if path.is_dir() and path != self.staging:
            self.staging.mkdir(exist_ok=True)
            aside = self.staging / f"old-{path.name}"
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(path, aside)
            path = aside
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Steps and folders, the oldest first."""
        found = []
        for path in self.path.glob(f"{CHECKPOINT}*"):
            try:
                found.append((int(json.loads((path / "trainer_state.json").read_text())["global_step"]), path))
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
        return sorted(found)

    def last_checkpoint(self) -> Path | None:
        return max(self.checkpoints(), default=(0, None))[1]

    def keep_checkpoints(self, newest: int, best: int | None) -> None:
        """Delete the others."""
        for step, path in self.checkpoints()[:-newest]:
            if step != best:
                self._remove(path)

    def finish(self, keep_checkpoints: bool) -> None:
        """Delete what only a run that goes on needs."""
        if not keep_checkpoints:
            for path in self.path.glob(f"{CHECKPOINT}*"):
                self._remove(path)
        (self / "progress.json").unlink(missing_ok=True)
        self.tidy()

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_atomically(self / name, as_json(value, indent=2) + "\n")


def _changes(name: str, was: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """What differs, of two mappings key by key."""
    if was == now:
        return []
    if not isinstance(was, Mapping) or not isinstance(now, Mapping):
        return [(name, was, now)]
    return [change for k in {**was, **now} for change in _changes(f"{name}.{k}", was.get(k), now.get(k))] or [
        (name, was, now)
    ]


def check_model_folder(path: Path, overwrite: bool) -> None:
    """Refuse to write a model where something is that is not to be lost; overwrite: unless it is a saved model."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise InputError(f"--output {path}: not empty; name another folder, or pass --overwrite")
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"--output {path}: --overwrite replaces a saved model, which this is not; name another folder")


@contextmanager
def model_folder(path: Path) -> Iterator[Path]:
    """A path to write a model to, which takes the place of what is at `path` when all of it is on the disk."""
    place = path.absolute()  # a dot has no name
    temporary = place.with_name(f".{place.name}{STAGING}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _sync_tree(temporary)
        if place.exists():
            shutil.rmtree(place)
        os.replace(temporary, place)
        sync(place.parent)
    except InputError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        said = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(f"--output {path}: cannot be written ({said})") from error


def as_json(value: Any, indent: int | None = None) -> str:
    """A number that is not finite is null: JSON has none.

    >>> as_json({"loss": float("nan"), "g": [1.0, float("inf")]})
    '{"loss": null, "g": [1.0, null]}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}{STAGING}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    for folder, _, files in os.walk(path):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))
