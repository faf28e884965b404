"""create_app: the application, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from threading import Thread
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from api.answering import COMMON
from api.database import Database, sqlite_url
from api.forking import EndingError
from api.keys import Rate
from api.observing import LOG, Metrics, Observing
from api.parts import Parts
from api.problems import ProblemError, answer, without_json
from api.routes import architectures, artifacts, convert, datasets, health, methods, models, plans, uploads
from api.sandbox import Sandbox
from api.settings import Settings
from api.store import Store

_ABOUT = """\
Upload a checkpoint of a trained network, and get it back with its BatchNorm layers replaced.

Errors are problem details (RFC 9457). Every POST takes an `Idempotency-Key`. Lists have `next`, to be given
back as `cursor`. Requests carry `Authorization: Bearer KEY`."""


def create_app(settings: Settings | None = None, *, warm: bool = False) -> FastAPI:
    """Return the application; nothing is opened until it starts.

    Args:
        settings: the settings; those of the environment by default.
        warm: start the process for children at once, not when the first is needed.

    """
    settings = Settings() if settings is None else settings
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        url = settings.database_url
        database = Database(sqlite_url(settings.data) if url is None else url.get_secret_value())
        store = Store(settings.data, database, settings.reserve_bytes)
        sandbox = Sandbox(settings, metrics)
        rate = Rate(settings.requests_per_minute)
        turns, threads = CapacityLimiter(settings.children), CapacityLimiter(settings.children)
        app.state.parts = Parts(settings, database, store, sandbox, metrics, rate, turns, threads)
        if warm:
            Thread(target=_warm, args=(sandbox,), daemon=True).start()
        try:
            yield
        finally:
            sandbox.close()
            database.close()

    # The interactive pages load scripts from elsewhere; /openapi.json is enough.
    app = FastAPI(
        title="normsearch",
        version="1",
        description=_ABOUT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        exception_handlers=dict.fromkeys((ProblemError, HTTPException, RequestValidationError), answer),
    )
    app.add_middleware(Observing, metrics=metrics)
    app.include_router(health.router)
    for noun in (uploads, models, architectures, methods, plans, datasets, artifacts, convert):
        app.include_router(noun.router, responses=COMMON)
    _document(app)
    return app


def _warm(sandbox: Sandbox) -> None:
    """Have a first child say which means of confinement apply here, and log it."""
    try:
        LOG.info("children are confined", extra={"fields": sandbox.confinement().model_dump()})
    except (ProblemError, EndingError):
        LOG.exception("no children")


def _document(app: FastAPI) -> None:
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = without_json(generate())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
