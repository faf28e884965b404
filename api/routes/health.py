"""Whether the service lives, whether it can work, and its metrics."""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from api.database import JOBS
from api.jobs import UNFINISHED
from api.parts import Service, for_operators
from api.problems import ProblemError, documented

router = APIRouter(tags=["health"])


class Live(BaseModel):
    """The process answers."""

    status: Literal["live"] = "live"


class Ready(BaseModel):
    """The service can work."""

    status: Literal["ready"] = "ready"


@router.get("/health/live", summary="Whether the process answers")
async def live() -> Live:
    """Answer at once, whatever else is going on."""
    return Live()


@router.get("/health/ready", summary="Whether requests can be served", responses=documented(503))
def ready(service: Service) -> Ready:
    """Ask the database."""
    try:
        with service.database.read() as connection:
            connection.execute(sa.select(1))
    except sa.exc.SQLAlchemyError as error:
        raise ProblemError(503, "busy", "the database does not answer", {"Retry-After": "5"}) from error
    return Ready()


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    dependencies=[Depends(for_operators)],
    responses={200: {"content": {"text/plain": {}}, "description": "Metrics"}, **documented(401)},
)
def metrics(service: Service) -> Response:
    """Return the metrics of this process, and how many jobs wait, in the text format of Prometheus."""
    with service.database.read() as connection:
        query = sa.select(JOBS.c.state, sa.func.count()).where(JOBS.c.state.in_(UNFINISHED))
        rows = connection.execute(query.group_by(JOBS.c.state)).all()
    found = {str(row[0]): int(row[1]) for row in rows}
    for state in UNFINISHED:
        service.metrics.jobs.labels(state).set(found.get(state, 0))
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
