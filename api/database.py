"""The database: its tables, and how transactions are done in it."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

METADATA = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
#: Seconds for which a writer waits for another before it gives up (SQLite).
_PATIENCE = 30

KEYS = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("quota_bytes", sa.BigInteger),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    sa.Column("revoked_ms", sa.BigInteger),
)
#: Contents on disk, shared by everything that has the same; never shown to anyone.
BLOBS = sa.Table(
    "blobs",
    METADATA,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
)


def _owned(name: str, *columns: sa.Column[Any] | sa.Constraint | sa.Index) -> sa.Table:
    """Return a table of things that belong to a key; their ids sort by time and cannot be guessed."""
    return sa.Table(
        name,
        METADATA,
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("owner", sa.String(40), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        # What counts for the quota.
        sa.Column("size", sa.BigInteger, nullable=False),
        *columns,
        sa.Index(None, "owner", "id"),
    )


def _content() -> sa.Column[str]:
    return sa.Column("sha256", sa.String(64), sa.ForeignKey("blobs.sha256"), nullable=False, index=True)


def _of(table: str) -> sa.Column[str]:
    return sa.Column(table, sa.String(40), sa.ForeignKey(f"{table}s.id"), nullable=False, index=True)


UPLOADS = _owned("uploads", _content(), sa.UniqueConstraint("owner", "name", "sha256"))
MODELS = _owned("models", _of("upload"), sa.Column("document", sa.Text, nullable=False))
DATASETS = _owned("datasets", _of("upload"), sa.Column("document", sa.Text, nullable=False))
ARTIFACTS = _owned(
    "artifacts",
    _content(),
    _of("model"),
    sa.Column("role", sa.String(40), nullable=False),
    sa.Column("media_type", sa.String(100), nullable=False),
    # The job that made it; jobs may be gone before what they made.
    sa.Column("job", sa.String(40), index=True),
)
#: Work that takes longer than a request. What is asked, how far it has come and what it came to are here; the
#: durable queue knows only that there is a job of this id.
JOBS = _owned(
    "jobs",
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("state", sa.String(20), nullable=False),
    # What it reads, which is not deleted before it ends.
    sa.Column("upload", sa.String(40), index=True),
    sa.Column("model", sa.String(40), index=True),
    sa.Column("dataset", sa.String(40), index=True),
    sa.Column("artifact", sa.String(40), index=True),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    # Number of events so far: whoever adds one holds this row's lock.
    sa.Column("events", sa.Integer, nullable=False, default=0),
    sa.Column("progress", sa.Text),
    sa.Column("result", sa.Text),
    sa.Column("problem", sa.Text),
    sa.Column("started_ms", sa.BigInteger),
    sa.Column("finished_ms", sa.BigInteger, index=True),
    sa.Index(None, "state", "id"),
)
#: What happened to each job, in order: what clients follow, also over restarts of the service.
EVENTS = sa.Table(
    "job_events",
    METADATA,
    sa.Column("job", sa.String(40), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
)
#: What the parts of a job are, for those that any worker may take: who has which, and what it came to.
PARTS = sa.Table(
    "job_parts",
    METADATA,
    sa.Column("job", sa.String(40), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("stage", sa.String(20), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("asked", sa.Text, nullable=False),
    # A workflow of the queue, which one process at a time runs.
    sa.Column("holder", sa.String(80)),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("result", sa.Text),
)
#: Processes that run jobs, and until when each counts as alive; times are the database's own.
LEASES = sa.Table(
    "leases",
    METADATA,
    sa.Column("executor", sa.String(100), primary_key=True),
    sa.Column("expires", sa.Double, nullable=False),
    sa.Column("dead", sa.Integer, nullable=False),
)
#: POST requests that carried an Idempotency-Key, and what they were answered with.
IDEMPOTENCY = sa.Table(
    "idempotency",
    METADATA,
    sa.Column("owner", sa.String(40), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("attempt", sa.String(40), nullable=False),
    sa.Column("started_ms", sa.BigInteger, nullable=False, index=True),
    sa.Column("outcome", sa.Text),
)


def now_ms() -> int:
    """Return the time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def new_id(prefix: str) -> str:
    """Return an id that sorts by time; its 80 random bits are what nobody guesses."""
    return f"{prefix}_{now_ms():012x}{secrets.token_hex(10)}"


class Database:
    """A database, opened; ``open_database`` sees to it that its tables are there.

    Args:
        url: an SQLAlchemy URL; SQLite and PostgreSQL are supported.

    """

    def __init__(self, url: str) -> None:
        parsed = sa.make_url(url)
        self._is_sqlite = parsed.get_backend_name() == "sqlite"
        if parsed.drivername == "postgresql":
            # The driver that the extra installs, instead of SQLAlchemy's older default.
            parsed = parsed.set(drivername="postgresql+psycopg")
        options: dict[str, Any] = {"pool_pre_ping": True}
        if self._is_sqlite:
            options = {"connect_args": {"timeout": _PATIENCE}}
        self._engine = sa.create_engine(parsed, pool_size=20, max_overflow=30, **options)
        if self._is_sqlite:
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction that writes; in SQLite it waits here until it is the only one.

        What was done outside of the database is undone if it fails: ``undoing`` says how. What is to be done
        once it has succeeded, ``afterwards`` says.
        """
        undo: list[Callable[[], None]] = []
        done: list[Callable[[], None]] = []
        try:
            options = {"writes": True, "undo": undo, "done": done}
            with self._engine.connect().execution_options(**options) as connection, connection.begin():
                yield connection
        except BaseException:
            for step in undo:
                step()
            raise
        for step in done:
            step()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a transaction that only reads."""
        with self._engine.connect() as connection:
            yield connection

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


def undoing(connection: sa.Connection, step: Callable[[], None]) -> None:
    """Have a step done after the transaction, should it fail."""
    connection.get_execution_options()["undo"].append(step)


def afterwards(connection: sa.Connection, step: Callable[[], None]) -> None:
    """Have a step done after the transaction, should it succeed."""
    connection.get_execution_options()["done"].append(step)


def sqlite_url(folder: Path) -> str:
    """Return the URL of the database that is used where none is configured."""
    return str(sa.URL.create("sqlite", database=str(folder / "normsearch.sqlite")))


def _prepare_sqlite(connection: Any, _: Any) -> None:
    # The driver must not begin transactions by itself: begin is ours.
    connection.isolation_level = None
    _use_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _use_wal(connection: Any) -> None:
    # Of several processes that open a new file at once, all but one are told that it is locked, at once.
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later fails if somebody wrote in between.
    immediate = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
