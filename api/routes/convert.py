"""The common case in one call: a checkpoint in, the rewritten one out."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import sqlalchemy as sa
from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from api.answering import CREATED
from api.children import in_turn, plain, source
from api.conversions import convert, keep_artifacts, keep_model
from api.database import ARTIFACTS
from api.idempotency import Commit, IdempotencyKey, Outcome, fingerprint, once
from api.owned import fetch
from api.parts import Asking, Service
from api.problems import ProblemError, documented
from api.receiving import FORM_ROOM, checked_name, incoming, keep_upload, receive_form
from api.routes.artifacts import download
from api.schemas import Artifact, ConvertForm
from api.tasks import Converting

router = APIRouter(prefix="/v1/convert", tags=["conversions"])
_WEIGHTS: dict[str, Any] = {
    "description": "The rewritten weights as safetensors; `Link` has the script, the plan and the report",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    "headers": {
        **CREATED["headers"],
        "Link": {"description": "the other artifacts, each with its name", "schema": {"type": "string"}},
    },
}
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
    summary="Convert a checkpoint",
    response_class=Response,
    responses={200: _WEIGHTS, **documented(408, 409, 413, 415, 422, 507)},
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": _FORM}}},
)
async def post(
    request: Request, service: Service, asking: Asking, idempotency_key: IdempotencyKey = None
) -> Response:
    """Replace the BatchNorm layers of a checkpoint and answer with the rewritten one.

    `curl -F file=@resnet50.pth -F architecture=torchvision/resnet50 -F to=group http://…/v1/convert -OJ`
    """
    async with incoming(request, service, asking, FORM_ROOM) as file:
        content, given, fields = await receive_form(request, service, file)
        name, form = checked_name(given), read_form(fields)
        told = source(service, name, form.architecture, form.arguments, form.entry)
        asked = form.model_dump(include={"architecture", "arguments", "entry"})
        try:
            wanted = Converting(
                source=told,
                to=form.to,
                plan=form.plan,
                keep=form.keep,
                input_shape=form.input_shape,
                stem=plain(name).rpartition(".")[0] or plain(name),
            )
        except ValidationError as error:
            raise ProblemError(422, "invalid-request", str(error.errors()[0]["msg"])) from error

        def work() -> Outcome:
            with ExitStack() as stack:
                same = fingerprint("convert", name, content.sha256, form.model_dump(mode="json"))
                return once(service.database, asking, idempotency_key, same, lambda: prepare(stack))

        def prepare(stack: ExitStack) -> Commit:
            converted, received = convert(service, asking, wanted, file.path, stack)

            def commit(connection: sa.Connection) -> Outcome:
                upload, _ = keep_upload(connection, service, asking, file, content, name)
                model = keep_model(connection, service, asking, upload, asked, converted.model)
                rows = keep_artifacts(connection, service, asking, model.id, received)
                document = {"artifacts": [Artifact.of(row).model_dump(mode="json") for row in rows]}
                return Outcome(200, document, f"/v1/artifacts/{rows[0].id}")

            return commit

        outcome = await in_turn(service, work)
    weights, *others = outcome.document["artifacts"]
    links = [f'</v1/artifacts/{one["id"]}>; rel="item"; title="{one["filename"]}"' for one in others]
    headers = {"location": str(outcome.location), "link": ", ".join(links)}
    if outcome.replayed:
        headers["idempotent-replayed"] = "true"

    def row() -> sa.Row[Any]:
        with service.database.read() as connection:
            return fetch(connection, ARTIFACTS, asking, weights["id"])

    return download(request, service, await run_sync(row), headers)


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
        raise ProblemError(422, "invalid-request", f"{where}: {first['msg']}"[:1000]) from error
