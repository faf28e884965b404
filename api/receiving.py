"""How a request's body becomes a file: raw or as a form, in pieces, within limits of size and time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.message import Message
from functools import partial
from typing import Any

import anyio
import sqlalchemy as sa
from anyio.to_thread import run_sync
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.database import UPLOADS
from api.keys import Owner
from api.owned import add, quota_exceeded, refuse_beyond_quota
from api.parts import Parts
from api.problems import ProblemError
from api.store import Content, Incoming

#: Pieces are put together to so many bytes before they are written.
_PIECE = 2**20
#: Seconds before the slowest rate counts.
_GRACE = 30.0
_MOST_FIELDS, _MOST_FIELD_BYTES = 64, 2**20
_DIGEST = re.compile(r"\s*sha-256\s*=\s*:([A-Za-z0-9+/=]*):\s*(?:;.*)?")
#: What is around the file in a form.
FORM_ROOM = 2 * 2**20


@asynccontextmanager
async def incoming(
    request: Request, service: Parts, owner: Owner, around: int = 0
) -> AsyncIterator[Incoming]:
    """Open a file for a request's body, within the key's quota; ``around`` is for what is not the file.

    Raises:
        ProblemError: 413 or 507 before anything is read, or later.

    """
    request.scope["takes_files"] = True
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ProblemError(415, "invalid-request", "send the file as it is, without Content-Encoding")
    settings = service.settings

    def left() -> int:
        with service.database.read() as connection:
            return refuse_beyond_quota(connection, owner, settings, 0)

    room = await run_sync(left)
    most = min(settings.upload_bytes, room)
    too_large = (
        ProblemError(413, "too-large", f"an upload has at most {settings.upload_bytes:,} bytes")
        if settings.upload_bytes <= room
        else quota_exceeded(settings.quota_bytes if owner.quota_bytes is None else owner.quota_bytes)
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > most + around:
        raise too_large
    file = await run_sync(service.store.incoming, most, too_large)
    try:
        yield file
    finally:
        with anyio.CancelScope(shield=True):
            await run_sync(file.__exit__, None, None, None)


async def receive_raw(request: Request, service: Parts, file: Incoming) -> Content:
    """Write a request's body to a file.

    Raises:
        ProblemError: too large, too slow, no room, empty, or another digest than announced.

    """
    await _pump(request, service, file.write)
    if not file.size:
        raise ProblemError(422, "invalid-request", "the body is empty; send the file's content as the body")
    return await run_sync(file.finish)


async def receive_form(
    request: Request, service: Parts, file: Incoming
) -> tuple[Content, str, dict[str, list[str]]]:
    """Write the part ``file`` of a form to a file; return its content, its name, and the other fields.

    Raises:
        ProblemError: as for a raw body, or the form is malformed or has no such part, or several.

    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ProblemError(
            415,
            "invalid-request",
            "send multipart/form-data with the part file, as `curl -F file=@PATH` does",
        )
    try:
        form = _Form(options[b"boundary"], file)
        await _pump(request, service, form.feed)
    except FormParserError as error:
        raise ProblemError(422, "invalid-request", f"the form is malformed: {str(error)[:200]}") from error
    if not form.is_complete or form.filename is None:
        raise ProblemError(
            422, "invalid-request", "the form has no part named file; `curl -F file=@PATH` sends one"
        )
    if not file.size:
        raise ProblemError(
            422, "invalid-request", f"the file {form.filename[:80]!r} is empty; send it with its content"
        )
    return await run_sync(file.finish), form.filename, form.fields


async def _pump(request: Request, service: Parts, take: Callable[[bytes], object]) -> None:
    """Give a body to ``take`` in large pieces, on other threads than the event loop's."""
    announced = _announced(request.headers.get("content-digest"))
    digest = None if announced is None else hashlib.sha256()
    start, received, waiting = time.monotonic(), 0, 0
    pieces: list[bytes] = []

    def handle(given: list[bytes]) -> None:
        # Put together here: what the event loop does, every other client waits for.
        piece = b"".join(given)
        if digest is not None:
            digest.update(piece)
        take(piece)
        service.metrics.received.inc(len(piece))

    stream = request.stream()
    while True:
        allowed = start + _GRACE + received / service.settings.slowest_bytes_per_second
        try:
            with anyio.fail_after(allowed - time.monotonic()):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            rate = service.settings.slowest_bytes_per_second
            raise ProblemError(
                408,
                "too-slow",
                f"less than {rate:,} bytes a second arrived; try again over a faster line",
                {"Connection": "close"},
            ) from error
        if chunk is None:
            break
        received += len(chunk)
        waiting += len(chunk)
        pieces.append(chunk)
        if waiting >= _PIECE:
            await run_sync(handle, pieces)
            pieces, waiting = [], 0
    await run_sync(handle, pieces)
    if digest is not None and digest.digest() != announced:
        raise ProblemError(
            422, "digest-mismatch", "the body's SHA-256 is not the one in Content-Digest; send the file again"
        )


def _announced(header: str | None) -> bytes | None:
    """Return the SHA-256 that a Content-Digest header (RFC 9530) announces; others are left aside."""
    for entry in (header or "").split(","):
        match = _DIGEST.fullmatch(entry)
        if match is None:
            if entry.strip().startswith("sha-256"):
                raise ProblemError(422, "invalid-request", "Content-Digest is written sha-256=:BASE64:")
            continue
        try:
            value = base64.b64decode(match[1], validate=True)
        except binascii.Error as error:
            raise ProblemError(422, "invalid-request", "Content-Digest: this is not base64") from error
        return value
    return None


class _Form:
    """Takes a form apart as it arrives: one part goes to a file, the others are short fields."""

    def __init__(self, boundary: bytes, file: Incoming) -> None:
        self.fields: dict[str, list[str]] = {}
        self.filename: str | None = None
        self.is_complete = False
        self._file, self._room = file, _MOST_FIELD_BYTES
        self._header: tuple[bytearray, bytearray] = bytearray(), bytearray()
        self._headers = Message()
        self._value: bytearray | None = None
        self._name = ""
        on: Any = {
            "on_part_begin": self._begin,
            "on_header_field": partial(self._collect, 0),
            "on_header_value": partial(self._collect, 1),
            "on_header_end": self._header_done,
            "on_headers_finished": self._started,
            "on_part_data": self._data,
            "on_part_end": self._part_done,
            "on_end": self._finished,
        }
        self._parser = MultipartParser(boundary, on)

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._parser.write(data)

    def _begin(self) -> None:
        self._headers = Message()

    def _collect(self, part: int, data: bytes, start: int, end: int) -> None:
        self._header[part].extend(data[start:end])

    def _header_done(self) -> None:
        name, value = (bytes(part).decode("latin-1") for part in self._header)
        self._headers[name] = value
        for part in self._header:
            part.clear()

    def _started(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name != "file" and b"filename" in options:
            raise _malformed(f"the part {name[:40]!r} is a file; the file is sent as the part named file")
        if name == "file":
            if self.filename is not None:
                raise _malformed("there is more than one part named file")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
            self._value = None
            return
        if sum(map(len, self.fields.values())) >= _MOST_FIELDS:
            raise _malformed(f"there are more than {_MOST_FIELDS} fields")
        self._name, self._value = name, bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = memoryview(data)[start:end]
        if self._value is None:
            self._file.write(part)
            return
        self._room -= len(part)
        if self._room < 0:
            raise ProblemError(413, "too-large", f"a form's fields have at most {_MOST_FIELD_BYTES:,} bytes")
        self._value.extend(part)

    def _part_done(self) -> None:
        if self._value is not None:
            text = bytes(self._value).decode("utf-8", "replace")
            self.fields.setdefault(self._name, []).append(text)

    def _finished(self) -> None:
        self.is_complete = True


def _malformed(what: str) -> ProblemError:
    return ProblemError(422, "invalid-request", f"the form is not as it must be: {what}")


def keep_upload(
    connection: sa.Connection, service: Parts, owner: Owner, file: Incoming, content: Content, name: str
) -> tuple[sa.Row[Any], bool]:
    """Make a received file an upload; return it, and whether the same file was there under the same name."""
    service.store.keep(connection, file, content)
    same = (UPLOADS.c.owner == owner.id, UPLOADS.c.name == name, UPLOADS.c.sha256 == content.sha256)
    row = connection.execute(sa.select(UPLOADS).where(*same)).one_or_none()
    if row is not None:
        return row, True
    values = {"name": name, "size": content.size, "sha256": content.sha256}
    return add(connection, UPLOADS, owner, service.settings, **values), False


def checked_name(name: str | None) -> str:
    """Return the last part of a file's name as a client gave it.

    Raises:
        ProblemError: 422; it is empty, too long, or has characters that cannot be seen.

    """
    last = re.split(r"[/\\]", name or "")[-1]
    if not 0 < len(last) <= 200 or not last.isprintable() or last in (".", ".."):
        raise ProblemError(
            422,
            "invalid-request",
            "filename: give the file's name, 1 to 200 printable characters, with its suffix",
        )
    return last
