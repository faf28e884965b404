"""Files by content: received beside their place, hashed on the way, shared by all who have the same content.

A content has a row in ``blobs`` and a file. Whoever puts or removes one holds that row's lock, so a file is
never removed while somebody puts the same content in its place. Nobody learns whether it was there before.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from api.database import ARTIFACTS, BLOBS, DATASETS, JOBS, MODELS, UPLOADS, Database, undoing
from api.problems import ProblemError

#: The free space is looked at again after so many bytes.
_STEP = 64 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Content:
    """What a file holds, by its hash."""

    sha256: str
    size: int


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


class Store:
    """The files of the service.

    Args:
        folder: where they are.
        database: where their rows are.
        reserve: bytes of the disk that stay free.

    """

    def __init__(self, folder: Path, database: Database, reserve: int) -> None:
        self._blobs, self._incoming = folder / "blobs", folder / "incoming"
        self._database, self._reserve = database, reserve
        for made in (self._blobs, self._incoming):
            made.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()

    def incoming(self, most: int, too_large: ProblemError) -> Incoming:
        """Open a file that may get at most so many bytes.

        Raises:
            ProblemError: 507 where the disk has no room.

        """
        if shutil.disk_usage(self._incoming).free < self._reserve:
            raise no_room()
        return Incoming(self._incoming, most, too_large, self._reserve)

    def keep(self, connection: sa.Connection, incoming: Incoming, content: Content) -> None:
        """Put a finished file in its place, within the transaction that refers to it."""
        self._lock(connection, content)
        place = self._place(content.sha256)
        undoing(connection, partial(self.forget, content))
        with disk():
            place.parent.mkdir(exist_ok=True, mode=0o700)
            os.replace(incoming.path, place)
            for folder in (place.parent, self._blobs):
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def path(self, sha256: str) -> Path:
        """Return the file with a content; it is only read."""
        return self._place(sha256)

    @contextmanager
    def local(self, content: Content) -> Iterator[Path]:
        """Have a content in a file of this machine, which is only read."""
        yield self._place(content.sha256)

    def forget(self, content: Content) -> None:
        """Remove a content if nothing refers to it, with or without a row."""
        with self._database.write() as connection:
            # Waits for whoever is about to refer to it.
            self._lock(connection, content)
            if not self._is_used(connection, content.sha256):
                connection.execute(sa.delete(BLOBS).where(BLOBS.c.sha256 == content.sha256))
                self._place(content.sha256).unlink(missing_ok=True)

    def _place(self, sha256: str) -> Path:
        return self._blobs / sha256[:2] / sha256

    def _lock(self, connection: sa.Connection, content: Content) -> None:
        insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        statement = insert(BLOBS).values(sha256=content.sha256, size=content.size)
        # An update of nothing, which takes the lock on the row.
        connection.execute(
            statement.on_conflict_do_update(index_elements=["sha256"], set_={"size": content.size})
        )

    @staticmethod
    def _is_used(connection: sa.Connection, sha256: str) -> bool:
        return any(
            connection.scalar(sa.select(table.c.id).where(table.c.sha256 == sha256).limit(1)) is not None
            for table in (UPLOADS, ARTIFACTS)
        )

    def _sweep(self) -> None:
        """Remove what processes that died have left: half-received files, and contents without a row."""
        for path in self._incoming.iterdir():
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                path.unlink(missing_ok=True)
        with self._database.read() as connection:
            known = set(connection.scalars(sa.select(BLOBS.c.sha256)))
        for path in self._blobs.glob("??/*"):
            if path.name not in known:
                self.forget(Content(path.name, path.stat().st_size))


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
        if error.errno in _FULL:
            raise no_room() from error
        raise


def no_room() -> ProblemError:
    """Return what is answered where the disk is full."""
    return ProblemError(
        507,
        "disk-full",
        "the disk has no room for this; nothing of it was kept: delete something, or tell the operator",
    )
