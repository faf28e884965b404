"""What is known before trials: supernet, learned gates, posterior."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
import torch
from searched import INPUTS, OPTIONS, SITES, Planted, assert_same, network, pairs, snapshot, task
from torch import nn
from torch.nn import functional as F

import normsearch
from normsearch.errors import SearchError
from normsearch.searching import (
    Resident,
    SearchSpace,
    sense,
)
from normsearch.searching.learned import learned_params
from normsearch.searching.posterior import Posterior


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


def test_the_posterior_knows_what_was_planted() -> None:
    result = normsearch.search(network(), Planted(), **OPTIONS)
    done = result.study.trials
    posterior = Posterior(result.space, done, [t.values[0] for t in done])
    effects = posterior.effects(result.params)
    assert {name: max(row, key=lambda m: row[m].mean) for name, row in effects.items()} == result.params
    for name, row in effects.items():
        assert row[result.params[name]].mean == pytest.approx(0, abs=1e-9)
        assert sum(effect.trials for effect in row.values()) == len(done)


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
