"""Leases: which processes that run jobs are alive, and how the jobs of those that are not go to others.

A worker has a row in ``leases`` that it renews each second. Times are the database's own: no two machines'
clocks are compared. One that was not renewed for a few seconds is marked dead, for ever; the jobs that its
process holds go back to the queue. A process that finds itself marked, because it was stopped or cut off,
ends at once: it cannot publish anything any more, and its children die with it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from api.database import LEASES, Database
from api.observing import LOG
from api.queueing import Queue

#: Seconds between two beats, and for which a lease holds without one.
BEAT, LEASE = 1.0, 4.0
#: A process needs longer for its first beat.
_START = 6.0


def new_executor() -> str:
    """Return a name for this process that no process has had, and that says where it runs."""
    return f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex}"


def clock(connection: sa.Connection) -> sa.ColumnElement[float]:
    """Return the database's time in seconds since 1970, as an expression."""
    if connection.dialect.name == "sqlite":
        return sa.literal_column("((julianday('now') - 2440587.5) * 86400.0)", sa.Double)
    return sa.literal_column("extract(epoch from clock_timestamp())::double precision", sa.Double)


class Lease:
    """The lease of this process, and its part in looking after the others'.

    Args:
        database: where leases are.
        queue: whose workflows are given to others.
        recover: puts the workflows that some processes hold back into the queue.
        on_lost: is called once if this process was marked dead; it must end the process.

    """

    def __init__(
        self,
        database: Database,
        queue: Queue,
        recover: Callable[[Sequence[str]], object],
        on_lost: Callable[[], None],
    ) -> None:
        self.executor = new_executor()
        self._database, self._queue = database, queue
        self._recover, self._on_lost = recover, on_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def begin(self) -> None:
        """Take the lease, before anything is run under its name, and renew it from now on."""
        with self._database.write() as connection:
            expires = clock(connection) + _START
            values = {"executor": self.executor, "expires": expires, "dead": 0}
            connection.execute(sa.insert(LEASES).values(values))
        self._thread.start()

    def end(self) -> None:
        """Give the lease back: what this process still holds goes to others at once."""
        self._ended.set()
        self._thread.join(LEASE)
        with self._database.write() as connection:
            mine = sa.update(LEASES).where(LEASES.c.executor == self.executor)
            connection.execute(mine.values(dead=1))

    def _beat(self) -> None:
        on_time, before = 0, time.monotonic()
        while not self._ended.wait(BEAT):
            try:
                if not self._renew() and not self._ended.is_set():
                    self._on_lost()
                    return
                now = time.monotonic()
                on_time, before = (on_time + 1 if now - before < LEASE else 0), now
                # Whose own lease ran out, in an outage of the database or a pause, gives the others the time
                # of a lease to renew theirs before anybody is declared dead.
                if on_time * BEAT >= LEASE:
                    self._reap()
            except sa.exc.SQLAlchemyError as error:
                on_time = 0
                LOG.warning("no beat", extra={"fields": {"error": type(error).__name__}})
            except Exception:
                on_time = 0
                LOG.exception("no beat")

    def _renew(self) -> bool:
        with self._database.write() as connection:
            mine = sa.update(LEASES).where(LEASES.c.executor == self.executor, LEASES.c.dead == 0)
            return connection.execute(mine.values(expires=clock(connection) + LEASE)).rowcount == 1

    def _reap(self) -> None:
        with self._database.read() as connection:
            late = sa.select(LEASES.c.executor).where(
                LEASES.c.dead == 0, LEASES.c.expires < clock(connection)
            )
            overdue = list(connection.scalars(late))
        if overdue:
            with self._database.write() as connection:
                # Looked at again: it may have been renewed meanwhile.
                still = (LEASES.c.executor.in_(overdue), LEASES.c.expires < clock(connection))
                connection.execute(sa.update(LEASES).where(*still).values(dead=1))
        with self._database.read() as connection:
            # In this order: a process takes its lease before it holds anything.
            holding = set(connection.scalars(self._queue.executors()))
            alive = set(connection.scalars(sa.select(LEASES.c.executor).where(LEASES.c.dead == 0)))
        gone = sorted(holding - alive)
        if gone:
            LOG.warning("workers are gone", extra={"fields": {"executors": gone}})
            self._recover(gone)
