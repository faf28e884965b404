"""Files in an S3 bucket instead of a folder, on a server on loopback that speaks S3: nothing is lost."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from factories_of_tests import small
from pydantic import ValidationError
from serving import bearer, served, settings, with_database
from starlette.testclient import TestClient

from api.database import BLOBS, UPLOADS, Database, sqlite_url
from api.keys import Owner
from api.owned import add, remove
from api.problems import ProblemError
from api.remote import Copies, Remote, open_store
from api.settings import Settings
from api.store import Content, Store

boto3 = pytest.importorskip("boto3", reason="boto3 and moto are not installed")
moto_server = pytest.importorskip("moto.server", reason="moto's server is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed")

PUT = "/v1/uploads?filename=x.npz"
#: More than one part.
LARGE = np.random.default_rng(0).integers(0, 256, 20_000_000, np.uint8).tobytes()
#: aiobotocore's connections are closed by its own thread, which may be after the test.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning")


class Bucket:
    """A bucket of its own on a server that many share."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.name, self.url = name, f"s3://{name}/files"
        self.options = {"endpoint_url": endpoint, "key": "key", "secret": "hunter2"}
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="key",
            aws_secret_access_key="hunter2",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=name)

    def settings(self, **others: Any) -> dict[str, Any]:
        return {"files": self.url, "files_options": self.options, **others}

    def objects(self) -> dict[str, bytes]:
        listed = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        found = [one["Key"] for one in listed]
        return {key: self.client.get_object(Bucket=self.name, Key=key)["Body"].read() for key in found}

    def unfinished(self) -> list[Any]:
        return list(self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", []))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str) -> Bucket:
    return Bucket(endpoint, f"normsearch-{os.urandom(6).hex()}")


@pytest.fixture
def client(bucket: Bucket, tmp_path: Path) -> Iterator[TestClient]:
    factories = {"small": "factories_of_tests:small"}
    with served(tmp_path, **bucket.settings(factories=factories)) as asking:
        asking.headers.update(bearer(asking))
        yield asking


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(sqlite_url(with_database(tmp_path)))
    yield made
    made.close()


def _store(bucket: Bucket, folder: Path, database: Database, **others: Any) -> Store:
    return open_store(settings(folder, **bucket.settings(**others)), database)


def _put(store: Store, database: Database, data: bytes, owner: str = "key_a") -> tuple[Content, str]:
    limits = settings(Path("unused"))
    with store.incoming(10**9, ProblemError(413, "too-large", "")) as file:
        file.write(data)
        content = file.finish()
        with database.write() as connection:
            store.keep(connection, file, content)
            values = {"name": os.urandom(4).hex(), "size": content.size, "sha256": content.sha256}
            return content, str(add(connection, UPLOADS, Owner(owner), limits, **values).id)


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / "data").rglob("*") if path.is_file() and "sqlite" not in path.name]


class TestService:
    def test_files_lie_in_the_bucket_and_children_read_copies(
        self, client: TestClient, bucket: Bucket, tmp_path: Path
    ) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(small().state_dict(), buffer)
        form = {"architecture": "factories/small", "to": "group"}
        made = client.post("/v1/convert", files={"file": ("small.pth", buffer.getvalue())}, data=form)
        assert made.status_code == 200, made.text
        artifacts = client.get("/v1/artifacts").json()["items"]
        digests = {item["sha256"] for item in artifacts} | {hashlib.sha256(buffer.getvalue()).hexdigest()}
        stored = bucket.objects()
        assert set(stored) == {f"files/{digest[:2]}/{digest}" for digest in digests}
        assert all(hashlib.sha256(data).hexdigest() == key[-64:] for key, data in stored.items())
        assert not (tmp_path / "data" / "blobs").exists()
        # As on another machine, which has no copies.
        for copy in (tmp_path / "data" / "copies").iterdir():
            copy.unlink()
        place = made.headers["location"]
        whole = client.get(place)
        assert (
            whole.content
            == made.content
            == stored[f"files/{made.headers['etag'][1:3]}/{made.headers['etag'][1:-1]}"]
        )
        part = client.get(place, headers={"Range": "bytes=-7"})
        assert (part.status_code, part.content) == (206, made.content[-7:])
        model = client.get("/v1/models").json()["items"][0]["id"]
        planned = client.post("/v1/plans", json={"model": model, "to": "group"})
        assert planned.status_code == 200, planned.text
        assert {path.name for path in (tmp_path / "data" / "copies").iterdir()} == {
            hashlib.sha256(buffer.getvalue()).hexdigest()
        }
        for item in artifacts:
            assert client.delete(f"/v1/artifacts/{item['id']}").status_code == 204
        assert set(bucket.objects()) == {
            key for key in stored if key[-64:] not in {a["sha256"] for a in artifacts}
        }

    def test_large_ones_go_in_parts_and_come_in_ranges(
        self, client: TestClient, bucket: Bucket, tmp_path: Path
    ) -> None:
        made = client.put(PUT, content=LARGE)
        assert made.status_code == 201, made.text
        digest = hashlib.sha256(LARGE).hexdigest()
        key = f"files/{digest[:2]}/{digest}"
        assert bucket.objects() == {key: LARGE}
        # An ETag with a number of parts.
        assert bucket.client.head_object(Bucket=bucket.name, Key=key)["ETag"].endswith('-3"')
        assert client.delete(made.headers["location"]).status_code == 204
        assert bucket.objects() == {}
        assert _files(tmp_path) == []

    @pytest.mark.parametrize(
        ("operation", "error", "status"),
        [
            ("complete_multipart_upload", ("InternalError", 500), 503),
            ("upload_part", ("XMinioStorageFull", 507), 507),
            ("upload_part", ("QuotaExceeded", 403), 507),
            ("create_multipart_upload", ("AccessDenied", 403), 503),
            ("head_object", ("ServiceUnavailable", 503), 503),
        ],
    )
    def test_a_bucket_that_fails_leaves_nothing(
        self,
        client: TestClient,
        bucket: Bucket,
        tmp_path: Path,
        operation: str,
        error: tuple[str, int],
        status: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        import s3fs
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        call = s3fs.S3FileSystem._call_s3

        async def failing(self: Any, method: str, *others: Any, **given: Any) -> Any:
            if method == operation:
                code, number = error
                answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": number}}
                raise translate_boto_error(ClientError(answer, method))
            return await call(self, method, *others, **given)

        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", failing)
        monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", s3fs.core.sync_wrapper(failing))
        refused = client.put(PUT, content=b"x" * 1000)
        assert refused.status_code == status, refused.text
        assert "hunter2" not in refused.text
        monkeypatch.undo()
        assert client.get("/v1/uploads").json()["items"] == []
        assert bucket.objects() == {}
        assert bucket.unfinished() == []
        assert _files(tmp_path) == []
        assert client.put(PUT, content=b"x" * 1000).status_code == 201

    def test_a_bucket_that_is_away_is_503(self, client: TestClient, tmp_path: Path) -> None:
        made = client.put(PUT, content=b"x")
        parts = client.app.state.parts  # type: ignore[attr-defined]
        for copy in (tmp_path / "data" / "copies").iterdir():
            copy.unlink()
        parts.store.place._system.rm_file(parts.store.place._place(made.json()["sha256"]))
        refused = client.post("/v1/datasets", json={"upload": made.json()["id"]})
        assert (refused.status_code, refused.json()["type"]) == (503, "/problems/busy")
        assert list((tmp_path / "data" / "work").iterdir()) == []


class TestStore:
    def test_what_was_removed_in_between_is_sent_again(
        self, bucket: Bucket, database: Database, tmp_path: Path
    ) -> None:
        store, other = (_store(bucket, tmp_path / name, database) for name in "ab")
        with store.incoming(10**6, ProblemError(413, "too-large", "")) as file:
            file.write(b"content")
            content = file.finish()
            assert list(bucket.objects().values()) == [b"content"]
            other.forget(content)
            assert bucket.objects() == {}
            with database.write() as connection:
                store.keep(connection, file, content)
                values = {"name": "x", "size": content.size, "sha256": content.sha256}
                add(connection, UPLOADS, Owner("key_a"), settings(tmp_path), **values)
        assert list(bucket.objects().values()) == [b"content"]
        with other.local(content) as path:
            assert path.read_bytes() == b"content"

    def test_what_is_not_kept_is_forgotten(self, bucket: Bucket, database: Database, tmp_path: Path) -> None:
        store = _store(bucket, tmp_path, database)
        with store.incoming(10**6, ProblemError(413, "too-large", "")) as file:
            file.write(b"content")
            file.finish()
            assert len(bucket.objects()) == 1
        assert bucket.objects() == {}
        with database.read() as connection:
            assert connection.execute(sa.select(BLOBS)).all() == []

    def test_put_and_removed_at_once(self, bucket: Bucket, database: Database, tmp_path: Path) -> None:
        stores = [_store(bucket, tmp_path / name, database) for name in "ab"]
        data, barrier = os.urandom(1000), threading.Barrier(4)

        def put_and_remove(number: int) -> None:
            store, owner = stores[number % 2], f"key_{number}"
            barrier.wait()
            for _ in range(5):
                content, identifier = _put(store, database, data, owner)
                with store.local(content) as path:
                    assert path.read_bytes() == data
                with database.write() as connection:
                    remove(connection, UPLOADS, Owner(owner), identifier)
                store.forget(content)

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(put_and_remove, range(4))) == [None] * 4
        assert bucket.objects() == {}

    def test_orphans_are_removed_at_the_start(
        self, bucket: Bucket, database: Database, tmp_path: Path
    ) -> None:
        content, _ = _put(_store(bucket, tmp_path, database), database, b"kept")
        bucket.client.put_object(Bucket=bucket.name, Key=f"files/00/{'0' * 64}", Body=b"left")
        _store(bucket, tmp_path, database)
        assert list(bucket.objects()) == [f"files/{content.sha256[:2]}/{content.sha256}"]

    def test_copies_are_bounded_and_those_in_use_stay(
        self, bucket: Bucket, database: Database, tmp_path: Path
    ) -> None:
        store = _store(bucket, tmp_path, database, copies_bytes=2500)
        contents = [_put(store, database, bytes([number]) * 1000)[0] for number in range(5)]
        folder = tmp_path / "data" / "copies"

        def copies() -> set[str]:
            return {path.name for path in folder.iterdir()}

        assert copies() == {content.sha256 for content in contents[3:]}
        with store.local(contents[0]) as first, store.local(contents[1]) as second:
            with store.local(contents[2]) as third:
                # More than they may have, but each is in use.
                assert [path.read_bytes()[0] for path in (first, second, third)] == [0, 1, 2]
            assert copies() == {content.sha256 for content in contents[:2]}
            store.forget(contents[0])
            assert first.read_bytes() == b"\0" * 1000
        assert list((tmp_path / "data" / "incoming").iterdir()) == []

    def test_what_is_damaged_is_never_used(self, bucket: Bucket, database: Database, tmp_path: Path) -> None:
        store, other = (_store(bucket, tmp_path / name, database) for name in "ab")
        content, _ = _put(store, database, b"content")
        key = f"files/{content.sha256[:2]}/{content.sha256}"
        for body in (b"CONTENT", b"more than there was", b"less"):
            bucket.client.put_object(Bucket=bucket.name, Key=key, Body=body)
            with pytest.raises(ProblemError, match="not what was put"), other.local(content):
                pass
        assert _files(tmp_path / "b") == []

    def test_disk_for_copies_may_be_full(self, bucket: Bucket, database: Database, tmp_path: Path) -> None:
        content, _ = _put(_store(bucket, tmp_path / "a", database), database, b"content")
        copies = Copies(tmp_path / "b", 10**6, reserve=2**60)
        with pytest.raises(ProblemError) as caught, Remote(bucket.url, bucket.options, copies).local(content):
            pass
        assert caught.value.status == 507
        assert list((tmp_path / "b").rglob("*/*")) == []


@pytest.mark.parametrize("url", ["bucket", "nothing://x", "s3://", "file:///srv", "/srv/files"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValidationError, match="files"):
        Settings(files=url)


def test_secrets_are_not_shown(bucket: Bucket) -> None:
    assert "hunter2" not in repr(Settings(**bucket.settings()))
