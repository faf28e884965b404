"""What every process of the service works with, the server and its workers alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from api.database import Database
from api.observing import Metrics
from api.queueing import Queue, migrate
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
    store = Store(settings.data, database, settings.reserve_bytes)
    sandbox = Sandbox(settings.model_copy(update={"child_seconds": child_seconds}), metrics)
    try:
        yield Tools(settings, database, queue, store, sandbox, metrics)
    finally:
        sandbox.close()
        queue.close()
        database.close()
