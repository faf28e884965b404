"""Plans: what a conversion would do at every site, and why not; nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastapi import APIRouter

from api.children import in_turn
from api.conversions import data_in, source_of
from api.database import DATASETS, MODELS, UPLOADS
from api.idempotency import IdempotencyKey, fingerprint, same_request
from api.keys import Owner
from api.owned import fetch
from api.parts import Asking, Parts, Service
from api.problems import documented
from api.schemas import ChoicesRequest, PlanRequest, PlanResponse
from api.store import Content
from api.tasks import Choices, Choosing, Data, Explained, Explaining, Source

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post("", summary="Try a plan", responses=documented(404, 409, 413, 422, 507))
async def post(
    body: PlanRequest, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> PlanResponse:
    """Say which method would stand at each site, with every refusal, its reason and its fix."""

    def work() -> Explained:
        same_request(
            service.database, asking, idempotency_key, fingerprint("plans", body.model_dump(mode="json"))
        )
        with _reading(service, asking, body) as (told, data, files):
            wanted = Explaining(source=told, to=body.to, input_shape=body.input_shape, data=data)
            with service.sandbox.run("explain", wanted, Explained, files) as finished:
                return finished.result

    found = await in_turn(service, work)
    return PlanResponse(
        rows=found.rows,
        notes=list(found.notes),
        refused=sum(row.method is None for row in found.rows),
        plan=None if found.plan is None else json.loads(found.plan),
    )


@router.post("/choices", summary="What could stand where", responses=documented(404, 409, 413, 422, 507))
async def choices(
    body: ChoicesRequest, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> Choices:
    """Say what each method would mean at each site: exact, approximate, or refused, with reason and fix."""

    def work() -> Choices:
        same_request(
            service.database, asking, idempotency_key, fingerprint("choices", body.model_dump(mode="json"))
        )
        with _reading(service, asking, body) as (told, data, files):
            methods = tuple(body.methods or ())
            wanted = Choosing(source=told, methods=methods, input_shape=body.input_shape, data=data)
            with service.sandbox.run("choices", wanted, Choices, files) as finished:
                return finished.result

    return await in_turn(service, work)


@contextmanager
def _reading(
    service: Parts, asking: Owner, body: PlanRequest | ChoicesRequest
) -> Iterator[tuple[Source, Data | None, dict[str, Path]]]:
    """Return a model and its inputs as a child is told of them, and the files of both."""
    with service.database.read() as connection:
        model = fetch(connection, MODELS, asking, body.model)
        upload = fetch(connection, UPLOADS, asking, model.upload)
        dataset = None if body.dataset is None else fetch(connection, DATASETS, asking, body.dataset)
        inputs = None if dataset is None else fetch(connection, UPLOADS, asking, dataset.upload)
    told, data = source_of(service, model, upload), None
    with ExitStack() as stack:
        files = {told.file: stack.enter_context(service.store.local(Content(upload.sha256, upload.size)))}
        if dataset is not None and inputs is not None:
            data = data_in(dataset, inputs, batch_size=2, samples=2)
            there = service.store.local(Content(inputs.sha256, inputs.size))
            files[data.file] = stack.enter_context(there)
        yield told, data, files
