"""The search: what may be combined, a resident model, costs, sensing, confirmation, all of it together."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from torch import Tensor, nn
from torch.nn import functional as F

import normsearch
from normsearch.errors import PlanError, SearchError
from normsearch.plans import Plan
from normsearch.searching import (
    BatchIndependent,
    MaxDrop,
    MaxLatency,
    MaxMemory,
    Recipe,
    Resident,
    Search,
    SearchSpace,
    Task,
    accuracy,
    join,
    measure_costs,
    sense,
)
from normsearch.searching.confirming import Candidate, decide
from normsearch.searching.learned import learned_params
from normsearch.searching.posterior import Posterior
from normsearch.searching.space import METHODS


class Net(nn.Module):
    """Three stages of one, two and two sites."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.d = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.d(self.c(self.b(self.a(x)))).mean((2, 3)))
        return y


def network() -> nn.Module:
    """Return a net whose statistics are not the initial ones."""
    net = Net().train()
    for _ in range(3):
        net(torch.randn(8, 1, 8, 8) * 2 + 1)
    return net.eval()


SITES = ["a.1", "b.1", "c.1", "d.1"]
INPUTS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def pairs(count: int, seed: int = 0, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return batches whose class is told by the image's brightness."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        y = torch.randint(3, (size,), generator=generator)
        batches.append((torch.randn(size, 1, 8, 8, generator=generator) + y[:, None, None, None], y))
    return batches


def task(steps: int = 4, **changes: Any) -> Task:
    """Return a small task."""
    recipe = Recipe(steps=steps, lr=1e-2)
    given = {"train": pairs(4), "validation": pairs(4, 1), "loss": F.cross_entropy, "metric": accuracy}
    return Task(**{**given, "recipe": recipe, **changes})


# What may be combined.


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


SPACE = SearchSpace.of(network())


# One model in memory.


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything that a conversion or training could change."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "parameters": [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("modules", "parameters", "hooks"):
        assert one[name] == other[name], name
    assert list(one["state"]) == list(other["state"])
    assert all(torch.equal(a, b) for a, b in zip(one["state"].values(), other["state"].values(), strict=True))


MORE = [*METHODS, "weight", "weight(mean_only=true)", "spectral", "filter_response", "evonorm_s0", "frozen"]


@pytest.mark.parametrize("method", MORE)
@pytest.mark.parametrize("name", ["net", "resnet10t", "tinynet_e"])
def test_resident_is_what_convert_gives_and_then_itself_again(method: str, name: str) -> None:
    torch.manual_seed(0)
    model = network() if name == "net" else timm.create_model(name, num_classes=3).eval()
    x = INPUTS if name == "net" else torch.randn(2, 3, 64, 64)
    resident = Resident(model)
    plan = normsearch.plan(model, method)
    before = snapshot(resident.model)
    wanted = normsearch.convert(model, plan)
    for _ in range(2):
        with resident.converted(plan) as converted:
            assert list(converted.state_dict()) == list(wanted.state_dict())
            assert torch.equal(converted(x), wanted(x))
            converted.train()
            converted(x).square().sum().backward()
            with torch.no_grad():
                for parameter in converted.parameters():
                    parameter.add_(1)
        assert_same(before, snapshot(resident.model))


@pytest.mark.parametrize("spoil", ["double", "requires_grad", "hook", "attribute", "error"])
def test_whatever_is_done_to_a_resident_is_undone(spoil: str) -> None:
    resident = Resident(network())
    before = snapshot(resident.model)
    plan = normsearch.plan(resident.model, {"*": "switchable"})
    try:
        with resident.converted(plan) as converted:
            if spoil == "double":
                converted.double()
            elif spoil == "requires_grad":
                converted.requires_grad_(False)
            elif spoil == "hook":
                converted.a[0].register_forward_pre_hook(lambda module, args: None)
            elif spoil == "attribute":
                converted.a[0].weight = nn.Parameter(torch.zeros(4, 1, 3, 3))
                converted.a.extra = nn.Linear(2, 2)
            else:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert spoil == "error"
    assert_same(before, snapshot(resident.model))


class Calls(nn.Module):
    """A model that calls F.batch_norm itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4) * 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)


def test_resident_of_functional_calls() -> None:
    model = Calls().eval()
    resident = Resident(model)
    plan = normsearch.plan(model, "group")
    with resident.converted(plan) as converted:
        assert torch.allclose(converted(INPUTS), normsearch.convert(model, plan)(INPUTS))
    assert torch.allclose(resident.model(INPUTS), model(INPUTS))


# Costs.


def test_a_plans_cost_is_the_sum_of_its_sites() -> None:
    resident = Resident(network())
    table = measure_costs(resident, SPACE, INPUTS)
    assert table.of(SPACE.plan(SPACE.uniform("batch")), "latency") == table.base_latency > 0
    mixed = SPACE.plan({"a.1": "group", "b.1": "switchable", "c.1": "batch", "d.1": "batch"})
    wanted = table.base_memory + table.memory["a.1"]["group"] + table.memory["b.1"]["switchable"]
    assert table.of(mixed, "memory") == wanted
    assert table.base_memory > INPUTS.numel() * 4
    with pytest.raises(SearchError, match="was not measured"):
        table.of(normsearch.plan(network(), "rms"), "latency")
    with pytest.raises(SearchError, match="'energy' is no cost"):
        table.table("energy")


# Sensing.


def test_sensing_finds_a_ruinous_method_and_leaves_the_model_alone() -> None:
    resident = Resident(network())
    before = snapshot(resident.model)
    # Brightness tells the class, which instance norm removes, wherever it stands.
    space = SearchSpace.of(resident.model, ["batch", "instance"], inputs=INPUTS)
    table = sense(resident, space, task(steps=40), seed=3)
    assert_same(before, snapshot(resident.model))
    assert set(table) == set(SITES)
    assert sum(row["batch"] - row["instance"] for row in table.values()) > 0.5
    assert table == sense(resident, space, task(steps=40), seed=3)
    state = torch.get_rng_state()
    sense(resident, space, task(steps=2), seed=4)
    assert torch.equal(state, torch.get_rng_state())


def test_gates_are_read_as_choices() -> None:
    space = SearchSpace.of(network(), ["batch", "instance", "batch_instance", "switchable"])
    plan = space.plan({"a.1": "batch_instance", "b.1": "switchable", "c.1": "batch_instance", "d.1": "batch"})
    model = normsearch.convert(network(), plan)
    with torch.no_grad():
        model.a[1].rho.fill_(0.2)
        model.c[1].rho.fill_(0.9)
        for logits in (model.b[1].mean_logits, model.b[1].var_logits):
            # Layer norm leads, but is not offered; instance comes next.
            logits.copy_(torch.tensor([1.0, 3.0, 0.0]))
    assert learned_params(model, plan, space) == {
        "a.1": "instance",
        "b.1": "instance",
        "c.1": "batch",
        "d.1": "batch",
    }
    assert learned_params(network(), space.plan(space.uniform("batch")), space) is None


# Confirmation.


def candidate(number: int, uniform: str | None = None) -> Candidate:
    return Candidate(number, {}, uniform, 0.0)


def test_a_mix_is_taken_only_beyond_noise() -> None:
    given = [candidate(0, "group"), candidate(1), candidate(2)]
    scores = {0: [0.5, 0.6, 0.7], 1: [0.51, 0.61, 0.71], 2: [0.9, 0.2, 0.9]}
    chosen, rows = decide(given, lambda c, seed: scores[c.number][seed], range(3), maximize=True)
    # Trial 2 gains more in the mean, but not beyond noise.
    assert chosen == 1
    assert rows[1].gain == pytest.approx(0.01)
    assert rows[1].beats
    assert not rows[2].beats
    assert rows[2].gain == pytest.approx(0.2 / 3)
    chosen, _ = decide(given[::2], lambda c, seed: scores[c.number][seed], range(3), maximize=True)
    assert chosen == 0


def test_smaller_may_be_better() -> None:
    given = [candidate(0, "group"), candidate(1)]
    scores = {0: [0.5, 0.6, 0.7], 1: [0.4, 0.51, 0.6]}
    chosen, rows = decide(given, lambda c, seed: scores[c.number][seed], range(3), maximize=False)
    assert chosen == 1
    assert rows[1].gain == pytest.approx(0.29 / 3)


def test_one_seed_confirms_nothing() -> None:
    given = [candidate(0, "group"), candidate(1)]
    assert decide(given, lambda c, seed: c.number, [7], maximize=True)[0] == 0


# All together.


class Planted:
    """An objective that knows the best plan: how many sites have it."""

    best: Mapping[str, str] = {
        "a.1": "GroupNorm",
        "b.1": "InstanceNorm2d",
        "c.1": "BatchNorm2d",
        "d.1": "GroupNorm",
    }

    def __init__(self) -> None:
        self.calls = 0
        self.stop_at: int | None = None

    def __call__(self, model: nn.Module, trial: Any) -> float:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        layers = {path: type(model.get_submodule(path)).__name__ for path in SITES}
        return sum(layers[path] == name for path, name in self.best.items()) / 4


OPTIONS: dict[str, Any] = {"methods": ["batch", "group", "instance"], "n_trials": 25, "confirm": 2}


def trials(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.params, t.values, t.state) for t in study.trials]


def test_search_finds_a_planted_plan_and_never_changes_the_model() -> None:
    model = network()
    before = snapshot(model)
    result = normsearch.search(model, Planted(), **OPTIONS)
    assert_same(before, snapshot(model))
    assert [type(result.model.get_submodule(p)).__name__ for p in SITES] == list(Planted.best.values())
    assert result.confirmation[0].uniform is not None
    assert result.confirmation[result.chosen].scores == (1.0, 1.0)
    assert result.same_split
    origins = [t.user_attrs.get("origin") for t in result.study.trials]
    assert origins[:3] == ["uniform"] * 3
    assert trials(result.study) == trials(normsearch.search(model, Planted(), **OPTIONS).study)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = normsearch.search(network(), Planted(), **OPTIONS)
    objective = Planted()
    objective.stop_at = 12
    kept = {"storage": tmp_path / "study.journal", "name": "s"}
    with pytest.raises(KeyboardInterrupt):
        normsearch.search(network(), objective, **OPTIONS, **kept)
    resumed = normsearch.search(network(), objective, **OPTIONS, **kept)
    assert trials(resumed.study) == trials(whole.study)
    calls = objective.calls
    again = normsearch.search(network(), objective, **OPTIONS, **kept)
    # All that is run again is the training of the plan that is returned.
    assert objective.calls == calls + 1
    assert again.best == resumed.best
    with pytest.raises(SearchError, match="seed=0, now it is 1"):
        normsearch.search(network(), objective, **OPTIONS, **kept, seed=1)


def test_task_is_trained_and_confirmed_on_data_that_no_trial_saw() -> None:
    seen: list[Tensor] = []

    def metric(model: nn.Module, given: Any) -> float:
        given = list(given)
        seen.append(torch.cat([x for x, _ in given]))
        return accuracy(model, given)

    validation = pairs(4, 1)
    result = normsearch.search(
        network(),
        task(metric=metric, validation=validation),
        methods=["batch", "group", "switchable"],
        n_trials=9,
        confirm=2,
        top=1,
    )
    searched, confirmed = (torch.cat([x for x, _ in validation[i::2]]) for i in (0, 1))
    # The first is the original's, by which the study knows its task.
    count = 1 + len(result.study.trials)
    assert all(torch.equal(x, searched) for x in seen[:count])
    assert all(torch.equal(x, confirmed) for x in seen[count:])
    assert len(seen) == count + 2 * len(result.confirmation) + 1
    assert not result.same_split
    assert set(result.prior or {}) == set(result.space.distributions)
    assert accuracy(result.model.eval(), validation[1::2]) == pytest.approx(
        result.confirmation[result.chosen].scores[0]
    )


def test_what_a_uniform_plans_gates_learned_is_tried_next() -> None:
    def objective(model: nn.Module, trial: Any) -> float:
        if isinstance(model.a[1], normsearch.methods.SwitchableNorm):
            with torch.no_grad():
                model.a[1].mean_logits.copy_(torch.tensor([9.0, 0.0, 0.0]))
        return 0.0

    result = normsearch.search(
        network(), objective, **OPTIONS | {"methods": ["batch", "instance", "switchable"]}
    )
    learned = [t for t in result.study.trials if t.user_attrs.get("origin") == "learned"]
    assert [t.params for t in learned] == [{"a.1": "instance"} | dict.fromkeys(SITES[1:], "batch")]
    assert learned[0].number == 3


def test_a_task_tries_no_more_plans_than_there_are() -> None:
    result = normsearch.search(network(), task(), methods=["batch", "group"], sites=["a.1", "b.1"], confirm=1)
    assert len(result.study.trials) == len({tuple(t.params.values()) for t in result.study.trials}) == 4


@pytest.mark.parametrize("sampler", ["norm", "tpe", "nsga2", "random", optuna.samplers.RandomSampler(seed=1)])
def test_every_sampler_runs(sampler: Any) -> None:
    result = normsearch.search(network(), Planted(), **OPTIONS | {"n_trials": 8, "sampler": sampler})
    assert len(result.study.trials) == 8


def test_costs_are_objectives_and_ceilings() -> None:
    result = normsearch.search(
        network(), Planted(), **OPTIONS, costs=["memory"], constraints=[MaxLatency(1e9)], inputs=[INPUTS]
    )
    assert result.costs is not None
    assert len(result.study.directions) == 2
    for trial in result.study.trials:
        assert trial.values[1] == result.costs.of(result.space.plan(trial.params), "memory")


def test_no_plan_over_a_known_ceiling_is_proposed_or_tried() -> None:
    result = normsearch.search(
        network(), Planted(), **OPTIONS, constraints=[MaxMemory(1.0)], inputs=[INPUTS], veto=None
    )
    assert result.costs is not None
    table, limit, choices = result.costs, result.costs.base("memory"), result.space.distributions
    every = itertools.product(*(distribution.choices for distribution in choices.values()))
    plans = {p: result.space.plan(dict(zip(choices, p, strict=True))) for p in every}
    under = {p for p, plan in plans.items() if table.of(plan, "memory") <= limit}
    assert 0 < len(under) < len(plans)
    # What is over comes when nothing else is left, and is not trained.
    tried = [(tuple(t.params[name] for name in choices), t.state) for t in result.study.trials]
    assert {plan for plan, _ in tried[: len(under)]} == under
    assert {plan for plan, state in tried if state == TrialState.COMPLETE} == under


def test_constraints_on_the_score_and_on_the_batch() -> None:
    result = normsearch.search(
        network(), Planted(), **OPTIONS, constraints=[MaxDrop(0.0), BatchIndependent()], inputs=[INPUTS]
    )
    # The original scores ¼; no plan below it may be chosen, and none has BatchNorm.
    assert all("batch" not in t.params.values() for t in result.study.trials)
    bad = [t for t in result.study.trials if t.values[0] < 0.25]
    assert bad
    assert all(t.constraints["MaxDrop"] > 0 for t in bad)
    assert result.confirmation[result.chosen].mean == 0.75


def test_ask_and_tell() -> None:
    run = Search(network(), None, methods=["batch", "group"], n_trials=5)
    for _ in range(5):
        trial = run.ask()
        run.tell(trial, sum(method.name == "group" for method in run.plan(trial).values()))
    assert run.study.best_value == 4
    with pytest.raises(SearchError, match="all 5 trials"):
        run.ask()
    with pytest.raises(SearchError, match="no objective"):
        run.optimize()


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("good", "returned str"),
        ((1.0, 2.0), "2 numbers for 1 directions"),
        (float("nan"), "finite numbers"),
        (None, "NoneType"),
    ],
)
def test_an_objective_that_returns_something_else(returned: Any, said: str) -> None:
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), lambda model, trial: returned, **OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n_trials": 0}, "n_trials=0"),
        ({"directions": ["up"]}, "maximize"),
        ({"costs": ["energy"]}, "is no cost"),
        ({"costs": ["latency"]}, "give inputs="),
        ({"constraints": ["latency"]}, "no constraint"),
        ({"constraints": [MaxDrop(0.1), MaxDrop(0.2)]}, "give each once"),
        ({"sampler": "best"}, "none of auto"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), Planted(), **arguments)


def test_the_posterior_knows_what_was_planted() -> None:
    result = normsearch.search(network(), Planted(), **OPTIONS)
    done = result.study.trials
    posterior = Posterior(result.space, done, [t.values[0] for t in done])
    effects = posterior.effects(result.params)
    assert {name: max(row, key=lambda m: row[m].mean) for name, row in effects.items()} == result.params
    for name, row in effects.items():
        assert row[result.params[name]].mean == pytest.approx(0, abs=1e-9)
        assert sum(effect.trials for effect in row.values()) == len(done)


def test_a_list_of_batches_is_trained_in_an_order_that_follows_the_seed() -> None:
    scores = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = network()
        torch.manual_seed(seed)
        task(steps=3)(model, optuna.trial.FixedTrial({}))
        scores.append(model.head.weight.detach().clone())  # type: ignore[union-attr]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_without_confirmation_the_best_plan_is_taken_at_its_word() -> None:
    def objective(model: nn.Module, trial: Any) -> float:
        return float(trial.params["a.1"] == "group") + float(trial.params["b.1"] == "batch")

    found = normsearch.search(
        network(), objective, methods=["batch", "group"], sites=["[ab].*"], n_trials=8, confirm=0
    )
    assert found.confirmation == ()
    assert found.params == {"a.1": "group", "b.1": "batch"}


def test_a_tasks_splits_must_be_readable_twice() -> None:
    with pytest.raises(SearchError, match="only once"):
        task(train=iter(pairs(3)))
    with pytest.raises(SearchError, match="fewer than two batches"):
        task(validation=pairs(1))


def test_a_loader_with_its_own_generator_starts_each_trial_alike() -> None:
    orders: list[list[int]] = []
    data = torch.utils.data.TensorDataset(
        torch.arange(12.0).reshape(12, 1), torch.zeros(12, dtype=torch.long)
    )
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=torch.Generator())

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean()

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4))

        def forward(self, x: Tensor) -> Tensor:
            orders.append(x.flatten().tolist())
            y: Tensor = self.net(x)
            return y

    given = Task(
        train=loader,
        validation=pairs(2),
        loss=loss,
        metric=lambda model, batches: 0.0,
        recipe=Recipe(steps=3),
    )
    for _ in range(2):
        torch.manual_seed(5)
        given(copy.deepcopy(Watching()), optuna.trial.FixedTrial({}))
    assert orders[:3] == orders[3:6]


def test_objectives_may_suggest_more() -> None:
    def objective(model: nn.Module, trial: Any) -> float:
        return -abs(trial.suggest_float("lr", 0.0, 1.0) - 0.5)

    result = normsearch.search(network(), objective, **OPTIONS | {"n_trials": 6})
    assert "lr" in result.params


def test_a_worker_waits_until_trials_begin_and_then_joins(tmp_path: Path) -> None:
    kept = {"storage": tmp_path / "study.journal", "name": "s"}
    run = Search(network(), Planted(), methods=["batch", "group", "instance"], n_trials=6, **kept)
    # As if the search were still at it.
    run.study.set_user_attr("normsearch:ready", None)
    told: list[str] = []

    def follow(progress: normsearch.Progress) -> None:
        told.append(progress.stage)
        if progress.stage.startswith("waiting"):
            run.memory.keep("ready", True)

    join(network(), Planted(), **kept, on_progress=follow)
    assert told[0].startswith("waiting")
    assert len(run.study.trials) == 6
    with pytest.raises(SearchError, match="no study 't'; it has s"):
        join(network(), Planted(), storage=kept["storage"], name="t")
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(SearchError, match=r"4 channels at 'a.1'; this one has nothing there"):
        join(other, Planted(), **kept)
    with pytest.raises(SearchError, match="memory"):
        join(network(), Planted(), storage=optuna.storages.InMemoryStorage(), name="s")


# What a newcomer tried.


def test_a_study_is_not_gone_on_with_for_another_network_or_task(tmp_path: Path) -> None:
    kept = {"storage": tmp_path / "study.journal", "name": "s", "n_trials": 3, "confirm": 1}
    few = {"methods": ["batch", "group"], **kept}
    normsearch.search(network(), task(), **few)
    other = network()
    with torch.no_grad():
        other.head.bias.add_(1)
    with pytest.raises(SearchError, match="other weights"):
        normsearch.search(other, task(), **few)
    with pytest.raises(SearchError, match="other recipe"):
        normsearch.search(network(), task(steps=5), **few)
    with pytest.raises(SearchError, match="other loss"):
        normsearch.search(network(), task(loss=F.nll_loss), **few)
    with pytest.raises(SearchError, match="other the original's score"):
        normsearch.search(network(), task(validation=pairs(4, 7)), **few)
    normsearch.search(network(), Planted(), **few | {"name": "t"})
    with pytest.raises(SearchError, match="other objective"):
        normsearch.search(network(), lambda model, trial: 0.0, **few | {"name": "t"})


def test_a_search_that_failed_goes_on_when_the_objective_is_mended(tmp_path: Path) -> None:
    broken = True

    def objective(model: nn.Module, trial: Any) -> float:
        if broken:
            raise RuntimeError("not yet")
        return Planted()(model, trial)

    kept = {"storage": tmp_path / "study.journal", "name": "s"}
    with pytest.raises(SearchError, match="not yet"):
        normsearch.search(network(), objective, **OPTIONS, **kept)
    broken = False
    result = normsearch.search(network(), objective, **OPTIONS, **kept)
    done = [t.params for t in result.study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert all(result.space.uniform(m) in done for m in result.space.methods)


def test_a_gain_of_one_sample_is_no_gain_however_well_seeds_agree() -> None:
    given = [candidate(0, "group"), candidate(1)]
    scores = {0: 0.9771, 1: 0.98}
    for samples, chosen in ((350, 0), (35_000, 1), (None, 1)):
        taken, rows = decide(
            given, lambda c, seed: scores[c.number], range(3), maximize=True, samples=samples
        )
        assert taken == chosen
        assert (rows[1].error or 0) == pytest.approx(
            0 if samples is None else (0.0029 / samples) ** 0.5, rel=0.01
        )


def test_validation_that_shuffles_cannot_be_halved() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(3, (64,)))
    loader = torch.utils.data.DataLoader(data, 16, shuffle=True)
    with pytest.raises(SearchError, match="other batches each time"):
        task(validation=loader)
    task(validation=loader, confirmation=pairs(1))


def test_every_generator_is_seeded() -> None:
    def objective(model: nn.Module, trial: Any) -> float:
        return float(np.random.rand()) + random.random() + float(torch.rand(()))  # noqa: NPY002

    state = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    result = normsearch.search(network(), objective, **OPTIONS | {"n_trials": 5, "confirm": 0})
    assert len({t.value for t in result.study.trials}) == 1
    assert state == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


def test_what_cannot_be_trained_is_left_out_and_named() -> None:
    ones = [(x[:1], y[:1]) for x, y in pairs(6)]
    given = task(train=ones, loss=F.cross_entropy)
    # One value per channel at the last sites: BatchNorm and instance norm raise.
    small = nn.Sequential(
        nn.Conv2d(1, 4, 8),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()
    result = normsearch.search(small, given, methods=["batch", "group", "frozen"], n_trials=4, confirm=1)
    assert {t.state for t in result.study.trials} == {optuna.trial.TrialState.COMPLETE}
    assert all("batch" not in t.params.values() for t in result.study.trials)
    assert "Expected more than 1 value per channel" in result.space.refusals[0].reason
    # Where a site alone cannot have a method, as a linear layer's cannot have instance norm, the others may.
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4), nn.BatchNorm1d(4)]
    mixed = nn.Sequential(*layers, nn.Linear(4, 3)).eval()
    result = normsearch.search(mixed, task(), methods=["batch", "instance"], n_trials=4, confirm=1, veto=None)
    assert result.space.allowed == {"1": ("batch", "instance"), "4": ("batch",)}
    with pytest.raises(SearchError, match="whatever its normalization: TypeError"):
        normsearch.search(network(), task(loss=lambda output: output.sum()), n_trials=4)


def test_a_plan_that_fails_in_the_confirmation_is_named() -> None:
    calls = 0

    def objective(model: nn.Module, trial: Any) -> float:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise ValueError("flaky")
        return 1.0

    with pytest.raises(SearchError, match=r"failed when it was run again with seed 1 .*flaky"):
        normsearch.search(network(), objective, **OPTIONS | {"n_trials": 5})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"confirm": -1}, "confirm=-1"),
        ({"confirm": 2.0}, "confirm=2.0"),
        ({"top": 0}, "top=0"),
        ({"seed": "a"}, "seed='a'"),
        ({"veto": float("nan")}, "veto=nan"),
        ({"methods": None}, "methods=None"),
        ({"sites": [1]}, r"sites=\[1\]"),
        ({"name": ""}, "name=''"),
        ({"name": "../evil"}, "names the journal too"),
        ({"name": "a\0b"}, "printable"),
    ],
)
def test_arguments_of_other_kinds(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), Planted(), **OPTIONS | arguments)


def test_what_was_refused_does_not_bind_a_name(tmp_path: Path) -> None:
    kept = {"storage": tmp_path / "study.journal", "name": "s"}
    with pytest.raises(SearchError, match="one plan only"):
        Search(network(), Planted(), methods=["batch", "group"], constraints=[BatchIndependent()], **kept)
    Search(
        network(), Planted(), methods=["batch", "group", "layer"], constraints=[BatchIndependent()], **kept
    )


def test_ceilings_that_no_plan_meets_are_named() -> None:
    with pytest.raises(SearchError, match="above MaxLatency, the cheapest, trial"):
        normsearch.search(network(), Planted(), **OPTIONS, constraints=[MaxLatency(0)], inputs=[INPUTS])


def test_fewer_plans_than_trials_are_told() -> None:
    def told(trials: int) -> list[str]:
        seen: list[str] = []
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        Search(
            model,
            None,
            methods=["batch", "group", "layer"],
            n_trials=trials,
            on_progress=lambda step: seen.append(step.detail),
        )
        return [detail for detail in seen if "different plans" in detail]

    assert told(3) == []
    assert told(4) == ["3 different plans are left without what is refused, vetoed or tied"]
