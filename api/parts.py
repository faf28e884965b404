"""What a running service is made of, and how a route gets at it: its parts, and who asks."""

from __future__ import annotations

import ipaddress
import secrets
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from anyio import CapacityLimiter
from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.keys import EVERYONE, Owner, Rate, owner_of
from api.problems import ProblemError
from api.tasks import Catalogue
from api.tools import Tools
from api.workers import Workers


@dataclass(frozen=True)
class Parts(Tools):
    """The parts that routes work with.

    Attributes:
        rate: how often each may ask.
        turns: how many children may be at work.
        threads: where the work waits for its child, apart from the threads of short requests.
        workers: the processes that run jobs beside this one.
        streams: who follows jobs at the moment.
        known: what children know by name, once one was asked.

    """

    rate: Rate
    turns: CapacityLimiter
    threads: CapacityLimiter
    workers: Workers
    streams: Streams
    known: list[Catalogue] = field(default_factory=list)


class Streams:
    """Who follows jobs at the moment: each key a few, all together not more than the service bears."""

    def __init__(self, most: int = 200, each: int = 20) -> None:
        self._most, self._each = most, each
        self._open: Counter[str] = Counter()

    def check(self, asker: str) -> None:
        """Raise if one more would be too many.

        Raises:
            ProblemError: 429 for the key, 503 for all together.

        """
        if self._open[asker] >= self._each or self._open.total() >= self._most:
            status, kind = (429, "rate-limited") if self._open[asker] >= self._each else (503, "busy")
            detail = "too many clients follow jobs at a time; ask GET /v1/jobs/ID now and then"
            raise ProblemError(status, kind, detail, {"Retry-After": "30"})

    def enter(self, asker: str) -> None:
        """Count one more."""
        self._open[asker] += 1

    def leave(self, asker: str) -> None:
        """Count one less."""
        self._open[asker] -= 1
        if not self._open[asker]:
            del self._open[asker]


def parts(request: Request) -> Parts:
    """Return the parts of the service that got a request."""
    return cast(Parts, request.app.state.parts)


Service = Annotated[Parts, Depends(parts)]
_BEARER = HTTPBearer(auto_error=False, description="A key made by `python -m api keys create`")
_Given = Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]


def owner(request: Request, service: Service, given: _Given) -> Owner:
    """Return who asks, and count the request.

    Raises:
        ProblemError: 401 without a valid key, 403 for strangers at an open service, 429 for too many.

    """
    asker, client = EVERYONE, (request.client.host if request.client else "")
    if service.settings.open:
        _refuse_strangers(request)
    else:
        found = None if given is None else owner_of(service.database, given.credentials)
        if found is None:
            _count(service, f"address {client}")
            raise ProblemError(
                401,
                "unauthorized",
                "send a valid key as Authorization: Bearer KEY; `python -m api keys create` makes one",
                {"WWW-Authenticate": "Bearer"},
            )
        asker = found
    _count(service, asker.id)
    request.scope["owner"] = asker.id
    return asker


Asking = Annotated[Owner, Depends(owner)]


def for_operators(request: Request, service: Service, given: _Given) -> None:
    """Let only the operator's own programs pass.

    Raises:
        ProblemError: 401 without the settings' token, or from elsewhere than loopback where it is unset.

    """
    token = service.settings.metrics_token
    if token is None:
        # Behind a proxy on this machine every client looks like loopback.
        if _is_loopback(request.client) and not _was_forwarded(request):
            return
    elif given is not None and secrets.compare_digest(
        given.credentials.encode(), token.get_secret_value().encode()
    ):
        return
    raise ProblemError(
        401,
        "unauthorized",
        "send the operator's token as Authorization: Bearer TOKEN; it is NORMSEARCH_METRICS_TOKEN",
        {"WWW-Authenticate": "Bearer"},
    )


def _count(service: Parts, asker: str) -> None:
    if not service.rate.allows(asker):
        most = service.settings.requests_per_minute
        raise ProblemError(
            429, "rate-limited", f"at most {most} requests a minute; wait", {"Retry-After": "10"}
        )


def _refuse_strangers(request: Request) -> None:
    """Raise for other machines, and for web pages that make a browser on this one ask."""
    host = request.url.hostname or ""
    local = _is_loopback(request.client) and _is_loopback(request.scope.get("server"))
    named = host == "localhost" or _is_loopback((host, 0))
    origin = request.headers.get("origin")
    asked_by_page = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin") or (
        origin is not None and origin != f"{request.url.scheme}://{request.headers.get('host')}"
    )
    if not local or not named or _was_forwarded(request) or asked_by_page:
        raise ProblemError(
            403,
            "forbidden",
            "this service needs no keys (NORMSEARCH_OPEN=1) and answers programs on its own machine alone; "
            "ask http://127.0.0.1 there, or run it with keys",
        )


def _was_forwarded(request: Request) -> bool:
    return any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip", "via"))


def _is_loopback(address: Any) -> bool:
    try:
        return address is not None and ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return False
