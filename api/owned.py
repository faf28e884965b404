"""Things that belong to a key: found, listed, added and removed, and invisible to every other key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Path, Query

from api.database import ARTIFACTS, DATASETS, JOBS, KEYS, MODELS, UPLOADS, new_id, now_ms
from api.keys import Owner
from api.problems import ProblemError, not_found
from api.settings import Settings
from api.store import used_bytes

Identifier = Annotated[str, Path(max_length=40, description="as its list or `Location` gives it")]
Limit = Annotated[int, Query(ge=1, le=200, description="the most items in the answer")]
Cursor = Annotated[str | None, Query(max_length=300, description="`next` of the page before")]

_PREFIXES = {UPLOADS: "upl", MODELS: "mod", DATASETS: "dat", ARTIFACTS: "art", JOBS: "job"}
#: What refers to a thing keeps it from being removed.
_REFERRING: dict[sa.Table, tuple[tuple[sa.Table, sa.Column[Any]], ...]] = {
    UPLOADS: ((MODELS, MODELS.c.upload), (DATASETS, DATASETS.c.upload), (JOBS, JOBS.c.upload)),
    MODELS: ((ARTIFACTS, ARTIFACTS.c.model), (JOBS, JOBS.c.model)),
    DATASETS: ((JOBS, JOBS.c.dataset),),
    ARTIFACTS: ((JOBS, JOBS.c.artifact),),
    JOBS: (),
}


def fetch(connection: sa.Connection, table: sa.Table, owner: Owner, identifier: str) -> sa.Row[Any]:
    """Return a thing.

    Raises:
        ProblemError: 404; it does not exist, or belongs to another key.

    """
    statement = sa.select(table).where(table.c.owner == owner.id, table.c.id == identifier)
    row = None if "\0" in identifier else connection.execute(statement).one_or_none()
    if row is None:
        raise not_found(_noun(table), identifier)
    return row


def page(
    connection: sa.Connection, table: sa.Table, owner: Owner, limit: int, cursor: str | None
) -> tuple[Sequence[sa.Row[Any]], str | None]:
    """Return a page of things, the newest first, and where the next one starts; None at the end."""
    statement = sa.select(table).where(table.c.owner == owner.id).order_by(table.c.id.desc()).limit(limit + 1)
    if cursor is not None:
        if not re.fullmatch(_PREFIXES[table] + "_[0-9a-f]{32}", cursor):
            raise ProblemError(422, "invalid-request", "cursor: give `next` of the page before")
        statement = statement.where(table.c.id < cursor)
    rows = connection.execute(statement).all()
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


def add(
    connection: sa.Connection, table: sa.Table, owner: Owner, settings: Settings, **values: Any
) -> sa.Row[Any]:
    """Add a thing and return it.

    Raises:
        ProblemError: 413; the key's quota would be exceeded.

    """
    # One after the other, so that two requests of a key cannot both take the last of its quota.
    connection.execute(sa.select(KEYS.c.id).where(KEYS.c.id == owner.id).with_for_update())
    refuse_beyond_quota(connection, owner, settings, values["size"])
    row = {"id": new_id(_PREFIXES[table]), "owner": owner.id, "created_ms": now_ms(), **values}
    connection.execute(sa.insert(table).values(row))
    return fetch(connection, table, owner, str(row["id"]))


def remove(connection: sa.Connection, table: sa.Table, owner: Owner, identifier: str) -> sa.Row[Any]:
    """Remove a thing and return what it was.

    Raises:
        ProblemError: 404, or 409 where another thing was made from it.

    """
    row = fetch(connection, table, owner, identifier)
    for other, column in _REFERRING[table]:
        query = sa.select(other.c.id).where(column == identifier)
        if other is JOBS:
            query = query.where(JOBS.c.finished_ms.is_(None))
        found = connection.scalar(query.limit(1))
        if found is not None:
            how = f"job {found} reads {identifier}; cancel it, or wait for it"
            if other is not JOBS:
                how = f"{_noun(other)} {found} was made from {identifier}; delete that first"
            raise ProblemError(409, "conflict", how)
    connection.execute(sa.delete(table).where(table.c.id == identifier))
    return row


def refuse_beyond_quota(connection: sa.Connection, owner: Owner, settings: Settings, more: int) -> int:
    """Return what a key may still store beyond ``more`` bytes.

    Raises:
        ProblemError: 413; it is less than nothing.

    """
    quota = settings.quota_bytes if owner.quota_bytes is None else owner.quota_bytes
    left = quota - used_bytes(connection, owner.id) - more
    if left < 0:
        raise quota_exceeded(quota)
    return left


def quota_exceeded(quota: int) -> ProblemError:
    """Return what is said to a key that has used up its quota."""
    return ProblemError(
        413,
        "quota-exceeded",
        f"this key may store {quota:,} bytes, and with this it would be more; delete what you no longer need",
    )


def _noun(table: sa.Table) -> str:
    return table.name.removesuffix("s")
