"""DBOS as workers run it: in which form it keeps values, what it says in the log, how its tables are made.

``queueing.py`` knows the rows; ``worker.py`` the workflows, and one private function. The version is pinned,
and a test guards all of it.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from dbos import DBOS, Serializer, error

from api.queueing import SCHEMA, SERIALIZATION

_EXPECTED = (
    error.DBOSWorkflowCancelledError,
    error.DBOSAwaitedWorkflowCancelledError,
    error.DBOSWorkflowConflictIDError,
    error.DBOSNonExistentWorkflowError,
)


class JsonSerializer(Serializer):
    """What DBOS keeps is JSON: its default is pickle, which runs what is in the database."""

    def serialize(self, data: Any) -> str:
        """Return a value as text."""
        if isinstance(data, BaseException):
            data = f"{type(data).__name__}: {data}"[:2000]
        return json.dumps(data)

    def deserialize(self, serialized_data: str) -> Any:
        """Return the value of a text."""
        return json.loads(serialized_data)

    def name(self) -> str:
        """Return what rows say of their form."""
        return SERIALIZATION


def make_tables(url: str) -> None:
    """Make the queue's tables, or bring them up to date."""
    quiet()
    DBOS.migrate(url, schema=SCHEMA)


def quiet() -> None:
    """Let DBOS's warnings go where the service's own records go, and leave out the rest."""
    logger = logging.getLogger("dbos")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out that a job which was cancelled, deleted, or is another worker's by now, was not recorded."""
    cause = record.exc_info[1] if record.exc_info else None
    return not isinstance(cause, _EXPECTED) and "no longer owned" not in record.getMessage()
