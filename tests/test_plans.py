"""Plans: as JSON, on another model than theirs, with patterns and alternatives."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from small_networks import images, pair, trained
from timm.layers import BatchNormAct2d
from torch import nn

from normsearch import (
    MethodError,
    PlanError,
    RefusedError,
    convert,
    plan,
)
from normsearch.plans import Plan

torch.set_num_threads(1)


def test_a_plan_survives_json() -> None:
    model = trained(
        nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.BatchNorm2d(32, momentum=None),
            BatchNormAct2d(32),
            nn.BatchNorm2d(32, affine=False),
        )
    )
    methods = {"1": "group(groups=8)", "2": "switchable(bn_logit=5)", "*": "layer(axes=channel)"}
    the_plan = plan(model, methods, inputs=images())
    read = Plan.from_json(the_plan.to_json())
    assert read == the_plan
    assert [str(read[path]) for path in ("1", "2", "3")] == [
        "group(groups=8)",
        "switchable(bn_logit=5.0)",
        "layer(axes=channel)",
    ]
    assert torch.equal(convert(model, read)(images()), convert(model, the_plan)(images()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda document: document["rows"][0].pop("method"), "rows.0.method"),
        (lambda document: document["rows"].append(document["rows"][0]), "occurs twice"),
        (lambda document: document["rows"][0]["site"].update(colour="red"), "unknown field 'colour'"),
        (lambda document: document["rows"][0]["site"].update(channels="many"), "channels"),
        (lambda document: document.update(version=2), "version"),
    ],
)
def test_a_malformed_plan_is_refused(change: Callable[[dict], object], match: str) -> None:
    document = json.loads(plan(pair(), "group").to_json())
    change(document)
    with pytest.raises(PlanError, match=match):
        Plan.from_json(json.dumps(document))


def test_a_plan_with_an_unknown_method_is_refused() -> None:
    text = plan(pair(), "group").to_json().replace("group(groups=2)", "bogus")
    with pytest.raises(MethodError, match="unknown method 'bogus'"):
        Plan.from_json(text)


def test_text_that_is_no_json_is_no_plan() -> None:
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json("{")


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 32, 3)), "has no BatchNorm layer"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.BatchNorm2d(32)),
            "nothing of 1 of the 2 sites of Sequential, '2' among them",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "channels 32 .* the model has 8"),
        (lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32, eps=1)), "eps 1e-05 .* has 1.0"),
        (lambda: nn.Sequential(nn.Conv1d(3, 32, 3), nn.BatchNorm1d(32)), "layer .*BatchNorm2d .*BatchNorm1d"),
    ],
)
def test_a_plan_for_another_model_is_refused(other: Callable[[], nn.Module], match: str) -> None:
    the_plan = plan(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)), "group")
    with pytest.raises(PlanError, match=match):
        convert(other(), the_plan)


def test_a_plan_is_refused_where_the_model_lost_its_running_statistics() -> None:
    the_plan = plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "frozen")
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(PlanError, match=r"running statistics|track_running_stats"):
        convert(other, the_plan)


def test_a_plan_is_refused_where_a_forward_was_patched_since() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    the_plan = plan(model, "group")
    model[1].forward = lambda x: x
    with pytest.raises(PlanError, match=r"forward method of its own|kind"):
        convert(model, the_plan, in_place=True)


def test_a_plan_is_refused_where_parameters_were_tied_since() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    the_plan = plan(trained(model), "group")
    model[2].weight = model[1].weight
    with pytest.raises(PlanError, match="weight"):
        convert(model, the_plan, in_place=True)


def test_a_plan_with_where_is_an_error() -> None:
    with pytest.raises(PlanError, match="where="):
        convert(pair(), plan(pair(), "group"), where=lambda site: True)


def test_sites_that_no_pattern_matches_stay_batch() -> None:
    model = pair()
    the_plan = plan(model, {"4": "group"})
    converted = convert(model, the_plan)
    assert {path: str(method) for path, method in the_plan.items()} == {"1": "batch", "4": "group(groups=1)"}
    assert type(converted[1]) is nn.BatchNorm2d
    assert [site.path for site, _ in the_plan.changes] == ["4"]


def test_where_keeps_sites_batch() -> None:
    the_plan = plan(pair(), "group", where=lambda site: site.channels != 16)
    assert [str(method) for method in the_plan.values()] == ["group(groups=2)", "batch"]


def test_the_first_method_that_does_not_refuse_is_taken() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    the_plan = plan(model, ["instance", "group"], inputs=images())
    assert [str(method) for method in the_plan.values()] == ["instance", "group(groups=1)"]


def test_what_matches_everything_is_for_the_rest_wherever_it_stands() -> None:
    first, second = (site.path for site in plan(pair(), "group").sites)
    for to in ({"*": "group", second: "rms"}, {second: "rms", "*": "group"}):
        assert [method.name for method in plan(pair(), to).values()] == ["group", "rms"]
    # Of others the first counts.
    both = {f"{second}*": "layer", second: "rms", f"{first}*": "group"}
    assert [method.name for method in plan(pair(), both).values()] == ["group", "layer"]


def test_every_refusal_is_collected() -> None:
    model = nn.Sequential(*(nn.BatchNorm2d(8, track_running_stats=False) for _ in range(3)))
    with pytest.raises(RefusedError) as caught:
        plan(model, "frozen")
    assert [refusal.site for refusal in caught.value.refusals] == ["0", "1", "2"]


def test_a_converted_model_is_called_converted() -> None:
    for method in ("frozen", "weight", "spectral"):
        with pytest.raises(PlanError, match=r"2 of normsearch \(.*\): it is converted already; start from"):
            plan(convert(pair(), method), "group")
    with pytest.raises(PlanError, match="there is nothing to convert"):
        plan(nn.Sequential(nn.Linear(2, 2)), "group")


def test_arguments_of_other_types_are_named() -> None:
    with pytest.raises(PlanError, match="patterns of site paths, which are text, got 1"):
        plan(pair(), {1: "group"})  # type: ignore[dict-item]
    with pytest.raises(PlanError, match="where='x': give a function of a NormSite"):
        plan(pair(), "group", where="x")  # type: ignore[arg-type]
