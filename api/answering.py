"""What the answers of several routes have in common."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse, Response

from api.idempotency import Outcome
from api.problems import documented

#: What every route under /v1 may be answered with.
COMMON = documented(400, 401, 403, 408, 413, 429, 503)
CREATED: dict[str, Any] = {
    "headers": {
        "Location": {"description": "where it is", "schema": {"type": "string"}},
        "Idempotent-Replayed": {
            "description": "`true` where an earlier request with this key did the work",
            "schema": {"type": "string"},
        },
    }
}


def answered(outcome: Outcome) -> Response:
    """Return an outcome as a response."""
    headers = {} if outcome.location is None else {"Location": outcome.location}
    if outcome.replayed:
        headers["Idempotent-Replayed"] = "true"
    return JSONResponse(outcome.document, outcome.status, headers)
