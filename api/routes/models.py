"""Models: uploads that fit a network, and where it normalizes."""

from __future__ import annotations

import json

import sqlalchemy as sa
from fastapi import APIRouter, Response

from api.answering import CREATED, answered
from api.children import in_turn, source
from api.conversions import keep_model
from api.database import MODELS, UPLOADS
from api.idempotency import Commit, IdempotencyKey, Outcome, fingerprint, once
from api.owned import Cursor, Identifier, Limit, fetch, page, remove
from api.parts import Asking, Service
from api.problems import ProblemError, documented
from api.schemas import Model, ModelRequest, Page
from api.store import Content
from api.tasks import Inspected, Site

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.post(
    "",
    summary="Read an upload into its network",
    status_code=201,
    response_model=Model,
    responses={201: {"description": "It fits", **CREATED}, **documented(404, 409, 413, 422, 507)},
)
async def post(
    body: ModelRequest, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> Response:
    """Open a file in a child process, compare it with its architecture, list where it normalizes.

    Exported programs (`.pt2`) and ONNX files (`.onnx`) say themselves what their network is: they are given
    without an architecture.
    """
    asked = body.model_dump(include={"architecture", "arguments", "entry"})

    def prepare() -> Commit:
        with service.database.read() as connection:
            upload = fetch(connection, UPLOADS, asking, body.upload)
        told = source(service.settings, upload.name, body.architecture, body.arguments, body.entry)
        with (
            service.store.local(Content(upload.sha256, upload.size)) as path,
            service.sandbox.run("inspect", told, Inspected, {told.file: path}) as finished,
        ):
            found = finished.result

        def commit(connection: sa.Connection) -> Outcome:
            row = keep_model(
                connection, service, asking, fetch(connection, UPLOADS, asking, upload.id), asked, found
            )
            return Outcome(201, Model.of(row).model_dump(mode="json"), f"/v1/models/{row.id}")

        return commit

    same = fingerprint("models", body.model_dump(mode="json"))
    return answered(
        await in_turn(service, lambda: once(service.database, asking, idempotency_key, same, prepare))
    )


@router.get("", summary="List models", responses=documented(422))
def listed(service: Service, asking: Asking, limit: Limit = 50, cursor: Cursor = None) -> Page[Model]:
    """Return this key's models, the newest first."""
    with service.database.read() as connection:
        rows, following = page(connection, MODELS, asking, limit, cursor)
    return Page(items=[Model.of(row) for row in rows], next=following)


@router.get("/{identifier}", summary="One model", responses=documented(404, 422))
def one(service: Service, asking: Asking, identifier: Identifier) -> Model:
    """Return what is known of a model."""
    with service.database.read() as connection:
        return Model.of(fetch(connection, MODELS, asking, identifier))


@router.get("/{identifier}/sites", summary="Where a model normalizes", responses=documented(404, 422))
def sites(
    service: Service, asking: Asking, identifier: Identifier, limit: Limit = 100, cursor: Cursor = None
) -> Page[Site]:
    """Return the model's sites, in its own order."""
    if cursor is not None and (not cursor.isascii() or not cursor.isdigit() or len(cursor) > 9):
        raise ProblemError(422, "invalid-request", "cursor: give `next` of the page before")
    with service.database.read() as connection:
        found = json.loads(fetch(connection, MODELS, asking, identifier).document)["found"]["sites"]
    start = int(cursor or 0)
    items = [Site.model_validate(site) for site in found[start : start + limit]]
    return Page(items=items, next=str(start + limit) if start + limit < len(found) else None)


@router.delete(
    "/{identifier}", summary="Delete a model", status_code=204, responses=documented(404, 409, 422)
)
def delete(service: Service, asking: Asking, identifier: Identifier) -> Response:
    """Delete a model that no artifact was made from; its upload stays."""
    with service.database.write() as connection:
        remove(connection, MODELS, asking, identifier)
    return Response(status_code=204)
