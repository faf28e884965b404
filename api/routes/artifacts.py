"""Artifacts: the files that were made here."""

from __future__ import annotations

import base64
from email.utils import formatdate
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response

from api.database import ARTIFACTS
from api.owned import Cursor, Identifier, Limit, fetch, page, remove
from api.parts import Asking, Parts, Service
from api.problems import documented
from api.schemas import Artifact, Page
from api.sending import send
from api.store import Content

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole file, with a strong ETag", "content": _BINARY},
    206: {"description": "The range that was asked for", "content": _BINARY},
    304: {"description": "The client has it already"},
    **documented(404, 416, 422),
}


def download(request: Request, service: Parts, row: sa.Row[Any], headers: dict[str, str]) -> Response:
    """Return a file as an attachment: whole, in part, or not again."""
    digest = base64.b64encode(bytes.fromhex(row.sha256)).decode()
    headers = {
        **headers,
        "etag": f'"{row.sha256}"',
        "repr-digest": f"sha-256=:{digest}:",
        "cache-control": "private, no-cache",
        # The file's own time would tell that somebody else has the same content.
        "last-modified": formatdate(row.created_ms // 1000, usegmt=True),
    }
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if headers["etag"] in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return send(request, service.store, Content.of(row), row.name, row.media_type, headers)


@router.get("", summary="List artifacts", responses=documented(422))
def listed(service: Service, asking: Asking, limit: Limit = 50, cursor: Cursor = None) -> Page[Artifact]:
    """Return this key's artifacts, the newest first."""
    with service.database.read() as connection:
        rows, following = page(connection, ARTIFACTS, asking, limit, cursor)
    return Page(items=[Artifact.of(row) for row in rows], next=following)


@router.get("/{identifier}", summary="Download an artifact", response_class=Response, responses=_CONTENT)
def one(request: Request, service: Service, asking: Asking, identifier: Identifier) -> Response:
    """Return the file; `Range`, `If-Range` and `If-None-Match` are understood."""
    with service.database.read() as connection:
        row = fetch(connection, ARTIFACTS, asking, identifier)
    return download(request, service, row, {})


router.add_api_route("/{identifier}", one, methods=["HEAD"], include_in_schema=False)


@router.delete(
    "/{identifier}", summary="Delete an artifact", status_code=204, responses=documented(404, 409, 422)
)
def delete(service: Service, asking: Asking, identifier: Identifier) -> Response:
    """Delete an artifact; what it was made from stays."""
    with service.database.write() as connection:
        row = remove(connection, ARTIFACTS, asking, identifier)
    service.store.forget(Content.of(row))
    return Response(status_code=204)
