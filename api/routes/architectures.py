"""Architectures: the networks that are known by name."""

from __future__ import annotations

from bisect import bisect_right
from fnmatch import fnmatchcase
from typing import Annotated

from fastapi import APIRouter, Query

from api.catalogue import catalogue
from api.children import FACTORIES
from api.owned import Cursor, Limit
from api.parts import Asking, Service
from api.problems import documented
from api.schemas import ArchitecturePage

router = APIRouter(prefix="/v1/architectures", tags=["architectures"])


@router.get("", summary="List architectures", responses=documented(422))
async def listed(
    service: Service,
    asking: Asking,
    match: Annotated[
        str,
        Query(
            max_length=100,
            description="only names like this, where * matches any text",
            examples=["timm/resnet*"],
        ),
    ] = "*",
    limit: Limit = 100,
    cursor: Cursor = None,
) -> ArchitecturePage:
    """Return the names of three libraries' registries and of what the operator configured."""
    known = await catalogue(service)
    names = sorted(
        [f"{FACTORIES}{name}" for name in service.settings.networks]
        + [f"{library}/{name}" for library, found in known.architectures.items() for name in found]
    )
    found = [name for name in names if fnmatchcase(name, match)]
    start = 0 if cursor is None else bisect_right(found, cursor)
    items = found[start : start + limit]
    more = start + limit < len(found)
    return ArchitecturePage(items=items, next=items[-1] if more else None, arguments=known.arguments)
