"""Methods: the normalizations that a layer may be replaced by."""

from __future__ import annotations

from fastapi import APIRouter

from api.catalogue import catalogue
from api.parts import Asking, Service
from api.problems import documented, not_found
from api.tasks import MethodOf

router = APIRouter(prefix="/v1/methods", tags=["methods"])


@router.get("", summary="List methods")
async def listed(service: Service, asking: Asking) -> list[MethodOf]:
    """Return every method with its options; a spelling is `name` or `name(option=value)`."""
    return (await catalogue(service)).methods


@router.get("/{name}", summary="One method", responses=documented(404, 422))
async def one(service: Service, asking: Asking, name: str) -> MethodOf:
    """Return a method with its options."""
    for method in (await catalogue(service)).methods:
        if method.name == name:
            return method
    raise not_found("method", name)
