"""A worker: the process that takes jobs from the queue and has them done in children."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa
from dbos import DBOS, DBOSConfig

from api import jobs, queueing
from api.database import JOBS
from api.forking import EndingError
from api.hearing import KilledError
from api.kinds import KINDS, PARTS
from api.leasing import Lease
from api.observing import LOG, Metrics
from api.problems import ProblemError
from api.queueing import JOB_QUEUE, PART_QUEUE, Claim
from api.retention import Cleaner
from api.runs import GivenUpError, Run
from api.sandbox import CancelledError
from api.settings import Settings
from api.tools import Tools, opened
from api.workflows import JsonSerializer, quiet

#: Attempts at a job that each ended the process, or the child, that made it.
ATTEMPTS = 3
#: Seconds between two looks at the queue, and at whether what is in work is still wanted.
_POLL, _WATCH = 0.2, 0.25
#: Seconds in which a worker that is told to end may finish what it has in work.
GRACE = 15.0
#: The exit code of a worker whose lease was lost.
LOST = 75
_UNAVAILABLE = (sa.exc.OperationalError, sa.exc.InterfaceError)


class Worker:
    """The part of a process in the queue.

    Args:
        tools: what work is done with.

    """

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        # Places for children are shared: a search that waits for its parts holds none.
        self._places = threading.Semaphore(tools.settings.children)
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._lease = Lease(tools.database, tools.queue, recover, self._lost)
        self._cleaner = Cleaner(tools)

    def begin(self) -> None:
        """Take a lease, and jobs from now on."""
        global _worker
        _worker = self
        settings = self._tools.settings
        config: DBOSConfig = {
            "name": queueing.APPLICATION,
            "system_database_url": settings.url(),
            "dbos_system_schema": queueing.SCHEMA,
            "application_version": queueing.VERSION,
            "executor_id": self._lease.executor,
            "serializer": JsonSerializer(),
            "log_level": "WARNING",
        }
        self._dbos = DBOS(config=config)
        quiet()
        self._lease.begin()
        DBOS.listen_queues([JOB_QUEUE, PART_QUEUE])
        DBOS.launch()
        for queue in (JOB_QUEUE, PART_QUEUE):
            DBOS.register_queue(
                queue,
                worker_concurrency=settings.children,
                polling_interval_sec=_POLL,
                on_conflict="always_update",
            )
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        threading.Thread(target=self._cleaner.run, args=(self._ending,), name="cleaner", daemon=True).start()
        LOG.info("worker takes jobs", extra={"fields": {"executor": self._lease.executor}})

    def end(self, grace: float) -> None:
        """Take no more jobs, finish in some seconds what is in work, and give back the rest, uncounted."""
        for event in self._dbos.background_thread_stop_events:
            event.set()
        deadline = time.monotonic() + grace
        while self._runs and time.monotonic() < deadline:
            time.sleep(0.1)
        self._ending.set()
        self._tools.sandbox.close()
        try:
            with self._tools.database.write() as connection:
                for run in self._active():
                    run.uncount(connection)
            self._lease.end()
        except _UNAVAILABLE:
            LOG.warning("the database does not answer; the lease will expire")

    def job(self, identifier: str) -> None:
        """Run a job until it has ended, or is another process's."""
        claim = Claim(identifier, self._lease.executor)
        while True:
            row = self._start(claim, identifier)
            if row is None:
                return
            run = Run(self._tools, claim, row, self._places)
            if row.attempts > ATTEMPTS:
                run.fail(_poisonous())
                return
            if self._is_done(run, KINDS[row.kind]):
                return

    def part(self, identifier: str, number: str) -> None:
        """Run a part of a search, which ends with it."""
        claim = Claim(f"{identifier}-{number}", self._lease.executor)
        while True:
            with self._tools.database.read() as connection:
                row = connection.execute(sa.select(JOBS).where(JOBS.c.id == identifier)).one_or_none()
            if row is None or row.state != "running":
                return
            if self._is_done(Run(self._tools, claim, row, self._places), PARTS[row.kind]):
                return

    def _start(self, claim: Claim, identifier: str) -> sa.Row[object] | None:
        while True:
            try:
                with self._tools.database.write() as connection:
                    return jobs.start(connection, self._tools.queue, claim, identifier)
            except _UNAVAILABLE:
                self._ending.wait(1)

    def _is_done(self, run: Run, work: Callable[[Run], None]) -> bool:
        """Do the work; False if it must be done again."""
        with self._lock:
            self._runs[run.claim.workflow] = run
        try:
            with run.files:
                work(run)
            return True
        except Exception as error:
            if self._ending.is_set() or isinstance(error, EndingError):
                # To return would be to say that it is done. This process ends in a moment.
                threading.Event().wait()
            return self._is_over(run, error)
        finally:
            with self._lock:
                del self._runs[run.claim.workflow]

    def _is_over(self, run: Run, error: Exception) -> bool:
        """Tell what ended a run; False if the work must be done again."""
        if isinstance(error, GivenUpError | CancelledError):
            return True
        if isinstance(error, _UNAVAILABLE):
            # What it made cannot be told from what it did not; what was published shows at the next start.
            self._again(run)
            return False
        if isinstance(error, KilledError) and run.job.attempts < ATTEMPTS:
            fields = {"job": run.job.id, "attempt": run.job.attempts}
            LOG.warning("child was killed", extra={"fields": fields})
            return False
        if isinstance(error, ProblemError) and error.status == 503:
            time.sleep(1)
            self._again(run)
            return False
        if not isinstance(error, ProblemError):
            LOG.error("unforeseen", exc_info=error, extra={"fields": {"job": run.job.id}})
            error = ProblemError(500, "internal", f"the log of the workers says more of {run.job.id}")
        run.fail(error)
        return True

    def _again(self, run: Run) -> None:
        def write() -> None:
            with self._tools.database.write() as connection:
                run.uncount(connection)

        run.lasting(write)

    def _active(self) -> list[Run]:
        with self._lock:
            return list(self._runs.values())

    def _watch(self) -> None:
        """Set the runs free that were cancelled, or are another process's by now."""
        while not self._ending.wait(_WATCH):
            runs = self._active()
            if not runs:
                continue
            wanted = [run.job.id for run in runs]
            try:
                with self._tools.database.read() as connection:
                    held = self._tools.queue.held(connection, self._lease.executor)
                    running = sa.select(JOBS.c.id).where(JOBS.c.id.in_(wanted), JOBS.c.state == "running")
                    going = set(connection.scalars(running))
            except sa.exc.SQLAlchemyError:
                # While the database is away, children go on.
                continue
            for run in runs:
                if run.claim.workflow not in held or run.job.id not in going:
                    run.cancelled.set()

    def _lost(self) -> None:
        """End at once: others run what this process held. Its children die with it."""
        fields = {"executor": self._lease.executor}
        LOG.error("this worker was taken for dead, and ends", extra={"fields": fields})
        sys.stderr.flush()
        os._exit(LOST)


_worker: Worker | None = None


@DBOS.workflow(name=JOB_QUEUE, max_recovery_attempts=1000)
def _job(identifier: str) -> None:
    # Attempts are counted in the job's row, where they can be taken back: this limit is never reached.
    assert _worker is not None
    _worker.job(identifier)


@DBOS.workflow(name=PART_QUEUE, max_recovery_attempts=1000)
def _part(identifier: str, number: str) -> None:
    assert _worker is not None
    _worker.part(identifier, number)


def recover(executors: Sequence[str]) -> object:
    """Put what some processes hold back into the queue.

    DBOS does so by itself only for a process that comes back under the same name. The function is private and
    the public one (``resume_workflow``) would move jobs to another queue.
    """
    return DBOS._recover_pending_workflows(list(executors))


def _poisonous() -> ProblemError:
    return ProblemError(
        422,
        "failed",
        f"{ATTEMPTS} processes died of this job, and it is not tried again; too large a network or batch may "
        "be the cause: try less, or tell the operator",
    )


def run(settings: Settings, told: threading.Event) -> None:
    """Run jobs until told to end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    with opened(settings, Metrics(), settings.job_seconds) as tools:
        worker, code = Worker(tools), 0
        try:
            worker.begin()
            told.wait()
            worker.end(GRACE)
        except Exception:
            LOG.exception("worker failed")
            code = 1
        sys.stderr.flush()
        # Nothing is closed and no thread is waited for: what they hold goes to others, and would be spoiled
        # by the end of what they work with.
        os._exit(code)
