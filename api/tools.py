"""What every process of the service works with, the server and its workers alike."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa

from api.database import Database
from api.observing import LOG, Metrics
from api.queueing import Queue, migrate
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
            Database(settings.url()).close()
            return None
        except sa.exc.SQLAlchemyError as error:
            shown = sa.make_url(settings.url()).render_as_string(hide_password=True).partition("?")[0]
            cause = str(getattr(error, "orig", error)).strip().splitlines()
            if not isinstance(error, sa.exc.OperationalError) or time.monotonic() > deadline:
                return f"the database {shown} does not answer: {cause[0] if cause else type(error).__name__}"
        LOG.warning("the database does not answer yet", extra={"fields": {"database": shown}})
        time.sleep(1)


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
    database = Database(url)
    migrate(url)
    queue = Queue(url)
    store = open_store(settings, database)
    sandbox = Sandbox(settings.model_copy(update={"child_seconds": child_seconds}), metrics)
    try:
        yield Tools(settings, database, queue, store, sandbox, metrics)
    finally:
        sandbox.close()
        queue.close()
        database.close()
