"""A task's rows → the examples to train on, to choose on, and to score."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from zotune.errors import InputError, nearest
from zotune.tasks.rows import (
    SUFFIXES,
    BadRows,
    Row,
    named,
    other_files,
    read_file,
    read_hub,
    refuse_overwriting,
    renamed,
    rows_of,
    split_file,
)
from zotune.tasks.task import MASK, Example, Task

VALIDATION_SIZE, TEST_SIZE = 500, 1000  # rows at most; --eval-size caps both
SPLITS = ("train", "validation", "test")
T = TypeVar("T")
U = TypeVar("U")
BETWEEN_SHOTS = "\n\n"  # stands behind each that is shown, so that it ends an answer there
CARVED_SHARE = 5  # a missing validation split takes at most one in so many of the training rows


@dataclass(frozen=True)
class Source:
    """Where rows are: a folder with a file a split, one file, a hub data set (name, subset, scored split), or rows in
    memory by split ("" for rows without one)."""

    folder: Path | None = None
    file: Path | None = None
    hub: tuple[str, str | None, str] | None = None
    tables: Mapping[str, Sequence[Any]] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    ask: Callable[[Row], Any] | None = None
    bad: BadRows = field(default_factory=BadRows, compare=False)
    _hub_splits: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    _read_before: dict[str, list[Row] | None] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, split: str) -> list[Row] | None:
        """The rows of a split, None where the source has no such split, InputError where it is empty. Read once.

        Rows that are none, or that `ask` cannot ask about, are refused together, or skipped; see `BadRows`.
        """
        if split not in self._read_before:
            rows, of = self._read(split), "" if self.single else split
            refuse_overwriting(rows or [], self.columns)
            self._read_before[split] = (
                self.usable(rows, lambda row: self._checked(replace(row, split=of))) if rows is not None else None
            )
        return self._read_before[split]

    def usable(self, given: Sequence[T], use: Callable[[T], U]) -> list[U]:
        """What `use` makes of each of the given; those that it refuses are bad rows."""
        made = []
        for one in given:
            with self.bad.caught():
                made.append(use(one))
        self.bad.refuse()
        if given and not made:
            raise InputError(f"{self.bad.said[-1]}; no other row can be used either")
        return made

    def _checked(self, row: Row) -> Row:
        row = renamed(row, self.columns) if self.columns else row
        if self.ask is not None:
            self.ask(row)
        return row

    def asking(self, ask: Callable[[Row], Any]) -> Source:
        """The same rows, each of which has to be one that `ask` can ask about."""
        return replace(self, ask=ask, bad=BadRows(self.bad.skip), _read_before={})

    def first(self) -> tuple[str, list[Row]]:
        """The first split that there is, and its rows."""
        for split in SPLITS:
            if rows := self.rows(split):
                return split, rows
        has = self.has("wanted train.jsonl, …, or .json, .csv, .tsv, .parquet")
        raise InputError(f"{self}: no train, validation or test split in it{has}")

    def has(self, wanted: str) -> str:
        """The tail of an error about a split that is not there."""
        return f" (it has {', '.join(self._hub_splits)})" if self.hub else f" ({wanted})" if self.folder else ""

    @property
    def unread(self) -> str | None:
        """A line that names the folder's files of rows that are no split's, if there are any."""
        names = other_files(self.folder) if self.folder is not None else []
        return (
            f"{self}: {', '.join(names)} not read, for no split (train, validation, test) is called so"
            if names
            else None
        )

    def _read(self, split: str) -> list[Row] | None:
        if self.folder is not None:
            path = split_file(self.folder, split)
            return None if path is None else _not_empty(read_file(path, self.bad), str(path), self.bad)
        if self.file is not None:
            return _not_empty(read_file(self.file, self.bad), str(self.file), self.bad) if split == "train" else None
        if self.tables is not None:
            found = self.tables.get("" if split == "train" and self.single else split)
            return None if found is None else _not_empty(rows_of(found, split, self.bad), split, self.bad)
        assert self.hub is not None
        name, subset, scored = self.hub
        if split == "validation" and scored == "validation":
            return None  # it is scored as test, so it chooses nothing
        if not self._hub_splits:
            self._hub_splits.update(read_hub(name, subset))
        found = self._hub_splits.get(split := scored if split == "test" else split)
        where = f"{name}/{split}"
        return None if found is None else _not_empty(rows_of(found, where, self.bad), where, self.bad)

    @property
    def single(self) -> bool:
        """Whether all rows are of one piece: drawn from to train, and scored whole."""
        return self.file is not None or (self.tables is not None and "" in self.tables)

    def __str__(self) -> str:
        if self.tables is not None:
            return "data"
        return str(self.folder or self.file or (self.hub or ("",))[0])


def find_source(
    task: Task | None,
    data: str | None,
    data_dir: str | None,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    subset: str | None = None,
    tables: Mapping[str, Sequence[Any]] | None = None,
) -> Source:
    """The source of a built-in task (the hub, or DIR/NAME) or of a user's own data (a folder, a file, a hub name).

    columns: names of the data's fields → names that the task reads, over the task's own.
    """
    found = Source(tables=tables) if tables is not None else _find_source(task, data, data_dir, subset)
    own = task.columns if task is not None else {}
    return replace(found, columns={**own, **(columns or {})}, bad=BadRows(skip_bad_rows))


def _find_source(task: Task | None, data: str | None, data_dir: str | None, subset: str | None) -> Source:
    if data is not None:
        if (local := _local(data)) is not None:
            return local
        path = Path(data).expanduser()
        if path.suffix or data.count("/") != 1 or _looks_local(data) or path.parent.is_dir():
            raise InputError(f"--data {data}: no such file or folder{_nearest_to(path)}")
        return Source(hub=(data, subset, "test"))
    assert task is not None
    if data_dir is not None:
        name = task.folder or task.name
        folder = Path(data_dir).expanduser() / name
        if not folder.is_dir():
            raise InputError(
                f"--data-dir {data_dir}: no folder {name!r} in it (wanted {folder}/train.jsonl, …); --data takes a folder of "
                "any name"
            )
        return Source(folder=folder)
    if task.source is None:
        raise InputError(f"task {task.name!r}: names no data; give --data, or a line `data:` in its file")
    if (local := _local(data := task.source.name)) is not None:
        return local
    if _looks_local(data):
        raise InputError(
            f"task {task.name!r}: data {data}: no such file or folder{_nearest_to(Path(data).expanduser())}"
        )
    return Source(hub=(task.source.name, task.source.subset, task.source.test_split))


def _local(name: str) -> Source | None:
    path = Path(name).expanduser()
    return Source(folder=path) if path.is_dir() else Source(file=path) if path.is_file() else None


def _looks_local(name: str) -> bool:
    """Whether no data set of the hub is called so."""
    return named(Path(name))[1] in SUFFIXES or name.startswith((".", "~", "/")) or name.count("/") > 1


def _nearest_to(path: Path) -> str:
    near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"; {nearest(path.name, near)}" if near else ""


@dataclass(frozen=True)
class Splits:
    """Drawn examples. Where there is no test split, test is validation and `test_split` says so.

    given: the rows of each split that they are drawn from; validation's is missing where it is carved from train.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    test_split: str
    given: Mapping[str, int] = field(default_factory=dict)

    def described(self) -> str:
        """How many rows of how many.

        >>> one = [Example("a", ("b",), 0, "f:1")]
        >>> Splits(one * 2, one, one * 3, "test", {"train": 5, "test": 3}).described()
        'rows: 2 of 5 to train on, 1 (of the same 5) to choose by, 3 to test on'
        """
        train, test = self.given.get("train", 0), self.given.get("test", 0)
        choosing = self.given.get("validation")
        same = f"{len(self.validation):,} (of the same {train:,})"
        parts = [f"{some_of(len(self.train), train)} to train on"]
        parts.append(f"{same if choosing is None else some_of(len(self.validation), choosing)} to choose by")
        parts.append(f"{some_of(len(self.test), test)} to test on" if self.test_split == "test" else "none to test on")
        return f"rows: {', '.join(parts)}"


def some_of(taken: int, given: int) -> str:
    """
    >>> some_of(1000, 5000), some_of(30, 30)
    ('1,000 of 5,000', '30')
    """
    return f"{taken:,} of {given:,}" if taken != given and given else f"{taken:,}"


@dataclass(frozen=True)
class Drawn:
    """The rows of a run, of which `Splits` are the examples; see there."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    test_split: str
    given: Mapping[str, int]


def draw(
    source: Source,
    *,
    train_size: int,
    validation_size: int,
    test_size: int,
    seed: int,
    choose: Callable[[list[Row], int, int], list[Row]] | None = None,
) -> Drawn:
    """Train and validation rows are drawn by the run's seed, test rows are the same for all.

    choose: (rows, size, seed) → the training rows, instead of a draw. A missing validation split is carved from train, at most a
    fifth of it.
    """
    train = source.rows("train")
    if train is None:
        has = source.has("no train.jsonl, train.csv or train.parquet in it")
        raise InputError(f"{source}: no rows to train on{has}")
    validation, test = source.rows("validation"), source.rows("test")
    of_splits = {"train": train, "validation": validation, "test": test}
    given = {split: len(rows) for split, rows in of_splits.items() if rows is not None}
    if validation is None:
        validation, train = _carve(source, train, validation_size, seed)
    train = _draw(train, train_size, seed, "train") if choose is None else choose(train, train_size, seed)
    validation = _draw(validation, validation_size, seed, "validation")
    scored = validation if test is None else _draw(test, test_size, 0, "test")
    return Drawn(train, validation, scored, "validation" if test is None else "test", given)


def training_splits(
    task: Task,
    source: Source,
    *,
    train_size: int,
    validation_size: int,
    test_size: int,
    seed: int,
    balanced: bool = False,
) -> Splits:
    """The examples of a run, by `draw`. balanced: as many training rows of each class."""
    rows = draw(
        source, train_size=train_size, validation_size=validation_size, test_size=test_size, seed=seed,
        choose=(lambda train, size, seed: _balanced(task, train, size, seed)) if balanced else None,
    )  # fmt: skip
    return Splits(
        train=[task.example(row) for row in rows.train],
        validation=[task.example(row) for row in rows.validation],
        test=[task.example(row) for row in rows.test],
        test_split=rows.test_split,
        given=rows.given,
    )


def _carve(source: Source, train: list[Row], size: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Validation and training rows from training rows alone."""
    if len(train) < 2:
        raise InputError(f"{source}: one training row, and no validation split to choose the best step on")
    share = max(1, min(size, len(train) // CARVED_SHARE))
    order = _draw(train, len(train), seed, "carve")
    return order[:share], order[share:]


def _balanced(task: Task, rows: list[Row], size: int, seed: int) -> list[Row]:
    """As many rows of each class, at most `size` together; those of a class that has fewer come again, in a drawn order."""
    classes: dict[int, list[Row]] = {}
    for row in rows:
        classes.setdefault(task.example(row).label or 0, []).append(row)
    if len(classes) < 2:
        raise InputError("--balance-classes: all training rows are of one class")
    each = max(1, min(size // len(classes), max(map(len, classes.values()))))
    drawn = []
    for label, members in sorted(classes.items()):
        order = _draw(members, len(members), seed, f"class {label}")
        drawn += [order[i % len(order)] for i in range(each)]
    return _draw(drawn, len(drawn), seed, "balanced")


def demonstrations(task: Task, source: Source, shots: int, seed: int, scored: Sequence[Row] = ()) -> list[Example]:
    """Training rows to show with their right answers before a prompt, none of those that are scored."""
    if task.models:
        kind = (
            "is a conversation; earlier turns are its examples"
            if task.messages_field
            else "is plain text, which asks nothing"
        )
        raise InputError(f"--shots {shots}: task {task.name!r} {kind}")
    rows = source.rows("train")
    if rows is None:
        raise InputError(f"--shots {shots}: {source} has no train split to show rows of")
    asked = {row.where for row in scored}
    free = [row for row in rows if row.where not in asked]
    if len(free) < shots:
        apart = f", {len(free)} of them not scored; name fewer by --eval-size" if len(free) < len(rows) else ""
        raise InputError(f"--shots {shots}: {source} has {len(rows)} training rows{apart}")
    return [task.example(row) for row in _draw(free, shots, seed, "shots")]


def shown(examples: Sequence[Example], mask: str | None = None) -> str:
    """The examples with their right answers, blank lines between them and behind.

    An answer stands in the place of `<mask>`, or of the tokenizer's own mask, where a prompt has one, else behind it.
    """
    texts = []
    for example in examples:
        answer, prompt = example.candidates[example.label or 0], example.prompt
        place = next((one for one in (MASK, mask) if one and one in prompt), None)
        texts.append(prompt.replace(place, answer.strip(), 1) if place else prompt + answer)
    return "".join(text + BETWEEN_SHOTS for text in texts)


def after_shots(examples: Sequence[Example], shots: Sequence[Example], mask: str | None = None) -> list[Example]:
    """The examples, each behind those that are shown, whose answers' end is theirs. What is too long loses these first."""
    before = shown(shots, mask)
    ends: dict[str | None, str] = {"": BETWEEN_SHOTS if shots else ""}
    return [
        replace(example, prompt=before + example.prompt, fields=(), end=ends.get(example.end, example.end))
        for example in examples
    ]


def given_rows(source: Source, split: str) -> int:
    """The rows of the split that `scored_rows` names, or of train where it carved validation from that."""
    return len(source.rows("train" if source.single else split) or source.rows("train") or [])


def scored_rows(source: Source, size: int | None, *, seed: int = 0, in_order: bool = False) -> tuple[list[Row], str]:
    """The rows that `eval` scores and their split: those that a run of this seed and size scores as test.

    That is test, else validation, given or carved; a single file is scored whole. size None: the defaults.
    in_order: the first rows of test, validation or the file as they stand, instead of a draw; None: all of them.
    """
    if source.single:
        rows, split = source.rows("train") or [], "file" if source.file else "rows"
    elif (test := source.rows("test")) is not None:
        rows, split = test, "test"
    elif (validation := source.rows("validation")) is not None:
        rows, split = validation, "validation"
    elif not in_order and (train := source.rows("train")) is not None:
        rows, split = _carve(source, train, min(VALIDATION_SIZE, size or VALIDATION_SIZE), seed)[0], "validation"
    else:
        raise InputError(f"{source}: neither a test nor a validation split in it")
    if in_order:
        return rows[:size], split
    if split == "validation":
        return _draw(rows, min(VALIDATION_SIZE, size or VALIDATION_SIZE), seed, "validation"), split
    return _draw(rows, min(TEST_SIZE, size or TEST_SIZE), 0, "test"), split


def _draw(rows: list[Row], size: int, seed: int, what: str) -> list[Row]:
    """`size` of the rows (all, where there are fewer), by seed, in the order drawn."""
    return random.Random(f"{what}:{seed}").sample(rows, min(size, len(rows)))


def _not_empty(rows: list[Row], where: str, bad: BadRows) -> list[Row]:
    if not rows:
        bad.refuse()
        raise InputError(f"{where}: no rows in it")
    return rows
