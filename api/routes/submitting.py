"""Work that takes longer than a request: each POST makes a job, which workers run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from anyio.to_thread import run_sync
from fastapi import APIRouter, Response
from pydantic import BaseModel

from api import jobs
from api.answering import CREATED, answered
from api.catalogue import catalogue
from api.conversions import format_of
from api.database import ARTIFACTS, DATASETS, MODELS, UPLOADS
from api.idempotency import IdempotencyKey, Outcome, at_once, fingerprint
from api.job_schemas import CalibrationRequest, ConversionRequest, Job, SearchRequest, SensitivityRequest
from api.keys import Owner
from api.owned import fetch
from api.parts import Asking, Parts, Service
from api.problems import ProblemError, documented
from api.schemas import Dataset

router = APIRouter(prefix="/v1", tags=["jobs"])
#: What cannot be asked of a model, by its format, and the way out.
_REFUSED: dict[jobs.Kind, dict[str, str]] = {
    "search": {
        "onnx": "a search trains, and an ONNX file is for inference; search on a checkpoint of the network, "
        "and export its result",
        "exported program": "a search trains, and an exported program stays in the mode that it was exported "
        "in; search on a checkpoint of the network, whose sites have the same paths, and convert the program "
        "with the plan",
    },
}
#: What a job is called, and the ids of what it reads.
_Reads = Callable[[sa.Connection], dict[str, Any]]
_ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"description": "It waits for a worker; `Location` is the job", **CREATED},
    **documented(404, 409, 413, 422, 507),
}


async def submitted(
    service: Parts, asking: Owner, key: str | None, kind: jobs.Kind, body: BaseModel, reads: _Reads
) -> Response:
    """Make a job, once for each Idempotency-Key."""

    def commit(connection: sa.Connection) -> Outcome:
        row = jobs.submit(
            connection, service.queue, service.settings, asking, kind, body, **reads(connection)
        )
        return Outcome(202, Job.of(row).model_dump(mode="json"), f"/v1/jobs/{row.id}")

    same = fingerprint(kind, body.model_dump(mode="json"))
    outcome = await run_sync(lambda: at_once(service.database, asking, key, same, commit))
    service.workers.start()
    return answered(outcome)


async def _refuse_unknown(service: Parts, spellings: Sequence[str] | None) -> None:
    """Raise unless every method exists; whether it fits is seen at each site.

    Raises:
        ProblemError: 422.

    """
    if spellings is None:
        return
    known = [method.name for method in (await catalogue(service)).methods]
    for spelling in spellings:
        name = spelling.partition("(")[0].strip()
        if name not in known:
            raise ProblemError(
                422, "refused", f"unknown method {name[:60]!r}; there are {', '.join(sorted(known))}"
            )


def _model(
    connection: sa.Connection,
    asking: Owner,
    kind: jobs.Kind,
    model: str,
    dataset: str | None,
    **others: Any,
) -> dict[str, Any]:
    row = fetch(connection, MODELS, asking, model)
    refused = _REFUSED.get(kind, {}).get(format_of(row))
    if refused is not None:
        raise ProblemError(422, "refused", f"{row.name}: {refused}")
    if dataset is not None:
        fetch(connection, DATASETS, asking, dataset)
    upload = fetch(connection, UPLOADS, asking, row.upload)
    return {"name": upload.name, "model": model, "dataset": dataset, **others}


@router.post(
    "/conversions", summary="Convert a model", status_code=202, response_model=Job, responses=_ACCEPTED
)
async def convert(
    body: ConversionRequest, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> Response:
    """Replace the BatchNorm layers of a model; makes weights, script, plan and report.

    An exported program becomes another one, and an ONNX file another one, without a script.
    """
    return await submitted(
        service,
        asking,
        idempotency_key,
        "conversion",
        body,
        lambda connection: _model(connection, asking, "conversion", body.model, body.dataset),
    )


@router.post(
    "/calibrations",
    summary="Calibrate a conversion",
    status_code=202,
    response_model=Job,
    responses=_ACCEPTED,
)
async def calibrate(
    body: CalibrationRequest, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> Response:
    """Bring converted weights back to their original; makes weights, script, plan and a report of both."""

    def reads(connection: sa.Connection) -> dict[str, Any]:
        weights = fetch(connection, ARTIFACTS, asking, body.weights)
        if weights.role != "weights":
            raise ProblemError(
                422, "refused", f"{body.weights} is a {weights.role}; give the weights of a conversion"
            )
        model = fetch(connection, MODELS, asking, weights.model)
        if format_of(model) == "onnx" and body.parameters == "affine":
            raise ProblemError(
                422,
                "refused",
                f"{weights.name} is an ONNX file, whose calibration may change the nodes before its sites "
                "too; leave parameters out",
            )
        return _model(connection, asking, "calibration", weights.model, body.dataset, artifact=weights.id)

    return await submitted(service, asking, idempotency_key, "calibration", body, reads)


@router.post(
    "/sensitivities", summary="Measure sensitivity", status_code=202, response_model=Job, responses=_ACCEPTED
)
async def sense(
    body: SensitivityRequest, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> Response:
    """Measure how far the output moves when one site changes, for every site and method."""
    await _refuse_unknown(service, body.methods)
    return await submitted(
        service,
        asking,
        idempotency_key,
        "sensitivity",
        body,
        lambda connection: _model(connection, asking, "sensitivity", body.model, body.dataset),
    )


@router.post(
    "/searches", summary="Search the best plan", status_code=202, response_model=Job, responses=_ACCEPTED
)
async def search(
    body: SearchRequest, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> Response:
    """Train a few dozen plans shortly, confirm the best on data that no trial saw, return it trained."""
    most = service.settings.search_trials
    if "trials" not in body.model_fields_set:
        body = body.model_copy(update={"trials": min(body.trials, most)})
    if body.trials > most:
        raise ProblemError(422, "invalid-request", f"trials: at most {most} here; the operator sets the most")
    await _refuse_unknown(service, body.methods)

    def reads(connection: sa.Connection) -> dict[str, Any]:
        found = _model(connection, asking, "search", body.model, body.dataset)
        dataset = Dataset.of(fetch(connection, DATASETS, asking, body.dataset))
        if dataset.kind == "arrays" and dataset.targets is None:
            raise ProblemError(
                422,
                "refused",
                f"{dataset.filename} has no labels; make a dataset with targets, the name of the array that "
                "holds them",
            )
        return found

    return await submitted(service, asking, idempotency_key, "search", body, reads)
