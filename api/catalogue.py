"""What the library knows by name: asked of a child once, since the service itself does not import it."""

from __future__ import annotations

from api.children import in_turn
from api.parts import Parts
from api.sandbox import Nothing
from api.tasks import Catalogue


async def catalogue(service: Parts) -> Catalogue:
    """Return the methods and architectures that children know."""
    if not service.known:
        service.known.append(await in_turn(service, lambda: _ask(service)))
    return service.known[0]


def _ask(service: Parts) -> Catalogue:
    with service.sandbox.run("catalogue", Nothing(), Catalogue) as finished:
        return finished.result
