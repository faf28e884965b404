"""The common case in one call: a network in, the rewritten one out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import anyio
import sqlalchemy as sa
from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from api import jobs
from api.answering import CREATED, answered
from api.children import source
from api.database import ARTIFACTS
from api.idempotency import IdempotencyKey, Outcome, at_once, fingerprint
from api.job_schemas import ConvertJob, Job
from api.keys import Owner
from api.owned import fetch
from api.parts import Asking, Parts, Service
from api.problems import ProblemError, documented, said
from api.receiving import FORM_ROOM, checked_name, incoming, keep_upload, receive_form
from api.routes.artifacts import download
from api.routes.jobs import job_of
from api.schemas import ConvertForm

router = APIRouter(prefix="/v1/convert", tags=["conversions"])
_WEIGHTS: dict[str, Any] = {
    "description": "The rewritten weights as safetensors, or another exported program or ONNX file where one "
    "was given; `Link` has the script, the plan and the report",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    "headers": {
        **CREATED["headers"],
        "Link": {"description": "the other artifacts, each with its name", "schema": {"type": "string"}},
    },
}
_LATER: dict[str, Any] = {"model": Job, "description": "It goes on; `Location` is the job", **CREATED}
_FIELDS = ConvertForm.model_json_schema()
_FIELDS["properties"] = {"file": {"type": "string", "format": "binary"}, **_FIELDS["properties"]}
_FIELDS["oneOf"] = [{"required": ["file", "to"]}, {"required": ["file", "plan"]}]
for _field in _FIELDS["properties"].values():
    # A form has no null: what is not there is left out.
    if "anyOf" in _field:
        (_kind,) = (one for one in _field.pop("anyOf") if one != {"type": "null"})
        _field.update(_kind)
        _field.pop("default", None)
_FORM = {"schema": _FIELDS}


@router.post(
    "",
    summary="Convert a file",
    response_class=Response,
    responses={200: _WEIGHTS, 202: _LATER, **documented(408, 409, 413, 415, 422, 507)},
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": _FORM}}},
)
async def post(
    request: Request, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> Response:
    """Replace the BatchNorm layers of a network and answer with the rewritten one.

    `curl -F file=@resnet50.pth -F architecture=torchvision/resnet50 -F to=group http://…/v1/convert -OJ`

    `curl -F file=@model.onnx -F to=group http://…/v1/convert -OJ`

    It is a job like others: where it takes longer than a minute, the answer is 202 and `Location` is the job.
    """
    async with incoming(request, service, asking, FORM_ROOM) as file:
        content, given, fields = await receive_form(request, service, file)
        name, form = checked_name(given), read_form(fields)
        # What the operator did not configure is refused before anything is kept.
        source(service.settings, name, form.architecture, form.arguments, form.entry)

        def commit(connection: sa.Connection) -> Outcome:
            upload, existed = keep_upload(connection, service, asking, file, content, name)
            asked = ConvertJob(upload=upload.id, is_new=not existed, form=form)
            row = jobs.submit(
                connection,
                service.queue,
                service.settings,
                asking,
                "convert",
                asked,
                name=upload.name,
                upload=upload.id,
            )
            return Outcome(202, Job.of(row).model_dump(mode="json"), f"/v1/jobs/{row.id}")

        same = fingerprint("convert", name, content.sha256, form.model_dump(mode="json"))
        outcome = await run_sync(lambda: at_once(service.database, asking, idempotency_key, same, commit))
    service.workers.start()
    job = await _ended(service, asking, outcome.document["id"])
    if job.problem is not None:
        raise ProblemError.of(job.problem)
    if job.state == "cancelled":
        raise ProblemError(409, "conflict", f"job {job.id} was cancelled; send the file again")
    if job.result is None:
        return answered(replace(outcome, document=job.model_dump(mode="json")))
    headers = {"idempotent-replayed": "true"} if outcome.replayed else {}
    return await _weights(request, service, asking, job.result.artifacts, headers)


async def _ended(service: Parts, asking: Owner, identifier: str) -> Job:
    """Return a job when it has ended, or after the time that a request waits for it."""

    def read() -> Job:
        with service.database.read() as connection:
            return job_of(connection, asking, identifier)

    deadline, pause = time.monotonic() + service.settings.convert_seconds, 0.05
    while True:
        job = await run_sync(read)
        left = deadline - time.monotonic()
        if job.finished is not None or left <= 0 or service.workers.is_closing():
            return job
        await anyio.sleep(min(pause, left))
        pause = min(1.5 * pause, 0.25)


async def _weights(
    request: Request, service: Parts, asking: Owner, artifacts: list[str], headers: dict[str, str]
) -> Response:
    """Answer with the first artifact, and link the others."""

    def read() -> list[sa.Row[Any]]:
        with service.database.read() as connection:
            return [fetch(connection, ARTIFACTS, asking, identifier) for identifier in artifacts]

    weights, *others = await run_sync(read)
    headers["location"] = f"/v1/artifacts/{weights.id}"
    headers["link"] = ", ".join(f'</v1/artifacts/{one.id}>; rel="item"; title="{one.name}"' for one in others)
    return await run_sync(download, request, service, weights, headers)


def read_form(fields: dict[str, list[str]]) -> ConvertForm:
    """Return the fields of a form.

    Raises:
        ProblemError: 422; a field is unknown, malformed, missing, or given twice.

    """
    known = ConvertForm.model_fields
    for name, values in fields.items():
        if name not in known or (len(values) > 1 and name not in ("to", "arguments")):
            raise ProblemError(
                422,
                "invalid-request",
                f"{name[:40]!r} is unknown, or given twice; there are {', '.join(known)}",
            )
    single = {name: values[0] for name, values in fields.items() if name not in ("to", "arguments")}
    many = {name: fields[name] for name in ("to", "arguments") if name in fields}
    try:
        return ConvertForm.model_validate({**single, **many})
    except ValidationError as error:
        first = error.errors()[0]
        where = "/".join(map(str, first["loc"]))
        detail = f"{where}: {said(first)}" if where else said(first)
        raise ProblemError(422, "invalid-request", detail[:1000]) from error
