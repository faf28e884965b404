"""The corpus of attacks over HTTP: nothing runs, nothing breaks, every answer is a problem with a way out."""

from __future__ import annotations

import io
import json
import os
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
from serving import bearer, served
from starlette.testclient import TestClient

#: Like the other bomb, and as slow to make.
_LARGE = {"bomb in the pickle"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attacks")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    limits = {"child_memory_bytes": 2 * 2**30, "child_seconds": 60, "children": 2}
    with served(folder, requests_per_minute=1_000_000, **limits) as asking:
        asking.headers.update(bearer(asking))
        yield asking


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary") / "canary"


def _send(client: TestClient, attack: Attack, canary: Path) -> Any:
    with warnings.catch_warnings():
        # Of torch, about formats that the attacks are made of.
        warnings.simplefilter("ignore")
        content = attack.content(canary)
    name = {"filename": f"{abs(hash(attack.name))}-{attack.file}"}
    made = client.put("/v1/uploads", params=name, content=content)
    if made.status_code != 201:
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
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda attack: _send(client, attack, canary), chosen))
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
