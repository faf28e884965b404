"""What every process of the service works with, the server and its workers alike."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa

from api.database import Database
from api.migrating import MigrationError, open_database, reason
from api.observing import LOG, Metrics
from api.queueing import Queue
from api.remote import open_store
from api.sandbox import Sandbox
from api.settings import Settings
from api.store import Store


@dataclass(frozen=True)
class Tools:
    """What work is done with.

    Attributes:
        settings: what the environment says.
        database: where everything is written down.
        queue: where jobs wait.
        store: the files.
        sandbox: the children.
        metrics: the numbers for operators.

    """

    settings: Settings
    database: Database
    queue: Queue
    store: Store
    sandbox: Sandbox
    metrics: Metrics


def await_database(settings: Settings, seconds: float) -> str | None:
    """Wait until the database answers; after some seconds return why it does not, without secrets."""
    settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    deadline = time.monotonic() + seconds
    while True:
        try:
            open_database(settings.url()).close()
            return None
        except sa.exc.SQLAlchemyError as error:
            if not isinstance(error, sa.exc.OperationalError) or time.monotonic() > deadline:
                return f"the database {_shown(settings)} does not answer: {reason(error)}"
        except MigrationError as error:
            return f"the database {_shown(settings)} cannot be brought up to date: {error}"
        LOG.warning("the database does not answer yet", extra={"fields": {"database": _shown(settings)}})
        time.sleep(1)


def _shown(settings: Settings) -> str:
    return sa.make_url(settings.url()).render_as_string(hide_password=True).partition("?")[0]


@contextmanager
def opened(settings: Settings, metrics: Metrics, child_seconds: float) -> Iterator[Tools]:
    """Open everything, and close it in the end.

    Args:
        settings: what the environment says.
        metrics: where work is counted.
        child_seconds: the time that a child of this process may take.

    """
    settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    url = settings.url()
    database = open_database(url)
    queue = Queue(url)
    store = open_store(settings, database)
    sandbox = Sandbox(settings.model_copy(update={"child_seconds": child_seconds}), metrics)
    try:
        yield Tools(settings, database, queue, store, sandbox, metrics)
    finally:
        sandbox.close()
        database.close()
