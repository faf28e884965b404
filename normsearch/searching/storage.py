"""Storages: where trials are kept, so that a killed process loses none and several can share them."""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock, get_lock_file
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from normsearch.errors import SearchError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

#: Bytes; no entry is longer.
_LONGEST_LINE = 1 << 20
#: How every journal begins.
_BEGINNING = b'{"op_code":'
#: How often tables are asked for while other processes make the same ones.
_TRIES = 10


def open_storage(storage: str | os.PathLike[str] | BaseStorage | None) -> BaseStorage:
    """Return the storage that a name stands for.

    None keeps trials in memory. A path is a journal file: any number of processes of one machine may share
    it, and none that is killed leaves it locked or unreadable. ``postgresql://USER:PASSWORD@HOST/DATABASE``
    is for many machines (``pip install "normsearch[postgresql]"``), ``sqlite:///FILE`` for one process. A
    storage of Optuna's is returned as it is.

    Raises:
        SearchError: the file or database cannot be used, or is something else. Passwords are not repeated.

    Example:
        >>> from normsearch.searching import open_storage
        >>> type(open_storage(None)).__name__
        'InMemoryStorage'

    """
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    name = os.fspath(storage)
    return _database(name) if "://" in name else _journal(Path(name))


def refuse_missing(storage: str | os.PathLike[str] | BaseStorage) -> None:
    """Raise a ``SearchError`` where there is no journal to read, which opening it would make."""
    if isinstance(storage, BaseStorage) or "://" in os.fspath(storage) or Path(storage).exists():
        return
    raise SearchError(
        f"there is no journal {storage}; start the search first, or give its storage (--storage)"
    )


def check_shared(storage: BaseStorage) -> None:
    """Raise unless several processes may write to a storage at once.

    Raises:
        SearchError: it is in memory, or SQLite.

    """
    database = getattr(storage, "_backend", storage)
    if isinstance(storage, InMemoryStorage):
        raise SearchError(f"trials in memory cannot be shared with other processes; {_WAY_OUT}")
    if isinstance(database, RDBStorage) and database.engine.name == "sqlite":
        raise SearchError(
            "SQLite is for one process: under several writers its locking gives one trial to two of them; "
            f"{_WAY_OUT}"
        )


_WAY_OUT = "give a path (a journal file, for processes of one machine) or postgresql://… (for any)"


class _Lock(BaseJournalFileLock):
    """A lock on the journal itself that ends with the process that holds it, however it ends.

    Optuna's own locks are files, which a killed process leaves behind: everybody waits 30 s then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def acquire(self) -> bool:
        """Wait for the lock, and remove what a process that was killed while writing left of a line."""
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            raise SearchError(_gone(self._path)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _drop_unfinished_line(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let others in."""
        # Unlocked by name: a forked child may hold a copy of the descriptor.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def _gone(path: Path) -> str:
    return (
        f"{path} is gone: it was removed or moved while it was in use; put it back and go on, or start anew"
    )


def _drop_unfinished_line(descriptor: int) -> None:
    """Cut a file after its last newline: the next line would be glued to the rest, unreadable for ever."""
    end = size = os.fstat(descriptor).st_size
    while end:
        start = max(end - 4096, 0)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


class _Journal(JournalFileBackend):
    """Optuna's journal file, under that lock."""

    def __init__(self, path: Path) -> None:
        self._journal, self._guard, self._size = path, _Lock(path), 0
        super().__init__(str(path), lock_obj=self._guard)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Return the entries from one number on."""
        self._check_whole()
        try:
            entries = list(super().read_logs(log_number_from))
        except ValueError:
            # Readers do not lock: half a line may have been replaced by another one between two reads.
            entries = self._read_locked(log_number_from)
        yield from entries

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries; a trial's parameters reach the disk with the next entry that is none.

        Optuna waits for the disk at every entry, so that a plan of fifty sites waits fifty times. In a crash
        of the whole machine a running trial can lose parameters so, never one that has a result.
        """
        if not all("param_name" in entry for entry in logs):
            super().append_logs(logs)
            return
        lines = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in logs)
        with get_lock_file(self._guard), self._journal.open("ab") as file:
            file.write(lines.encode())

    def _check_whole(self) -> None:
        """Raise if what was there is no longer: a journal only grows."""
        try:
            size = self._journal.stat().st_size
        except FileNotFoundError:
            raise SearchError(_gone(self._journal)) from None
        # Half a line that a killed process left may be cut off.
        if size + _LONGEST_LINE < self._size or (self._size and not size):
            raise SearchError(f"{self._journal} was cut while it was in use; restore it from a copy")
        self._size = max(self._size, size)

    def _read_locked(self, log_number_from: int) -> list[dict[str, Any]]:
        self._guard.acquire()
        try:
            return list(super().read_logs(log_number_from))
        except ValueError as error:
            raise SearchError(
                f"{self._journal} is damaged after entry {log_number_from} ({error}); restore it from a "
                "copy, or give another name"
            ) from error
        finally:
            self._guard.release()


def _journal(path: Path) -> BaseStorage:
    if fcntl is None:
        raise SearchError(
            f"{path}: journal files are locked by fcntl, which this platform lacks; give sqlite:///{path} "
            "(for one process) or postgresql://…"
        )
    if not path.parent.is_dir():
        raise SearchError(f"{path}: the folder {str(path.parent)!r} does not exist; make it first")
    try:
        if path.exists():
            with path.open("rb") as file:
                beginning = file.read(len(_BEGINNING))
            # What is no journal must not be written to, nor cut after its last newline.
            if beginning != _BEGINNING[: len(beginning)]:
                raise SearchError(f"{path} is not a journal of trials; give another name")
        return JournalStorage(_Journal(path))
    except OSError as error:
        raise SearchError(f"cannot use {path} as a journal of trials: {error.strerror or error}") from error


def _database(url: str) -> BaseStorage:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Neither the URL nor the reason is shown: a password may be in either.
        raise SearchError(
            f"cannot read the storage's URL, which begins with {url.partition('://')[0]}://; give "
            "postgresql://USER:PASSWORD@HOST/DATABASE with special characters as %40 and the like"
        ) from None
    kind = parsed.get_backend_name()
    if kind not in ("postgresql", "sqlite"):
        raise SearchError(
            f"{kind}:// is no storage that normsearch opens; give a path, postgresql://…, sqlite:///… or a "
            "storage of Optuna's"
        )
    options: dict[str, Any] = {}
    if kind == "postgresql":
        parsed = _with_driver(parsed)
        # A connection that the server closed, because it was started anew, is replaced without an error.
        options = {"pool_pre_ping": True}
    shown = parsed.render_as_string(hide_password=True).partition("?")[0]
    full = parsed.render_as_string(hide_password=False)
    try:
        return _connected(full, options)
    except ImportError:
        raise SearchError(
            f"{shown}: the driver of {parsed.drivername} is not installed; {_INSTALL}"
        ) from None
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        # Not chained: the cause may repeat the password.
        raise SearchError(f"cannot use {shown}: {_without_secrets(error, parsed)}") from None


_INSTALL = 'pip install "normsearch[postgresql]"'


def _with_driver(url: URL) -> URL:
    """Return a URL that names the driver that is installed: which one is the default has changed."""
    if url.drivername != "postgresql":
        return url
    for driver in ("psycopg", "psycopg2"):
        if find_spec(driver) is not None:
            return url.set(drivername=f"postgresql+{driver}")
    shown = url.render_as_string(hide_password=True).partition("?")[0]
    raise SearchError(f"{shown}: no driver for PostgreSQL is installed; {_INSTALL}")


def _connected(url: str, options: dict[str, Any]) -> RDBStorage:
    for last in [*[False] * (_TRIES - 1), True]:
        try:
            storage = RDBStorage(url, engine_kwargs=options)
        except (IntegrityError, ProgrammingError):
            # Another process makes the same tables at this moment.
            if last:
                raise
            time.sleep(0.2)
        else:
            # Optuna leaves its connections open: the driver warns of each when they are collected.
            weakref.finalize(storage, storage.engine.dispose)
            return storage
    raise AssertionError("unreachable")


def _without_secrets(error: Exception, url: URL) -> str:
    """Return an error's first line without passwords."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    text = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    passwords = [url.password, *(value for key, value in url.query.items() if "pass" in key.lower())]
    for password in passwords:
        if password:
            text = text.replace(str(password), "***")
    return text
