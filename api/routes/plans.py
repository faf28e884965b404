"""Plans: what a conversion would do at every site, and why not; nothing is changed."""

from __future__ import annotations

import json
from contextlib import ExitStack

from fastapi import APIRouter

from api.children import in_turn
from api.conversions import data_in, source_of
from api.database import DATASETS, MODELS, UPLOADS
from api.idempotency import IdempotencyKey, fingerprint, same_request
from api.owned import fetch
from api.parts import Asking, Service
from api.problems import documented
from api.schemas import PlanRequest, PlanResponse
from api.store import Content
from api.tasks import Explained, Explaining

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
        with service.database.read() as connection:
            model = fetch(connection, MODELS, asking, body.model)
            upload = fetch(connection, UPLOADS, asking, model.upload)
            dataset = None if body.dataset is None else fetch(connection, DATASETS, asking, body.dataset)
            inputs = None if dataset is None else fetch(connection, UPLOADS, asking, dataset.upload)
        told, data = source_of(service, model, upload), None
        with ExitStack() as stack:
            there = service.store.local(Content(upload.sha256, upload.size))
            files = {told.file: stack.enter_context(there)}
            if dataset is not None and inputs is not None:
                data = data_in(dataset, inputs, batch_size=2, samples=2)
                there = service.store.local(Content(inputs.sha256, inputs.size))
                files[data.file] = stack.enter_context(there)
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
