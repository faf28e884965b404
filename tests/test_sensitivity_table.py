"""Sensitivity as a table: what may be chosen from it, JSON, how it is printed."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from residual import METHODS, Residual, images, trained
from rich.console import Console
from torch import nn
from torchvision import models

from normsearch import (
    MethodError,
    PlanError,
    Refusal,
    Sensitivity,
    convert,
    sensitivity,
)
from normsearch.reports import Environment

HERE = Environment("cpu", "float32", 1, "2.14.1", "3.11")


def table() -> Sensitivity:
    return Sensitivity(
        ("a", "b[0]", "c"),
        ("instance", "group"),
        {
            "a": {"instance": 0.1, "group": 0.01},
            "b[0]": {"instance": 0.6, "group": 0.3},
            "c": {"instance": None, "group": math.inf},
        },
        (Refusal("c", "instance", "one element", "choose group"),),
        HERE,
    )


def test_vetoes_follow_the_threshold() -> None:
    assert table().vetoes() == {"b[0]": ("instance", "group"), "c": ("instance", "group")}
    assert table().vetoes(threshold=0.5) == {"b[0]": ("instance",), "c": ("instance", "group")}
    assert table().vetoes(threshold=0.05)["a"] == ("instance",)


def test_preferring_takes_the_first_that_may_stand_and_else_the_last() -> None:
    assert table().preferring("instance", "group") == {"a": "instance", "b[[]0]": "group", "c": "group"}
    assert table().preferring("instance", "group", "frozen", threshold=0.5) == {
        "a": "instance",
        "b[[]0]": "group",
        "c": "frozen",
    }


def test_what_is_preferred_converts() -> None:
    network = trained(nn.ModuleDict({"odd[*]name": nn.BatchNorm2d(3)}))
    network.forward = lambda x: network["odd[*]name"](x)  # type: ignore[method-assign]
    result = sensitivity(network, "instance", images())
    mixed = result.preferring("instance", "frozen", threshold=1e-9)
    assert type(convert(network, mixed)["odd[*]name"]).__name__ == "FrozenBatchNorm"
    mixed = result.preferring("instance", "frozen", threshold=1e9)
    assert type(convert(network, mixed)["odd[*]name"]).__name__ == "InstanceNorm2d"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: table().vetoes(threshold=0), PlanError, "threshold=0"),
        (lambda: table().preferring("instance", "group", threshold=math.nan), PlanError, "threshold=nan"),
        (lambda: table().preferring(), PlanError, "no method"),
        (lambda: table().preferring("layer", "group"), PlanError, "layer was not measured"),
        (lambda: table().preferring("grupp", "group"), MethodError, "grupp"),
    ],
)
def test_choices_that_cannot_be_made(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# --- as data -----------------------------------------------------------------------------------------


def test_json_keeps_everything() -> None:
    assert Sensitivity.from_json(table().to_json()) == table()
    measured = sensitivity(trained(Residual()), METHODS, images())
    assert Sensitivity.from_json(measured.to_json()) == measured
    json.loads(measured.to_json(), parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("sites"), "sites"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["drift"].pop("a"), "each site"),
        (lambda d: d["drift"]["a"].pop("group"), "each method"),
        (lambda d: d["drift"]["a"].update(group=-1), "at least 0"),
        (lambda d: d["drift"]["a"].update(group="nan"), "at least 0"),
        (lambda d: d["drift"]["a"].update(group="a lot"), "valid number"),
        (lambda d: d["refusals"][0].pop("reason"), "reason"),
        (lambda d: d["environment"].update(threads="many"), "threads"),
    ],
)
def test_malformed_json_is_refused(change: Any, words: str) -> None:
    document = json.loads(table().to_json())
    change(document)
    with pytest.raises(PlanError, match=words):
        Sensitivity.from_json(json.dumps(document))
    with pytest.raises(PlanError, match="not a sensitivity"):
        Sensitivity.from_json(b"\xff")


def test_a_misspelt_method_in_json_is_refused() -> None:
    text = table().to_json().replace("instance", "insistence")
    with pytest.raises(MethodError, match="insistence"):
        Sensitivity.from_json(text)


def printed(result: Sensitivity, **options: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=80, legacy_windows=False, **options).print(result)
    return out.getvalue()


def test_the_table_shows_every_number_at_80_columns() -> None:
    methods = [
        "group",
        "group(groups=32)",
        "layer",
        "layer(axes=channel)",
        "rms",
        "instance",
        "switchable",
        "frozen",
    ]
    network = trained(models.resnet18(weights=None))
    result = sensitivity(network, methods, images(1, 32), sites=["layer2.*"])
    text = printed(result)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for site in result.sites:
        (line,) = (line for line in lines if line.split()[:1] == [site])
        # One number per method, to the digits that fit: none is cut off or folded.
        shown = [float(number) for number in line.split()[1:]]
        for method, number in zip(methods, shown, strict=True):
            assert number == pytest.approx(
                result.drift[site][method], rel=0.5 if number < 5e-4 else 0, abs=6e-4
            )
    # Letters stand for the methods, whose spellings follow in full.
    assert [line.split() for line in lines if line.split()[1:2] and line.split()[1] in methods] == [
        [letter, method] for letter, method in zip("ABCDEFGH", methods, strict=True)
    ]


def test_the_table_names_few_methods_and_shades_by_drift() -> None:
    text = printed(table())
    assert ["site", "instance", "group"] in [line.split() for line in text.splitlines()]
    assert ["b[0]", "0.600", "0.300"] in [line.split() for line in text.splitlines()]
    assert ["c", "×", "inf"] in [line.split() for line in text.splitlines()]
    coloured = printed(table(), color_system="truecolor", force_terminal=True)
    low, high = coloured.index("0.010"), coloured.index("0.600")
    assert coloured[:low].rpartition("\x1b[")[2] != coloured[:high].rpartition("\x1b[")[2]
