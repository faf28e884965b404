"""Contents in another file system, such as an S3 bucket: sent whole or not at all, copied here when needed.

Children read files of this machine alone, so what they need is copied into a folder of bounded size. Whoever
uses a copy holds a shared lock on it; only what nobody uses is removed, the least recently used first.
"""

from __future__ import annotations

import fcntl
import os
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from api.database import Database
from api.observing import LOG
from api.problems import ProblemError
from api.settings import Settings
from api.store import FULL, Content, Incoming, Place, Reading, Store, no_room

#: Bytes of a part that is sent or fetched at once, at least.
_PART = 8 * 2**20
_PIECE = 2**20
#: S3 takes 10,000 parts of a file.
_MOST_PARTS = 9_000
#: What servers say that have no room; the last is HTTP's own status.
_NO_ROOM = ("QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", 507)


def open_store(settings: Settings, database: Database) -> Store:
    """Return the files of the service, where the settings say that they lie.

    Raises:
        ProblemError: they are elsewhere, and that does not answer.

    """
    reserve, place = settings.reserve_bytes, None
    if settings.files is not None:
        copies = Copies(settings.data, settings.copies_bytes, reserve)
        place = Remote(settings.files, settings.files_options, copies)
    return Store(settings.data, database, reserve, place)


class Copies:
    """Copies of contents on this machine's disk.

    Args:
        folder: where their folder is, beside that of arriving files.
        most: the bytes that all of them may have, but for those in use.
        reserve: bytes of the disk that stay free.

    """

    def __init__(self, folder: Path, most: int, reserve: int) -> None:
        self._folder, self._arriving = folder / "copies", folder / "incoming"
        self._most, self._reserve = most, reserve
        for made in (self._folder, self._arriving):
            made.mkdir(parents=True, exist_ok=True, mode=0o700)

    def drop(self, sha256: str) -> None:
        """Remove a copy, unless it is used."""
        _removed(self._folder / sha256)

    def add(self, incoming: Incoming, content: Content) -> None:
        """Take a file that is whole."""
        incoming.move(self._folder / content.sha256)
        self._shrink(0)

    @contextmanager
    def using(self, content: Content, place: Place) -> Iterator[Path]:
        """Yield the copy, fetched from its place if need be; it stays as long as it is used."""
        while (copy := self.open(content.sha256)) is None:
            self._fetch(content, place)
        try:
            yield self._folder / content.sha256
        finally:
            os.close(copy)
            self._shrink(0)

    def open(self, sha256: str) -> int | None:
        """Open a copy, which is not removed until the descriptor is closed; None if there is none."""
        path = self._folder / sha256
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                # Unless it was removed before the lock.
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    os.utime(descriptor)
                    return descriptor
            os.close(descriptor)

    def _fetch(self, content: Content, place: Place) -> None:
        self._shrink(content.size)
        with Incoming(self._arriving, content.size, damaged(), self._reserve) as file:
            with closing(place.open(content, 0, content.size)) as reading:
                while data := reading.read(_PIECE):
                    file.write(data)
            if file.finish() != content:
                raise damaged()
            file.move(self._folder / content.sha256)

    def _shrink(self, room: int) -> None:
        """Remove what was used least recently until all that is left leaves so much room."""
        found = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total = room + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._most:
                return
            if _removed(path):
                total -= size


def _removed(path: str | Path) -> bool:
    """Remove a copy that nobody uses; tell whether it was."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            return True
    except (FileNotFoundError, BlockingIOError):
        return False


class Remote:
    """A folder of a file system that fsspec knows.

    Args:
        url: of the folder, for example ``s3://bucket/normsearch``.
        options: of the file system.
        copies: what this machine has of it.

    """

    is_far = True

    def __init__(self, url: str, options: Mapping[str, Any], copies: Copies) -> None:
        self._copies = copies
        with storage():
            # A listing that is remembered would be another process's past.
            self._system, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)

    def send(self, path: Path, content: Content) -> None:
        """Send a file in parts, of which nothing is seen before the last one has arrived."""
        part = max(_PART, -(-content.size // _MOST_PARTS))
        with storage(), path.open("rb") as file:
            target = self._system.open(self._place(content.sha256), "wb", block_size=part, autocommit=False)
            try:
                while data := file.read(part):
                    target.write(data)
                target.close()
                target.commit()
            except BaseException:
                with suppress(Exception):
                    target.discard()
                raise

    def put(self, incoming: Incoming, content: Content) -> None:
        """Make sure that it is still there, since others may have removed it, and keep a copy here."""
        with storage():
            try:
                is_there = self._system.info(self._place(content.sha256))["size"] == content.size
            except FileNotFoundError:
                is_there = False
        if not is_there:
            self.send(incoming.path, content)
        self._copies.add(incoming, content)

    def remove(self, sha256: str) -> None:
        """Remove the object and this machine's copy; other machines' go when their room is needed."""
        with storage(), suppress(FileNotFoundError):
            self._system.rm_file(self._place(sha256))
        self._copies.drop(sha256)

    def contents(self) -> Iterator[str]:
        """Yield what is there."""
        with storage():
            try:
                found = self._system.find(self._root)
            except FileNotFoundError:
                found = []
        yield from map(posixpath.basename, found)

    def local(self, content: Content) -> AbstractContextManager[Path]:
        """Copy it here, or use the copy that there is."""
        return self._copies.using(content, self)

    def open(self, content: Content, start: int, end: int) -> Reading:
        """Open the copy, or the object itself."""
        copy = self._copies.open(content.sha256)
        if copy is None:
            return _Parts(self, content, start, end)
        os.lseek(copy, start, os.SEEK_SET)
        return os.fdopen(copy, "rb", buffering=0)

    def fetch(self, sha256: str, start: int, end: int) -> bytes:
        """Return some bytes of an object."""
        with storage():
            return bytes(self._system.cat_file(self._place(sha256), start=start, end=end))

    def _place(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"


class _Parts:
    """A range of an object, fetched in parts."""

    def __init__(self, remote: Remote, content: Content, start: int, end: int) -> None:
        self._remote, self._sha256, self._next, self._end = remote, content.sha256, start, end
        # Whether it can be read is known now, not when an answer has begun.
        self._part = self._fetch()

    def read(self, size: int, /) -> bytes:
        """Return at most so many bytes; none at the end."""
        if not self._part and self._next < self._end:
            self._part = self._fetch()
        given, self._part = bytes(self._part[:size]), self._part[size:]
        return given

    def close(self) -> None:
        """Nothing is open between two parts."""

    def _fetch(self) -> memoryview:
        end = min(self._next + _PART, self._end)
        part = self._remote.fetch(self._sha256, self._next, end)
        if len(part) != end - self._next:
            raise damaged()
        self._next = end
        return memoryview(part)


def damaged() -> ProblemError:
    """Return what is answered where an object is not what was put there."""
    return ProblemError(503, "busy", "a stored file is not what was put there; tell the operator")


@contextmanager
def storage() -> Iterator[None]:
    """Answer whatever the file system's library raises: 507 where there is no room, else 503."""
    try:
        yield
    except ProblemError:
        raise
    except Exception as error:
        LOG.warning("storage failed", extra={"fields": {"error": f"{type(error).__name__}: {error}"[:500]}})
        if _is_full(error):
            raise no_room() from error
        raise ProblemError(
            503, "busy", "the storage of files does not answer; try again", {"Retry-After": "10"}
        ) from error


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    # botocore's own, below what s3fs makes of it.
    response = getattr(error.__cause__, "response", None) or {}
    said = response.get("Error", {}).get("Code"), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return any(one in _NO_ROOM for one in said)
