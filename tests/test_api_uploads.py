"""Uploads: what is received, what is refused, and what keys see of each other."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import bearer, running, served
from starlette.testclient import TestClient

CONTENT = os.urandom(300_000)
PUT = "/v1/uploads?filename=x.pth"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with served(tmp_path, upload_bytes=2_000_000, quota_bytes=5_000_000) as asking:
        asking.headers.update(bearer(asking))
        yield asking


def _digest(content: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def _files(folder: Path) -> list[Path]:
    return [
        path
        for name in ("blobs", "incoming")
        for path in (folder / "data" / name).rglob("*")
        if path.is_file()
    ]


class TestPut:
    def test_is_received_and_described(self, client: TestClient, tmp_path: Path) -> None:
        made = client.put(PUT, content=CONTENT, headers={"Content-Digest": _digest(CONTENT)})
        assert made.status_code == 201, made.text
        document = made.json()
        assert document["sha256"] == hashlib.sha256(CONTENT).hexdigest()
        assert (document["filename"], document["bytes"]) == ("x.pth", len(CONTENT))
        assert client.get(made.headers["location"]).json() == document
        (file,) = _files(tmp_path)
        assert file.read_bytes() == CONTENT
        assert file.stat().st_mode & 0o777 == 0o444

    def test_same_again_is_the_same_upload(self, client: TestClient) -> None:
        first, second = (client.put(PUT, content=CONTENT) for _ in range(2))
        assert (first.status_code, second.status_code) == (201, 200)
        assert first.json() == second.json()

    @pytest.mark.parametrize("digest", [_digest(b"other"), "sha-256=:abc:", "sha-256=5"])
    def test_other_digest_is_refused(self, client: TestClient, digest: str, tmp_path: Path) -> None:
        assert client.put(PUT, content=CONTENT, headers={"Content-Digest": digest}).status_code == 422
        assert _files(tmp_path) == []

    def test_other_algorithms_are_left_aside(self, client: TestClient) -> None:
        assert (
            client.put(PUT, content=CONTENT, headers={"Content-Digest": "sha-512=:AAAA:"}).status_code == 201
        )

    def test_too_large_without_a_length(self, client: TestClient, tmp_path: Path) -> None:
        refused = client.put(PUT, content=(CONTENT for _ in range(20)))
        assert refused.status_code == 413
        assert refused.json()["type"] == "/problems/too-large"
        assert _files(tmp_path) == []

    def test_quota(self, client: TestClient, tmp_path: Path) -> None:
        statuses = [
            client.put(f"/v1/uploads?filename={number}.pth", content=os.urandom(1_500_000)).status_code
            for number in range(5)
        ]
        assert statuses == [201, 201, 201, 413, 413]
        assert len(_files(tmp_path)) == 3
        listed = client.get("/v1/uploads").json()["items"]
        assert client.delete(f"/v1/uploads/{listed[0]['id']}").status_code == 204
        assert client.put(PUT, content=os.urandom(1_500_000)).status_code == 201

    @pytest.mark.parametrize("name", ["", ".", "..", "a/", "a\0b", "a\nb", "‮gpj.pth", "x" * 201])
    def test_names_that_are_none(self, client: TestClient, name: str) -> None:
        refused = client.put("/v1/uploads", params={"filename": name}, content=b"x")
        assert refused.status_code == 422
        assert refused.headers["content-type"] == "application/problem+json"

    def test_only_the_last_part_of_a_name_counts(self, client: TestClient) -> None:
        for name in ("../../etc/résumé.pth", "C:\\models\\résumé.pth"):
            made = client.put("/v1/uploads", params={"filename": name}, content=b"x")
            assert made.json()["filename"] == "résumé.pth"

    def test_empty_or_encoded(self, client: TestClient) -> None:
        assert client.put(PUT, content=b"").status_code == 422
        assert client.put(PUT, content=b"x", headers={"Content-Encoding": "gzip"}).status_code == 415


class TestPost:
    def test_form(self, client: TestClient) -> None:
        made = client.post("/v1/uploads", files={"file": ("x.pth", CONTENT)})
        assert made.status_code == 201, made.text
        assert made.json()["sha256"] == hashlib.sha256(CONTENT).hexdigest()

    @pytest.mark.parametrize("address", ["/v1/uploads", "/v1/convert"])
    def test_an_empty_file_is_said_to_be_empty(self, client: TestClient, address: str) -> None:
        refused = client.post(address, files={"file": ("x.pth", b"")}, data={"to": "group"})
        assert refused.status_code == 422
        assert refused.json()["detail"] == "the file 'x.pth' is empty; send it with its content"
        refused = client.post(address, files={"other": ("x.pth", b"")})
        assert refused.status_code == 422
        assert "the part named file" in refused.json()["detail"]

    def test_what_is_wrong_with_fields_stands_alone(self, client: TestClient) -> None:
        refused = client.post("/v1/convert", files={"file": ("x.pth", b"x")})
        assert refused.status_code == 422
        assert refused.json()["detail"] == "give either to, for example group, or plan"
        asked = {"model": "mod_" + "0" * 20, "to": "group", "plan": {}}
        refused = client.post("/v1/conversions", json=asked)
        assert refused.status_code == 422
        assert refused.json()["errors"] == [
            {"pointer": "/body", "detail": "give either to, for example group, or plan"}
        ]

    def test_fields_around_and_content_that_looks_like_a_boundary(self, client: TestClient) -> None:
        content = b"\r\n--x\r\n--" * 1000 + b"\r\n--xy"
        body = b"\r\n".join(
            [
                b"--xyz",
                b'Content-Disposition: form-data; name="a"',
                b"",
                b"1",
                b"--xyz",
                b'Content-Disposition: form-data; name="file"; filename="x.pth"',
                b"Content-Type: application/octet-stream",
                b"",
                content,
                b"--xyz--",
                b"",
            ]
        )
        made = client.post(
            "/v1/uploads", content=body, headers={"Content-Type": "multipart/form-data; boundary=xyz"}
        )
        assert made.json()["sha256"] == hashlib.sha256(content).hexdigest()

    @pytest.mark.parametrize(
        ("kind", "body", "status"),
        [
            ("multipart/form-data; boundary=x", b"nonsense", 422),
            ("multipart/form-data; boundary=x", b"", 422),
            ("multipart/form-data", b"--x--", 415),
            ("multipart/form-data; boundary=" + "x" * 500, b"--x--", 422),
            ("application/json", b"{}", 415),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--',
                422,
            ),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.pth"\r\n\r\ncut off',
                422,
            ),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.pth"\r\n\r\n1\r\n' * 2
                + b"--x--",
                422,
            ),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 100 + b"--x--",
                422,
            ),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"1" * 1_500_000 + b"\r\n--x--",
                413,
            ),
            ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 100_000 + b"\r\n1\r\n--x--", 422),
        ],
    )
    def test_malformed(self, client: TestClient, kind: str, body: bytes, status: int, tmp_path: Path) -> None:
        refused = client.post("/v1/uploads", content=body, headers={"Content-Type": kind})
        assert refused.status_code == status, refused.text
        assert refused.headers["content-type"] == "application/problem+json"
        assert _files(tmp_path) == []

    def test_idempotency_key(self, client: TestClient) -> None:
        def post(content: bytes, key: str) -> Any:
            return client.post(
                "/v1/uploads", files={"file": ("x.pth", content)}, headers={"Idempotency-Key": key}
            )

        first, again = post(CONTENT, "a"), post(CONTENT, "a")
        assert (first.status_code, again.status_code) == (201, 201)
        assert first.json() == again.json()
        assert again.headers["idempotent-replayed"] == "true"
        assert post(b"other", "a").status_code == 422
        assert post(b"other", "b").status_code == 201
        assert post(b"other", "b" * 300).status_code == 422
        client.headers.update(bearer(client))
        other = post(b"third", "a")
        assert other.status_code == 201
        assert "idempotent-replayed" not in other.headers


class TestKeysDoNotSeeEachOther:
    def test_ids_and_lists(self, client: TestClient) -> None:
        made = client.put(PUT, content=CONTENT)
        place, other = made.headers["location"], bearer(client)
        for method in ("GET", "DELETE"):
            hidden = client.request(method, place, headers=other)
            nothing = client.request(method, place[:-1] + "x", headers=other)
            assert hidden.status_code == nothing.status_code == 404
            assert hidden.json()["type"] == nothing.json()["type"]
        assert client.get("/v1/uploads", headers=other).json() == {"items": [], "next": None}
        assert client.get(place).status_code == 200

    def test_same_content_reveals_nothing_and_is_stored_once(
        self, client: TestClient, tmp_path: Path
    ) -> None:
        mine, other = client.put(PUT, content=CONTENT), bearer(client)
        theirs = client.put(PUT, content=CONTENT, headers=other)
        fresh = client.put(PUT, content=os.urandom(len(CONTENT)), headers=other)
        assert mine.status_code == theirs.status_code == fresh.status_code == 201
        assert mine.json()["id"] != theirs.json()["id"]
        assert set(theirs.headers) == set(fresh.headers)
        assert len(_files(tmp_path)) == 2
        # Each deletes its own; the content stays as long as somebody has it.
        assert client.delete(mine.headers["location"]).status_code == 204
        assert len(_files(tmp_path)) == 2
        assert client.delete(theirs.headers["location"], headers=other).status_code == 204
        assert len(_files(tmp_path)) == 1


def test_pages(client: TestClient) -> None:
    made = [client.put(f"/v1/uploads?filename={n}.pth", content=b"x").json()["id"] for n in range(7)]
    seen, cursor = [], None
    while True:
        page = client.get("/v1/uploads", params={"limit": 3, **({"cursor": cursor} if cursor else {})}).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert sorted(seen) == sorted(made)
    assert len(seen) == 7
    for limit in (0, 201, "x"):
        assert client.get("/v1/uploads", params={"limit": limit}).status_code == 422


class TestFullDisk:
    def test_while_writing(self, client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written = os.write

        def full(descriptor: int, data: Any) -> int:
            # The disk takes a part of it, as real ones do.
            if len(data) > 100_000:
                return written(descriptor, data[:100_000])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("api.store.os.write", full)
        refused = client.put(PUT, content=CONTENT)
        assert refused.status_code == 507
        assert refused.json()["type"] == "/problems/disk-full"
        assert _files(tmp_path) == []
        assert client.get("/v1/uploads").json()["items"] == []

    @pytest.mark.parametrize("function", ["fsync", "replace"])
    def test_at_the_end(
        self, client: TestClient, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        monkeypatch.setattr(f"api.store.os.{function}", full)
        assert client.put(PUT, content=CONTENT).status_code == 507
        assert _files(tmp_path) == []
        assert client.get("/v1/uploads").json()["items"] == []

    def test_reserve(self, tmp_path: Path) -> None:
        with served(tmp_path, reserve_bytes=2**60) as client:
            assert client.put(PUT, content=CONTENT, headers=bearer(client)).status_code == 507


def test_what_was_left_behind_is_removed_at_the_start(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        client.headers.update(bearer(client))
        place = client.put(PUT, content=CONTENT).headers["location"]
        orphan = tmp_path / "data" / "blobs" / "00" / ("0" * 64)
        orphan.parent.mkdir(exist_ok=True)
        orphan.write_bytes(b"x")
        (tmp_path / "data" / "incoming" / "half").write_bytes(b"x")
        with served(tmp_path) as later:
            assert later.get(place, headers=dict(client.headers)).status_code == 200
            (file,) = _files(tmp_path)
            assert file.read_bytes() == CONTENT


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server that waits for a second at most."""
    with running(tmp_path_factory.mktemp("impatient"), grace=1.0, cold=True) as number:
        yield number


class TestOverTheNetwork:
    """What only a real server shows: answers before the body, slow clients, clients that go away."""

    def test_too_large_is_answered_before_the_body(self, tmp_path: Path) -> None:
        with (
            running(tmp_path, cold=True, NORMSEARCH_UPLOAD_BYTES="1000") as port,
            socket.create_connection(("127.0.0.1", port), 20) as line,
        ):
            line.sendall(_head(port, length=10**12))
            assert b" 413 " in line.recv(100)

    def test_slow_and_vanished_clients_leave_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import httpx2

        # One second of grace instead of thirty.
        with running(tmp_path, grace=1.0, cold=True) as port:
            with socket.create_connection(("127.0.0.1", port), 20) as line:
                line.sendall(_head(port, length=10**6) + b"x" * 5000)
                start = time.monotonic()
                answer = line.recv(100)
                assert b" 408 " in answer
                assert time.monotonic() - start < 5
            with socket.create_connection(("127.0.0.1", port), 20) as line:
                line.sendall(_head(port, length=10**6) + b"x" * 5000)
            deadline, counted = time.monotonic() + 10, ""
            # Who goes away is no fault of the server's.
            while (_files(tmp_path) or 'status="499"' not in counted) and time.monotonic() < deadline:
                time.sleep(0.05)
                counted = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
            assert _files(tmp_path) == []
            assert 'route="/v1/uploads",status="499"' in counted
            assert 'status="500"' not in counted

    @pytest.mark.parametrize(
        "sent",
        [
            b"",
            b"GET /health/live HTTP/1.1\r\nHost: x\r\n",
            b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /health",
            b"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{",
        ],
    )
    def test_requests_that_never_end_are_ended(self, sent: bytes, port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), 20) as line:
            line.sendall(sent)
            start = time.monotonic()
            while line.recv(1000):
                assert time.monotonic() - start < 5

    def test_many_at_a_time(self, tmp_path: Path) -> None:
        import httpx2

        contents = [os.urandom(500_000) for _ in range(8)]
        with running(tmp_path, cold=True) as port:
            answers: list[Any] = []

            def put(number: int) -> None:
                url = f"http://127.0.0.1:{port}/v1/uploads"
                answers.append(
                    httpx2.put(url, params={"filename": "x.pth"}, content=contents[number % 4], timeout=30)
                )

            threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(answer.status_code for answer in answers) == [200] * 4 + [201] * 4
            assert len({json.loads(answer.text)["id"] for answer in answers}) == 4
        assert len(_files(tmp_path)) == 4


def _head(port: int, length: int) -> bytes:
    return (
        "PUT /v1/uploads?filename=x.pth HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()
