"""Rows of labelled text from JSON, CSV, Parquet or the hub, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from zotune.errors import InputError
from zotune.models.border import stands_in

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PACKED = ".gz"  # behind any of these but Parquet's, which packs by itself
GZIP = b"\x1f\x8b"  # how what is packed begins, whatever its name
DESCRIBING = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # of `datasets`, which hold no rows
HIDDEN = re.compile(r"(?:label|is) '(-1(?:\.0)?|)'")  # in what is said of a label that a test split does not tell


@dataclass(frozen=True)
class Row:
    """A row's fields and where it stands, as `file:line`, for the errors that name it; its split, where that is known."""

    fields: dict[str, Any]
    where: str
    split: str = ""

    def __getitem__(self, field: str) -> Any:
        if field not in self.fields:
            has = ", ".join(repr(name) for name in self.fields)
            raise InputError(f"{self.where}: no field {field!r} (has {has})")
        if missing(self.fields[field]):
            raise InputError(f"{self.where}: field {field!r} has no value")
        return self.fields[field]


def missing(value: Any) -> bool:
    """Whether a field has no value: None, or what pandas has in the place of one (NaN, NaT, NA)."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas need not be there to be looked for
        return True
    value = value.item() if getattr(value, "shape", None) == () else value  # a number of NumPy
    return isinstance(value, float) and math.isnan(value)


class BadRows:
    """Rows that cannot be used: gathered, and refused together unless they are to be skipped.

    said: a line for each, with its place and what was expected there. A row that is met again, as one that serves to choose and
    to score is, counts once.
    """

    SHOWN = 5

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.said: list[str] = []
        self._known: set[str] = set()

    @contextmanager
    def caught(self) -> Iterator[None]:
        """An InputError inside is that of one row."""
        try:
            yield
        except InputError as error:
            if (line := str(error)) not in self._known:
                self._known.add(line)
                self.said.append(line)

    def refuse(self) -> None:
        """Raises InputError with the first few, if there are any and they are not to be skipped."""
        if self.skip or not self.said:
            return
        hidden = [match[1] for line in self.said if (match := HIDDEN.search(line))]
        if len(hidden) == len(self.said) > 1:
            others = f", here and in {len(hidden) - 1} other rows"
            where = self.said[0].partition(": ")[0]
            raise InputError(
                f"{where}: the label is {hidden[0] or 'empty'}{others}: not told, as in GLUE's test split; "
                "score validation, by leaving the test file out or by `test_split: validation` in a file for --task, "
                "or predict; --skip-bad-rows leaves them out"
            )
        if len(self.said) == 1:
            raise InputError(f"{self.said[0]}; --skip-bad-rows leaves such rows out")
        if len({line.partition(": ")[2] for line in self.said}) == 1 and ": no field" in self.said[0]:
            what, _, advice = self.said[0].partition("; ")  # who asked may have said what to do, once
            advice = advice or "name one of theirs, or read it under another name by --columns"
            others = f"nor have {len(self.said) - 1} other rows"
            raise InputError(f"{what}, {others}; {advice}; --skip-bad-rows leaves such rows out")
        shown = self.said[: self.SHOWN]
        more = f", the first {len(shown)} above" if len(self.said) > len(shown) else ""
        raise InputError("\n".join([*shown, f"{len(self.said)} bad rows{more}; --skip-bad-rows leaves them out"]))

    def __str__(self) -> str:
        return f"{len(self.said)} left out, the first: {self.said[0]}" if self.said else "none"


def read_file(path: Path, bad: BadRows | None = None) -> list[Row]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file, or of one of them but the last as .gz.

    "No value" is the same in all: JSON's null, a field that is not there, an empty one of CSV and TSV. Raises InputError that names
    file, line and what was expected. bad: gathers the rows that are none; without it the first of them is raised.
    """
    gathers = BadRows() if bad is None else bad
    rows = _rows_of(path, gathers)
    if bad is None and gathers.said:
        raise InputError(gathers.said[0])
    return rows


def _rows_of(path: Path, bad: BadRows) -> list[Row]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    suffix = named(path)[1]
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: not a .jsonl, .csv, .tsv or .parquet file, nor a .json one, nor one of texts packed as .gz"
        )
    text = _text_of(path)
    if suffix in (".jsonl", ".json"):
        listed = _json_list(path, text, bad, suffix)
        return list(_json_lines(path, text, bad)) if listed is None else listed
    most = csv.field_size_limit(len(text) + 1)  # csv refuses fields of more than 128 KiB otherwise
    try:
        return list(_csv_lines(path, text, bad, "\t" if suffix == ".tsv" else _delimiter(text)))
    finally:
        csv.field_size_limit(most)


def named(path: Path) -> tuple[str, str]:
    """A file's name without its suffixes, and the one that says what it holds, both in lower case.

    >>> named(Path("Train.jsonl.gz")), named(Path("rows.CSV")), named(Path("notes"))
    (('train', '.jsonl'), ('rows', '.csv'), ('notes', ''))
    """
    path = Path(path.name.lower())
    if path.suffix == PACKED and path.with_suffix("").suffix != ".parquet":
        path = path.with_suffix("")
    return path.stem, path.suffix


def _text_of(path: Path) -> str:
    try:
        held = path.read_bytes()
        _refuse_stand_in(path, held)
        if path.suffix.lower() == PACKED or held.startswith(GZIP):
            held = gzip.decompress(held)
        return held.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].split(b"\n")
        raise InputError(f"{path}:{len(before)}: not UTF-8 at byte {len(before[-1])}; save it as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); fetch it again, or unpack it") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _refuse_stand_in(path: Path, start: bytes) -> None:
    if found := stands_in(start[:256]):
        raise InputError(f"{path}: {found}")


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open(path, "rb") as opened:
            _refuse_stand_in(path, opened.read(256))
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise InputError(f"{path}: two columns are named {twice[0]!r}; rename one of them, or leave it out")
            rows = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({(str(error).splitlines() or ['?'])[0]})") from None
    return [Row(fields, f"{path}:{i}") for i, fields in enumerate(rows, start=1)]


def _json_list(path: Path, text: str, bad: BadRows, suffix: str) -> list[Row] | None:
    """The rows of a JSON array; None where the file is not one, but an object a line."""
    if not text.lstrip().startswith(("[", "{") if suffix == ".json" else "["):
        return None
    try:
        whole = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        return None
    except _TwiceError as error:
        raise InputError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        if suffix == ".json" and text.lstrip().startswith("["):
            raise InputError(f"{path}:{error.lineno}: not a list in JSON ({error.msg})") from None
        return None
    except ValueError:  # a number of more digits than Python reads
        return None
    if isinstance(whole, dict):
        if "\n" not in text.strip():
            return None
        raise InputError(
            f"{path}: one JSON object (with {', '.join(map(repr, list(whole)[:5]))}) where a list of them was expected, or one a "
            "line"
        )
    if suffix == ".jsonl" and not any(isinstance(one, dict) for one in whole):
        return None
    found = []
    for number, fields in enumerate(whole, start=1):
        with bad.caught():
            found.append(_row(fields, f"{path}, row {number}"))
    return found


def _json_lines(path: Path, text: str, bad: BadRows) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with bad.caught():
                yield _json_row(line, f"{path}:{number}")


def _json_row(line: str, where: str) -> Row:
    try:
        fields = json.loads(line, object_pairs_hook=_once)
    except RecursionError:
        raise InputError(f"{where}: not a JSON object (nested too deeply)") from None
    except _TwiceError as error:
        raise InputError(f"{where}: {error}") from None
    except ValueError as error:  # also a number of more digits than Python reads
        raise InputError(f"{where}: not a JSON object ({getattr(error, 'msg', error)})") from None
    return _row(fields, where, "\\u" in line)


def _row(fields: Any, where: str, escaped: bool = True) -> Row:
    """escaped: whether a text may hold what only an escape writes."""
    if not isinstance(fields, dict):
        raise InputError(f"{where}: a {type(fields).__name__} where a JSON object was expected, one a line")
    if escaped and any("\ud800" <= c <= "\udfff" for c in json.dumps(fields, ensure_ascii=False, allow_nan=True)):
        raise InputError(f"{where}: half a surrogate pair (\\ud800 to \\udfff), which is no text")
    return Row(fields, where)


class _TwiceError(ValueError):
    """A JSON object that names a field twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields. Raises _TwiceError where one is named twice, of which the first would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f"the object names {next(n for n in names if names.count(n) > 1)!r} twice")
    return made


BETWEEN = {",": "a comma", ";": "a semicolon", "\t": "a tab"}  # of a header's names, the first that is there


def _delimiter(text: str) -> str:
    header = re.sub(r'"[^"]*"', "", text.lstrip("\n").split("\n", 1)[0])
    return next((one for one in BETWEEN if one in header), ",")


def _csv_lines(path: Path, text: str, bad: BadRows, delimiter: str) -> Iterator[Row]:
    """A header, then rows. An empty field is no value. Columns without a name, such as a table's index, are left out."""
    unquoted: Any = {} if delimiter != "\t" or _quoted(text) else {"quoting": csv.QUOTE_NONE}
    reader = csv.reader(
        io.StringIO(text), delimiter=delimiter, strict=True, **unquoted
    )  # lines end at \n alone, unlike those of str.splitlines
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
                if twice := [name for name in names if name.strip() and names.count(name) > 1]:
                    raise InputError(f"{where}: the header names {twice[0]!r} twice")
                continue
            if len(values) > len(names):
                with bad.caught():
                    way = f"quote fields that hold {BETWEEN[delimiter]}"
                    if unquoted:
                        way = "a field cannot hold a tab here, where none is quoted; save it as .csv"
                    raise InputError(f"{where}: more values than the header has names; {way}")
                continue
            yield Row({name: value or None for name, value in zip_longest(names, values) if name.strip()}, where)
    except csv.Error as error:
        raise InputError(f"{where}: not CSV ({error})") from None


def _quoted(text: str) -> bool:
    """Whether a table with tabs is quoted as CSV is: all its header is, or it has a field within quotes that doubles those in it,
    and it can be read so, with as many values in each row as the header has. What else begins with a quote is text: tables with
    tabs are commonly written without quoting, as GLUE's are.
    """
    header = text.lstrip("\n").split("\n", 1)[0].split("\t")
    whole = all(len(name) > 1 and name[0] == name[-1] == '"' for name in header)
    if not whole and not re.search(r'(?:^|\t)"[^"\t\n]*""(?:[^"\n]|"")*"(?=\t|$)', text, re.MULTILINE):
        return False
    try:
        return {len(row) for row in csv.reader(io.StringIO(text), delimiter="\t", strict=True) if row} == {len(header)}
    except csv.Error:
        return False


CONVERTED = (
    "refs/convert/parquet"  # where the hub keeps a data set's tables beside a loading script that no longer runs
)


def read_hub(name: str, subset: str | None) -> dict[str, Iterable[Mapping[str, Any]]]:
    """The splits of a hub data set, each a table of rows. Raises InputError where it cannot be had."""
    from zotune.models.hub import look_first

    look_first(name)
    import datasets

    try:
        try:
            return dict(datasets.load_dataset(name, subset))
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            return dict(datasets.load_dataset(name, subset, revision=CONVERTED))
    except Exception as error:  # the hub's client raises a dozen kinds, none of them ours to list
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if "onfig" in lines[0] and ("missing" in lines[0] or "not found" in lines[0]):
            raise InputError(f"hub data set {name!r}: {' '.join(lines[:2])}; name one by --subset") from None
        raise InputError(f"hub data set {name!r}: {lines[0]}; offline, give rows by --data-dir or --data") from None


def rows_of(given: Iterable[Any], where: str, bad: BadRows) -> list[Row]:
    """Rows in memory, or of a hub data set, each a mapping of fields."""
    found: list[Row] = []
    others: set[str] = set()
    for number, fields in enumerate(given, start=1):
        with bad.caught():
            if not isinstance(fields, Mapping):
                others.add(type(fields).__name__)
                raise InputError(f"{where}, row {number}: a {type(fields).__name__} where a dict was expected")
            found.append(Row(dict(fields), f"{where}, row {number}"))
    if (
        others and not found
    ):  # not a bad row here and there: the whole is another thing, such as a table, which gives its columns
        raise InputError(
            f"data: holds no dict (but {', '.join(sorted(others))}); give a list of dicts or a datasets.Dataset, of a table of "
            'pandas df.to_dict("records")'
        )
    return found


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with fields under other names: columns maps a row's own name to the name that is wanted."""
    for name in columns:
        row[name]  # says so where the row lacks it
    return Row({columns.get(name, name): value for name, value in row.fields.items()}, row.where, row.split)


def refuse_overwriting(rows: Iterable[Row], columns: Mapping[str, str]) -> None:
    """Raises InputError where a field would get the name of another that keeps it, or two the same."""
    taken = {new: name for name, new in columns.items()}
    for name, new in columns.items():
        if taken[new] != name:
            raise InputError(f"--columns: both {name!r} and {taken[new]!r} → {new!r}; name one of them")
    for row in rows:
        if kept := next((new for new in columns.values() if new in row.fields and new not in columns), None):
            raise InputError(
                f"{row.where}: --columns {taken[kept]!r} → {kept!r} would overwrite the field {kept!r} that is there; give that "
                "another name too"
            )


NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}  # of a split's file


def split_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder, or None; two are refused."""
    found = [path for path in _tables(folder) if named(path)[0] in NAMES[split]]
    if len(found) > 1:
        raise InputError(f"{folder}: both {found[0].name} and {found[1].name}; keep one")
    return found[0] if found else None


def other_files(folder: Path) -> list[str]:
    """Names of the files of rows in a folder that are no split's."""
    known = {name for names in NAMES.values() for name in names}
    return [path.name for path in _tables(folder) if named(path)[0] not in known and path.name not in DESCRIBING]


def _tables(folder: Path) -> list[Path]:
    here = folder.iterdir() if folder.is_dir() else ()
    order = sorted(here, key=lambda path: (_place(path), path.name))
    return [path for path in order if _place(path) < len(SUFFIXES) and path.is_file()]


def _place(path: Path) -> int:
    suffix = named(path)[1]
    return SUFFIXES.index(suffix) if suffix in SUFFIXES else len(SUFFIXES)
