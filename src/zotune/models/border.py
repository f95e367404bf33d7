"""Files that another library reads for us: whatever it raises is one line that names the file and what it looks like."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from zotune.errors import InputError

# What loaders of models, tokenizers and adapters open in a folder, by kind of file.
TEXTS = ("*config.json", "tokenizer.json", "*.index.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")
OTHERS = ("*.safetensors", "*.bin", "*.gguf", "*.model", "merges.txt", "vocab.txt")
STATES = ("trainer_state.json", "*.pt", "*.pth")  # and of a checkpoint to go on from
PICKLES = (".bin", ".pt", ".pth")
POINTER = b"version https://git-lfs"
WEB_PAGE = "is a web page; fetch the file again"
OURS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM)  # the machine's fault, not the file's
PICKLED = "pickled weights hold more than tensors, which is not read"


@contextmanager
def reading(what: str, place: str | Path | None = None, said: str = "") -> Iterator[None]:
    """Raises InputError, one line that begins with `what`, for anything that a library raises inside but a lack of memory, or a
    disk that fails.

    place: the file, folder or hub name that it reads. A file there that is damaged is named; else what the library says is told,
    behind `said`.
    """
    try:
        yield
    except Exception as error:
        if not tells_of_input(error):
            raise
        found = damaged(place) if place is not None else None
        if found is None and isinstance(error, pickle.UnpicklingError):
            found = PICKLED  # torch's own words recommend to unpickle it
        raise InputError(f"{what}: {found or said + first_line(error)}") from error


def tells_of_input(error: Exception) -> bool:
    """Whether an exception that a library raises while it reads says something of what it reads, and says it for the first time."""
    machine = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or getattr(error, "errno", None) in OURS
    return not machine and not isinstance(error, InputError)


def first_line(error: BaseException) -> str:
    """What an exception says, in a line: two of its lines where the first introduces the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"KeyError: {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def damaged(place: str | Path) -> str | None:
    """The first file there that is not what its name says, and what it looks like instead."""
    path = Path(place).expanduser()
    if not path.exists():
        found = _cached(str(place))
        if found is None:
            return None
        path = found
    files = (
        [path] if path.is_file() else sorted(file for kind in (*TEXTS, *OTHERS, *STATES) for file in path.glob(kind))
    )
    for file in files:
        try:
            if file.is_file() and (looks := _looks(file)) is not None:
                return f"{file.name} {looks}"
        except OSError as error:
            return f"{file.name} cannot be read ({os.strerror(error.errno or 0)})"
    if path.is_dir():
        for index in path.glob("*.index.json"):
            named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
            if lacking := sorted(name for name in named if not (path / name).is_file()):
                return f"{index.name} names {lacking[0]}, which is not there ({len(lacking)} of {len(named)} files)"
    return None


def _cached(name: str) -> Path | None:
    """The folder of a hub name's files on this machine."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of a repository
        return None
    return Path(found).parent if isinstance(found, str) else None


def _looks(file: Path) -> str | None:
    """What a damaged file looks like, and what to do; None of a sound one."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(256)
    if not size:
        return "is empty; fetch it again"
    if found := stands_in(start):
        return found
    if start.lstrip()[:1] == b"<" and file.suffix in (".json", ".safetensors", ".bin", ".gguf"):
        return WEB_PAGE
    if file.suffix == ".json":
        return _looks_json(file)
    if file.suffix == ".safetensors":
        return _looks_safetensors(file, size)
    if file.suffix in PICKLES and start.startswith(b"PK") and not zipfile.is_zipfile(file):
        return "is cut; fetch it again"
    if file.suffix in PICKLES and start[:1] not in (b"P", b"\x80"):
        return "holds no pickled tensors; fetch it again"
    if file.suffix == ".gguf" and not start.startswith(b"GGUF"):
        return "is no GGUF file; fetch it again"
    return None


def stands_in(start: bytes) -> str | None:
    """What stands in a file's place, by how it begins: a git-lfs pointer or a web page."""
    if start.startswith(POINTER):
        return "is a git-lfs pointer, not the file itself; run git lfs pull"
    if re.match(rb"\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        return WEB_PAGE
    return None


def _looks_json(file: Path) -> str | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return f"is cut, or no JSON (line {error.lineno}); fetch it again"
    except (UnicodeDecodeError, RecursionError):
        return "is no JSON; fetch it again"
    return None if isinstance(value, dict) else "is JSON, but no object; fetch it again"


def _looks_safetensors(file: Path, size: int) -> str | None:
    with open(file, "rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
        if size < 8 or header > 100_000_000:  # more than safetensors itself would read
            return "is no safetensors file; fetch it again"
        if header > size - 8:
            return f"is cut: {size} bytes, its header alone has {header + 8}; fetch it again"
        try:
            tensors = json.loads(opened.read(header))
            ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
            whole = 8 + header + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return "is no safetensors file; fetch it again"
    return None if whole == size else f"is cut, or was written to: {size} bytes of {whole}; fetch it again"
