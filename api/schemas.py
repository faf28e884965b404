"""Requests and responses, as OpenAPI shows them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Generic, Self, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """A part of a list."""

    items: list[T]
    next: str | None = Field(description="give it as `cursor` to get the next part; null at the end")


class Upload(BaseModel):
    """A file that was received."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "upl_019e2f0c5b1a0123456789abcdef01234567",
                "filename": "resnet50.pth",
                "bytes": 102540417,
                "sha256": "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
                "created": "2026-11-28T12:00:00Z",
            }
        }
    )

    id: str
    filename: str
    bytes: int
    sha256: str
    created: datetime

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        """Return it as its row says."""
        return cls(
            id=row.id, filename=row.name, bytes=row.size, sha256=row.sha256, created=moment(row.created_ms)
        )


def moment(milliseconds: int) -> datetime:
    """Return a time as it is shown."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
