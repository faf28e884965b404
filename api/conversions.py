"""A conversion: done in a child, and its files and what they were made from kept together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from api.children import source
from api.database import ARTIFACTS, MODELS
from api.keys import Owner
from api.owned import add, quota_exceeded
from api.parts import Parts
from api.store import Content, Incoming
from api.tasks import Converted, Converting, Inspected, Made, Source

_PIECE = 2**20


@dataclass(frozen=True)
class Received:
    """A file of a conversion, on its way into the store."""

    made: Made
    file: Incoming
    content: Content


def convert(
    service: Parts, owner: Owner, asked: Converting, path: Path, stack: ExitStack
) -> tuple[Converted, list[Received]]:
    """Convert a checkpoint in a child and receive its files, which are gone with the stack unless kept.

    Raises:
        ProblemError: it is refused, fails, or exceeds a limit or the quota.

    """
    received = []
    with service.sandbox.run("convert", asked, Converted, {asked.source.file: path}) as finished:
        for made in finished.result.files:
            too_large = quota_exceeded(owner.quota_bytes or service.settings.quota_bytes)
            file = stack.enter_context(service.store.incoming(service.settings.child_file_bytes, too_large))
            with os.fdopen(finished.open(made.name), "rb") as written:
                while data := written.read(_PIECE):
                    file.write(data)
            received.append(Received(made, file, file.finish()))
        return finished.result, received


def keep_model(
    connection: sa.Connection,
    service: Parts,
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
        service.settings,
        name=upload.name,
        upload=upload.id,
        document=document,
        size=len(document),
    )


def keep_artifacts(
    connection: sa.Connection, service: Parts, owner: Owner, model: str, received: list[Received]
) -> list[sa.Row[Any]]:
    """Keep the files of a conversion."""
    rows = []
    for one in received:
        service.store.keep(connection, one.file, one.content)
        rows.append(
            add(
                connection,
                ARTIFACTS,
                owner,
                service.settings,
                name=one.made.name,
                model=model,
                role=one.made.role,
                media_type=one.made.media_type,
                sha256=one.content.sha256,
                size=one.content.size,
            )
        )
    return rows


def source_of(service: Parts, model: sa.Row[Any], upload: sa.Row[Any]) -> Source:
    """Return the checkpoint of a model as a child is told of it."""
    asked = json.loads(model.document)["asked"]
    return source(service, upload.name, asked["architecture"], asked["arguments"], asked["entry"])
