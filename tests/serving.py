"""The service, started for a test: in this process, or as users start it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from api import keys
from api.main import create_app
from api.settings import Settings


def settings(folder: Path, **others: Any) -> Settings:
    given: dict[str, Any] = {"data": folder / "data", "reserve_bytes": 0, "children": 1, **others}
    return Settings(**given)


@contextmanager
def served(folder: Path, client: str = "127.0.0.1", **others: Any) -> Iterator[TestClient]:
    """The application in this process, asked from loopback."""
    app = create_app(settings(folder, **others))
    with TestClient(
        app, base_url="http://127.0.0.1", client=(client, 50_000), raise_server_exceptions=False
    ) as asking:
        yield asking


def bearer(client: TestClient, name: str = "a", quota_bytes: int | None = None) -> dict[str, str]:
    """The header of a new key."""
    _, secret = keys.create(client.app.state.parts.database, name, quota_bytes)  # type: ignore[attr-defined]
    return {"Authorization": f"Bearer {secret}"}
