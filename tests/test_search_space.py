"""What may be combined: sites, ties, vetoes; parameters and plans."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searched import INPUTS, SITES, SPACE, network

import normsearch
from normsearch.errors import PlanError, SearchError
from normsearch.plans import Plan
from normsearch.searching import (
    SearchSpace,
)
from normsearch.searching.space import METHODS


def test_space_lists_what_may_stand_where() -> None:
    space = SearchSpace.of(
        network(), ["batch", "instance", "group"], sites=["[ad].*"], inputs=INPUTS[:, :, :2, :2]
    )
    assert [choice.sites for choice in space.choices] == [("a.1",), ("d.1",)]
    assert space.allowed == {"a.1": ("batch", "instance", "group"), "d.1": ("batch", "group")}
    assert [(refusal.site, refusal.method) for refusal in space.refusals] == [("d.1", "instance")]
    assert space.size == 6
    plan = space.plan(space.uniform("instance"))
    assert [str(plan[path]) for path in SITES] == ["instance", "batch", "batch", "batch"]


def test_batch_independent_leaves_the_others_out() -> None:
    space = SearchSpace.of(network(), METHODS, batch_independent=True)
    assert all(normsearch.parse_method(m).batch_independent for row in space.allowed.values() for m in row)
    assert {refusal.method for refusal in space.refusals} == {
        "batch",
        "batch_instance",
        "switchable",
        "batch_renorm",
    }


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"methods": []}, SearchError, "methods is empty"),
        ({"methods": ["group"]}, SearchError, "one plan only"),
        ({"methods": ["group", "nothing"]}, normsearch.MethodError, "nothing"),
        ({"sites": ["x*"]}, PlanError, "'x*'"),
        ({"sites": []}, PlanError, "empty list"),
    ],
)
def test_space_says_what_is_wrong(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said.replace("*", r"\*")):
        SearchSpace.of(network(), **arguments)


def test_ties_keep_to_stages_until_there_are_no_more() -> None:
    space = SearchSpace.of(network(), ["batch", "group"], inputs=INPUTS)
    assert [choice.sites for choice in space.tied(4).choices] == [(path,) for path in SITES]
    assert [choice.sites for choice in space.tied(3).choices] == [("a.1",), ("b.1", "c.1"), ("d.1",)]
    assert [choice.sites for choice in space.tied(2).choices] == [("a.1", "b.1", "c.1"), ("d.1",)]
    assert [choice.sites for choice in space.tied(1).choices] == [tuple(SITES)]
    assert space.tied(1).choices[0].name == "a.1 +3"


def test_a_tied_site_gets_the_preferred_method_where_the_choice_may_not_stand() -> None:
    space = SearchSpace.of(network(), ["group", "instance"], inputs=INPUTS[:, :, :2, :2]).tied(1)
    # instance may stand at a.1 alone: at less than half of the tied sites.
    assert space.choices[0].methods == ("group",)
    space = SearchSpace.of(network(), ["group", "instance"], inputs=INPUTS).without(
        {"b.1": ["instance"]}, "why"
    )
    plan = space.tied(2).plan({"a.1 +2": "instance", "d.1": "instance"})
    assert [plan[path].name for path in SITES] == ["instance", "group", "instance", "instance"]
    costs = {path: {"group": 1.0, "instance": 10.0} for path in SITES}
    assert space.tied(2).by_choice(costs)["a.1 +2"] == {"group": 3.0, "instance": 21.0}


def test_a_veto_leaves_a_sites_last_method() -> None:
    space = SearchSpace.of(network(), ["group", "instance"]).without({"d.1": ["group", "instance"]}, "why")
    assert space.allowed["d.1"] == ("group", "instance")


@given(st.lists(st.sampled_from(METHODS), min_size=4, max_size=4))
@settings(max_examples=20, deadline=None)
def test_parameters_and_plans_say_the_same(methods: list[str]) -> None:
    space = SPACE
    params = space.params(dict(zip(SITES, methods, strict=True)))
    assert params == dict(zip(SITES, methods, strict=True))
    assert [plan_spelling(space.plan(params), path) for path in SITES] == [
        str(normsearch.parse_method(m).resolve(site)) for m, site in zip(methods, space.sites, strict=True)
    ]


def plan_spelling(plan: Plan, path: str) -> str:
    return str(plan[path])
