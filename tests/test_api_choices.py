"""POST /v1/plans/choices: what each method would mean at each site, beside what the library says."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from serving import served
from starlette.testclient import TestClient

import normsearch
from api.engine.digits import network
from api.settings import Settings

METHODS = ["frozen", "group", "instance", "layer(axes=channel)", "identity"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with served(tmp_path_factory.mktemp("choices"), open=True, workers=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client: TestClient) -> str:
    held = io.BytesIO()
    torch.manual_seed(0)
    torch.save(network().state_dict(), held)
    upload = client.put("/v1/uploads?filename=digits.pth", content=held.getvalue()).json()
    made = client.post("/v1/models", json={"upload": upload["id"], "architecture": "factories/digits"})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def test_is_what_the_library_says(client: TestClient, model: str) -> None:
    asked = {"model": model, "methods": METHODS, "input_shape": "1x8x8"}
    found = client.post("/v1/plans/choices", json=asked).json()
    inputs, original = torch.randn(2, 1, 8, 8), network().eval()
    assert found["methods"] == METHODS
    sites = normsearch.find_sites(original, inputs)
    assert [site["path"] for site in found["sites"]] == [site.path for site in sites]
    assert [site["input_shapes"] for site in found["sites"]] == [
        [list(shape) for shape in asdict(site)["input_shapes"]] for site in sites
    ]
    for column, method in enumerate(METHODS):
        explained = normsearch.explain(original, method, inputs=inputs)
        for row, cells in zip(explained.rows, found["choices"], strict=True):
            cell: dict[str, Any] = cells[column]
            assert cell["method"] == (None if row.method is None else str(row.method))
            assert cell["notes"] == list(row.notes)
            if row.method is None:
                (refusal,) = row.refusals
                assert cell["reason"] == refusal.reason
                assert cell["fix"] == refusal.remedy
            else:
                assert cell["exact"] == row.method.exact_at(row.site)
    assert {cells[2]["method"] is None for cells in found["choices"]} == {True, False}


def test_order_is_that_of_the_data(client: TestClient, model: str) -> None:
    found = client.post("/v1/plans/choices", json={"model": model, "input_shape": "1x8x8"}).json()
    assert found["methods"] == list(normsearch.METHODS)
    called: list[str] = []
    original = network().eval()
    for path, module in original.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(lambda *_, path=path: called.append(path))
    original(torch.randn(2, 1, 8, 8))
    assert found["order"] == called
    without = client.post("/v1/plans/choices", json={"model": model, "methods": ["group"]}).json()
    assert without["order"] is None


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"methods": ["groop"]}, 422, "groop"),
        ({"methods": []}, 422, "methods"),
        ({"model": "mod_0"}, 404, "mod_0"),
        ({"input_shape": "3x8x8"}, 422, "failed on the given inputs"),
        ({"input_shape": "1x8x8", "dataset": "dat_0"}, 422, "not both"),
    ],
)
def test_refusals(client: TestClient, model: str, change: dict[str, Any], status: int, said: str) -> None:
    answer = client.post("/v1/plans/choices", json={"model": model, **change})
    assert answer.status_code == status
    assert said in answer.json()["detail"]


def test_operators_may_give_the_examples_name_to_a_network_of_their_own() -> None:
    assert Settings().networks == {"digits": "api.engine.digits:network"}
    own = Settings(factories={"digits": "mine:Net", "other": "mine:Other"})
    assert own.networks == {"digits": "mine:Net", "other": "mine:Other"}
