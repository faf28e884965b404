"""Retention: what is finished, unused or left over is removed after a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from api import jobs
from api.database import ARTIFACTS, BLOBS, DATASETS, EVENTS, JOBS, LEASES, MODELS, PARTS, UPLOADS, now_ms
from api.leasing import clock
from api.observing import LOG
from api.problems import ProblemError
from api.searches import has_studies, studies_of, workflows_of
from api.store import Content
from api.tools import Tools

#: Seconds between two rounds of a worker, and between two looks for jobs that nobody will go on with.
_ROUND, _LOOK = 600.0, 5.0
_DAY_MS = 86_400_000
#: So many things are removed in one transaction.
_MOST = 200


class Cleaner:
    """Removes in rounds; every worker has one. Whatever one of them was killed at, the next round does."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def run(self, ended: threading.Event) -> None:
        """Go round until the end."""
        looks = 0
        while not ended.wait(_LOOK):
            try:
                self.close_orphans()
                if looks % int(_ROUND / _LOOK) == 0:
                    self.clean()
            except sa.exc.SQLAlchemyError as error:
                LOG.warning("cleaning failed", extra={"fields": {"error": type(error).__name__}})
            except Exception:
                LOG.exception("cleaning failed")
            looks += 1

    def close_orphans(self) -> None:
        """End the jobs whose workflow has ended without them, which only a fault can bring about."""
        ended = self._tools.queue.has_ended(JOBS.c.id)
        with self._tools.database.read() as connection:
            query = sa.select(JOBS.c.id).where(JOBS.c.state.in_(jobs.UNFINISHED), ended).limit(_MOST)
            found = list(connection.scalars(query))
        problem = ProblemError(500, "internal", "the queue gave this job up; send it again").document()
        for job in found:
            with self._tools.database.write() as connection:
                if jobs.finish(connection, self._tools.store, ended, job, "failed", problem=problem):
                    LOG.error("job was given up by the queue", extra={"fields": {"job": job}})

    def clean(self) -> None:
        """Remove what is older than it is kept."""
        settings, now = self._tools.settings, now_ms()
        self._finished_jobs(now - int(settings.keep_jobs_days * _DAY_MS))
        self._artifacts(now - int(settings.keep_artifacts_days * _DAY_MS))
        self._unused(now - int(settings.keep_uploads_days * _DAY_MS))
        self._contents()
        self._studies()
        with self._tools.database.write() as connection:
            old = sa.delete(LEASES).where(LEASES.c.dead == 1, LEASES.c.expires < clock(connection) - 86_400)
            connection.execute(old)

    def _finished_jobs(self, before: int) -> None:
        with self._tools.database.write() as connection:
            old = sa.select(JOBS.c.id).where(JOBS.c.finished_ms < before).limit(_MOST)
            found = list(connection.scalars(old))
            for table in (EVENTS, PARTS):
                connection.execute(sa.delete(table).where(table.c.job.in_(found)))
            connection.execute(sa.delete(JOBS).where(JOBS.c.id.in_(found)))
            gone = [one for job in found for one in workflows_of(job, self._tools.settings)]
            self._tools.queue.forget(connection, gone)

    def _artifacts(self, before: int) -> None:
        with self._tools.database.write() as connection:
            reading = sa.select(JOBS.c.artifact).where(
                JOBS.c.artifact.is_not(None), JOBS.c.finished_ms.is_(None)
            )
            old = ARTIFACTS.c.created_ms < before
            gone = self._removed(connection, ARTIFACTS, old & ARTIFACTS.c.id.not_in(reading))
        self._forget(gone)

    def _unused(self, before: int) -> None:
        """Remove models and datasets that nothing refers to, and uploads that nothing was made from."""

        def free(table: sa.Table, *columns: sa.Column[Any]) -> sa.ColumnElement[bool]:
            used = [sa.exists(sa.select(column).where(column == table.c.id)) for column in columns]
            return (table.c.created_ms < before) & ~sa.or_(*used)

        with self._tools.database.write() as connection:
            self._removed(connection, MODELS, free(MODELS, ARTIFACTS.c.model, JOBS.c.model))
            self._removed(connection, DATASETS, free(DATASETS, JOBS.c.dataset))
            uploads = free(UPLOADS, MODELS.c.upload, DATASETS.c.upload, JOBS.c.upload)
            gone = self._removed(connection, UPLOADS, uploads)
        self._forget(gone)

    def _contents(self) -> None:
        """Remove the files that nothing refers to, left by processes that died before they removed them."""
        columns = (UPLOADS.c.sha256, ARTIFACTS.c.sha256)
        used = [sa.exists(sa.select(column).where(column == BLOBS.c.sha256)) for column in columns]
        with self._tools.database.read() as connection:
            query = sa.select(BLOBS).where(~sa.or_(*used)).limit(_MOST)
            gone = connection.execute(query).all()
        self._forget(gone)

    def _studies(self) -> None:
        """Remove the studies whose job is gone."""
        with self._tools.database.read() as connection:
            if not has_studies(connection):
                return
        studies = studies_of(self._tools.settings)
        names = studies.names()
        # In this order: a job is there before its study is.
        with self._tools.database.read() as connection:
            there = set(connection.scalars(sa.select(JOBS.c.id).where(JOBS.c.kind == "search")))
        for name in names:
            if name not in there:
                studies.forget(name)

    @staticmethod
    def _removed(
        connection: sa.Connection, table: sa.Table, condition: sa.ColumnElement[bool]
    ) -> Sequence[sa.Row[Any]]:
        rows = connection.execute(sa.select(table).where(condition).limit(_MOST)).all()
        connection.execute(sa.delete(table).where(table.c.id.in_([row.id for row in rows])))
        return rows

    def _forget(self, rows: Sequence[sa.Row[Any]]) -> None:
        for row in rows:
            self._tools.store.forget(Content(row.sha256, row.size))
