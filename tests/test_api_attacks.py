"""The corpus of attacks over HTTP: nothing runs, nothing breaks, every answer is a problem with a way out."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import ARGUMENTS, ATTACKS, NAMES, Attack
from PIL import Image
from safetensors.numpy import save as safetensors_bytes
from serving import bearer, running, served
from starlette.testclient import TestClient

#: Like the other bomb, and as slow to make.
_LARGE = {"bomb in the pickle"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attacks")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    limits = {"child_memory_bytes": 2 * 2**30, "child_seconds": 60, "children": 2}
    limits["factories"] = {"small": "factories_of_tests:small"}
    with served(folder, requests_per_minute=1_000_000, **limits) as asking:
        asking.headers.update(bearer(asking))
        yield asking
        # Of all that was sent here, nothing broke the service.
        broken = re.findall(r'normsearch_requests_total\{.*status="5\d\d"\}.*', asking.get("/metrics").text)
        assert broken == []


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary") / "canary"


def _content(attack: Attack, canary: Path) -> bytes:
    with warnings.catch_warnings():
        # Of torch, about formats that the attacks are made of.
        warnings.simplefilter("ignore")
        return attack.content(canary)


def _send(client: TestClient, attack: Attack, content: bytes) -> Any:
    name = {"filename": f"{abs(hash(attack.name))}-{attack.file}"}
    made = client.put("/v1/uploads", params=name, content=content)
    # 200: the same file was sent before.
    if made.status_code not in (200, 201):
        return made
    known = attack.file.endswith(".safetensors")
    body = {"upload": made.json()["id"], **({} if known else {"architecture": "torchvision/resnet18"})}
    return client.post("/v1/models", json=body)


@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_attacks_are_refused_and_run_nothing(
    client: TestClient, canary: Path, folder: Path, share: int
) -> None:
    """Every file that is built otherwise, and a share of those that only differ in a name."""
    named = [attack for attack in ATTACKS if attack.file == "x.safetensors" and "{" in attack.name]
    named += [attack for attack in ATTACKS if attack.name.startswith("architecture ")]
    chosen = [attack for attack in ATTACKS if attack not in named and attack.name not in _LARGE]
    chosen += named[::share]
    # Made before there are threads, which share the filters of warnings.
    contents = [_content(attack, canary) for attack in chosen]
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda one: _send(client, *one), zip(chosen, contents, strict=True)))
    for attack, answer in zip(chosen, answers, strict=True):
        assert answer.status_code in (413, 422), (attack.name, answer.text[:500])
        document = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert 20 < len(document["detail"]) < 1500, (attack.name, document)
        # The child refused it: it neither died nor was stopped.
        assert document["type"] in ("/problems/refused", "/problems/invalid-request"), (attack.name, document)
        assert str(folder) not in answer.text, attack.name
    assert not canary.exists()
    assert client.get("/v1/models").json()["items"] == []
    assert list((folder / "data" / "work").iterdir()) == []


def test_names_and_arguments_of_architectures(client: TestClient, folder: Path) -> None:
    upload = client.put("/v1/uploads?filename=x.safetensors", content=safetensors_bytes({"a": np.ones(1)}))
    identifier = upload.json()["id"]
    bodies: list[dict[str, Any]] = [{"architecture": name} for name in NAMES]
    bodies += [{"architecture": "timm/resnet18", "arguments": arguments} for arguments in ARGUMENTS]
    for body in bodies:
        # As JSON has it, infinities included.
        text = json.dumps({"upload": identifier, **body})
        answer = client.post("/v1/models", content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, (body, answer.text)
        assert str(folder) not in answer.text


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _png(width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def _zip(entries: dict[str, bytes], change: Callable[[zipfile.ZipInfo], None] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            if change is not None:
                change(info)
            archive.writestr(info, content)
    return buffer.getvalue()


def _link(info: zipfile.ZipInfo) -> None:
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


def _claiming(size: int) -> bytes:
    """An archive whose directory claims another size than the entry has."""
    data = bytearray(_zip({"a/x.png": _png()}))
    place = data.rindex(b"PK\x01\x02")
    data[place + 24 : place + 28] = size.to_bytes(4, "little")
    return bytes(data)


def _describe(client: TestClient, name: str, content: bytes) -> Any:
    upload = client.put("/v1/uploads", params={"filename": name}, content=content).json()["id"]
    return client.post("/v1/datasets", json={"upload": upload})


def test_datasets_are_described(client: TestClient) -> None:
    arrays = {"x": np.ones((5, 3), np.float32), "y": np.arange(5)}
    for name, content in (("x.npz", _npz(**arrays)), ("x.safetensors", safetensors_bytes(arrays))):
        made = _describe(client, name, content)
        assert made.status_code == 201, made.text
        document = made.json()
        assert (document["kind"], document["samples"]) == ("arrays", 5)
        assert {"name": "x", "dtype": "float32", "shape": [5, 3]} in document["arrays"]
        assert client.get(made.headers["location"]).json() == document
    images = {"cat/1.png": _png(), "cat/2.png": _png(9), "dog/1.png": _png(10), "__MACOSX/._1.png": b"x"}
    made = _describe(client, "x.zip", _zip(images))
    assert made.status_code == 201, made.text
    assert made.json()["classes"] == [{"name": "cat", "images": 2}, {"name": "dog", "images": 1}]
    listed = client.get("/v1/datasets").json()["items"]
    assert len(listed) == 3
    assert client.delete(f"/v1/datasets/{listed[0]['id']}").status_code == 204


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("objects.npz", lambda: _npz(x=np.array([{}], dtype=object))),
        ("empty.npz", lambda: _zip({})),
        ("noise.npz", lambda: os.urandom(1000)),
        ("bomb.npz", lambda: _zip({"x.npy": b"\x93NUMPY\x01\0v\0" + b"\0" * 50_000_000})),
        ("pickle.npy", lambda: b"\x80\x04cos\nsystem\n."),
        ("text.csv", lambda: b"1,2"),
        ("no.zip", lambda: b"PK\x03\x04nothing"),
        ("empty.zip", lambda: _zip({})),
        ("flat.zip", lambda: _zip({"x.png": _png()})),
        ("deep.zip", lambda: _zip({"a/b/x.png": _png()})),
        ("outside.zip", lambda: _zip({"../x.png": _png()})),
        ("absolute.zip", lambda: _zip({"/a/x.png": _png()})),
        ("code.zip", lambda: _zip({"a/x.py": b"import os"})),
        ("link.zip", lambda: _zip({"a/x.png": b"/etc/passwd"}, _link)),
        ("damaged.zip", lambda: _zip({"a/x.png": _png()[:-20] * 0 + b"\x89PNG\r\n\x1a\n"})),
        ("renamed.zip", lambda: _zip({"a/x.png": b"GIF89a" + b"\0" * 100})),
        ("postscript.zip", lambda: _zip({"a/x.png": b"%!PS-Adobe-3.0 EPSF-3.0\n"})),
        ("huge.zip", lambda: _zip({"a/x.png": b"\0" * 70_000_000})),
        ("pixels.zip", lambda: _zip({"a/x.pgm": b"P5 100000 100000 255\n" + b"\0" * 100})),
        ("lies.zip", lambda: _claiming(10)),
        ("lies more.zip", lambda: _claiming(2**31)),
    ],
)
def test_datasets_that_are_none(client: TestClient, name: str, content: Callable[[], bytes]) -> None:
    refused = _describe(client, name, content())
    assert refused.status_code == 422, refused.text
    assert refused.json()["type"] == "/problems/refused", refused.text


def test_identifiers_that_are_none(client: TestClient) -> None:
    for noun in ("uploads", "models", "datasets", "artifacts"):
        for identifier in ("..", "%2e%2e", "%00", "x" * 41, "'; DROP TABLE uploads; --", "‮", "%ff", "*"):
            for method in ("GET", "DELETE"):
                answer = client.request(method, f"/v1/{noun}/{identifier}")
                assert answer.status_code in (404, 405, 422), (noun, identifier, answer.text)
    assert client.get("/v1/uploads").status_code == 200


def test_reports_escape_names(client: TestClient) -> None:
    """A stranger's name reaches pages and headers only as text."""
    import torch
    import torchvision

    buffer = io.BytesIO()
    torch.save(torchvision.models.resnet18().state_dict(), buffer)
    name = '<script>alert(1)</script>".pth'.replace("/", "_")
    made = client.post(
        "/v1/convert",
        files={"file": (name, buffer.getvalue())},
        data={"architecture": "torchvision/resnet18", "to": "group"},
    )
    assert made.status_code == 200, made.text
    assert "<" not in made.headers["content-disposition"]
    page = next(item for item in client.get("/v1/artifacts").json()["items"] if item["role"] == "page")
    got = client.get(f"/v1/artifacts/{page['id']}")
    assert got.headers["content-disposition"].startswith("attachment")
    assert b"<script" not in got.content


@pytest.fixture(scope="module")
def made(client: TestClient) -> dict[str, str]:
    """The id of one of every noun, made from a small network."""
    import torch
    from factories_of_tests import small

    buffer = io.BytesIO()
    torch.save(small().state_dict(), buffer)
    form = {"architecture": "factories/small", "to": "group"}
    converted = client.post("/v1/convert", files={"file": ("small.pth", buffer.getvalue())}, data=form)
    assert converted.status_code == 200, converted.text
    described = _describe(client, "given.npz", _npz(x=np.ones((2, 3), np.float32)))
    model = client.get("/v1/models").json()["items"][0]
    return {
        "uploads": model["upload"],
        "models": model["id"],
        "artifacts": converted.headers["location"].rpartition("/")[2],
        "datasets": described.headers["location"].rpartition("/")[2],
    }


def test_another_keys_ids_are_404_everywhere(client: TestClient, made: dict[str, str]) -> None:
    """Whatever route the OpenAPI document has, and wherever an id may stand in it."""
    other, document = bearer(client), client.get("/openapi.json").json()
    tried = 0
    for path, operations in document["paths"].items():
        noun = path.split("/")[2] if path.startswith("/v1/") else ""
        if "{identifier}" not in path or noun not in made:
            continue
        for method in operations:
            asked = path.replace("{identifier}", made[noun])
            hidden = client.request(method, asked, headers=other)
            nothing = client.request(method, asked[:-3] + "000", headers=other)
            assert hidden.status_code == nothing.status_code == 404, (method, asked, hidden.text)
            assert hidden.json()["title"] == nothing.json()["title"]
            tried += 1
    assert tried >= 9
    for noun, body in (
        ("models", {"upload": made["uploads"], "architecture": "factories/small"}),
        ("datasets", {"upload": made["uploads"]}),
        ("plans", {"model": made["models"], "to": "group"}),
    ):
        refused = client.post(f"/v1/{noun}", json=body, headers=other)
        assert refused.status_code == 404, (noun, refused.text)
    for noun, identifier in made.items():
        assert client.get(f"/v1/{noun}", headers=other).json() == {"items": [], "next": None}
        # As a cursor it says nothing either.
        page = client.get(f"/v1/{noun}", params={"cursor": identifier}, headers=other)
        assert page.json() == {"items": [], "next": None}
        # It is all still there.
        assert client.get(f"/v1/{noun}/{identifier}").status_code == 200


def test_idempotency_keys_of_others_are_nobodys(client: TestClient, made: dict[str, str]) -> None:
    """A key of another is as if it had never been used, for the same request too."""
    body = {"upload": made["uploads"], "architecture": "factories/small"}
    given = {"Idempotency-Key": "mine"}
    first = client.post("/v1/models", json=body, headers=given)
    assert first.status_code == 201, first.text
    other = bearer(client)
    theirs = client.post("/v1/models", json=body, headers={**other, **given})
    assert theirs.status_code == 404
    assert "idempotent-replayed" not in theirs.headers
    again = client.post("/v1/models", json=body, headers=given)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b" ",
        b"x" * 256,
        b"a b",
        b"\xff\xfe",
        "\u202e".encode(),
        b"a\tb",
        b"'; DROP TABLE idempotency; --",
    ],
)
def test_idempotency_keys_that_are_none(client: TestClient, made: dict[str, str], key: bytes) -> None:
    refused = client.post(
        "/v1/plans", json={"model": made["models"], "to": "group"}, headers={b"Idempotency-Key": key}
    )
    assert refused.status_code == 422, refused.text
    assert refused.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "name",
    [
        "a\r\nX-Evil: 1.pth",
        'a"; filename="b.pth',
        "../../../etc/cron.d/x.pth",
        "..\\..\\x.pth",
        "\u202egpj.pth",
        "<img src=x onerror=alert(1)>.pth",
        "{{7*7}}${7*7}.pth",
        "; rm -rf ~.pth",
        "-o.pth",
        ".pth",
        "CON.pth",
        "é" * 90 + ".pth",
        "x" * 300 + ".pth",
        "argument.json",
        "log.txt",
    ],
)
def test_names_of_files_are_only_names(client: TestClient, canary: Path, folder: Path, name: str) -> None:
    """A file's name goes through a form, a child's folder, a database, headers and a page."""
    import torch
    from factories_of_tests import small

    buffer = io.BytesIO()
    torch.save(small().state_dict(), buffer)
    raw = name.encode()
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="' + raw + b'"\r\n\r\n'
    fields = b"".join(
        b'\r\n--x\r\nContent-Disposition: form-data; name="' + key + b'"\r\n\r\n' + value
        for key, value in ((b"architecture", b"factories/small"), (b"to", b"group"))
    )
    body = head + buffer.getvalue() + fields + b"\r\n--x--\r\n"
    answer = client.post(
        "/v1/convert", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code in (200, 422), answer.text
    assert "x-evil" not in answer.headers
    if answer.status_code == 200:
        disposition = answer.headers["content-disposition"]
        assert re.fullmatch(r'attachment; filename="[A-Za-z0-9._-]+-converted\.safetensors"', disposition)
        links = re.findall(r'title="([^"]*)"', answer.headers["link"])
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", link) for link in links)
        page = re.findall(r"</v1/artifacts/(\w+)>", answer.headers["link"])[-1]
        assert b"<img src" not in client.get(f"/v1/artifacts/{page}").content
    assert not canary.exists()
    assert list((folder / "data" / "work").iterdir()) == []
    assert {path.name for path in (folder / "data").iterdir()} <= {
        "blobs",
        "incoming",
        "work",
        *(f"normsearch.sqlite{suffix}" for suffix in ("", "-wal", "-shm", "-journal")),
    }


def test_memory_of_the_server_is_bounded(tmp_path: Path) -> None:
    """Whatever is large, the process that has the secrets does not become large with it."""
    import httpx2

    def peak() -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024  # type: ignore[index]

    with running(tmp_path, NORMSEARCH_CHILD_MEMORY_BYTES="1GiB") as port:
        log = (tmp_path / "log").read_text()
        pid = int(re.search(r"server process \[(\d+)\]", log)[1])  # type: ignore[index]
        url, before = f"http://127.0.0.1:{port}/v1", peak()
        with httpx2.Client(timeout=60) as asking:

            def put(name: str, content: bytes) -> str:
                made = asking.put(f"{url}/uploads", params={"filename": name}, content=content)
                return str(made.json()["id"])

            large = b"[" * 30_000_000
            statuses = [
                asking.post(f"{url}/models", content=large, headers={"Content-Type": "application/json"}),
                asking.post(
                    f"{url}/convert", files={"file": ("x.pth", b"x")}, data={"plan": "x" * 30_000_000}
                ),
                asking.post(f"{url}/convert", files={"file": ("x.pth", large)}, data={"to": "group"}),
                asking.post(
                    f"{url}/datasets", json={"upload": put("bomb.zip", _zip({"a/x.png": b"\0" * 60_000_000}))}
                ),
                asking.post(
                    f"{url}/datasets", json={"upload": put("bomb.npz", _zip({"x.npy": b"\0" * 60_000_000}))}
                ),
                asking.post(f"{url}/datasets", json={"upload": put("x.npz", large)}),
            ]
        assert {answer.status_code for answer in statuses} <= {413, 422}
        assert peak() - before < 40, (before, peak())
