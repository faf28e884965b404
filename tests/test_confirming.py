"""Which plan is returned: beyond noise, on data that no trial saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from searched import OPTIONS, network, pairs, task
from torch import Tensor, nn

import normsearch
from normsearch.errors import SearchError
from normsearch.searching import (
    accuracy,
)
from normsearch.searching.confirming import Candidate, decide


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


def test_without_confirmation_the_best_plan_is_taken_at_its_word() -> None:
    def objective(model: nn.Module, trial: Any) -> float:
        return float(trial.params["a.1"] == "group") + float(trial.params["b.1"] == "batch")

    found = normsearch.search(
        network(), objective, methods=["batch", "group"], sites=["[ab].*"], n_trials=8, confirm=0
    )
    assert found.confirmation == ()
    assert found.params == {"a.1": "group", "b.1": "batch"}


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
