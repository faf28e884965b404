"""What every request leaves behind and carries: its id, one log line, metrics, and the headers of safety."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from typing import Any

import anyio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import ProblemError, as_problem

LOG = logging.getLogger("normsearch.api")
#: The largest body of a request that is not a file.
MOST_BODY = 4 * 2**20
#: Seconds in which it must have arrived.
_BODY_SECONDS = 30.0
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: Nothing that is served may run, be framed, be guessed to be of another type, or be kept by a proxy.
HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'; sandbox",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Metrics:
    """The service's numbers, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "normsearch_requests",
            "Requests by method, route and status",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "normsearch_request_seconds",
            "Time until the answer was sent",
            ["method", "route"],
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300),
            registry=self.registry,
        )
        self.active = Gauge("normsearch_requests_active", "Requests in work", registry=self.registry)
        self.received = Counter("normsearch_upload_bytes", "Bytes of files received", registry=self.registry)
        self.children = Gauge("normsearch_children", "Child processes at work", registry=self.registry)
        self.jobs = Gauge(
            "normsearch_jobs", "Jobs that are not finished, of all keys", ["state"], registry=self.registry
        )
        self.tasks = Counter(
            "normsearch_tasks", "Work done in child processes", ["task", "outcome"], registry=self.registry
        )


class JsonLines(logging.Formatter):
    """One JSON object a line: what strangers sent cannot break a line or pass for another."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        made = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{made}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def log_as_json() -> None:
    """Write every logger's records to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # Each request has one line of ours; alembic tells each step.
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("alembic").setLevel(logging.WARNING)


class Observing:
    """Outermost middleware: ids, logs, metrics, headers, limits on bodies, and what was not foreseen.

    Args:
        app: what it wraps.
        metrics: where requests are counted.

    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        scope["request_id"] = given if _GIVEN_ID.fullmatch(given) else secrets.token_hex(8)
        start, status = time.monotonic(), 0
        received, is_complete = 0, False

        async def limited() -> Message:
            nonlocal received, is_complete
            # Routes that take files say so, and keep limits of their own.
            if is_complete or scope.get("takes_files"):
                return await receive()
            try:
                with anyio.fail_after(start + _BODY_SECONDS - time.monotonic()):
                    message = await receive()
            except TimeoutError as error:
                raise ProblemError(
                    408,
                    "too-slow",
                    "the request's body did not arrive; send it again",
                    {"Connection": "close"},
                ) from error
            is_complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > MOST_BODY:
                raise ProblemError(
                    413, "too-large", f"a request's body has at most {MOST_BODY:,} bytes, unless it is a file"
                )
            return message

        async def headed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = scope["request_id"]
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        self._metrics.active.inc()
        try:
            await self._app(scope, limited, headed)
        except ClientDisconnect:
            # Nobody is there to be answered: a request that its client gave up is no fault of the service.
            status = status or _CLOSED
        except Exception as error:
            problem = as_problem(error)
            if problem.status == 500:
                LOG.exception("unforeseen", extra={"fields": {"request_id": scope["request_id"]}})
            if status:
                raise
            await problem.response(scope["request_id"])(scope, receive, headed)
        finally:
            self._metrics.active.dec()
            self._record(scope, status, time.monotonic() - start)
        return None

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        # The template, never the path: ids would make a series each, and strangers could make any.
        route = getattr(scope.get("route"), "path_format", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.seconds.labels(method, route).observe(seconds)
        fields = {
            "request_id": scope["request_id"],
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "key": scope.get("owner"),
            "client": (scope.get("client") or ("",))[0],
        }
        LOG.info("request", extra={"fields": fields})


#: What logs and metrics call requests that their clients gave up, as nginx does.
_CLOSED = 499
_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}
