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
from torch.nn import functional as F

import normsearch
from normsearch.errors import SearchError, TrainingError
from normsearch.searching import (
    Recipe,
    Search,
    Task,
    accuracy,
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

    said = (
        r"on the original, accuracy is for outputs .* of two classes or more, and the network's are of dict"
    )
    with pytest.raises(SearchError, match=said):
        normsearch.search(Named(), task(), **OPTIONS)

    def top(model: nn.Module, batches: Any) -> float:
        return float(model(next(iter(batches))[0])["score"])

    said = r"on the original, the metric top failed \(KeyError: 'score'\); try top\(model.eval\(\), val"
    with pytest.raises(SearchError, match=said):
        normsearch.search(Named(), task(metric=top), **OPTIONS)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("0.5", "the metric <lambda> returned '0.5'; give a number"),
        (None, "the metric <lambda> returned None; give a number"),
        ((0.5, 0.6), "the metric <lambda> returned 2 numbers"),
        (float("nan"), "the metric <lambda> returned nan; give finite numbers"),
    ],
)
def test_a_metric_returns_one_number(returned: Any, said: str) -> None:
    with pytest.raises(SearchError, match=f"on the original, {said}"):
        normsearch.search(network(), task(metric=lambda model, batches: returned), **OPTIONS)


def test_a_metric_that_gives_a_plan_up_prunes_it() -> None:
    def impatient(model: nn.Module, batches: Any) -> float:
        if any(isinstance(layer, nn.GroupNorm) for layer in model.modules()):
            raise optuna.TrialPruned("hopeless")
        return 0.5

    search = Search(network(), task(metric=impatient, steps=1), methods=["batch", "group"], n_trials=2)
    search.optimize()
    assert [trial.state.name for trial in search.study.trials[:2]] == ["COMPLETE", "PRUNED"]
    assert search.study.trials[1].user_attrs["error"] == "hopeless"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (x, F.one_hot(y, 3)), r"here of shape \(8,\), and got targets of shape \(8, 3\)"),
        (lambda x, y: (x, y[:4]), r"got targets of shape \(4,\)"),
        (lambda x, y: (x, y.tolist()), "got targets of list"),
        (lambda x, y: (x.numpy(), y), "validation gives NumPy arrays; give tensors"),
    ],
)
def test_targets_are_numbers_of_classes(change: Any, said: str) -> None:
    validation = [change(*pair) for pair in pairs(4)]
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), task(validation=validation), **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": None}, "train=None: give a DataLoader"),
        ({"validation": 5}, "validation=5: give a DataLoader"),
        ({"confirmation": 5}, "confirmation=5: give a DataLoader"),
        ({"validation": torch.utils.data.DataLoader([None])}, "validation cannot be read: TypeError"),
        ({"confirmation": torch.utils.data.DataLoader([None])}, "confirmation cannot be read: TypeError"),
    ],
)
def test_splits_that_cannot_be_read_are_refused_at_once(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SearchError, match=said):
        task(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps=0: give a whole number at least 1"),
        ({"steps": True}, "steps=True: give a whole number"),
        ({"steps": "5"}, "steps='5': give a whole number"),
        ({"lr": 0.0}, "lr=0.0: give a finite number above 0"),
        ({"lr": "high"}, "lr='high': give a finite number"),
        ({"weight_decay": -1}, "weight_decay=-1: give a finite number at least 0"),
        ({"warmup": 1.5}, "warmup=1.5: give a whole number at least 0"),
        ({"clip": 0}, "clip=0: give a number above 0"),
        ({"clip": None}, "clip=None: give a number above 0"),
    ],
)
def test_recipes_are_checked_when_they_are_made(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        Recipe(**changes)


def test_a_prior_points_the_same_way_whether_a_metric_rises_or_falls() -> None:
    def loss(model: nn.Module, batches: Any) -> float:
        return float(np.mean([float(F.cross_entropy(model(x), y)) for x, y in batches]))

    def tried(metric: Any, direction: str) -> list[dict[str, Any]]:
        options = {"methods": ["batch", "group", "instance"], "n_trials": 9, "veto": None}
        search = Search(network(), task(metric=metric, steps=2), directions=[direction], **options)
        search.optimize()
        return [trial.params for trial in search.study.trials]

    def gain(model: nn.Module, batches: Any) -> float:
        return -loss(model, batches)

    assert tried(loss, "minimize") == tried(gain, "maximize")


def test_a_network_of_one_output_is_refused_by_accuracy() -> None:
    with pytest.raises(SearchError, match=r"two classes or more, and the network's are of shape \(8, 1\)"):
        accuracy(nn.Linear(4, 1), [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))])
    with pytest.raises(SearchError, match=r"targets of shape \(8, 1\); give targets.squeeze\(1\)"):
        accuracy(nn.Linear(4, 2), [(torch.randn(8, 4), torch.zeros(8, 1, dtype=torch.long))])


class _Two(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.net(a + b)
        return y


def test_several_inputs_of_a_loader_are_lists_and_the_error_says_what_to_do() -> None:
    data = [((x, x), int(y)) for xs, ys in pairs(4) for x, y in zip(xs, ys, strict=True)]
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    listed = task(train=loader, validation=loader)
    said = r"missing 1 required positional argument: 'b'\); the inputs are a list, which is one argument"
    with pytest.raises(SearchError, match=said):
        normsearch.search(_Two(), listed, **OPTIONS)
    with pytest.raises(TrainingError, match=r"_Two failed .*give \[\(tuple\(inputs\), targets\) for"):
        normsearch.finetune(_Two(), loader, loss=F.cross_entropy, steps=1, lr=1e-3)
    tuples = [(tuple(inputs), targets) for inputs, targets in loader]
    Search(_Two(), task(train=tuples, validation=tuples), methods=["batch", "group"], n_trials=2).optimize()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": nn.CrossEntropyLoss}, r"loss=CrossEntropyLoss is a class: give an instance, CrossEntropyL"),
        (
            {"train": torch.utils.data.TensorDataset(torch.randn(8, 1, 8, 8), torch.zeros(8))},
            r"train is a TensorDataset of single samples; give DataLoader\(train",
        ),
    ],
)
def test_what_is_easily_confused_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), task(**changes), **OPTIONS)


def test_a_task_has_one_direction() -> None:
    with pytest.raises(SearchError, match="a Task returns one number, its metric"):
        normsearch.search(network(), task(), **OPTIONS | {"directions": ["maximize", "minimize"]})


def test_a_scalar_target_is_one_sample() -> None:
    batches = [(torch.randn(1, 1, 8, 8), torch.tensor(1)) for _ in range(3)]
    assert task(confirmation=batches).confirmed_on() == 3
