"""What may happen to a process and to the disk under it: faults at one call, chosen by its number.

`Calls` wraps the ways in which a run writes (Python's files, the functions of os, torch.save, safetensors) for the paths of one
folder and counts them. A `Fault` says at which call what happens. Both are for a process of their own: nothing is put back.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import os
import random
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DELETES = ("unlink", "rmdir", "replace")  # what also works on a full disk
POWER = ("undone", "named", "zeros", "torn")


@dataclass(frozen=True)
class Fault:
    """At call `at` (from 1; 0 for never):

    kill: SIGKILL before the call; half: in its middle, if it is a write. enospc: it fails, and so does each later one that needs
    room; short: half of it is written, then as enospc. eio: it fails, once. A power loss, and what the disk keeps of what no
    fsync was waited for: undone (nothing), named (names, no bytes), zeros (names and sizes), torn (names and a part of the bytes).
    folder: whose calls count. report: a file for the names of the calls, and the number of records at the power loss.
    """

    folder: str
    at: int = 0
    kind: str = "kill"
    report: str = ""

    def __call__(self) -> Calls:
        return Calls(self)


class Calls:
    def __init__(self, fault: Fault) -> None:
        self.fault, self.root, self.names = fault, os.path.realpath(fault.folder), []
        self.disk = Disk(self.root) if fault.kind in POWER else None
        self.full = False
        self._wrap()

    def report(self, **more: Any) -> None:
        if self.fault.report:
            Path(self.fault.report).write_text(json.dumps({"calls": self.names, **more}))

    def call(self, name: str, path: Any, do: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Count it, and do it unless its time has come."""
        fault = self.fault
        self.names.append(f"{name} {os.path.relpath(path, self.root)}")
        if len(self.names) == fault.at:
            if fault.kind in POWER:
                self.fault = Fault(fault.folder, 0, "kill", fault.report)  # what follows is ours
                self.report(records=_records(self.root))
                assert self.disk is not None
                self.disk.lose_power(fault.kind, random.Random(fault.at))
            if fault.kind in ("half", "short") and half is not None:
                half()
            if fault.kind in ("kill", "half", *POWER):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.kind == "eio":
                raise self._error(errno.EIO, name)
            self.full = True
        if self.full and name not in DELETES:
            raise self._error(errno.ENOSPC, name)
        return do()

    def _error(self, number: int, name: str) -> Exception:
        """As the writer says it: torch and safetensors have exceptions of their own."""
        if name == "torch.save":
            return RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")
        if name == "safetensors":
            from safetensors import SafetensorError

            return SafetensorError(f'I/O error: Os {{ code: {number}, message: "{os.strerror(number)}" }}')
        return OSError(number, os.strerror(number))

    def _inside(self, path: Any) -> str | None:
        """The path, if it is of the folder."""
        if isinstance(path, int):
            path = _opened(path)
        full = os.path.abspath(os.fsdecode(path))
        return full if full == self.root or full.startswith(self.root + os.sep) else None

    def _wrap(self) -> None:
        import safetensors.torch
        import torch

        real_open = io.open

        def opened(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **named: Any) -> Any:
            path = None if isinstance(file, int) or not set(mode) & set("wxa+") else self._inside(file)
            if path is None:
                return real_open(file, mode, buffering, *text, **named)
            raw = self.call("open", path, lambda: Raw(path, mode.replace("b", "").replace("t", ""), calls=self))
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **named)

        builtins.open = io.open = opened  # type: ignore[assignment]

        def wrap(name: str, shown: str = "", target: int = 0) -> None:
            real = getattr(os, name)

            def wrapped(*args: Any, **named: Any) -> Any:
                path, at = args[target], named.get("dir_fd")
                if at is not None:
                    path = os.path.join(_opened(at), path)
                path = self._inside(path)
                nothing = (name == "open" and not args[1] & os.O_CREAT) or (
                    name == "mkdir" and os.path.isdir(path or "")
                )
                if path is None or nothing:
                    return real(*args, **named)
                half = (lambda: real(args[0], args[1][: len(args[1]) // 2], *args[2:])) if name == "pwrite" else None

                def do() -> Any:
                    done = real(*args, **named)
                    if name == "fsync" and self.disk is not None:
                        self.disk.synced(path)
                    return done

                return self.call(shown or name, path, do, half)

            setattr(os, name, wrapped)

        for name in ("fsync", "pwrite", "mkdir", "unlink", "rmdir", "open", "truncate", "ftruncate"):
            wrap(name)
        wrap("remove", "unlink")
        wrap("replace", target=1)
        wrap("rename", "replace", target=1)

        def whole(module: Any, name: str, shown: str, target: int) -> None:
            """A file that C++ or Rust writes, as one call."""
            real = getattr(module, name)

            def wrapped(*args: Any, **named: Any) -> Any:
                path = None if not isinstance(args[target], (str, os.PathLike)) else self._inside(args[target])
                if path is None:
                    return real(*args, **named)

                def half() -> None:
                    real(*args, **named)
                    os.truncate(os.open(path, os.O_WRONLY), os.path.getsize(path) // 2)

                return self.call(shown, path, lambda: real(*args, **named), half)

            setattr(module, name, wrapped)

        whole(torch, "save", "torch.save", 1)
        whole(safetensors.torch, "serialize_file", "safetensors", 1)


class Raw(io.FileIO):
    def __init__(self, path: str, mode: str, calls: Calls) -> None:
        self._calls, self._path = None, path
        super().__init__(path, mode)
        self._calls = calls

    def write(self, data: Any) -> int:
        done = super().write
        data = bytes(data)
        return self._calls.call("write", self._path, lambda: done(data), lambda: done(data[: len(data) // 2]))

    def truncate(self, size: int | None = None) -> int:
        done = super().truncate
        return self._calls.call("truncate", self._path, lambda: done(size))


class Disk:
    """What surely is on the disk: of a file its bytes at its last fsync, of a folder its names at its last fsync."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.held: dict[int, int] = {}  # inode → descriptor, so that no number is used again
        self.bytes: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        if os.path.isdir(root):
            for folder, _, files in os.walk(root):
                for name in files:
                    self.synced(os.path.join(folder, name))
                self.synced(folder)

    def synced(self, path: str) -> None:
        inode = self._hold(path)
        if os.path.isdir(path):
            self.names[inode] = {entry.name: self._hold(entry.path) for entry in os.scandir(path)}
        else:
            self.bytes[inode] = Path(path).read_bytes()

    def _hold(self, path: str) -> int:
        inode = os.stat(path).st_ino
        if inode not in self.held:
            self.held[inode] = os.open(path, os.O_RDONLY)
        return inode

    def lose_power(self, kind: str, draw: random.Random) -> None:
        """Put the folder into the state that a power loss may leave."""
        if not os.path.isdir(self.root):
            return
        tree = self._synced_tree(self._hold(self.root)) if kind == "undone" else self._named(self.root, kind, draw)
        shutil.rmtree(self.root)
        _write(self.root, tree)

    def _synced_tree(self, inode: int) -> Any:
        if stat.S_ISDIR(os.fstat(self.held[inode]).st_mode):
            return {name: self._synced_tree(i) for name, i in self.names.get(inode, {}).items()}
        return self.bytes.get(inode, b"")

    def _named(self, path: str, kind: str, draw: random.Random) -> Any:
        if os.path.isdir(path):
            return {e.name: self._named(e.path, kind, draw) for e in sorted(os.scandir(path), key=lambda e: e.name)}
        now = Path(path).read_bytes()
        kept = self.bytes.get(os.stat(path).st_ino, b"")
        if now.startswith(kept):
            behind = now[len(kept) :]
            if kind == "zeros":
                kept += bytes(len(behind))
            elif kind == "torn":
                kept += behind[: draw.randint(0, len(behind))]
        return kept


def _opened(descriptor: int) -> str:
    """The path that was opened."""
    if sys.platform == "darwin":
        return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _write(path: str, tree: Any) -> None:
    if isinstance(tree, bytes):
        Path(path).write_bytes(tree)
    else:
        os.makedirs(path, exist_ok=True)
        for name, item in tree.items():
            _write(os.path.join(path, name), item)


def _records(root: str) -> int:
    from zotune.record.trajectory import read_file

    try:
        return len(read_file(os.path.join(root, "trajectory.zot")).records)
    except ValueError:
        return 0


@dataclass(frozen=True)
class KilledAtStep:
    """SIGKILL before or after the record of a step (from 1) is written."""

    step: int
    when: str

    def __call__(self) -> None:
        from zotune.record.trajectory import TrajectoryWriter

        append = TrajectoryWriter.append

        def fatal(writer: Any, record: Any) -> None:
            if record.step + 1 == self.step:
                if self.when == "after":
                    append(writer, record)
                os.kill(os.getpid(), signal.SIGKILL)
            append(writer, record)

        TrajectoryWriter.append = fatal  # type: ignore[method-assign]


@dataclass(frozen=True)
class Limit:
    """No file may grow beyond so many bytes: every writer, in whatever language, is refused by the system itself."""

    size: int

    def __call__(self) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))
