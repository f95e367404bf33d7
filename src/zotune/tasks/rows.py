"""Rows of labelled text from JSON lines, CSV or the hub, each with the place it came from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from zotune.errors import InputError

SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """A row's fields and where it stands, as `file:line`, for the errors that name it."""

    fields: dict[str, Any]
    where: str

    def __getitem__(self, field: str) -> Any:
        if field not in self.fields:
            has = ", ".join(repr(name) for name in self.fields)
            raise InputError(f"{self.where}: no field {field!r} (has {has})")
        if self.fields[field] is None:
            raise InputError(f"{self.where}: field {field!r} has no value")
        return self.fields[field]


def read_file(path: Path) -> list[Row]:
    """The rows of a .jsonl, .csv or .parquet file. Raises InputError that names file, line and what was expected."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if path.suffix == ".jsonl":
        return list(_json_lines(path, text))
    if path.suffix == ".csv":
        return list(_csv_lines(path, text))
    raise InputError(f"{path}: not a .jsonl, .csv or .parquet file")


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({(str(error).splitlines() or ['?'])[0]})") from None
    return [Row(fields, f"{path}:{i}") for i, fields in enumerate(table.to_pylist(), start=1)]


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except RecursionError:
            raise InputError(f"{where}: not a JSON object (nested too deeply)") from None
        except ValueError as error:  # also a number of more digits than Python reads
            raise InputError(f"{where}: not a JSON object ({getattr(error, 'msg', error)})") from None
        if not isinstance(fields, dict):
            raise InputError(f"{where}: a {type(fields).__name__} where a JSON object was expected, one a line")
        if "\\u" in line and any("\ud800" <= c <= "\udfff" for c in json.dumps(fields, ensure_ascii=False)):
            raise InputError(f"{where}: half a surrogate pair (\\ud800 to \\udfff), which is no text")
        yield Row(fields, where)


def _csv_lines(path: Path, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text), strict=True)  # lines end at \n alone, unlike those of str.splitlines
    names: list[str] | None = None
    where = f"{path}:1"
    try:
        while True:
            where = f"{path}:{reader.line_num + 1}"  # a quoted field may hold further lines
            values = next(reader, None)
            if values is None:
                return
            if not values:
                continue
            if names is None:
                names = values
                if twice := [name for name in names if names.count(name) > 1]:
                    raise InputError(f"{where}: the header names {twice[0]!r} twice")
                continue
            if len(values) > len(names):
                raise InputError(f"{where}: more values than the header has names; quote fields that hold a comma")
            yield Row(dict(zip_longest(names, values)), where)
    except csv.Error as error:
        raise InputError(f"{where}: not CSV ({error})") from None


def read_hub(name: str, subset: str | None, split: str) -> list[Row]:
    """A split of a hub data set. Raises InputError where it cannot be had."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds, none of them ours to list
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"hub data set {name!r} (split {split!r}): {reason}; offline, pass --data-dir") from None
    return [Row(dict(fields), f"{name}/{split}:{i}") for i, fields in enumerate(loaded, start=1)]


def renamed(rows: list[Row], columns: Mapping[str, str]) -> list[Row]:
    """The rows with fields under other names: columns maps a row's own name to the name that is wanted."""
    found = []
    for row in rows:
        for name in columns:
            row[name]  # says so where the row lacks it
        fields = {columns.get(name, name): value for name, value in row.fields.items()}
        found.append(Row(fields, row.where))
    return found


def split_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder, or None; two of one name are refused."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        raise InputError(f"{folder}: both {found[0].name} and {found[1].name}; keep one")
    return found[0] if found else None
