"""How a content is answered with: whole or a range of it, in pieces, as fast as the client takes them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from urllib.parse import quote

import anyio
from anyio.to_thread import run_sync
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.problems import ProblemError
from api.store import Content, Reading, Store

#: A client that does not take so much in the server's time limit is too slow.
_PIECE = 2**18
#: Of several ranges, which nobody must understand (RFC 9110), the whole file is sent.
_RANGE = re.compile(r"bytes=\s*(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))\s*", re.ASCII)


def send(
    request: Request, store: Store, content: Content, name: str, media_type: str, headers: Mapping[str, str]
) -> Response:
    """Return a content as an attachment; ``headers`` has its ``etag`` and ``last-modified``.

    Raises:
        ProblemError: 416 for a range beyond the end, 503 where the content cannot be had.

    """
    quoted = quote(name)
    filename = f'filename="{name}"' if quoted == name else f"filename*=utf-8''{quoted}"
    start, end, status = _range(request, content.size, headers)
    headers = {
        **headers,
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; {filename}",
        "content-length": str(end - start),
        **({"content-range": f"bytes {start}-{end - 1}/{content.size}"} if status == 206 else {}),
    }
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    file = store.open(content, start, end)
    return _Sending(file, end - start, status, headers, media_type)


def _range(request: Request, size: int, headers: Mapping[str, str]) -> tuple[int, int, int]:
    """Return where what was asked for starts and ends, and the status of the answer."""
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    condition = request.headers.get("if-range", headers["etag"])
    if match is None or condition not in (headers["etag"], headers["last-modified"]):
        return 0, size, 200
    first, last, final = match.groups()
    start = max(0, size - int(final)) if first is None else int(first)
    end = min(size, int(last) + 1) if last else size
    if start >= end:
        raise ProblemError(
            416, "invalid-request", f"the file has {size:,} bytes", {"Content-Range": f"bytes */{size}"}
        )
    return start, end, 206


class _Sending(StreamingResponse):
    """Closes its file whatever happens."""

    def __init__(
        self, file: Reading, size: int, status: int, headers: Mapping[str, str], media_type: str
    ) -> None:
        super().__init__(_pieces(file, size), status, headers, media_type)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await run_sync(self._file.close)


async def _pieces(file: Reading, size: int) -> AsyncIterator[bytes]:
    while size and (data := await run_sync(file.read, min(_PIECE, size))):
        size -= len(data)
        yield data
