"""Problem details (RFC 9457): how every refusal and failure is answered, and the one handler that does it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Self

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
_TITLES = {
    "invalid-request": "The request is not valid",
    "not-found": "There is no such thing",
    "unauthorized": "An API key is needed",
    "forbidden": "This is not allowed",
    "conflict": "Something else is in the way",
    "too-large": "That is too large",
    "quota-exceeded": "The key's quota is used up",
    "disk-full": "There is no room to store this",
    "digest-mismatch": "The content arrived otherwise than announced",
    "too-slow": "The content arrived too slowly",
    "rate-limited": "Too many requests",
    "too-many-jobs": "Too many jobs are not finished",
    "busy": "Every worker is busy",
    "refused": "normsearch refuses this",
    "limits-exceeded": "The work exceeded its limits",
    "failed": "The work failed",
    "internal": "Something went wrong here",
    "http": "The request cannot be answered",
}


class RefusalDetails(BaseModel):
    """Why a method cannot stand at a site."""

    site: str
    method: str
    reason: str
    fix: str


class ProblemDetails(BaseModel):
    """RFC 9457 problem details."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "/problems/not-found",
                "title": "There is no such thing",
                "status": 404,
                "detail": "there is no model 'mod_0190'; GET /v1/models lists those of this key",
                "request_id": "7c9e6679f4e2",
            }
        }
    )

    type: str = Field(description="`/problems/NAME`, the same for the same kind of problem")
    title: str
    status: int
    detail: str = Field(description="what was given, the rule, and the way out")
    request_id: str
    error: str | None = Field(None, description="the library's class of error, for example `CheckpointError`")
    site: str | None = Field(None, description="the first normalization layer concerned")
    fix: str | None = Field(None, description="what to do about it")
    refusals: list[RefusalDetails] | None = Field(None, description="every method refused at a site")
    errors: list[dict[str, str]] | None = Field(None, description="`pointer` and `detail` of invalid fields")


class ProblemError(Exception):
    """What a request is answered with instead of success.

    Args:
        status: the HTTP status.
        kind: the last part of the problem's type.
        detail: what was given, the rule, and the way out.
        headers: headers of the answer.
        members: further members of the problem, as in ``ProblemDetails``.

    """

    def __init__(
        self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers, self.members = dict(headers or {}), members

    def document(self) -> dict[str, Any]:
        """Return what is said, apart from the request."""
        return {
            "type": f"/problems/{self.kind}",
            "title": _TITLES[self.kind],
            "status": self.status,
            "detail": self.detail,
            **{key: value for key, value in self.members.items() if value is not None},
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Return the problem that a document tells, as ``document`` made it."""
        others = {key: document[key] for key in document if key not in ("type", "title", "status", "detail")}
        kind = str(document["type"]).removeprefix("/problems/")
        return cls(document["status"], kind, document["detail"], None, **others)

    def response(self, request_id: str) -> JSONResponse:
        """Return the answer."""
        document = {**self.document(), "request_id": request_id}
        return JSONResponse(document, self.status, self.headers, MEDIA_TYPE)


def not_found(noun: str, identifier: str) -> ProblemError:
    """Return what things that do not exist and things of other keys are answered with alike."""
    return ProblemError(
        404,
        "not-found",
        f"there is no {noun} {identifier[:80]!r}; GET /v1/{noun}s lists those of this key",
    )


async def answer(request: Request, error: Exception) -> JSONResponse:
    """Answer any exception; only what is foreseen says more than that something went wrong."""
    problem = as_problem(error)
    if problem.status == 405:
        problem.headers["Allow"] = ", ".join(_methods(request))
    return problem.response(request.scope.get("request_id", ""))


def _methods(request: Request) -> list[str]:
    """Return the methods that an address understands; the framework names those of one route alone."""
    paths = request.app.openapi()["paths"]
    found = {
        method.upper()
        for path, operations in paths.items()
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), request.url.path)
        for method in operations
    }
    return sorted(found)


def said(error: Mapping[str, Any]) -> str:
    """Return what one error of a validation says, without the name of its class before it."""
    return str(error["msg"]).removeprefix("Value error, ")


def as_problem(error: Exception) -> ProblemError:
    """Return the problem that an exception is answered with."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, RequestValidationError):
        found = [
            {"pointer": "/" + "/".join(map(str, one["loc"])), "detail": said(one)}
            for one in error.errors()[:20]
        ]
        detail = "; ".join(f"{one['pointer']}: {one['detail']}" for one in found)
        return ProblemError(422, "invalid-request", f"{detail}; /openapi.json has the form", errors=found)
    if isinstance(error, HTTPException) and isinstance(error.__cause__, ProblemError):
        # What was raised while a body was read, wrapped by the framework.
        return error.__cause__
    if isinstance(error, HTTPException):
        kind = "not-found" if error.status_code == 404 else "http"
        detail = str(error.detail)
        if error.status_code == 404:
            detail = "there is nothing at this address; /openapi.json lists what there is"
        return ProblemError(error.status_code, kind, detail, error.headers)
    if isinstance(error, OperationalError):
        if "full" in str(error.orig):
            return ProblemError(507, "disk-full", "the disk has no room; nothing was kept: tell the operator")
        return ProblemError(503, "busy", "the database does not answer; try again", {"Retry-After": "5"})
    return ProblemError(500, "internal", "the server's log has the details under this request id")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the entries of an OpenAPI document for answers that are problems."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "model": ProblemDetails,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}},
        }
        for status in statuses
    }


def without_json(document: dict[str, Any]) -> dict[str, Any]:
    """Leave problem+json as the only type of the answers that ``documented`` describes."""
    for path in document["paths"].values():
        for operation in path.values():
            for found in operation.get("responses", {}).values():
                content = found.get("content", {})
                if MEDIA_TYPE in content:
                    content.pop("application/json", None)
    return document
