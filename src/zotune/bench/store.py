"""Results in one SQLite file in WAL mode: a row a run, written whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Text, create_engine, event, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.schema import CreateIndex, CreateTable

from zotune.bench import DATABASE, FINAL
from zotune.errors import InputError
from zotune.run.folder import as_json


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012  # SQLAlchemy's own form


class Record(Base):
    """A run: what was asked, how it went, what came out.

    key names the configuration and the code's version, `config_key` the configuration alone. status: running, interrupted,
    done, failed or oom; a row that says running while no runner holds the folder was killed with it.
    """

    __tablename__ = "runs"

    key: Mapped[str] = mapped_column(primary_key=True)
    config_key: Mapped[str] = mapped_column(index=True)
    code: Mapped[str]
    suite: Mapped[str]
    kind: Mapped[str]
    name: Mapped[str]
    model: Mapped[str]
    task: Mapped[str]
    method: Mapped[str]
    scheme: Mapped[str]
    seed: Mapped[int]
    labels: Mapped[dict[str, Any]]
    options: Mapped[dict[str, Any]]
    command: Mapped[str] = mapped_column(Text)
    folder: Mapped[str]
    planned: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(index=True)
    attempts: Mapped[int] = mapped_column(default=0)
    started: Mapped[float] = mapped_column(default=0.0)
    finished: Mapped[float] = mapped_column(default=0.0)
    result: Mapped[dict[str, Any]] = mapped_column(default=dict)
    metrics: Mapped[list[Any]] = mapped_column(default=list)
    error: Mapped[str] = mapped_column(Text, default="")


class Store:
    """The results of an output folder. Raises InputError where the file is no store."""

    def __init__(self, folder: Path, *, create: bool = True) -> None:
        path = folder / DATABASE
        if not create and not path.is_file():
            raise InputError(f"{folder}: no {DATABASE} in it; run `zotune bench run SUITE --output {folder}` first")
        folder.mkdir(parents=True, exist_ok=True)
        self.engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30}, json_serializer=as_json)
        event.listen(self.engine, "connect", _write_ahead)
        try:
            with self.engine.begin() as connection:  # create_all looks first, and another process may be as quick
                for table in Base.metadata.sorted_tables:
                    connection.execute(CreateTable(table, if_not_exists=True))
                    for index in table.indexes:
                        connection.execute(CreateIndex(index, if_not_exists=True))
        except DatabaseError as error:
            raise InputError(f"{path}: not a store of results ({error.orig})") from None

    def get(self, key: str) -> Record | None:
        with Session(self.engine, expire_on_commit=False) as session:
            return session.get(Record, key)

    def put(self, record: Record) -> None:
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            session.merge(record)

    def update(self, key: str, **values: Any) -> None:
        with Session(self.engine) as session, session.begin():
            record = session.get(Record, key)
            assert record is not None
            for name, value in values.items():
                setattr(record, name, value)

    def all(self, *, status: Sequence[str] = ()) -> list[Record]:
        """Rows in the order of their first start."""
        query = select(Record).order_by(Record.started, Record.key)
        if status:
            query = query.where(Record.status.in_(status))
        with Session(self.engine, expire_on_commit=False) as session:
            return list(session.scalars(query))

    def latest(self) -> list[Record]:
        """Of each configuration the newest finished row, whatever code's version it is from."""
        newest: dict[str, Record] = {}
        for record in self.all(status=FINAL):
            known = newest.get(record.config_key)
            if known is None or (record.status == "done", record.finished) >= (known.status == "done", known.finished):
                newest[record.config_key] = record
        return list(newest.values())

    def close(self) -> None:
        self.engine.dispose()


def now() -> float:
    return time.time()


def _write_ahead(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
