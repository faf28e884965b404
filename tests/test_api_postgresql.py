"""The routes on PostgreSQL, where nothing of SQLite helps: every noun is made, found, replayed, deleted."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories_of_tests import small
from safetensors.numpy import save as safetensors_bytes
from serving import bearer, running, served
from starlette.testclient import TestClient

from benchmarks.search import postgresql

FACTORY = "factories/small"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    reason = postgresql.missing()
    if reason is not None:
        pytest.skip(reason)
    with postgresql.cluster() as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    factories = {"small": "factories_of_tests:small"}
    folder = tmp_path_factory.mktemp("postgresql")
    with served(folder, database_url=url, factories=factories, requests_per_minute=10_000) as asking:
        asking.headers.update(bearer(asking))
        yield asking
        assert not list(folder.rglob("*.sqlite"))


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save(small().state_dict(), buffer)
    return buffer.getvalue()


def _put(client: TestClient, name: str, content: bytes, **headers: str) -> Any:
    return client.put("/v1/uploads", params={"filename": name}, content=content, headers=headers)


def test_every_noun(client: TestClient, checkpoint: bytes) -> None:
    upload = _put(client, "small.pth", checkpoint)
    assert (upload.status_code, _put(client, "small.pth", checkpoint).status_code) == (201, 200)
    body = {"upload": upload.json()["id"], "architecture": FACTORY}
    models = [client.post("/v1/models", json=body, headers={"Idempotency-Key": "model"}) for _ in range(2)]
    assert [model.status_code for model in models] == [201, 201], models[0].text
    assert models[0].json() == models[1].json()
    assert models[1].headers["idempotent-replayed"] == "true"
    model = models[0].json()["id"]
    planned = client.post("/v1/plans", json={"model": model, "to": "group"})
    assert planned.json()["refused"] == 0
    arrays = safetensors_bytes({"x": np.ones((2, 3), np.float32)})
    dataset = client.post("/v1/datasets", json={"upload": _put(client, "x.safetensors", arrays).json()["id"]})
    assert (dataset.status_code, dataset.json()["samples"]) == (201, 2)
    form = {"architecture": FACTORY, "to": "group"}
    made = client.post("/v1/convert", files={"file": ("small.pth", checkpoint)}, data=form)
    assert made.status_code == 200, made.text
    assert client.get(made.headers["location"]).content == made.content
    # What others were made from goes last.
    assert client.delete(upload.headers["location"]).status_code == 409
    for noun in ("artifacts", "datasets", "models", "uploads"):
        items = client.get(f"/v1/{noun}", params={"limit": 200}).json()["items"]
        assert items, noun
        assert [client.delete(f"/v1/{noun}/{item['id']}").status_code for item in items] == [204] * len(items)
        assert client.get(f"/v1/{noun}").json() == {"items": [], "next": None}


def test_pages_are_complete_and_keys_apart(client: TestClient) -> None:
    other = bearer(client)
    for number in range(7):
        _put(client, f"{number}.pth", b"x")
        _put(client, f"{number}.pth", b"x", **other)
    seen, cursor = [], None
    while True:
        given = {"limit": 3, **({"cursor": cursor} if cursor else {})}
        page = client.get("/v1/uploads", params=given, headers=other).json()
        seen += [item["filename"] for item in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == [f"{number}.pth" for number in reversed(range(7))]
    mine = {item["id"] for item in client.get("/v1/uploads").json()["items"]}
    assert {client.get(f"/v1/uploads/{one}", headers=other).status_code for one in mine} == {404}


def test_one_key_at_once_does_its_work_once_and_keeps_to_its_quota(client: TestClient) -> None:
    mine = bearer(client, quota_bytes=2_500_000)

    def post(number: int) -> Any:
        content = (b"same" if number % 2 else str(number).encode()) + b"x" * 1_000_000
        headers = {**mine, **({"Idempotency-Key": "same"} if number % 2 else {})}
        return client.post("/v1/uploads", files={"file": ("x.pth", content)}, headers=headers)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(post, range(8)))
    assert {answer.status_code for answer in answers} <= {200, 201, 409, 413}, [a.text for a in answers]
    kept = client.get("/v1/uploads", headers=mine).json()["items"]
    assert 1 <= len(kept) <= 2
    assert sum(item["bytes"] for item in kept) <= 2_500_000


@pytest.mark.parametrize("text", ["\0", "a\0b", "‮", "'; DROP TABLE uploads; --", "\ud800"])
def test_texts_that_a_database_may_refuse(client: TestClient, text: str) -> None:
    answers = [
        client.put(
            "/v1/uploads", params={"filename": f"{text}.pth".encode("utf-8", "surrogatepass")}, content=b"x"
        ),
        client.get("/v1/uploads", params={"cursor": text.encode("utf-8", "surrogatepass")}),
        client.post("/v1/models", content=b'{"upload": "' + text.encode("utf-8", "surrogatepass") + b'"}'),
        client.get(
            "/v1/uploads", headers={b"Authorization": b"Bearer " + text.encode("utf-8", "surrogatepass")}
        ),
    ]
    assert all(answer.status_code < 500 for answer in answers), [answer.text for answer in answers]


def test_a_server_that_starts_anew_is_reached_again(tmp_path: Path) -> None:
    """Requests are refused with 503 while the database is away, and served when it is back."""
    import httpx2

    reason = postgresql.missing()
    if reason is not None:
        pytest.skip(reason)
    with (
        postgresql.cluster() as server,
        running(tmp_path, cold=True, NORMSEARCH_DATABASE_URL=server.url) as port,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        place = client.put("/v1/uploads?filename=x.pth", content=b"x").headers["location"]
        assert client.get("/health/ready").status_code == 200
        server.stop()
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
        refused = client.put("/v1/uploads?filename=y.pth", content=os.urandom(100))
        assert (refused.status_code, refused.json()["type"]) == (503, "/problems/busy")
        server.restart()
        assert client.get("/health/ready").status_code == 200
        assert client.get(place).json()["filename"] == "x.pth"
    assert list((tmp_path / "data" / "incoming").iterdir()) == []
