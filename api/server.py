"""The HTTP server: uvicorn, which waits for nobody for ever."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds in which a request's head must have come, and in which a client must take what it is sent.
HEAD, TAKE = 15.0, 60.0


class Protocol(H11Protocol):
    """Ends connections whose request's head, or whose reading, never comes to an end."""

    _head: asyncio.TimerHandle | None = None
    _take: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start to wait for a head."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Wait on while there is no head yet, from the first byte of it."""
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        for timer in (self._head, self._take):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """Start to wait for the client to take what it was sent."""
        super().pause_writing()
        self._take = self.loop.call_later(TAKE, self.transport.abort)

    def resume_writing(self) -> None:
        """Wait no more: it took some."""
        super().resume_writing()
        if self._take is not None:
            self._take.cancel()

    def _wait_for_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD, self._give_up)

    def _give_up(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class Server(uvicorn.Server):
    """Tells the application that it is to end before it waits for requests, some of which wait for jobs."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        app: Any = self.config.app
        if hasattr(app.state, "parts"):
            app.state.parts.workers.announce_end()
        super().handle_exit(sig, frame)


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve until told to stop; what is in work is finished first, for at most half a minute."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(HEAD),
        timeout_graceful_shutdown=30,
    )
    server = Server(config)
    # Ctrl-C was meant for it, and was heard.
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(3)
