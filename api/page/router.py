"""The routes of the page; what it shows of models and jobs, its script asks of /v1 like any other client."""

from __future__ import annotations

import hashlib

from fastapi import APIRouter, Request, Response

from api.page.assets import Assets
from api.problems import ProblemError
from api.settings import Settings

_FOR_GOOD = "public, max-age=31536000, immutable"


def page_router(settings: Settings) -> APIRouter:
    """Return the routes, rendered once: an answer costs as much as sending it."""
    assets, router = Assets(), APIRouter(include_in_schema=False)
    html = assets.html(settings)
    tag = f'"{hashlib.sha256(html).hexdigest()[:32]}"'
    headers = {
        "content-security-policy": assets.policy,
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
        "etag": tag,
    }

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(html, headers=headers, media_type="text/html; charset=utf-8")

    @router.api_route("/page/{version}/{name}", methods=["GET", "HEAD"])
    async def file(version: str, name: str) -> Response:
        asset = assets.files.get(name)
        if asset is None or version != assets.version:
            raise ProblemError(404, "not-found", "this file of the page has changed; load the page again")
        return Response(asset.content, headers={"cache-control": _FOR_GOOD}, media_type=asset.media_type)

    return router
