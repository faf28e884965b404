"""What normsearch writes beside the weights in a checkpoint's metadata: architecture, plan, shared names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from normsearch.architectures import Architecture
from normsearch.errors import CheckpointError
from normsearch.plans import Plan
from normsearch.registries import Scalar

#: The metadata key; its value is one JSON document.
KEY = "normsearch"
FORMAT = 1
_LONGEST = 16 * 2**20


@dataclass(frozen=True)
class Record:
    """How a checkpoint's model was made.

    Attributes:
        architecture: what built it, before conversion; None where it was not given.
        plan: what was changed; None for a model that was not converted.
        aliases: state dict names saved once, each with the name that holds its numbers.
        versions: of normsearch and torch, for the reader's information.

    """

    architecture: Architecture | None = None
    plan: Plan | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the document that ``read`` reads back."""
        architecture = self.architecture
        return json.dumps(
            {
                "format": FORMAT,
                "architecture": None
                if architecture is None
                else {"name": architecture.name, "arguments": architecture.arguments},
                "plan": None if self.plan is None else self.plan.to_json(),
                "aliases": dict(self.aliases),
                "versions": dict(self.versions),
            }
        )


def read(metadata: Mapping[str, str], path: object) -> Record:
    """Return the record in a file's metadata; an empty one where there is none.

    Raises:
        CheckpointError: it is not such a document.
        NormsearchError: the architecture, the plan or a method in it is not valid.

    """
    text = metadata.get(KEY)
    if text is None:
        return Record()
    if len(text) > _LONGEST:
        raise CheckpointError(f"{path}: metadata of {len(text):,} characters; at most {_LONGEST:,} are read")
    document = _validated(text, path)
    if document.format != FORMAT:
        raise CheckpointError(
            f"{path} was written in format {document.format}, this version reads {FORMAT}; update normsearch"
        )
    architecture = document.architecture
    return Record(
        None if architecture is None else Architecture(architecture.name, architecture.arguments),
        None if document.plan is None else Plan.from_json(document.plan),
        document.aliases,
        document.versions,
    )


def _validated(text: str, path: object) -> Any:
    # pydantic takes a third of a second to import: only where something is read from outside.
    from pydantic import BaseModel, ConfigDict, ValidationError

    class Named(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        name: str
        arguments: dict[str, Scalar]

    class Document(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        format: int
        architecture: Named | None = None
        plan: str | None = None
        aliases: dict[str, str] = {}
        versions: dict[str, str] = {}

    # The annotations are text; these are the names they refer to.
    Named.model_rebuild(_types_namespace={"Scalar": Scalar})
    Document.model_rebuild(_types_namespace={"Named": Named})
    try:
        return Document.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:60] for part in first["loc"]) or "the text"
        raise CheckpointError(
            f"{path}: its normsearch metadata is not valid: {where}: {first['msg'][:200]}; give the "
            "architecture yourself, or save it again"
        ) from error
