"""The durable queue: which jobs wait for a worker, and who runs which. It is DBOS, in the service's database.

Only what is public of DBOS is used here, but for the names of its table of workflows and three of its
columns; ``leasing.py`` uses one private function. The version is pinned, and a test guards both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, EnqueueOptions, Serializer, error

#: Queued jobs outlive releases of the service: the version that DBOS computes by itself would strand them.
APPLICATION, VERSION, SCHEMA = "normsearch", "1", "dbos"
#: Jobs, and the parts of searches that any worker may take, apart from jobs: whoever waits for them holds a
#: place of a job.
JOB_QUEUE, PART_QUEUE = "jobs", "parts"
#: A workflow that somebody runs.
PENDING = "PENDING"
_ENDED = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")

_EXPECTED = (
    error.DBOSWorkflowCancelledError,
    error.DBOSAwaitedWorkflowCancelledError,
    error.DBOSWorkflowConflictIDError,
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
        return "normsearch_json"


@dataclass(frozen=True)
class Claim:
    """A workflow that this process runs, as long as the queue says so.

    Attributes:
        workflow: its id.
        executor: the process.

    """

    workflow: str
    executor: str


class Queue:
    """The queue, as those see it who put jobs in and take them out again.

    Args:
        url: of the database, which must be migrated already (``migrate``).

    """

    def __init__(self, url: str) -> None:
        schema = None if url.startswith("sqlite") else SCHEMA
        columns: list[Any] = [sa.column(name) for name in ("workflow_uuid", "status", "executor_id")]
        self._workflows = sa.table("workflow_status", *columns, schema=schema)
        self._client = DBOSClient(
            system_database_url=url,
            dbos_system_schema=SCHEMA,
            serializer=JsonSerializer(),
            application_name=APPLICATION,
            lazy=True,
            retry_connection_errors=False,
        )

    def put(self, connection: sa.Connection, workflow: str, queue: str, *arguments: str) -> None:
        """Let a workflow wait for a worker, within the transaction that makes what it is about."""
        options: EnqueueOptions = {
            "workflow_name": queue,
            "queue_name": queue,
            "workflow_id": workflow,
            "app_version": VERSION,
        }
        self._client.enqueue_in_transaction(connection, options, *arguments)

    def cancel(self, workflows: Sequence[str]) -> None:
        """Have workflows neither started nor gone on with."""
        self._client.cancel_workflows(list(workflows))

    def forget(self, workflows: Sequence[str]) -> None:
        """Remove what is known of workflows."""
        self._client.delete_workflows(list(workflows))

    def is_held(self, claim: Claim) -> sa.ColumnElement[bool]:
        """Return the condition under which a claim holds; whatever is published is published under it."""
        found = self._workflows.c
        return sa.exists(
            sa.select(sa.literal(1))
            .select_from(self._workflows)
            .where(
                found.workflow_uuid == claim.workflow,
                found.status == PENDING,
                found.executor_id == claim.executor,
            )
        )

    def has_ended(self, workflow: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
        """Return the condition under which nobody will go on with a workflow any more."""
        found = self._workflows.c
        return sa.exists(
            sa.select(sa.literal(1))
            .select_from(self._workflows)
            .where(found.workflow_uuid == workflow, found.status.in_(_ENDED))
        )

    def held(self, connection: sa.Connection, executor: str) -> set[str]:
        """Return the workflows that a process holds."""
        found = self._workflows.c
        query = sa.select(found.workflow_uuid).where(found.status == PENDING, found.executor_id == executor)
        return set(connection.scalars(query))

    def executors(self) -> sa.Select[Any]:
        """Return the query of the processes that hold workflows, dead or alive."""
        found = self._workflows.c
        return (
            sa.select(found.executor_id)
            .distinct()
            .where(found.status == PENDING, found.executor_id.is_not(None))
        )

    def close(self) -> None:
        """Close every connection."""
        self._client.destroy()


def migrate(url: str) -> None:
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
    """Leave out that a job which was cancelled, or is another worker's by now, was not recorded as done."""
    cause = record.exc_info[1] if record.exc_info else None
    return not isinstance(cause, _EXPECTED) and "no longer owned" not in record.getMessage()
