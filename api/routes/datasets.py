"""Datasets: uploads that hold inputs for forward passes."""

from __future__ import annotations

import json

import sqlalchemy as sa
from fastapi import APIRouter, Response

from api.answering import CREATED, answered
from api.children import in_turn, plain
from api.database import DATASETS, UPLOADS
from api.idempotency import Commit, IdempotencyKey, Outcome, fingerprint, once
from api.owned import Cursor, Identifier, Limit, add, fetch, page, remove
from api.parts import Asking, Service
from api.problems import documented
from api.schemas import Dataset, DatasetRequest, Page
from api.store import Content
from api.tasks import Described, Describing

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])


@router.post(
    "",
    summary="Read an upload as inputs",
    status_code=201,
    response_model=Dataset,
    responses={201: {"description": "It holds inputs", **CREATED}, **documented(404, 409, 413, 422, 507)},
)
async def post(
    body: DatasetRequest, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> Response:
    """Look at arrays (.npz without objects, .npy, .safetensors) or a .zip of images, a folder per class."""

    def prepare() -> Commit:
        with service.database.read() as connection:
            upload = fetch(connection, UPLOADS, asking, body.upload)
        told = Describing(file=plain(upload.name), targets=body.targets)
        with (
            service.store.local(Content(upload.sha256, upload.size)) as path,
            service.sandbox.run("describe", told, Described, {told.file: path}) as finished,
        ):
            asked = body.model_dump(mode="json", include={"targets", "preparation"})
            document = json.dumps({"asked": asked, "found": finished.result.model_dump(mode="json")})

        def commit(connection: sa.Connection) -> Outcome:
            fetch(connection, UPLOADS, asking, upload.id)
            values = {"name": upload.name, "upload": upload.id, "document": document, "size": len(document)}
            row = add(connection, DATASETS, asking, service.settings, **values)
            return Outcome(201, Dataset.of(row).model_dump(mode="json"), f"/v1/datasets/{row.id}")

        return commit

    same = fingerprint("datasets", body.model_dump(mode="json"))
    return answered(
        await in_turn(service, lambda: once(service.database, asking, idempotency_key, same, prepare))
    )


@router.get("", summary="List datasets", responses=documented(422))
def listed(service: Service, asking: Asking, limit: Limit = 50, cursor: Cursor = None) -> Page[Dataset]:
    """Return this key's datasets, the newest first."""
    with service.database.read() as connection:
        rows, following = page(connection, DATASETS, asking, limit, cursor)
    return Page(items=[Dataset.of(row) for row in rows], next=following)


@router.get("/{identifier}", summary="One dataset", responses=documented(404, 422))
def one(service: Service, asking: Asking, identifier: Identifier) -> Dataset:
    """Return what is known of a dataset."""
    with service.database.read() as connection:
        return Dataset.of(fetch(connection, DATASETS, asking, identifier))


@router.delete(
    "/{identifier}", summary="Delete a dataset", status_code=204, responses=documented(404, 409, 422)
)
def delete(service: Service, asking: Asking, identifier: Identifier) -> Response:
    """Delete a dataset; its upload stays."""
    with service.database.write() as connection:
        remove(connection, DATASETS, asking, identifier)
    return Response(status_code=204)
