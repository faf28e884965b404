"""A run: one attempt of this process at a job, given up when the job is cancelled or another's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel

from api import jobs
from api.database import KEYS, PARTS
from api.jobs import Publish
from api.keys import EVERYONE, Owner
from api.messages import Progressed
from api.observing import LOG
from api.problems import ProblemError
from api.queueing import Claim
from api.sandbox import Finished
from api.tools import Tools

R = TypeVar("R", bound=BaseModel)
T = TypeVar("T")
#: Seconds between two events that say how far a job has come.
_PACE = 0.5
#: Seconds between two tries where the database does not answer.
_PAUSE = 0.5


class GivenUpError(Exception):
    """The run is over: the job was cancelled, has ended, or is another process's."""


class Run:
    """What the work of a job gets at.

    Args:
        tools: what work is done with.
        claim: by which this process runs it.
        job: its row.
        places: how many children this process may have at work.

    """

    def __init__(self, tools: Tools, claim: Claim, job: sa.Row[Any], places: threading.Semaphore) -> None:
        self.tools, self.claim, self.job = tools, claim, job
        self.owner = Owner(job.owner)
        #: Set when the run is over before its work is done; children die then.
        self.cancelled = threading.Event()
        #: What is open until the run ends.
        self.files = ExitStack()
        self._places = places
        self._told, self._stage = -1.0, ""

    @contextmanager
    def child(
        self,
        task: str,
        argument: BaseModel,
        result: type[R],
        inputs: Mapping[str, Path],
        on_progress: Callable[[Progressed], None] | None = None,
    ) -> Iterator[Finished[R]]:
        """Do a piece of work in a child, as soon as this process may have one more.

        Raises:
            GivenUpError: the run is over.
            ProblemError: as for ``Sandbox.run``.

        """
        while not self._places.acquire(timeout=_PAUSE):
            self.check()
        try:
            self.check()
            with self.tools.sandbox.run(
                task,
                argument,
                result,
                inputs,
                on_progress=on_progress or self.advance,
                cancelled=self.cancelled,
            ) as finished:
                yield finished
        finally:
            self._places.release()

    def check(self) -> None:
        """Raise GivenUpError if the run is over."""
        if self.cancelled.is_set():
            raise GivenUpError

    def advance(self, step: Progressed) -> None:
        """Tell how far the work has come; of many steps in a moment the last of each stage counts."""
        now = time.monotonic()
        ends = step.total > 0 and step.done >= step.total
        if step.stage == self._stage and now - self._told < _PACE and not ends:
            return
        self._told, self._stage = now, step.stage
        self.tell("progress", step.model_dump(exclude={"kind", "note"}))

    def log(self, text: str) -> None:
        """Add a line to the job's log."""
        self.tell("log", {"text": text[:2000]})

    def tell(self, kind: jobs.EventKind, document: dict[str, Any]) -> None:
        """Add an event to the job, if it is still this run's."""

        def write() -> None:
            with self.tools.database.write() as connection:
                held = sa.select(sa.literal(1)).where(self.tools.queue.is_held(self.claim))
                if connection.scalar(held) is not None:
                    jobs.tell(connection, self.job.id, kind, document)

        self.lasting(write)

    def lasting(self, work: Callable[[], T]) -> T:
        """Do something with the database, again and again while it does not answer.

        Raises:
            GivenUpError: the run is over.

        """
        while True:
            try:
                return work()
            except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
                LOG.warning(
                    "the database does not answer",
                    extra={"fields": {"job": self.job.id, "error": type(error).__name__}},
                )
            if self.cancelled.wait(_PAUSE):
                raise GivenUpError

    def publish(self, commit: Publish) -> None:
        """Write what was made and end the job, in one transaction that only the job's holder can complete.

        Raises:
            GivenUpError: it is not this run's any more; nothing was written.
            ProblemError: what is written is beyond the quota.

        """
        with self.tools.database.write() as connection:
            # The key's quota, as it is now.
            quota = connection.scalar(sa.select(KEYS.c.quota_bytes).where(KEYS.c.id == self.job.owner))
            self.owner = EVERYONE if self.job.owner == EVERYONE.id else Owner(self.job.owner, quota)
            if not jobs.holds(connection, self.tools.queue, self.claim, self.job.id):
                raise GivenUpError
            result = commit(connection)
            condition = self.tools.queue.is_held(self.claim)
            if not jobs.finish(
                connection, self.tools.store, condition, self.job.id, "succeeded", result=result
            ):
                raise GivenUpError

    def uncount(self, connection: sa.Connection) -> None:
        """Take back an attempt that ended for no fault of the job's."""
        if self.claim.workflow == self.job.id:
            jobs.uncount(connection, self.job.id)
        else:
            mine = (
                PARTS.c.job == self.job.id,
                PARTS.c.holder == self.claim.workflow,
                PARTS.c.result.is_(None),
            )
            connection.execute(sa.update(PARTS).where(*mine).values(attempts=PARTS.c.attempts - 1))

    def fail(self, problem: ProblemError) -> None:
        """End the job with a problem, if it is still this run's."""

        def write() -> None:
            with self.tools.database.write() as connection:
                condition = self.tools.queue.is_held(self.claim)
                jobs.finish(
                    connection, self.tools.store, condition, self.job.id, "failed", problem=problem.document()
                )

        self.lasting(write)
