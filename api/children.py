"""How a request has its work done in a child: it waits its turn, and names what the child may read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePath
from typing import TypeVar

import anyio
from anyio.to_thread import run_sync

from api.forking import EndingError
from api.parts import Parts
from api.problems import ProblemError
from api.settings import Settings
from api.tasks import Scalar, Source

T = TypeVar("T")
FACTORIES = "factories/"
#: Files that say themselves what their network is, by their suffix.
COMPLETE = {".pt2": "an exported program", ".onnx": "an ONNX file"}


async def in_turn(service: Parts, work: Callable[[], T]) -> T:
    """Run work that needs a child on a thread, as soon as a child is free.

    Raises:
        ProblemError: 503 if none becomes free in time, or the service ends; what the work raises.

    """
    turn = object()
    try:
        with anyio.fail_after(service.settings.wait_seconds):
            await service.turns.acquire_on_behalf_of(turn)
    except TimeoutError as error:
        raise ProblemError(
            503, "busy", "every child process is at work; try again", {"Retry-After": "30"}
        ) from error
    try:
        return await run_sync(work, limiter=service.threads)
    except EndingError as error:
        raise ProblemError(503, "busy", "the service is ending; try again", {"Retry-After": "10"}) from error
    finally:
        service.turns.release_on_behalf_of(turn)


def source(
    settings: Settings,
    filename: str,
    architecture: str | None,
    arguments: dict[str, Scalar],
    entry: str | None,
) -> Source:
    """Return a network's file as a child is told of it.

    Raises:
        ProblemError: 422; there is no such factory, or it is given arguments, or the file needs neither.

    """
    complete = COMPLETE.get(PurePath(plain(filename)).suffix)
    if complete is not None and (architecture is not None or arguments or entry is not None):
        raise ProblemError(
            422,
            "refused",
            f"{filename} is {complete}, which says itself what its network is; leave out architecture, "
            "arguments and entry",
        )
    known_as = architecture
    configured = architecture is not None and architecture.startswith(FACTORIES)
    if architecture is not None and configured:
        name = architecture.removeprefix(FACTORIES)
        known = settings.networks
        if name not in known:
            there = ", ".join(f"{FACTORIES}{one}" for one in sorted(known)) or "none"
            raise ProblemError(
                422, "refused", f"there is no {architecture[:80]!r}; the operator configured {there}"
            )
        if arguments:
            raise ProblemError(
                422,
                "refused",
                f"{architecture} takes no arguments; the operator configures one name for each form",
            )
        architecture = known[name]
    return Source(
        file=plain(filename),
        architecture=architecture,
        arguments=arguments,
        entry=entry,
        configured=configured,
        known_as=known_as,
    )


def plain(filename: str) -> str:
    """Return a file's name in letters that need no care anywhere, with its suffix in small ones.

    Example:
        >>> plain("résumé of mine.PTH")
        'r_sum__of_mine.pth'

    """
    made = re.sub(r"[^A-Za-z0-9._-]", "_", filename)[-150:]
    name, dot, suffix = made.rpartition(".")
    made = name + dot + suffix.lower() if dot else made
    return made if made[0].isalnum() else f"x{made}"
