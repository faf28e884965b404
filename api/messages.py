"""What the service and its children say to each other: JSON, checked when it is read, never pickles."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from api.confinement import Limits

#: The longest line of a child, in bytes, and all of them together.
MOST_LINE, MOST_LINES = 16 * 2**20, 64 * 2**20
#: The file in a child's folder that holds what it is asked.
ARGUMENT = "argument.json"
LOG = "log.txt"


class Strict(BaseModel):
    """What a child may have said: nothing is taken that was not asked for."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Order(Strict):
    """What is asked of the process that forks.

    Attributes:
        task: the name of the work.
        folder: the child's own.
        inputs: names that the files get in that folder.
        limits: what the child may use.

    """

    task: str
    folder: str
    inputs: tuple[str, ...]
    limits: Limits


class Ended(Strict):
    """How a child ended, as ``os.waitpid`` says it."""

    status: int


class Refused(Strict):
    """A method that cannot stand at a site."""

    site: str = Field(max_length=2000)
    method: str = Field(max_length=300)
    reason: str = Field(max_length=2000)
    remedy: str = Field(max_length=2000)


class Progressed(Strict):
    """How far a child has come."""

    kind: Literal["progress"] = "progress"
    stage: str = Field(max_length=200)
    done: int = Field(ge=0)
    total: int = Field(ge=0)
    seconds_left: float | None = Field(None, ge=0)
    detail: str = Field("", max_length=2000)
    note: dict[str, Any] | None = Field(None, description="what whoever asked must know before the end")


class Done(Strict):
    """What a child's work came to; its form is checked by who asked for it."""

    kind: Literal["done"] = "done"
    result: dict[str, Any]


class Failed(Strict):
    """Why a child's work came to nothing."""

    kind: Literal["failed"] = "failed"
    error: str = Field(max_length=100)
    detail: str = Field(max_length=20_000)
    refusals: list[Refused] = Field(default=[], max_length=10_000)


Line = Annotated[Progressed | Done | Failed, Field(discriminator="kind")]
LINE: TypeAdapter[Progressed | Done | Failed] = TypeAdapter(Line)
