"""Checkpoints over HTTP: read, planned, converted and downloaded; every file is opened in a child."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from factories_of_tests import small
from safetensors.torch import load as read_safetensors
from serving import bearer, served
from starlette.testclient import TestClient

import normsearch
from api.tasks import Site
from normsearch.sites import NormSite

RESNET = "torchvision/resnet18"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    # A factory of the operator's own; the module is where Python looks.
    factories = {"small": "factories_of_tests:small"}
    with served(tmp_path_factory.mktemp("models"), factories=factories, requests_per_minute=10_000) as asking:
        asking.headers.update(bearer(asking))
        yield asking


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A network with statistics that were learned."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(network: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def upload(client: TestClient, checkpoint: bytes) -> str:
    made = client.put("/v1/uploads?filename=resnet18.pth", content=checkpoint)
    return str(made.json()["id"])


@pytest.fixture(scope="module")
def model(client: TestClient, upload: str) -> str:
    made = client.post("/v1/models", json={"upload": upload, "architecture": RESNET})
    assert made.status_code == 201, made.text
    assert made.headers["location"] == f"/v1/models/{made.json()['id']}"
    return str(made.json()["id"])


class TestModels:
    def test_is_described(self, client: TestClient, model: str, upload: str) -> None:
        found = client.get(f"/v1/models/{model}").json()
        assert found["upload"] == upload
        assert found["format"] == "torch zip"
        assert found["architecture"] == RESNET
        assert (found["parameters"], found["sites"], found["converted"]) == (11_689_512, 20, False)
        assert model in {item["id"] for item in client.get("/v1/models").json()["items"]}

    def test_sites_in_pages_are_those_of_the_library(
        self, client: TestClient, model: str, network: torch.nn.Module
    ) -> None:
        found, cursor = [], None
        while True:
            given = {"limit": 7, **({"cursor": cursor} if cursor else {})}
            page = client.get(f"/v1/models/{model}/sites", params=given).json()
            found += page["items"]
            cursor = page["next"]
            if cursor is None:
                break
        assert [site["path"] for site in found] == [site.path for site in normsearch.find_sites(network)]
        assert found[0]["producer"]["path"] == "conv1"
        for cursor in ("-1", "x", "1" * 30, "²"):
            assert client.get(f"/v1/models/{model}/sites", params={"cursor": cursor}).status_code == 422

    def test_sites_say_all_that_the_library_says(self) -> None:
        assert set(Site.model_fields) == set(NormSite.__dataclass_fields__)

    def test_operators_factory(self, client: TestClient) -> None:
        buffer = io.BytesIO()
        torch.save(small().state_dict(), buffer)
        made = client.put("/v1/uploads?filename=small.pth", content=buffer.getvalue()).json()["id"]
        found = client.post("/v1/models", json={"upload": made, "architecture": "factories/small"})
        assert found.status_code == 201, found.text
        assert found.json()["architecture"] == "factories/small"
        for name, arguments in (
            ("factories/other", {}),
            ("factories/small", {"a": 1}),
            ("factories_of_tests:small", {}),
            ("os:system", {"command": "true"}),
        ):
            body = {"upload": made, "architecture": name, "arguments": arguments}
            assert client.post("/v1/models", json=body).status_code == 422, name

    def test_what_does_not_fit_is_refused_with_a_way_out(self, client: TestClient, upload: str) -> None:
        for body, words in (
            ({"architecture": "torchvision/resnet34"}, "resnet18.pth"),
            ({"architecture": "torchvision/resnet19"}, "did you mean"),
            ({}, "give the architecture"),
            ({"architecture": RESNET, "arguments": {"weights": "DEFAULT"}}, "allowed are"),
            ({"architecture": RESNET, "entry": "ema"}, "no entry"),
        ):
            refused = client.post("/v1/models", json={"upload": upload, **body})
            assert refused.status_code == 422, refused.text
            assert refused.json()["type"] == "/problems/refused"
            assert refused.json()["error"].endswith("Error")
            assert words in refused.json()["detail"]
            # Where the service and its files lie is nobody's business.
            assert str(Path(__file__).parents[1]) not in refused.text
            assert tempfile.gettempdir() not in refused.text

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"[" * 100_000,
            b'{"upload": ' + b"9" * 10_000 + b"}",
            b'{"upload": "x", "arguments": {"a": NaN}}',
            b'{"upload": "\\ud800"}',
            b'{"upload": "x", "unknown": 1}',
            b'{"upload": "x", "arguments": {"a": 1e999}}',
            b"\xff\xfe",
        ],
    )
    def test_bodies_that_are_none(self, client: TestClient, body: bytes) -> None:
        refused = client.post("/v1/models", content=body, headers={"Content-Type": "application/json"})
        assert refused.status_code in (400, 422), refused.text
        assert refused.headers["content-type"] == "application/problem+json"

    def test_body_too_large(self, client: TestClient) -> None:
        body = b'{"upload": "' + b"x" * 5_000_000 + b'"}'
        refused = client.post("/v1/models", content=body, headers={"Content-Type": "application/json"})
        assert refused.status_code == 413

    def test_upload_in_use_stays(self, client: TestClient, model: str, upload: str) -> None:
        assert model
        assert client.delete(f"/v1/uploads/{upload}").status_code == 409

    def test_idempotency(self, client: TestClient, upload: str) -> None:
        body = {"upload": upload, "architecture": RESNET}
        first, again = (
            client.post("/v1/models", json=body, headers={"Idempotency-Key": "models"}) for _ in range(2)
        )
        assert first.json() == again.json()
        assert again.headers["idempotent-replayed"] == "true"
        other = client.post("/v1/models", json={"upload": "x"}, headers={"Idempotency-Key": "models"})
        assert other.status_code == 422
        # What failed may be tried again.
        for _ in range(2):
            failed = client.post("/v1/models", json={"upload": "x"}, headers={"Idempotency-Key": "failed"})
            assert failed.status_code == 404


class TestPlans:
    def test_is_the_librarys(self, client: TestClient, model: str, network: torch.nn.Module) -> None:
        to = {"layer4.*": "instance", "*": ["identity", "frozen"]}
        found = client.post("/v1/plans", json={"model": model, "to": to}).json()
        assert found["refused"] == 0
        plan = normsearch.plan(network, to)
        assert found["plan"] == json.loads(plan.to_json())
        assert [row["method"] for row in found["rows"]] == [str(plan[path]) for path in plan]

    def test_refusals_have_reason_and_fix(self, client: TestClient, model: str) -> None:
        body = {"model": model, "to": "instance", "input_shape": "3x32x32"}
        found = client.post("/v1/plans", json=body).json()
        assert found["plan"] is None
        refused = [row for row in found["rows"] if row["method"] is None]
        assert found["refused"] == len(refused) > 0
        (refusal,) = refused[0]["refusals"]
        assert refusal["method"] == "instance"
        assert refusal["reason"]
        assert refusal["fix"]
        assert "--" not in refusal["fix"]

    @pytest.mark.parametrize(
        "to", ["evil", "__import__('os')", "group(groups=0)", {"nothing": "group"}, [], {}, "x" * 301, 3]
    )
    def test_what_is_no_plan(self, client: TestClient, model: str, to: Any) -> None:
        assert client.post("/v1/plans", json={"model": model, "to": to}).status_code == 422

    def test_key_is_held_to_its_request(self, client: TestClient, model: str) -> None:
        def post(to: str) -> int:
            body = {"model": model, "to": to}
            return client.post("/v1/plans", json=body, headers={"Idempotency-Key": "plan"}).status_code

        assert [post("group"), post("group"), post("layer")] == [200, 200, 422]


class TestConvert:
    def test_end_to_end(
        self, client: TestClient, network: torch.nn.Module, checkpoint: bytes, tmp_path: Path
    ) -> None:
        """The README's call: weights come back, and the script rebuilds the network without normsearch."""
        made = client.post(
            "/v1/convert",
            files={"file": ("resnet18.pth", checkpoint)},
            data={"architecture": RESNET, "to": "group", "input_shape": "3x32x32"},
            headers={"Idempotency-Key": "end to end".replace(" ", "-")},
        )
        assert made.status_code == 200, made.text
        assert made.headers["content-disposition"] == 'attachment; filename="resnet18-converted.safetensors"'
        expected = normsearch.convert(network, "group").eval()
        state = read_safetensors(made.content)
        assert set(state) == set(expected.state_dict())
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
        (tmp_path / "resnet18-converted.safetensors").write_bytes(made.content)
        found = {
            item["role"]: item
            for item in client.get("/v1/artifacts").json()["items"]
            if item["role"] != "weights"
        }
        assert set(found) == {"script", "plan", "report", "page"}
        for item in found.values():
            assert f"</v1/artifacts/{item['id']}>" in made.headers["link"]
            got = client.get(f"/v1/artifacts/{item['id']}")
            assert got.headers["content-disposition"].startswith("attachment")
            assert got.headers["x-content-type-options"] == "nosniff"
            assert "sandbox" in got.headers["content-security-policy"]
            (tmp_path / item["filename"]).write_bytes(got.content)
        assert normsearch.Plan.from_json((tmp_path / "resnet18-plan.json").read_text()) == normsearch.plan(
            network, "group", inputs=torch.zeros(4, 3, 32, 32)
        )
        x = torch.randn(2, 3, 64, 64)
        torch.save(x, tmp_path / "x.pt")
        code = (
            "import sys, torch; sys.modules['normsearch'] = None; import resnet18_converted_model as m; "
            "torch.save(m.load()(torch.load('x.pt')), 'y.pt')"
        )
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / "y.pt"), expected(x))
        again = client.post(
            "/v1/convert",
            files={"file": ("resnet18.pth", checkpoint)},
            data={"architecture": RESNET, "to": "group", "input_shape": "3x32x32"},
            headers={"Idempotency-Key": "end-to-end"},
        )
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["location"] == made.headers["location"]
        assert again.content == made.content

    def test_plan_instead_of_methods(
        self, client: TestClient, network: torch.nn.Module, checkpoint: bytes
    ) -> None:
        plan = normsearch.plan(network, {"layer4.*": "batch_renorm", "*": "frozen"})
        made = client.post(
            "/v1/convert",
            files={"file": ("a b.pth", checkpoint)},
            data={"architecture": RESNET, "plan": plan.to_json()},
        )
        assert made.status_code == 200, made.text
        assert 'filename="a_b-converted.safetensors"' in made.headers["content-disposition"]
        # What came back says itself which network it is, and that it is converted.
        put = client.put("/v1/uploads?filename=x.safetensors", content=made.content).json()["id"]
        assert client.post("/v1/models", json={"upload": put}).json()["converted"]
        refused = client.post(
            "/v1/convert", files={"file": ("x.safetensors", made.content)}, data={"to": "group"}
        )
        assert "converted already" in refused.json()["detail"]

    def test_refusals_name_site_and_fix(self, client: TestClient, checkpoint: bytes) -> None:
        refused = client.post(
            "/v1/convert",
            files={"file": ("resnet18.pth", checkpoint)},
            data={"architecture": RESNET, "to": "instance", "input_shape": "3x32x32"},
        )
        document = refused.json()
        assert refused.status_code == 422
        assert document["error"] == "RefusedError"
        assert document["site"].startswith("layer4")
        assert document["fix"]
        assert {refusal["method"] for refusal in document["refusals"]} == {"instance"}

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"to": "group", "plan": "{}"},
            {"to": "group", "evil": "1"},
            {"to": "group", "keep": "evil"},
            {"to": "group", "arguments": "x"},
            {"to": "group", "arguments": ["a=1", "a=2"]},
            {"to": "group", "architecture": ["a", "b"]},
            {"to": "group", "input_shape": "3x-1"},
            {"to": "group", "input_shape": "9999999x9999999x9999999"},
            {"plan": "[" * 100_000},
        ],
    )
    def test_forms_that_are_none(self, client: TestClient, fields: dict[str, Any], checkpoint: bytes) -> None:
        given = {"architecture": RESNET, **fields}
        refused = client.post("/v1/convert", files={"file": ("x.pth", checkpoint)}, data=given)
        assert refused.status_code == 422, refused.text
        assert refused.headers["content-type"] == "application/problem+json"


@pytest.fixture(scope="module")
def artifact(client: TestClient, checkpoint: bytes) -> dict[str, Any]:
    form = {"architecture": RESNET, "to": "frozen"}
    made = client.post("/v1/convert", files={"file": ("resnet18.pth", checkpoint)}, data=form)
    page = client.get("/v1/artifacts", params={"limit": 200}).json()
    return next(item for item in page["items"] if made.headers["location"].endswith(item["id"]))


class TestArtifacts:
    def test_ranges_and_etag(self, client: TestClient, artifact: dict[str, Any]) -> None:
        place, size = f"/v1/artifacts/{artifact['id']}", artifact["bytes"]
        whole = client.get(place)
        assert whole.headers["etag"] == f'"{artifact["sha256"]}"'
        assert len(whole.content) == size
        for asked, expected in (
            ("bytes=0-99", whole.content[:100]),
            ("bytes=100-", whole.content[100:]),
            ("bytes=-7", whole.content[-7:]),
            (f"bytes=5-{10**17}", whole.content[5:]),
        ):
            part = client.get(place, headers={"Range": asked})
            assert part.status_code == 206
            assert part.content == expected
        for asked in ("bytes=x", "lines=1-2", "bytes=1-2" + ",3-4" * 100, "bytes=" + "9" * 5000 + "-"):
            assert client.get(place, headers={"Range": asked}).status_code == 200
        for asked in (f"bytes={size}-", "bytes=5-4", "bytes=-0"):
            refused = client.get(place, headers={"Range": asked})
            assert refused.status_code == 416
            assert refused.headers["content-range"] == f"bytes */{size}"
        fresh = {"If-None-Match": f'"x", {whole.headers["etag"]}'}
        assert client.get(place, headers=fresh).status_code == 304
        stale = {"Range": "bytes=0-9", "If-Range": '"other"'}
        assert client.get(place, headers=stale).status_code == 200
        head = client.head(place)
        assert head.headers["content-length"] == str(size)
        assert head.content == b""

    def test_other_keys_see_nothing(
        self, client: TestClient, artifact: dict[str, Any], model: str, upload: str
    ) -> None:
        other = bearer(client)
        for noun in ("uploads", "models", "datasets", "artifacts"):
            assert client.get(f"/v1/{noun}", headers=other).json() == {"items": [], "next": None}
        for place in (f"artifacts/{artifact['id']}", f"models/{model}", f"models/{model}/sites"):
            assert client.get(f"/v1/{place}", headers=other).status_code == 404
        for place in (f"artifacts/{artifact['id']}", f"models/{model}", f"uploads/{upload}"):
            assert client.delete(f"/v1/{place}", headers=other).status_code == 404
        for noun, body in (
            ("models", {"upload": upload, "architecture": RESNET}),
            ("datasets", {"upload": upload}),
            ("plans", {"model": model, "to": "group"}),
        ):
            assert client.post(f"/v1/{noun}", json=body, headers=other).status_code == 404

    def test_same_content_of_another_key_shows_nowhere(
        self, client: TestClient, artifact: dict[str, Any], checkpoint: bytes
    ) -> None:
        place = f"/v1/artifacts/{artifact['id']}"
        before = client.head(place).headers
        form = {"architecture": RESNET, "to": "frozen"}
        client.post(
            "/v1/convert", files={"file": ("resnet18.pth", checkpoint)}, data=form, headers=bearer(client)
        )
        after = client.head(place).headers
        changing = ("x-request-id",)
        assert {k: v for k, v in before.items() if k not in changing} == {
            k: v for k, v in after.items() if k not in changing
        }

    def test_is_deleted(self, client: TestClient, artifact: dict[str, Any]) -> None:
        place = f"/v1/artifacts/{artifact['id']}"
        assert client.delete(f"/v1/models/{artifact['model']}").status_code == 409
        assert client.delete(place).status_code == 204
        assert client.get(place).status_code == 404


def test_methods_and_architectures(client: TestClient) -> None:
    methods = client.get("/v1/methods").json()
    assert {method["name"] for method in methods} == set(normsearch.METHODS)
    assert client.get("/v1/methods/group").json()["options"]["groups"] is None
    assert client.get("/v1/methods/evil").status_code == 404
    page = client.get("/v1/architectures", params={"match": "*/resnet18", "limit": 1}).json()
    assert page["items"] == ["timm/resnet18"]
    following = client.get("/v1/architectures", params={"match": "*/resnet18", "cursor": page["next"]}).json()
    assert following["items"] == [RESNET]
    assert following["next"] is None
    assert "num_classes" in page["arguments"]["timm"]
    assert client.get("/v1/architectures?match=factories/*").json()["items"] == [
        "factories/digits",
        "factories/small",
    ]


def test_quota_counts_what_is_made(tmp_path: Path, checkpoint: bytes) -> None:
    with served(tmp_path) as asking:
        asking.headers.update(bearer(asking, quota_bytes=60_000_000))
        form = {"architecture": RESNET, "to": "group"}
        refused = asking.post("/v1/convert", files={"file": ("resnet18.pth", checkpoint)}, data=form)
        assert refused.status_code == 413
        assert refused.json()["type"] == "/problems/quota-exceeded"
        # All or nothing.
        for noun in ("uploads", "models", "artifacts"):
            assert asking.get(f"/v1/{noun}").json()["items"] == []
        assert not [path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()]
