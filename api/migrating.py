"""How the database is brought up to date before it is opened: by a process of its own.

What makes and changes tables (Alembic, and DBOS for those of the queue) is needed for a moment; a process
that has imported it holds it in memory until it ends.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import traceback
from pathlib import Path

import sqlalchemy as sa

from api.confinement import hide
from api.database import Database
from api.queueing import Queue

#: Any number, the same for every process: who holds this lock migrates (PostgreSQL).
_LOCK = 0x6E6F726D
#: The first SQLite that knows fractions of seconds.
_SUBSECONDS = (3, 42)
_FOLDER = Path(__file__).parent / "migrations"


class MigrationError(Exception):
    """The tables could not be made, or not be changed; says why, without secrets."""


def open_database(url: str) -> Database:
    """Open a database, brought up to date.

    Args:
        url: an SQLAlchemy URL; SQLite and PostgreSQL are supported.

    Raises:
        SQLAlchemyError: it does not answer.
        MigrationError: it could not be brought up to date.

    """
    too_old = (
        outdated(sys.version_info[:2], sqlite3.sqlite_version_info) if url.startswith("sqlite") else None
    )
    if too_old is not None:
        raise MigrationError(too_old)
    database = Database(url)
    try:
        if not _is_current(database, url):
            _migrate(url)
    except BaseException:
        database.close()
        raise
    return database


def outdated(python: tuple[int, ...], sqlite: tuple[int, ...]) -> str | None:
    """Say why an SQLite cannot hold the queue; None if it can.

    Under Python 3.12 and later DBOS asks SQLite for fractions of seconds, which older ones answer with NULL.
    """
    if python < (3, 12) or sqlite >= _SUBSECONDS:
        return None
    here, under, needed = (".".join(map(str, version)) for version in (sqlite, python, _SUBSECONDS))
    return (
        f"SQLite {here} is too old for the queue under Python {under}, which needs {needed}; use PostgreSQL "
        "(NORMSEARCH_DATABASE_URL), a newer SQLite or Python 3.11"
    )


def newest() -> str:
    """Return the revision that the code expects: the last file of ``migrations/versions``."""
    return max(path.name.partition("_")[0] for path in (_FOLDER / "versions").glob("[0-9]*_*.py"))


def reason(error: Exception) -> str:
    """Return what a database said, in one line and without the statement."""
    said = str(getattr(error, "orig", error)).strip().splitlines()
    return said[0] if said else type(error).__name__


def _is_current(database: Database, url: str) -> bool:
    revision = sa.table("alembic_version", sa.column("version_num"))
    with database.read() as connection:
        if not sa.inspect(connection).has_table(revision.name):
            return False
        is_newest = connection.scalar(sa.select(revision.c.version_num)) == newest()
        return is_newest and Queue(url).has_tables(connection)


def _migrate(url: str) -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; from api.migrating import main; main()"
    # The URL may hold a password: it is told, where nobody else can read it.
    done = subprocess.run(
        [sys.executable, "-c", code], input=url, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:]
        raise MigrationError(json.loads(last[0]) if last else f"its process ended with {done.returncode}")


def main() -> None:
    """Bring the database up to date whose URL stands on standard input; say on standard output why not."""
    hide()
    url = sys.stdin.read()
    try:
        _upgrade(url)
    except Exception as error:
        if not isinstance(error, sa.exc.SQLAlchemyError):
            traceback.print_exc()
        print(json.dumps(reason(error)))
        sys.exit(1)


def _upgrade(url: str) -> None:
    """Make or change tables; of several that try at once, the others wait and find it done."""
    from alembic import command
    from alembic.config import Config

    from api.workflows import make_tables

    database = Database(url)
    try:
        with database.write() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            config = Config()
            config.set_main_option("script_location", str(_FOLDER))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        database.close()
    make_tables(url)
