"""The record of a run, `trajectory.zot`: with its base model, all that it takes to rebuild the weights.

A step of a zeroth-order run is a few scalars, so 20,000 steps fit in 420 kB. All numbers are little-endian.

    ======  =========  ===========================================================================
    offset  type       file
    ======  =========  ===========================================================================
    0       8 bytes    magic, 89 5A 4F 54 0D 0A 1A 0A: text-mode copies and cut copies show at once
    8       u32        format version, 1
    12      u32        N, the header's length, at most 65,536
    16      N bytes    header: an object in canonical JSON (see `_json`), UTF-8
    16 + N  u32        CRC-32 of all bytes before it
    20 + N  records    R bytes each, the first of step 0; R follows from the header
    ======  =========  ===========================================================================

    ======  =========  ===========================================================================
    offset  type       record: P pairs (seed, projected gradient), G parameter groups
    ======  =========  ===========================================================================
    0       u8         flags. bit 0: skipped, nothing applied; 1: end marker; 2: forced fold;
                       bits 4-5: choice of a conservative step, 0 to 2; the others are 0
    1       f32        loss at θ + ε·z, mean over the batch and the pairs
    5       f32        loss at θ − ε·z
    9       f32 × P    g, the projected gradient of each pair
            f32 × G    lr, if the header's layout names it (else the header holds it)
            f32 × G    decay, likewise
            f32 × M    of a run on rewards (layout "rewards"): each member's reward, in the order of the places
    R − 4   u32        CRC-32 of the record's bytes before it, seeded by the CRC-32 that precedes it
    ======  =========  ===========================================================================

The seed makes each check sum depend on everything before it: a swapped, dropped, doubled or foreign record is seen.
A finished run ends with an end marker: a record with only bit 1 set, the chosen step as u32 at offset 1, and zeros.
So R = 17 + 4·P at least (with lr). What a later version adds to records gets a name in `layout`, what changes the
meaning of a record a name in `required`: a reader refuses the names that it does not know.

Steps count from 0 in records, as in the noise. "Step n" of weights (`until`, chosen, resumed) is after n records.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from zotune.errors import InputError
from zotune.record.scalars import coefficient, float32

MAGIC = b"\x89ZOT\r\n\x1a\n"
VERSION = 1
MAX_HEADER = 1 << 16  # bytes of JSON
MAX_DEPTH = 16  # of nested JSON
MAX_VALUES = 1 << 16  # pairs × parameter groups
FEATURES: frozenset[str] = frozenset()  # names that `required` may hold
LAYOUT = ("lr", "decay")  # names that `layout` may hold, in the order of the bytes: a number a parameter group
REWARDS = "rewards"  # the one behind them: a number a member

_SKIPPED, _MARKER, _FOLDED, _CHOICE = 1, 2, 4, 4  # the last one is a shift
_PREAMBLE = struct.Struct("<8sII")
_U32 = struct.Struct("<I")


class TrajectoryError(InputError):
    """Bytes that are not a whole trajectory. steps: how many steps before the damage can be read, if any can."""

    def __init__(self, message: str, steps: int | None = None) -> None:
        super().__init__(message)
        self.steps = steps


@dataclass(frozen=True)
class Header:
    """What holds for a whole run.

    method, method_options: the preset's name and its options. seed: the run's; those of a step follow from it.
    planned_steps: the records of a run that was not stopped early. pairs: P, queries × groups of rows.
    groups: G, the parameter groups. members: M, the rewards of a record where layout names "rewards", else 0.
    layout: which of "lr" and "decay" each record holds; the others are constant, here,
    one float32 per parameter group, () for zeros. base: name, revision, hash of the weights, GGUF file. versions:
    of zotune, torch, …. created: ISO 8601, or "". required: features without which a reader would misread the records.
    extra: top-level keys of the JSON that this version does not know; they are kept.

    Raises ValueError for a value of the wrong type or out of range.
    """

    noise_version: int
    direction: str
    method: str
    seed: int
    planned_steps: int
    pairs: int = 1
    groups: int = 1
    members: int = 0
    layout: tuple[str, ...] = ("lr",)
    lr: tuple[float, ...] = ()
    decay: tuple[float, ...] = ()
    method_options: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    engine: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    task: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    required: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            _require(type(value) is int and low <= value < high, name, value, f"a whole number in [{low}, {high})")
        for kind, names in _KINDS.items():
            for name in names:
                _require(isinstance(getattr(self, name), kind), name, getattr(self, name), f"a {kind.__name__}")
        for name, known in (("layout", frozenset((*LAYOUT, REWARDS))), ("required", FEATURES)):
            value = getattr(self, name)
            _require(_list_of(value, str) and len({*value}) == len(value), name, value, "a list of different names")
            _require(
                {*value} <= known, name, value, f"of the names that this version knows, {sorted(known)}; update zotune"
            )
            object.__setattr__(self, name, tuple(value))
        for name in LAYOUT:
            value = getattr(self, name)
            _require(_list_of(value, float, int), name, value, "a list of numbers")
            rounded = tuple(map(float32, value))
            _require(all(map(math.isfinite, rounded)), name, value, "finite in float32")
            sizes = {0} if name in self.layout else {0, self.groups}
            _require(len(rounded) in sizes, name, value, "one number per group; none if the records hold it")
            object.__setattr__(self, name, rounded)
        _require(
            (REWARDS in self.layout) == (self.members > 0),
            "members",
            self.members,
            "above 0 where rewards are recorded",
        )
        _require(self.pairs * self.groups <= MAX_VALUES, "pairs × groups", self.pairs * self.groups, f"≤ {MAX_VALUES}")
        clash = sorted(self.extra.keys() & {f.name for f in fields(self)})
        _require(not clash, "extra", clash, "free of the header's own names")

    @cached_property
    def body(self) -> struct.Struct:
        """A record without its check sum."""
        each_group = len({*self.layout} - {REWARDS})
        return struct.Struct(f"<B{2 + self.pairs + self.groups * each_group + self.members}f")

    @property
    def record_size(self) -> int:
        """R, in bytes."""
        return self.body.size + _U32.size

    def encode(self) -> bytes:
        """The file up to its first record."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        if not self.members:  # the header of a run without rewards is what it always was
            del values["members"]
        text = _json(values | self.extra)
        _require(len(text) <= MAX_HEADER, "the header", f"{len(text):,} bytes long", f"at most {MAX_HEADER:,}")
        data = _PREAMBLE.pack(MAGIC, VERSION, len(text)) + text
        return data + _U32.pack(zlib.crc32(data))

    def _held(self, name: str) -> tuple[float, ...]:
        """lr or decay where it is constant."""
        held: tuple[float, ...] = getattr(self, name)
        return held or (0.0,) * self.groups


_WHOLE = {
    "noise_version": (0, 1 << 32),
    "seed": (-(1 << 63), 1 << 64),
    "planned_steps": (0, 1 << 32),
    "pairs": (1, MAX_VALUES + 1),
    "groups": (1, MAX_VALUES + 1),
    "members": (0, MAX_VALUES + 1),
}
_KINDS: dict[type, tuple[str, ...]] = {
    str: ("direction", "method", "dtype", "engine", "task", "created"),
    dict: ("method_options", "base", "versions", "extra"),
}


@dataclass(frozen=True)
class Record:
    """What one step saw and applied; numbers are rounded to float32 when written.

    step: from 0. g: one per pair. lr, decay: one per parameter group. skipped: the losses were not finite, nothing was
    applied. folded: updates held back were folded here out of turn. choice: of a conservative step. rewards: one per member, NaN
    where it got none.
    """

    step: int
    loss_plus: float
    loss_minus: float
    g: tuple[float, ...]
    lr: tuple[float, ...]
    decay: tuple[float, ...]
    skipped: bool = False
    folded: bool = False
    choice: int = 0
    rewards: tuple[float, ...] = ()

    def encode(self, header: Header) -> bytes:
        """The record's bytes without its check sum. Raises ValueError where it does not fit the header."""
        where = f"step {self.step}'s "
        _require(len(self.g) == header.pairs, where + "g", self.g, f"{header.pairs} numbers, one per pair")
        _require(self.choice in (0, 1, 2), where + "choice", self.choice, "0, 1 or 2")
        values = [self.loss_plus, self.loss_minus, *self.g]
        for name in LAYOUT:
            value = getattr(self, name)
            _require(len(value) == header.groups, where + name, value, f"{header.groups} numbers, one per group")
            if name in header.layout:
                values += value
            else:
                same = tuple(map(float32, value)) == header._held(name)
                _require(same, where + name, value, f"the header's {header._held(name)}, or named in its layout")
        _require(len(self.rewards) == header.members, where + "rewards", self.rewards, f"{header.members} numbers")
        values += self.rewards
        flags = _SKIPPED * self.skipped | _FOLDED * self.folded | self.choice << _CHOICE
        return header.body.pack(flags, *map(float32, values))


def coefficients(record: Record, header: Header) -> tuple[tuple[float, ...], ...]:
    """The coefficient of each pair, by parameter group (G × P), as a step of ZO-SGD applied it; zeros if skipped."""
    if record.skipped:
        return ((0.0,) * header.pairs,) * header.groups
    return tuple(tuple(coefficient(lr, g, 1 / header.pairs) for g in record.g) for lr in record.lr)


@dataclass(frozen=True)
class Records:
    """The records of a verified file, decoded as they are asked for: nothing is kept but the file's bytes."""

    header: Header
    count: int
    start: int  # offset of the first
    data: bytes = field(repr=False)

    @property
    def end(self) -> int:
        """Offset behind the last."""
        return self.start + self.count * self.header.record_size

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(self.count))

    def __getitem__(self, index: int) -> Record:
        step, header = range(self.count)[index], self.header
        offset = self.start + step * header.record_size
        flags, plus, minus, *values = header.body.unpack_from(self.data, offset)
        parts = {name: header._held(name) for name in LAYOUT}
        at = header.pairs
        for name in filter(header.layout.__contains__, LAYOUT):
            parts[name] = tuple(values[at : at + header.groups])
            at += header.groups
        skipped, folded, choice = bool(flags & _SKIPPED), bool(flags & _FOLDED), flags >> _CHOICE
        return Record(
            step, plus, minus, tuple(values[: header.pairs]), parts["lr"], parts["decay"], skipped, folded, choice,
            tuple(values[at:]),
        )  # fmt: skip


@dataclass(frozen=True)
class Trajectory:
    """What a file holds. torn_bytes: of a last record that was not written to its end; they are cut from `records`.

    chosen_step: the step whose weights the run kept, once it has ended; None before.
    """

    header: Header
    records: Records
    torn_bytes: int = 0
    chosen_step: int | None = None

    @property
    def complete(self) -> bool:
        """The run has ended (before its planned steps if it was stopped early) and nothing of it is missing."""
        return self.chosen_step is not None


def read_file(path: str | os.PathLike[str], until: int | None = None) -> Trajectory:
    """`read` of a file; its errors, and those of the file system, are TrajectoryErrors that name the path."""
    try:
        return read(Path(path).read_bytes(), until)
    except OSError as error:
        raise TrajectoryError(f"{path}: cannot be read ({error.strerror})") from None
    except TrajectoryError as error:
        raise TrajectoryError(f"{path}: {error}", error.steps) from None


def read(data: bytes, until: int | None = None) -> Trajectory:
    """Verify a file's bytes. A pure function: any bytes give a Trajectory or a TrajectoryError.

    A last record that is cut, or whose check sum is wrong, is left out and counted in `torn_bytes`; damage with more
    bytes behind it is an error. until: read the first `until` steps and look at nothing behind them, so that the
    part before any damage can be had; whether the run ended is then not known (`chosen_step` None). Memory: data's own,
    the header's (at most 64 KiB of JSON), and one record.
    """
    header, start = _read_header(data)
    size, end, offset, steps, chosen = header.record_size, len(data), start, 0, None
    crc = _U32.unpack_from(data, start - 4)[0]
    while end - offset >= size and steps != until:
        body, behind = data[offset : offset + size - 4], end - offset - size
        crc = zlib.crc32(body, crc)
        if crc == _U32.unpack_from(data, offset + size - 4)[0]:
            fault = _fault(header, body, steps, chosen)
        elif behind:
            fault = f"its check sum is wrong, and {behind:,} bytes follow"
        else:
            break
        if fault:
            hint = f"fetch the file again, or read what is before with --until {steps}"
            raise TrajectoryError(f"step {steps} (byte {offset:,}): {fault}; {hint}", steps)
        if body[0] & _MARKER:
            chosen = _U32.unpack_from(body, 1)[0]
        else:
            steps += 1
        offset += size
    records = Records(header, steps, start, data)
    if until is None:
        return Trajectory(header, records, end - offset, chosen)
    if steps != until:
        raise TrajectoryError(f"step {until} was asked for, the file holds 0 to {steps}; try --until {steps}", steps)
    return Trajectory(header, records)


def _fault(header: Header, body: bytes, steps: int, chosen: int | None) -> str | None:
    """What is wrong with a record whose check sum is right."""
    flags = body[0]
    if chosen is not None:
        return "it stands behind the end marker"
    if flags & _MARKER:
        whole = flags == _MARKER and not any(body[5:]) and _U32.unpack_from(body, 1)[0] <= steps
        return None if whole else "its end marker is malformed"
    if steps >= header.planned_steps:
        return f"it is one more than the {header.planned_steps} steps planned"
    if flags & ~(_SKIPPED | _FOLDED | 3 << _CHOICE) or flags >> _CHOICE == 3:
        return f"its flags 0x{flags:02x} are not of this version"
    return None


def _read_header(data: bytes) -> tuple[Header, int]:
    """The header, and the offset of the first record."""
    if not data or data[:8] != MAGIC[: len(data)]:
        raise TrajectoryError("byte 0: not a trajectory (its first 8 bytes are others); name a trajectory.zot")
    _, version, length = _PREAMBLE.unpack(data[:16].ljust(16, b"\0"))
    start = _PREAMBLE.size + length + 4
    if len(data) >= 12 and version != VERSION:
        raise TrajectoryError(f"byte 8: format version {version}, this zotune reads {VERSION}; update zotune")
    if length > MAX_HEADER:
        raise TrajectoryError(f"byte 12: a header of {length:,} bytes, above {MAX_HEADER:,}; fetch the file again")
    if len(data) < start:
        raise TrajectoryError(f"byte {len(data)}: the file ends within its header, before any step; fetch it again")
    if zlib.crc32(data[: start - 4]) != _U32.unpack_from(data, start - 4)[0]:
        raise TrajectoryError(f"byte {start - 4}: the header's check sum is wrong; fetch the file again")
    try:
        return _parse(data[_PREAMBLE.size : start - 4]), start
    except (ValueError, RecursionError) as error:
        raise TrajectoryError(f"byte 16, the header: {error}; not written by this version of zotune") from None


def _parse(text: bytes) -> Header:
    values = json.loads(text.decode())
    if not isinstance(values, dict) or _json(values) != text:
        raise ValueError("not an object in canonical JSON (a doubled key, white space, …)")
    known = [f for f in fields(Header) if f.name != "extra"]
    missing = [f.name for f in known if f.name not in values and f.default is f.default_factory is MISSING]
    if missing:
        raise ValueError(f"no field {', '.join(missing)}")
    return Header(**{f.name: values.pop(f.name) for f in known if f.name in values}, extra=values)


def _json(value: Any) -> bytes:
    """Canonical JSON, so that one header has one text: sorted keys, no white space, no NaN, little depth."""
    if not _shallow(value, MAX_DEPTH):
        raise ValueError(f"JSON nested more than {MAX_DEPTH} deep")
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")).encode()


def _shallow(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return depth >= 0 and all(_shallow(item, depth - 1) for item in inner)


def _list_of(value: Any, *kinds: type) -> bool:
    return isinstance(value, (tuple, list)) and all(type(item) in kinds for item in value)


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r:.80}; it must be {wanted}")


class TrajectoryWriter:
    """Appends the records of a run to its file; a context manager.

    Each record goes out in one write, so that a killed process loses none; every `sync_every` records, at the end
    marker, and on `sync` they go to the disk, so that a power loss costs no more. `OSError` (a full disk) passes
    through; what a failed write left behind is a torn last record. One writer a file: the caller holds the lock.
    """

    def __init__(self, path: Path, records: Records, sync_every: int) -> None:
        self.header, self.steps, self.sync_every = records.header, records.count, sync_every
        self._end, self._crc = records.end, _U32.unpack_from(records.data, records.end - 4)[0]
        self._unsynced, self._ended = 0, False
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  # closed by close
        self._file.truncate(self._end)
        self.sync()

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Header, *, sync_every: int = 64) -> TrajectoryWriter:
        """Begin a file. Raises TrajectoryError if there is one."""
        path, head = Path(path), header.encode()
        try:
            file = open(path, "xb")  # noqa: SIM115  # closed by the next with
        except FileExistsError:
            raise TrajectoryError(f"{path}: exists; name another file, or go on with it by `resume`") from None
        try:
            with file:
                file.write(head)
            writer = cls.resume(path, 0, sync_every=sync_every)
            _sync_folder(path.parent)
            return writer
        except BaseException:
            path.unlink()
            raise

    @classmethod
    def resume(cls, path: str | os.PathLike[str], step: int, *, sync_every: int = 64) -> TrajectoryWriter:
        """Go on after `step` steps: verify these, cut whatever is behind them (torn, damaged or an end marker too)."""
        return cls(Path(path), read_file(path, until=step).records, sync_every)

    def append(self, record: Record) -> None:
        """Raises ValueError if the record is not the next step's, is one too many, or does not fit the header."""
        _require(not self._ended, "the trajectory", "ended", "resumed before a step is added")
        _require(record.step == self.steps, "the record's step", record.step, f"{self.steps}, the next one")
        planned = self.header.planned_steps
        _require(self.steps < planned, "the record's step", record.step, f"one of the {planned} planned")
        self._append(record.encode(self.header))
        self.steps += 1
        if self._unsynced >= self.sync_every:
            self.sync()

    def mark_chosen(self, step: int) -> None:
        """End the file: the weights after `step` steps are the run's result; 0 is the base model."""
        _require(not self._ended, "the trajectory", "ended", "marked once")
        _require(0 <= step <= self.steps, "the chosen step", step, f"from 0 to {self.steps}, the last")
        self._append(bytes([_MARKER]) + _U32.pack(step) + bytes(self.header.body.size - 5))
        self._ended = True
        self.sync()

    def sync(self) -> None:
        """Wait until all is on the disk; to be called before a checkpoint that relies on it."""
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def close(self) -> None:
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, body: bytes) -> None:
        """At a fixed offset: after a failed or short write the next one overwrites what was left."""
        crc = zlib.crc32(body, self._crc)
        data, done = body + _U32.pack(crc), 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], self._end + done)
        self._end, self._crc, self._unsynced = self._end + len(data), crc, self._unsynced + 1


def _sync_folder(path: Path) -> None:
    """The new file's name, too, survives a power loss."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
