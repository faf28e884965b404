"""Uploads: files received, raw or as a form."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import sqlalchemy as sa
from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response

from api.answering import CREATED, answered
from api.database import UPLOADS
from api.idempotency import Commit, IdempotencyKey, Outcome, at_once, fingerprint
from api.keys import Owner
from api.owned import Cursor, Identifier, Limit, fetch, page, remove
from api.parts import Asking, Parts, Service
from api.problems import documented
from api.receiving import FORM_ROOM, checked_name, incoming, keep_upload, receive_form, receive_raw
from api.schemas import Page, Upload
from api.store import Content, Incoming

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "string", "format": "binary"}},
    }
}
_REFUSED = documented(408, 409, 413, 415, 422, 507)
_EXISTED: dict[int | str, Any] = {200: {"model": Upload, "description": "The same file was there", **CREATED}}


def kept(service: Parts, owner: Owner, file: Incoming, content: Content, name: str) -> Commit:
    """Return the last step of an upload."""

    def commit(connection: sa.Connection) -> Outcome:
        row, existed = keep_upload(connection, service, owner, file, content, name)
        document = Upload.of(row).model_dump(mode="json")
        return Outcome(200 if existed else 201, document, f"/v1/uploads/{row.id}")

    return commit


@router.put(
    "",
    summary="Upload a file as the body",
    status_code=201,
    response_model=Upload,
    responses={201: {"description": "Received", **CREATED}, **_EXISTED, **_REFUSED},
    openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": _BINARY}}},
)
async def put(
    request: Request,
    service: Service,
    asking: Asking,
    filename: Annotated[str, Query(max_length=200, description="its name, with its suffix")],
) -> Response:
    """Receive a file: `curl -T resnet50.pth 'http://…/v1/uploads?filename=resnet50.pth'`.

    `Content-Digest: sha-256=:…:` is checked where it is sent. The same file under the same name is one
    upload.
    """
    name = checked_name(filename)
    async with incoming(request, service, asking) as file:
        content = await receive_raw(request, service, file)
        commit = kept(service, asking, file, content, name)
        return answered(await run_sync(at_once, service.database, asking, None, "", commit))


@router.post(
    "",
    summary="Upload a file in a form",
    status_code=201,
    response_model=Upload,
    responses={201: {"description": "Received", **CREATED}, **_EXISTED, **_REFUSED},
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": _FORM}}},
)
async def post(
    request: Request, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> Response:
    """Receive the part `file` of a form: `curl -F file=@resnet50.pth http://…/v1/uploads`."""
    async with incoming(request, service, asking, FORM_ROOM) as file:
        content, given, _ = await receive_form(request, service, file)
        name = checked_name(given)
        commit = kept(service, asking, file, content, name)
        same = fingerprint("uploads", name, content.sha256)
        work = partial(at_once, service.database, asking, idempotency_key, same, commit)
        return answered(await run_sync(work))


@router.get("", summary="List uploads", responses=documented(422))
def listed(service: Service, asking: Asking, limit: Limit = 50, cursor: Cursor = None) -> Page[Upload]:
    """Return this key's uploads, the newest first."""
    with service.database.read() as connection:
        rows, following = page(connection, UPLOADS, asking, limit, cursor)
    return Page(items=[Upload.of(row) for row in rows], next=following)


@router.get("/{identifier}", summary="One upload", responses=documented(404, 422))
def one(service: Service, asking: Asking, identifier: Identifier) -> Upload:
    """Return what is known of an upload."""
    with service.database.read() as connection:
        return Upload.of(fetch(connection, UPLOADS, asking, identifier))


@router.delete(
    "/{identifier}", summary="Delete an upload", status_code=204, responses=documented(404, 409, 422)
)
def delete(service: Service, asking: Asking, identifier: Identifier) -> Response:
    """Delete an upload that nothing was made from."""
    with service.database.write() as connection:
        row = remove(connection, UPLOADS, asking, identifier)
    service.store.forget(Content.of(row))
    return Response(status_code=204)
