"""Blocks that stay in their checkpoint's files: where their bytes lie, and threads that read them ahead of a forward."""

from __future__ import annotations

import contextlib
import os
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.streaming.plans import bytes_of

ROOMS = 2  # blocks in page-locked memory: one is read while the other crosses the bus
READERS = 4  # threads that read at a time: one alone does not keep a fast disk, or the page cache, busy
AT_ONCE = 32 << 20  # bytes of a read


class Place(NamedTuple):
    """size bytes of a file from an offset on."""

    path: str
    offset: int
    size: int


def places(tensors: Sequence[Tensor]) -> list[Place | None]:
    """Where each tensor's bytes lie in a file, of those that are mapped from one and as it has them; None of all others.

    safetensors are mapped as they are loaded, and what is not converted stays so. Which file and where, and that nobody has
    written into it, the kernel says (/proc/self/smaps, of Linux).
    """
    with contextlib.suppress(OSError):
        maps = _mapped(Path("/proc/self/smaps").read_text())
        firsts = [first for first, *_ in maps]
        return [_place(maps[bisect_right(firsts, t.data_ptr()) - 1], t) for t in tensors]
    return [None] * len(tensors)


def _place(region: tuple[int, int, int, str, bool], tensor: Tensor) -> Place | None:
    first, last, offset, path, whole = region
    begin, size = tensor.data_ptr(), bytes_of(tensor)
    inside = first <= begin and begin + size <= last
    return Place(path, offset + begin - first, size) if inside and whole and path.startswith("/") else None


def _mapped(table: str) -> list[tuple[int, int, int, str, bool]]:
    """Of each region: its addresses, the file's offset at the first, the file, and whether it is as the file has it."""
    found: list[tuple[int, int, int, str, bool]] = []
    for line in table.splitlines():
        words = line.split(None, 5)
        if not words[0].endswith(":"):
            first, last = (int(word, 16) for word in words[0].split("-"))
            path = words[5] if len(words) > 5 else ""
            found.append((first, last, int(words[2], 16), path, not path.endswith("(deleted)")))
        elif words[0] == "Anonymous:" and int(words[1]):  # pages that were written into are no longer the file's
            found[-1] = (*found[-1][:4], False)
    return found


class Reader:
    """Blocks from files into page-locked memory, and from there to the device, in the order in which they are asked for."""

    def __init__(self, size: int, device: torch.device, stream: Any) -> None:
        """size: of the largest block. stream: of copies to the device; None where that is the host itself."""
        self._stream = stream
        self._rooms = [torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(ROOMS)]
        self._crossed: list[Any] = [None] * ROOMS  # the event of the last copy out of each
        self._turn = 0
        self._files: dict[str, int] = {}
        self._order = ThreadPoolExecutor(1, "zotune-blocks")
        self._readers = ThreadPoolExecutor(READERS, "zotune-reads")
        self.close = weakref.finalize(self, _close, self._order, self._readers, self._files)

    def bring(
        self, wanted: Sequence[Place], offsets: Sequence[int], memory: Tensor, before: Sequence[Any]
    ) -> Future[Any]:
        """The event behind which they are in the device's memory, each from its offset on. before: what the copy waits for."""
        return self._order.submit(self._bring, wanted, offsets, memory, before)

    @torch.no_grad()
    def _bring(self, wanted: Sequence[Place], offsets: Sequence[int], memory: Tensor, before: Sequence[Any]) -> Any:
        self._turn = (self._turn + 1) % ROOMS
        room, crossed = self._rooms[self._turn], self._crossed[self._turn]
        if crossed is not None:
            crossed.synchronize()
        for place in wanted:
            if place.path not in self._files:
                self._files[place.path] = os.open(place.path, os.O_RDONLY)
        bytes_: Any = memoryview(room.numpy())  # type: ignore[arg-type]
        reads = [
            self._readers.submit(
                self._read, place.path, place.offset + at, bytes_[to + at : to + min(at + AT_ONCE, place.size)]
            )
            for place, to in zip(wanted, offsets, strict=True)
            for at in range(0, place.size, AT_ONCE)
        ]
        for read in reads:
            read.result()
        last = offsets[-1] + wanted[-1].size
        if self._stream is None:
            memory[:last].copy_(room[:last])
            return None
        with torch.cuda.stream(self._stream):
            for event in before:
                self._stream.wait_event(event)
            memory[:last].copy_(room[:last], non_blocking=True)
            self._crossed[self._turn] = self._stream.record_event()
        return self._crossed[self._turn]

    def _read(self, path: str, offset: int, into: memoryview) -> None:
        while into:
            count = os.preadv(self._files[path], [into], offset)
            if not count:
                raise OSError(f"{path}: shorter than it was when the model was loaded")
            into, offset = into[count:], offset + count


def _close(order: ThreadPoolExecutor, readers: ThreadPoolExecutor, files: dict[str, int]) -> None:
    order.shutdown()
    readers.shutdown()
    for file in files.values():
        os.close(file)
    files.clear()
