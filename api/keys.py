"""API keys: who may ask, how much they may store, and how often they may ask."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from api.database import KEYS, Database, new_id, now_ms

_PREFIX = "nsk_"


@dataclass(frozen=True)
class Owner:
    """Who asks.

    Attributes:
        id: the key's id, never its secret.
        quota_bytes: what it may store; None where the settings say.

    """

    id: str
    quota_bytes: int | None = None


#: Who asks where no keys are needed.
EVERYONE = Owner("open")


def create(database: Database, name: str, quota_bytes: int | None = None) -> tuple[str, str]:
    """Make a key and return its id and its secret, which is shown this once and stored nowhere."""
    # 256 random bits: a fast hash is enough, there is nothing to guess.
    identifier, secret = new_id("key"), _PREFIX + secrets.token_urlsafe(32)
    with database.write() as connection:
        connection.execute(
            sa.insert(KEYS).values(
                id=identifier,
                name=name,
                secret_sha256=_hash(secret),
                quota_bytes=quota_bytes,
                created_ms=now_ms(),
            )
        )
    return identifier, secret


def listed(database: Database) -> Sequence[sa.Row[Any]]:
    """Return every key's id, name, quota and times."""
    columns = [KEYS.c[name] for name in ("id", "name", "quota_bytes", "created_ms", "revoked_ms")]
    with database.read() as connection:
        return connection.execute(sa.select(*columns).order_by(KEYS.c.id)).all()


def revoke(database: Database, identifier: str) -> bool:
    """Make a key useless from now on; False if there is no such key that is still valid."""
    statement = sa.update(KEYS).where(KEYS.c.id == identifier, KEYS.c.revoked_ms.is_(None))
    with database.write() as connection:
        return connection.execute(statement.values(revoked_ms=now_ms())).rowcount == 1


def owner_of(database: Database, secret: str) -> Owner | None:
    """Return whose secret this is; None if it is nobody's, or was revoked."""
    statement = sa.select(KEYS.c.id, KEYS.c.quota_bytes).where(
        KEYS.c.secret_sha256 == _hash(secret), KEYS.c.revoked_ms.is_(None)
    )
    with database.read() as connection:
        row = connection.execute(statement).one_or_none()
    return None if row is None else Owner(row.id, row.quota_bytes)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


class Rate:
    """How often one asker may ask, counted in this process.

    Args:
        per_minute: the most requests in any minute.

    """

    def __init__(self, per_minute: int) -> None:
        self._item = RateLimitItemPerMinute(per_minute)
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def allows(self, asker: str) -> bool:
        """Count a request and tell whether it may be answered."""
        return self._limiter.hit(self._item, asker)
