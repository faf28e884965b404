"""What a job reads: rows of its owner, and their files by the names that a child gets them by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from api.children import plain
from api.conversions import data_in, source_of
from api.database import ARTIFACTS, DATASETS, MODELS, UPLOADS
from api.owned import fetch
from api.runs import Run
from api.store import Content
from api.tasks import Data, Source


def row_of(run: Run, table: sa.Table, identifier: str) -> sa.Row[Any]:
    """Return something of the job's owner.

    Raises:
        ProblemError: 404.

    """

    def read() -> sa.Row[Any]:
        with run.tools.database.read() as connection:
            return fetch(connection, table, run.owner, identifier)

    return run.lasting(read)


def path_of(run: Run, row: sa.Row[Any]) -> Path:
    """Return the file of an upload or an artifact, which is there until the run ends."""
    return run.files.enter_context(run.tools.store.local(Content(row.sha256, row.size)))


def model_of(run: Run, identifier: str) -> tuple[dict[str, Path], Source, str]:
    """Return a model's file by the name that a child gets it by, what a child is told, and its own name."""
    model = row_of(run, MODELS, identifier)
    upload = row_of(run, UPLOADS, model.upload)
    told = source_of(run.tools, model, upload)
    return {told.file: path_of(run, upload)}, told, upload.name


def plan_of(run: Run, weights: sa.Row[Any]) -> sa.Row[Any] | None:
    """Return the plan that was made with weights; None if it was deleted."""

    def read() -> sa.Row[Any] | None:
        beside = (
            ARTIFACTS.c.job == weights.job,
            ARTIFACTS.c.owner == run.owner.id,
            ARTIFACTS.c.role == "plan",
        )
        with run.tools.database.read() as connection:
            return connection.execute(sa.select(ARTIFACTS).where(*beside)).first()

    return run.lasting(read)


def data_of(
    run: Run, files: dict[str, Path], identifier: str | None, batch_size: int, samples: int | None
) -> Data | None:
    """Return a dataset as a child is told of it, and add its file to the child's."""
    if identifier is None:
        return None
    dataset = row_of(run, DATASETS, identifier)
    upload = row_of(run, UPLOADS, dataset.upload)
    data = data_in(dataset, upload, batch_size=batch_size, samples=samples)
    files[data.file] = path_of(run, upload)
    return data


def stem(name: str) -> str:
    """Return what the files of a job begin with."""
    return plain(name).rpartition(".")[0] or plain(name)
