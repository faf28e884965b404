"""Objectives from two loaders: order, seeds, splits."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from searched import OPTIONS, network, pairs, task
from torch import Tensor, nn

import normsearch
from normsearch.errors import SearchError
from normsearch.searching import (
    Recipe,
    Task,
)
from normsearch.searching.checking import check_objective


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": [{"x": 1, "y": 2}] * 2}, r"train: give pairs \(inputs, targets\), got a dict of 2"),
        ({"train": [(1, 2, 3)] * 2}, "train: give pairs .*, got a tuple of 3; several inputs are one tuple"),
        ({"validation": [torch.ones(2)] * 2}, "validation: give pairs .*, got a Tensor"),
        ({"confirmation": [torch.ones(2)]}, "confirmation: give pairs .*, got a Tensor"),
        ({"train": None}, "train=None: give a DataLoader, or a list of pairs"),
        ({"train": 5}, "train=5: give a DataLoader"),
        ({"train": []}, "train has no batch"),
        ({"train": torch.utils.data.DataLoader([None])}, "train cannot be read: TypeError: "),
    ],
)
def test_data_that_are_no_pairs_are_refused_before_anything_is_made(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), task(**changes), **OPTIONS)


def test_data_that_a_for_loop_reads_need_no_iter() -> None:
    class Indexed:
        def __getitem__(self, number: int) -> Any:
            return pairs(4)[number]

    check_objective(task(train=Indexed(), validation=Indexed()))


def test_looking_at_the_data_moves_no_generator() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(32, 1, 8, 8), torch.randint(3, (32,)))
    own = torch.Generator().manual_seed(3)
    given = task(train=torch.utils.data.DataLoader(data, 8, shuffle=True, generator=own))
    before = own.get_state(), torch.get_rng_state(), random.getstate()
    check_objective(given)
    assert torch.equal(own.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2]


def test_a_task_without_gradients_is_refused() -> None:
    with torch.no_grad(), pytest.raises(SearchError, match=r"gradients are turned off here \(torch.no_grad"):
        normsearch.search(network(), task(), **OPTIONS)


def test_a_metric_that_fails_on_the_original_is_named() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    said = r"the metric normsearch.searching.tasks.accuracy failed on the original \(AttributeError: 'dict'"
    with pytest.raises(SearchError, match=said):
        normsearch.search(Named(), task(), **OPTIONS)
    with pytest.raises(
        SearchError, match=r"the metric .*<lambda> failed on the original \(ZeroDivisionError"
    ):
        normsearch.search(network(), task(metric=lambda model, given: 1 / 0), **OPTIONS)
