"""POST once: a request that is sent again with the same Idempotency-Key gets the first one's answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Header

from api.database import IDEMPOTENCY, Database, new_id, now_ms
from api.keys import Owner
from api.problems import ProblemError

#: Answers are kept for a day.
_KEPT_MS = 24 * 3600 * 1000
#: A request without an answer after so long was lost with its process.
_LOST_MS = 30 * 60 * 1000

IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="any text of yours: a POST sent again with it, within a day, is done once",
    ),
]


@dataclass(frozen=True)
class Outcome:
    """What a POST is answered with.

    Attributes:
        status: the HTTP status.
        document: the JSON of the answer.
        location: where what was made is.
        replayed: whether an earlier request did the work.

    """

    status: int
    document: dict[str, Any]
    location: str | None = None
    replayed: bool = False


#: The last step of a POST: it writes to the database, and says what is answered.
Commit = Callable[[sa.Connection], Outcome]


def fingerprint(*parts: Any) -> str:
    """Return what tells one request from another."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def once(
    database: Database, owner: Owner, key: str | None, request: str, prepare: Callable[[], Commit]
) -> Outcome:
    """Do a POST's work, or return what it was answered with before.

    What the request writes and that it was done are one transaction: nothing is done twice.

    Args:
        database: the database.
        owner: who asks; keys of others are others.
        key: the Idempotency-Key; None does the work always.
        request: the request's fingerprint.
        prepare: does the long part and returns the last step.

    Raises:
        ProblemError: 409 while the first is in work, 422 for the same key with another request.

    """
    if key is None:
        commit = prepare()
        with database.write() as connection:
            return commit(connection)
    attempt = new_id("try")
    with database.write() as connection:
        done = _claim(connection, owner, key, request, attempt)
    if done is not None:
        return done
    mine = (IDEMPOTENCY.c.owner == owner.id, IDEMPOTENCY.c.key == key, IDEMPOTENCY.c.attempt == attempt)
    try:
        commit = prepare()
        with database.write() as connection:
            outcome = commit(connection)
            text = json.dumps(asdict(outcome))
            if connection.execute(sa.update(IDEMPOTENCY).where(*mine).values(outcome=text)).rowcount != 1:
                raise _in_work()
            return outcome
    except BaseException:
        # What failed may be tried again.
        with database.write() as connection:
            connection.execute(sa.delete(IDEMPOTENCY).where(*mine))
        raise


def at_once(database: Database, owner: Owner, key: str | None, request: str, commit: Commit) -> Outcome:
    """Do a POST that only writes to the database, or return what it was answered with before.

    It is one transaction: a process that dies leaves nothing in work, and the same request does it.

    Raises:
        ProblemError: 409 while the first is in work, 422 for the same key with another request.

    """
    with database.write() as connection:
        if key is None:
            return commit(connection)
        attempt = new_id("try")
        done = _claim(connection, owner, key, request, attempt)
        if done is not None:
            return done
        outcome = commit(connection)
        mine = (IDEMPOTENCY.c.owner == owner.id, IDEMPOTENCY.c.key == key, IDEMPOTENCY.c.attempt == attempt)
        connection.execute(sa.update(IDEMPOTENCY).where(*mine).values(outcome=json.dumps(asdict(outcome))))
        return outcome


def _claim(connection: sa.Connection, owner: Owner, key: str, request: str, attempt: str) -> Outcome | None:
    now, table = now_ms(), IDEMPOTENCY
    connection.execute(sa.delete(table).where(table.c.started_ms < now - _KEPT_MS))
    lost = (table.c.outcome.is_(None), table.c.started_ms < now - _LOST_MS)
    connection.execute(sa.delete(table).where(table.c.owner == owner.id, table.c.key == key, *lost))
    row = connection.execute(
        sa.select(table).where(table.c.owner == owner.id, table.c.key == key)
    ).one_or_none()
    if row is None:
        values = {
            "owner": owner.id,
            "key": key,
            "fingerprint": request,
            "attempt": attempt,
            "started_ms": now,
        }
        try:
            connection.execute(sa.insert(table).values(values))
        except sa.exc.IntegrityError as error:
            raise _in_work() from error
        return None
    if row.fingerprint != request:
        raise ProblemError(
            422,
            "conflict",
            "this Idempotency-Key came with another request before; give each request its own",
        )
    if row.outcome is None:
        raise _in_work()
    return replace(Outcome(**json.loads(row.outcome)), replayed=True)


def _in_work() -> ProblemError:
    return ProblemError(
        409, "conflict", "the first request with this Idempotency-Key is still in work", {"Retry-After": "5"}
    )


def same_request(database: Database, owner: Owner, key: str | None, request: str) -> None:
    """Hold a key to its request where nothing is made, so that the work may simply be done again.

    Raises:
        ProblemError: 422; the key came with another request before.

    """
    if key is None:
        return
    with database.write() as connection:
        attempt = new_id("try")
        if _claim(connection, owner, key, request, attempt) is None:
            mine = (IDEMPOTENCY.c.owner == owner.id, IDEMPOTENCY.c.key == key)
            nothing = json.dumps(asdict(Outcome(200, {})))
            connection.execute(sa.update(IDEMPOTENCY).where(*mine).values(outcome=nothing))
