"""Jobs: how far they have come, what they came to, and how they are cancelled."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
import sqlalchemy as sa
from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse

from api import jobs
from api.answering import CREATED, answered
from api.database import EVENTS, JOBS, PARTS
from api.idempotency import IdempotencyKey, Outcome, at_once, fingerprint
from api.job_schemas import Job
from api.keys import Owner
from api.observing import LOG
from api.owned import Cursor, Identifier, Limit, fetch, page, remove
from api.parts import Asking, Parts, Service
from api.problems import ProblemError, documented
from api.schemas import Page

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
#: Seconds between two looks for events, and between two signs of life of a stream without any.
_LOOK, _HEARTBEAT = 0.4, 15.0
_LOG_LINES = 100
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events as they happen: `id` counts them, `event` is queued, started, progress, log, "
        "succeeded, failed or cancelled, `data` is JSON. It ends with the job",
        "content": {"text/event-stream": {}},
    },
    **documented(404, 422),
}


@router.get("", summary="List jobs", responses=documented(422))
def listed(service: Service, asking: Asking, limit: Limit = 50, cursor: Cursor = None) -> Page[Job]:
    """Return this key's jobs, the newest first."""
    with service.database.read() as connection:
        rows, following = page(connection, JOBS, asking, limit, cursor)
    return Page(items=[Job.of(row) for row in rows], next=following)


@router.get("/{identifier}", summary="One job", responses=documented(404, 422))
def one(service: Service, asking: Asking, identifier: Identifier) -> Job:
    """Return how far a job has come, and what it came to."""
    with service.database.read() as connection:
        return job_of(connection, asking, identifier)


def job_of(connection: sa.Connection, asking: Owner, identifier: str) -> Job:
    """Return a job with the end of its log."""
    row = fetch(connection, JOBS, asking, identifier)
    return Job.of(row, jobs.last_events(connection, identifier, ["log"], _LOG_LINES))


@router.get(
    "/{identifier}/events", summary="Follow a job", response_class=StreamingResponse, responses=_STREAM
)
async def events(
    service: Service,
    asking: Asking,
    identifier: Identifier,
    last_event_id: Annotated[
        str | None,
        Header(
            pattern=r"^[0-9]{1,9}$", description="the last `id` that was seen: what came after it is sent"
        ),
    ] = None,
) -> Response:
    """Return the job's events as they happen (server-sent events); events are kept, so nothing is missed.

    A client that comes back sends `Last-Event-ID`, as browsers do by themselves, also after a restart of the
    service.
    """

    def there() -> None:
        with service.database.read() as connection:
            fetch(connection, JOBS, asking, identifier)

    await run_sync(there)
    service.streams.check(asking.id)
    lines = _stream(service, asking, identifier, int(last_event_id or 0))
    return StreamingResponse(lines, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _stream(service: Parts, asking: Owner, identifier: str, seen: int) -> AsyncIterator[str]:
    def later() -> list[sa.Row[Any]]:
        with service.database.read() as connection:
            return list(jobs.events_after(connection, identifier, seen))

    service.streams.enter(asking.id)
    try:
        spoken = time.monotonic()
        yield "retry: 2000\n\n"
        # When the service ends, clients come back to the next one.
        while not service.workers.is_closing():
            try:
                found = await run_sync(later)
            except sa.exc.SQLAlchemyError as error:
                LOG.warning("events are late", extra={"fields": {"error": type(error).__name__}})
                found = []
            for event in found:
                seen = event.number
                yield f"id: {event.number}\nevent: {event.kind}\ndata: {event.document}\n\n"
                spoken = time.monotonic()
                if event.kind in ("succeeded", "failed", "cancelled"):
                    return
            if time.monotonic() - spoken > _HEARTBEAT:
                yield ": alive\n\n"
                spoken = time.monotonic()
            await anyio.sleep(_LOOK)
    finally:
        service.streams.leave(asking.id)


@router.post(
    "/{identifier}/cancel",
    summary="Cancel a job",
    response_model=Job,
    responses={200: {"description": "It is cancelled", **CREATED}, **documented(404, 409, 413, 422, 507)},
)
async def cancel(
    service: Service, asking: Asking, identifier: Identifier, idempotency_key: IdempotencyKey = None
) -> Response:
    """End a job that has not ended; its child is dead within two seconds, and nothing of it is kept."""

    def commit(connection: sa.Connection) -> Outcome:
        row = fetch(connection, JOBS, asking, identifier)
        if not jobs.finish(connection, service.store, sa.true(), row.id, "cancelled"):
            raise ProblemError(409, "conflict", f"job {identifier} is {row.state} already")
        service.queue.cancel(connection, [identifier])
        return Outcome(200, job_of(connection, asking, identifier).model_dump(mode="json"))

    def work() -> Outcome:
        same = fingerprint("cancel", identifier)
        return at_once(service.database, asking, idempotency_key, same, commit)

    return answered(await run_sync(work))


@router.delete("/{identifier}", summary="Delete a job", status_code=204, responses=documented(404, 409, 422))
def delete(service: Service, asking: Asking, identifier: Identifier) -> Response:
    """Delete a job that has ended; what it made stays."""
    with service.database.write() as connection:
        row = fetch(connection, JOBS, asking, identifier)
        if row.state in jobs.UNFINISHED:
            raise ProblemError(409, "conflict", f"job {identifier} is {row.state}; cancel it first")
        for table in (EVENTS, PARTS):
            connection.execute(sa.delete(table).where(table.c.job == identifier))
        remove(connection, JOBS, asking, identifier)
        service.queue.forget(connection, [identifier])
    return Response(status_code=204)
