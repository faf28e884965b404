"""The durable queue: which jobs wait for a worker, and who runs which. It is DBOS, in the service's database.

Workers run DBOS. Whoever only puts jobs in and takes them out again writes DBOS's rows by itself, within the
transaction that makes what they are about, and need not load it: a server would hold it in memory for three
statements. The version is pinned, and a test compares the rows with those that DBOS's own client writes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from api.database import now_ms

#: Queued jobs outlive releases of the service: the version that DBOS computes by itself would strand them.
APPLICATION, VERSION, SCHEMA = "normsearch", "1", "dbos"
#: Jobs, and the parts of searches that any worker may take, apart from jobs: whoever waits for them holds a
#: place of a job.
JOB_QUEUE, PART_QUEUE = "jobs", "parts"
#: How rows say in which form their values are.
SERIALIZATION = "normsearch_json"
#: The last of the migrations by which DBOS makes its tables.
TABLES = 125
#: A workflow that somebody runs.
PENDING = "PENDING"
_WAITING, _CANCELLED = "ENQUEUED", "CANCELLED"
_DONE = ("SUCCESS", "ERROR")
_ENDED = (*_DONE, _CANCELLED, "MAX_RECOVERY_ATTEMPTS_EXCEEDED")
_COLUMNS = (
    "workflow_uuid",
    "status",
    "name",
    "queue_name",
    "application_name",
    "application_version",
    "serialization",
    "recovery_attempts",
    "priority",
    "is_debounced",
    "attributes",
    "creator_xid",
    "owner_xid",
    "executor_id",
    "deduplication_id",
    "started_at_epoch_ms",
    "updated_at",
    "completed_at",
)
_TYPES = {"attributes": sa.JSON()}


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
        url: of the database.

    """

    def __init__(self, url: str) -> None:
        schema = None if url.startswith("sqlite") else SCHEMA

        def table(name: str, *columns: str) -> sa.TableClause:
            return sa.table(name, *(sa.column(one, _TYPES.get(one)) for one in columns), schema=schema)

        self._workflows = table("workflow_status", *_COLUMNS)
        self._inputs = table("workflow_input", "workflow_uuid", "inputs")
        self._others = [table(name, "workflow_uuid") for name in ("workflow_output", "operation_outputs")]
        self._migrations = table("dbos_migrations", "version")

    def put(self, connection: sa.Connection, workflow: str, queue: str, *arguments: str) -> None:
        """Let a workflow wait for a worker."""
        values = {
            "workflow_uuid": workflow,
            "status": _WAITING,
            "name": queue,
            "queue_name": queue,
            "application_name": APPLICATION,
            "application_version": VERSION,
            "serialization": SERIALIZATION,
            "recovery_attempts": 0,
            "priority": 0,
            "is_debounced": False,
            "attributes": None,
            "creator_xid": str(uuid.uuid4()),
        }
        connection.execute(sa.insert(self._workflows).values(values))
        inputs = json.dumps({"args": arguments, "kwargs": {}})
        connection.execute(sa.insert(self._inputs).values(workflow_uuid=workflow, inputs=inputs))

    def cancel(self, connection: sa.Connection, workflows: Sequence[str]) -> None:
        """Have workflows neither started nor gone on with."""
        found, now = self._workflows.c, now_ms()
        ended = {"status": _CANCELLED, "updated_at": now, "completed_at": now}
        free = dict.fromkeys(("owner_xid", "queue_name", "deduplication_id", "started_at_epoch_ms"))
        going = (found.workflow_uuid.in_(workflows), found.status.not_in(_DONE))
        connection.execute(sa.update(self._workflows).where(*going).values(ended | free))

    def forget(self, connection: sa.Connection, workflows: Sequence[str]) -> None:
        """Remove what is known of workflows."""
        for table in (self._inputs, *self._others, self._workflows):
            connection.execute(sa.delete(table).where(table.c.workflow_uuid.in_(workflows)))

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

    def has_tables(self, connection: sa.Connection) -> bool:
        """Tell whether the queue's tables are there and up to date."""
        if not sa.inspect(connection).has_table(self._migrations.name, schema=self._migrations.schema):
            return False
        version = connection.scalar(sa.select(self._migrations.c.version))
        return version is not None and version >= TABLES
