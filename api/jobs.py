"""Jobs: work that takes longer than a request; asked for, told of in events, and ended once.

A job's row says what is asked and what came of it. The durable queue (``queueing.py``) sees to it that some
worker runs it; whoever changes a job's state names the claim by which it may.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel

from api.database import EVENTS, JOBS, UPLOADS, afterwards, now_ms
from api.keys import Owner
from api.owned import add, remove
from api.problems import ProblemError
from api.queueing import JOB_QUEUE, Claim, Queue
from api.settings import Settings
from api.store import Content, Store

Kind = Literal["convert", "conversion", "calibration", "sensitivity", "search"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
UNFINISHED: tuple[State, ...] = ("queued", "running")
#: What a client is told of; the last three end the stream.
EventKind = Literal["queued", "started", "progress", "log", "succeeded", "failed", "cancelled"]
#: Beyond so many events of a job only its ends are kept.
_MOST_EVENTS = 20_000


def submit(
    connection: sa.Connection,
    queue: Queue,
    settings: Settings,
    owner: Owner,
    kind: Kind,
    request: BaseModel,
    *,
    name: str,
    **reads: str | None,
) -> sa.Row[Any]:
    """Make a job and let it wait for a worker.

    Args:
        connection: the transaction that it is part of.
        queue: where it waits.
        settings: how many a key may have.
        owner: whose it is.
        kind: what is to be done.
        request: what is asked.
        name: what it is called in lists.
        reads: ids of the upload, model, dataset and artifact that it reads.

    Raises:
        ProblemError: 429; the key has too many jobs that are not finished.

    """
    mine = sa.select(sa.func.count()).where(JOBS.c.owner == owner.id, JOBS.c.state.in_(UNFINISHED))
    if (connection.scalar(mine) or 0) >= settings.unfinished_jobs:
        raise ProblemError(
            429,
            "too-many-jobs",
            f"this key has {settings.unfinished_jobs} unfinished jobs; wait for one, or cancel one",
            {"Retry-After": "30"},
        )
    document = request.model_dump_json()
    row = add(
        connection,
        JOBS,
        owner,
        settings,
        name=name,
        kind=kind,
        state="queued",
        request=document,
        size=len(document),
        attempts=0,
        events=0,
        **reads,
    )
    tell(connection, row.id, "queued", {})
    queue.put(connection, row.id, JOB_QUEUE, row.id)
    return row


def tell(connection: sa.Connection, job: str, kind: EventKind, document: dict[str, Any]) -> None:
    """Add an event to a job; numbers have no gaps, so that a client knows what it has missed."""
    changed = sa.update(JOBS).where(JOBS.c.id == job).values(events=JOBS.c.events + 1)
    if kind in ("progress", "log"):
        changed = changed.where(JOBS.c.events < _MOST_EVENTS)
    if kind == "progress":
        changed = changed.values(progress=json.dumps(document))
    number = connection.scalar(changed.returning(JOBS.c.events))
    if number is not None:
        values = {"job": job, "number": number, "created_ms": now_ms(), "kind": kind}
        connection.execute(sa.insert(EVENTS).values(**values, document=json.dumps(document)))


def start(connection: sa.Connection, queue: Queue, claim: Claim, job: str) -> sa.Row[Any] | None:
    """Count an attempt at a job and return it; None if it is finished, or another process's."""
    held = (JOBS.c.id == job, JOBS.c.state.in_(UNFINISHED), queue.is_held(claim))
    now = now_ms()
    changed = (
        sa.update(JOBS)
        .where(*held)
        .values(
            state="running",
            attempts=JOBS.c.attempts + 1,
            started_ms=sa.func.coalesce(JOBS.c.started_ms, now),
        )
    )
    row = connection.execute(changed.returning(*JOBS.c)).one_or_none()
    if row is not None:
        tell(connection, job, "started", {"attempt": row.attempts})
    return row


def holds(connection: sa.Connection, queue: Queue, claim: Claim, job: str) -> bool:
    """Lock a job's row, and tell whether a claim on it holds."""
    held = sa.select(JOBS.c.id).where(JOBS.c.id == job, JOBS.c.state == "running", queue.is_held(claim))
    return connection.scalar(held.with_for_update(of=JOBS)) is not None


def uncount(connection: sa.Connection, job: str) -> None:
    """Take back an attempt that ended for no fault of the job's."""
    waiting = sa.update(JOBS).where(JOBS.c.id == job, JOBS.c.state == "running", JOBS.c.attempts > 0)
    connection.execute(waiting.values(attempts=JOBS.c.attempts - 1))


def finish(
    connection: sa.Connection,
    store: Store,
    condition: sa.ColumnElement[bool],
    job: str,
    state: State,
    *,
    result: dict[str, Any] | None = None,
    problem: dict[str, Any] | None = None,
) -> bool:
    """End a job that has not ended, under a condition; False if it was not this caller's to end.

    Of all that try at once one succeeds: the row's lock is what they wait for.
    """
    open_ = (JOBS.c.id == job, JOBS.c.state.in_(UNFINISHED), condition)
    values = {
        "state": state,
        "finished_ms": now_ms(),
        "result": None if result is None else json.dumps(result),
        "problem": None if problem is None else json.dumps(problem),
    }
    changed = sa.update(JOBS).where(*open_).values(values).returning(JOBS.c.kind, JOBS.c.request)
    row = connection.execute(changed).one_or_none()
    if row is None:
        return False
    if row.kind == "convert" and state != "succeeded":
        _discard(connection, store, json.loads(row.request))
    tell(connection, job, state, result or problem or {})  # type: ignore[arg-type]
    return True


def _discard(connection: sa.Connection, store: Store, request: dict[str, Any]) -> None:
    """Remove the upload that came with a job, if nothing else was made from it."""
    if not request["is_new"]:
        return
    row = connection.execute(sa.select(UPLOADS).where(UPLOADS.c.id == request["upload"])).one_or_none()
    # Somebody may refer to it at this moment.
    with contextlib.suppress(ProblemError, sa.exc.IntegrityError), connection.begin_nested():
        if row is not None:
            remove(connection, UPLOADS, Owner(row.owner), row.id)
            afterwards(connection, partial(store.forget, Content(row.sha256, row.size)))


def events_after(connection: sa.Connection, job: str, number: int, limit: int = 500) -> Sequence[sa.Row[Any]]:
    """Return a job's events after one, in order."""
    later = sa.select(EVENTS).where(EVENTS.c.job == job, EVENTS.c.number > number)
    return connection.execute(later.order_by(EVENTS.c.number).limit(limit)).all()


def last_events(connection: sa.Connection, job: str, kinds: Sequence[str], limit: int) -> list[sa.Row[Any]]:
    """Return the last events of some kinds, in order."""
    found = sa.select(EVENTS).where(EVENTS.c.job == job, EVENTS.c.kind.in_(kinds))
    return list(reversed(connection.execute(found.order_by(EVENTS.c.number.desc()).limit(limit)).all()))


#: The last step of a job: it writes what was made, and says what the job's result is.
Publish = Callable[[sa.Connection], dict[str, Any]]
