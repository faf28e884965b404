"""Files by content: received beside their place, hashed on the way, shared by all who have the same content.

A content has a row in ``blobs`` and a file. Whoever puts or removes one holds that row's lock, so a file is
never removed while somebody puts the same content in its place. Nobody learns whether it was there before.
The place is a folder, or what ``remote`` makes of another file system.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from api.database import ARTIFACTS, BLOBS, DATASETS, JOBS, MODELS, UPLOADS, Database, undoing
from api.observing import LOG
from api.problems import ProblemError

#: The free space is looked at again after so many bytes.
_STEP = 64 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Content:
    """What a file holds, by its hash."""

    sha256: str
    size: int

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        """Return the content of an upload or an artifact."""
        return cls(row.sha256, row.size)


class Incoming:
    """A file on its way in; nothing of it stays unless it is kept.

    Args:
        folder: where it is written.
        most: the most bytes it may have.
        too_large: what is said of more.
        reserve: bytes of the disk that stay free.

    """

    def __init__(self, folder: Path, most: int, too_large: ProblemError, reserve: int) -> None:
        self._folder, self._most, self._too_large, self._reserve = folder, most, too_large, reserve
        self._hash, self.size, self._checked = hashlib.sha256(), 0, -1
        with disk():
            self._descriptor, name = tempfile.mkstemp(dir=folder)
        self.path = Path(name)
        # Held as long as this process lives: what is not locked was left behind by one that died.
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def write(self, data: bytes | memoryview) -> None:
        """Append.

        Raises:
            ProblemError: 413 for more than it may have, 507 where the disk has no room.

        """
        if self.size + len(data) > self._most:
            raise self._too_large
        if self._checked < 0 or self.size + len(data) - self._checked > _STEP:
            self._checked = self.size
            if shutil.disk_usage(self._folder).free - len(data) < self._reserve:
                raise no_room()
        self._hash.update(data)
        rest = memoryview(data)
        with disk():
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        self.size += len(data)

    def finish(self) -> Content:
        """Make sure that it survives a crash, and return what it holds."""
        with disk():
            os.fchmod(self._descriptor, 0o444)
            os.fsync(self._descriptor)
        return Content(self._hash.hexdigest(), self.size)

    def move(self, place: Path) -> None:
        """Put it in a place, from where it may be removed by others."""
        with disk():
            os.replace(self.path, place)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


class _Sent(Incoming):
    """A file whose content goes to a place elsewhere as soon as it is whole, and is forgotten unless kept."""

    def __init__(self, store: Store, most: int, too_large: ProblemError) -> None:
        super().__init__(store.arriving, most, too_large, store.reserve)
        self._store, self._content = store, Content("", 0)
        self.is_kept = False

    def finish(self) -> Content:
        content = super().finish()
        self._content = content
        # Not in a transaction, where others would wait for it.
        self._store.place.send(self.path, content)
        return content

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        if self._content.size and not self.is_kept:
            self._store.forget(self._content)


class Reading(Protocol):
    """An open file."""

    def read(self, size: int, /) -> bytes | None:
        """Return at most so many bytes; none at the end."""

    def close(self) -> None:
        """Need it no more."""


class Place(Protocol):
    """Where contents lie; what is put there appears whole or not at all.

    Attributes:
        is_far: whether what is put there is sent there first, outside of transactions.

    """

    is_far: bool

    def send(self, path: Path, content: Content) -> None:
        """Do what can be done before ``put``, which takes long."""

    def put(self, incoming: Incoming, content: Content) -> None:
        """Have the content there, for good."""

    def remove(self, sha256: str) -> None:
        """Have it there no more."""

    def contents(self) -> Iterator[str]:
        """Yield what is there."""

    def local(self, content: Content) -> AbstractContextManager[Path]:
        """Have it on this machine's disk, to be only read."""

    def open(self, content: Content, start: int, end: int) -> Reading:
        """Open it wherever it is, to read it from ``start`` and not beyond ``end``."""


class Folder:
    """A folder of this machine, or of a disk that several share."""

    is_far = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def send(self, path: Path, content: Content) -> None:
        """Do nothing: ``put`` is quick."""

    def put(self, incoming: Incoming, content: Content) -> None:
        """Move it there."""
        place = self._place(content.sha256)
        with disk():
            place.parent.mkdir(exist_ok=True, mode=0o700)
            incoming.move(place)
            for folder in (place.parent, self._folder):
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def remove(self, sha256: str) -> None:
        """Remove the file."""
        self._place(sha256).unlink(missing_ok=True)

    def contents(self) -> Iterator[str]:
        """Yield what is there."""
        for path in self._folder.glob("??/*"):
            yield path.name

    @contextmanager
    def local(self, content: Content) -> Iterator[Path]:
        """Yield the file itself."""
        yield self._place(content.sha256)

    def open(self, content: Content, start: int, end: int) -> Reading:
        """Open the file."""
        file = self._place(content.sha256).open("rb", buffering=0)
        file.seek(start)
        return file

    def _place(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256


class Store:
    """The files of the service.

    Args:
        folder: where they are received, and lie by default.
        database: where their rows are.
        reserve: bytes of the disk that stay free.
        place: where they lie.

    """

    def __init__(self, folder: Path, database: Database, reserve: int, place: Place | None = None) -> None:
        self.place: Place = Folder(folder / "blobs") if place is None else place
        self.arriving, self.reserve = folder / "incoming", reserve
        self._database = database
        self.arriving.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()

    def incoming(self, most: int, too_large: ProblemError) -> Incoming:
        """Open a file that may get at most so many bytes.

        Raises:
            ProblemError: 507 where the disk has no room.

        """
        if shutil.disk_usage(self.arriving).free < self.reserve:
            raise no_room()
        if self.place.is_far:
            return _Sent(self, most, too_large)
        return Incoming(self.arriving, most, too_large, self.reserve)

    def keep(self, connection: sa.Connection, incoming: Incoming, content: Content) -> None:
        """Put a finished file in its place, within the transaction that refers to it."""
        self._lock(connection, content)
        undoing(connection, partial(self.forget, content))
        self.place.put(incoming, content)
        if isinstance(incoming, _Sent):
            incoming.is_kept = True

    def local(self, content: Content) -> AbstractContextManager[Path]:
        """Have a content on this machine's disk; it is only read, by children too.

        Raises:
            ProblemError: 503 where it cannot be had, 507 where the disk has no room for it.

        """
        return self.place.local(content)

    def open(self, content: Content, start: int, end: int) -> Reading:
        """Open a content, to be read from ``start`` and not beyond ``end``.

        Raises:
            ProblemError: 503 where it cannot be had.

        """
        return self.place.open(content, start, end)

    def forget(self, content: Content) -> None:
        """Remove a content if nothing refers to it, with or without a row; later, if its place is away."""
        try:
            with self._database.write() as connection:
                # Waits for whoever is about to refer to it.
                self._lock(connection, content)
                if not self._is_used(connection, content.sha256):
                    connection.execute(sa.delete(BLOBS).where(BLOBS.c.sha256 == content.sha256))
                    self.place.remove(content.sha256)
        except ProblemError as problem:
            LOG.warning("a file stays until the next start", extra={"fields": {"why": problem.detail}})

    def _lock(self, connection: sa.Connection, content: Content) -> None:
        insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        statement = insert(BLOBS).values(sha256=content.sha256, size=content.size)
        # An update of nothing, which takes the lock on the row.
        connection.execute(
            statement.on_conflict_do_update(index_elements=["sha256"], set_={"size": BLOBS.c.size})
        )

    @staticmethod
    def _is_used(connection: sa.Connection, sha256: str) -> bool:
        return any(
            connection.scalar(sa.select(table.c.id).where(table.c.sha256 == sha256).limit(1)) is not None
            for table in (UPLOADS, ARTIFACTS)
        )

    def _sweep(self) -> None:
        """Remove what processes that died have left: half-received files, and contents of nobody."""
        for path in self.arriving.iterdir():
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                path.unlink(missing_ok=True)
        used = sa.union(*(sa.select(table.c.sha256) for table in (UPLOADS, ARTIFACTS)))
        with self._database.read() as connection:
            known = set(connection.scalars(used))
            rows = set(connection.scalars(sa.select(BLOBS.c.sha256)))
        for sha256 in (rows | set(self.place.contents())) - known:
            self.forget(Content(sha256, 0))


def used_bytes(connection: sa.Connection, owner: str) -> int:
    """Return what a key has stored, every copy counted: what others have costs the same."""
    sums = [
        sa.select(sa.func.coalesce(sa.func.sum(table.c.size), 0)).where(table.c.owner == owner)
        for table in (UPLOADS, MODELS, DATASETS, ARTIFACTS, JOBS)
    ]
    return sum(int(connection.scalar(one) or 0) for one in sums)


@contextmanager
def disk() -> Iterator[None]:
    """Answer a full disk with 507."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise no_room() from error
        raise


def no_room() -> ProblemError:
    """Return what is answered where the disk is full."""
    return ProblemError(
        507,
        "disk-full",
        "the disk has no room for this; nothing of it was kept: delete something, or tell the operator",
    )
