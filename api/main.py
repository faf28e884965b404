"""create_app: the application, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from threading import Thread
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from api.answering import COMMON
from api.forking import EndingError
from api.keys import Rate
from api.observing import LOG, Metrics, Observing
from api.page.router import page_router
from api.parts import Parts, Streams
from api.problems import ProblemError, answer, without_json
from api.routes import (
    architectures,
    artifacts,
    convert,
    datasets,
    health,
    jobs,
    methods,
    models,
    plans,
    submitting,
    uploads,
)
from api.sandbox import Sandbox
from api.settings import Settings
from api.tools import opened
from api.workers import Workers

_ABOUT = """\
Upload a trained network, a checkpoint, an exported program (.pt2) or an ONNX file, and get it back with its
BatchNorm layers replaced.

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
        rate, workers = Rate(settings.requests_per_minute), Workers(settings)
        turns, threads = CapacityLimiter(settings.children), CapacityLimiter(settings.children)
        with opened(settings, metrics, settings.child_seconds) as tools:
            app.state.parts = Parts(
                **vars(tools), rate=rate, turns=turns, threads=threads, workers=workers, streams=Streams()
            )
            if warm:
                workers.start()
                Thread(target=_warm, args=(tools.sandbox,), daemon=True).start()
            try:
                yield
            finally:
                await run_sync(workers.close)

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
    for noun in (
        uploads,
        models,
        architectures,
        methods,
        plans,
        datasets,
        artifacts,
        convert,
        submitting,
        jobs,
    ):
        app.include_router(noun.router, responses=COMMON)
    app.include_router(page_router(settings))
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
