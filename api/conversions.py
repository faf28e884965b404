"""What a job keeps: the files that a child made, and the model that they were made from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from api.children import plain, source
from api.database import ARTIFACTS, MODELS
from api.keys import Owner
from api.owned import add, quota_exceeded
from api.sandbox import Finished
from api.store import Content, Incoming
from api.tasks import Data, Inspected, Made, Source
from api.tools import Tools

_PIECE = 2**20


@dataclass(frozen=True)
class Received:
    """A file that a child made, on its way into the store."""

    made: Made
    file: Incoming
    content: Content


def receive(
    tools: Tools, owner: Owner, finished: Finished[Any], files: list[Made], stack: ExitStack
) -> list[Received]:
    """Receive what a child made; it is gone with the stack unless it is kept.

    Raises:
        ProblemError: a file is not there as it should be, or is beyond a limit or the quota.

    """
    received = []
    for made in files:
        too_large = quota_exceeded(owner.quota_bytes or tools.settings.quota_bytes)
        file = stack.enter_context(tools.store.incoming(tools.settings.child_file_bytes, too_large))
        with os.fdopen(finished.open(made.name), "rb") as written:
            while data := written.read(_PIECE):
                file.write(data)
        received.append(Received(made, file, file.finish()))
    return received


def keep_model(
    connection: sa.Connection,
    tools: Tools,
    owner: Owner,
    upload: sa.Row[Any],
    asked: Mapping[str, Any],
    found: Inspected,
) -> sa.Row[Any]:
    """Keep what was found in an upload, and what was asked: name of the architecture, arguments, entry."""
    document = json.dumps({"asked": asked, "found": found.model_dump(mode="json")})
    return add(
        connection,
        MODELS,
        owner,
        tools.settings,
        name=upload.name,
        upload=upload.id,
        document=document,
        size=len(document),
    )


def keep_artifacts(
    connection: sa.Connection, tools: Tools, owner: Owner, model: str, job: str, received: list[Received]
) -> list[sa.Row[Any]]:
    """Keep the files that a job made from a model."""
    rows = []
    for one in received:
        tools.store.keep(connection, one.file, one.content)
        rows.append(
            add(
                connection,
                ARTIFACTS,
                owner,
                tools.settings,
                name=one.made.name,
                model=model,
                job=job,
                role=one.made.role,
                media_type=one.made.media_type,
                sha256=one.content.sha256,
                size=one.content.size,
            )
        )
    return rows


def format_of(model: sa.Row[Any]) -> str:
    """Return the format of a model's file."""
    return str(json.loads(model.document)["found"]["format"])


def source_of(tools: Tools, model: sa.Row[Any], upload: sa.Row[Any]) -> Source:
    """Return the file of a model as a child is told of it."""
    asked = json.loads(model.document)["asked"]
    return source(tools.settings, upload.name, asked["architecture"], asked["arguments"], asked["entry"])


def data_in(dataset: sa.Row[Any], upload: sa.Row[Any], *, batch_size: int, samples: int | None) -> Data:
    """Return a dataset as a child is told of it."""
    asked = json.loads(dataset.document)["asked"]
    # No name of a checkpoint begins like this by accident.
    return Data(file=f"dataset-{plain(upload.name)}", **asked, batch_size=batch_size, samples=samples)
