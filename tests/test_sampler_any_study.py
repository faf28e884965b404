"""NormSampler in studies of any kind: other parameters, choices of their own, failures, sums beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest

from normsearch.errors import SearchError
from normsearch.searching import NormSampler
from normsearch.searching.surrogate import without_outliers

Table = dict[str, dict[Any, float]]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def study(objective: Callable[[optuna.Trial], Any], trials: int, **options: Any) -> optuna.Study:
    made = optuna.create_study(direction="maximize", sampler=NormSampler(seed=0, **options))
    made.optimize(objective, n_trials=trials, catch=(MemoryError,))
    return made


def plans(made: optuna.Study) -> list[tuple[Any, ...]]:
    return [tuple(trial.params.values()) for trial in made.trials]


def sums(made: optuna.Study, table: Table) -> list[float]:
    return [sum(table[n][c] for n, c in trial.params.items() if n in table) for trial in made.trials]


def among(names: str, choices: Any) -> Callable[[optuna.Trial], float]:
    """Suggest every name; count the last choice, later names more."""

    def objective(trial: optuna.Trial) -> float:
        plan = [trial.suggest_categorical(name, choices) for name in names]
        return float(sum(i * (one == choices[-1]) for i, one in enumerate(plan, 1)))

    return objective


# --- other parameters -----------------------------------------------------------------------------


def test_numbers_are_drawn_independently() -> None:
    made = study(lambda t: sum(t.suggest_float(n, 0, 1) + t.suggest_int(f"{n}i", 0, 99) for n in "xyz"), 40)
    drawn = np.array(plans(made), dtype=float)
    between = np.corrcoef(drawn.T)[~np.eye(6, dtype=bool)]
    # Of forty independent pairs, .5 is three standard errors.
    assert np.abs(between).max() < 0.55
    again = study(lambda t: sum(t.suggest_float(n, 0, 1) + t.suggest_int(f"{n}i", 0, 99) for n in "xyz"), 40)
    assert plans(made) == plans(again)


def test_parameters_without_choices_in_common_start_with_every_choice_once() -> None:
    own = {"opt": ["adam", "sgd", "rms"], "act": ["relu", "gelu"], "width": [32, 64, 128]}
    made = study(
        lambda t: sum(i * own[n].index(t.suggest_categorical(n, own[n])) for i, n in enumerate(own)), 15
    )
    assert plans(made)[:3] == [("adam", "relu", 32), ("sgd", "gelu", 64), ("rms", "relu", 128)]
    assert made.best_value == 5


def test_own_choices_are_searched_as_well_as_common_ones() -> None:
    effects = np.random.default_rng(0).normal(size=(12, 5))

    def objective(trial: optuna.Trial) -> float:
        found = [trial.suggest_categorical(f"p{i}", [f"p{i}={k}" for k in range(5)]) for i in range(12)]
        return float(sum(effects[i, int(one[-1])] for i, one in enumerate(found)))

    # One change of the first choices after another would not be over by then.
    assert study(objective, 45).best_value > 0.85 * effects.max(1).sum()


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raises", "prunes", "returns NaN"])
def test_choices_that_fail_are_learned_to_be_bad(how: str) -> None:
    effects = np.random.default_rng(1).normal(size=(10, 4))

    def objective(trial: optuna.Trial) -> float:
        found = [trial.suggest_categorical(f"p{i}", list("abcd")) for i in range(10)]
        if found[3] == "b":
            if how == "raises":
                raise MemoryError
            if how == "prunes":
                raise optuna.TrialPruned
            return float("nan")
        return float(sum(effects[i, "abcd".index(one)] for i, one in enumerate(found)))

    late = study(objective, 50).trials[10:]
    assert sum(trial.params["p3"] == "b" for trial in late) <= 4


@pytest.mark.parametrize("penalty", [1e3, 1e6, 1e30])
def test_a_score_far_below_all_others_does_not_hide_them(penalty: float) -> None:
    effects = np.random.default_rng(2).normal(size=(12, 4))
    best = effects.max(1).sum() - effects[3].max() + effects[3, [0, 2, 3]].max()

    def objective(trial: optuna.Trial) -> float:
        found = [trial.suggest_categorical(f"p{i}", list("abcd")) for i in range(12)]
        value = float(sum(effects[i, "abcd".index(one)] for i, one in enumerate(found)))
        return value - penalty * (1 + trial.number % 3) * (found[3] == "b")

    assert study(objective, 60).best_value > 0.85 * best


def test_outliers_are_as_bad_as_the_worst_of_the_others() -> None:
    scores = np.array([1.0, 2.0, 3.0, 2.5, -1e6, 0.0])
    assert without_outliers(scores).tolist() == [1.0, 2.0, 3.0, 2.5, 0.0, 0.0]
    for kept in (scores[:4], np.array([1.0]), np.array([1.0, -1e9]), np.array([2.0, 2.0, 2.0, 2.0, -5.0])):
        assert without_outliers(kept).tolist() == kept.tolist()


# --- ceilings and costs ---------------------------------------------------------------------------


def test_ceilings_over_choices_that_are_none_or_lists() -> None:
    table: Table = {name: {None: 0.0, "batch": 1.0, "group": 2.0} for name in "abcd"}
    made = study(among("abcd", [None, "batch", "group"]), 15, ceilings=[(table, 5.0)])
    assert max(sums(made, table)) <= 5
    made = optuna.create_study(sampler=NormSampler(ceilings=[({"a": {"x": 1.0}}, 5.0)]))
    with (
        pytest.warns(UserWarning, match="persistent storage"),
        pytest.raises(SearchError, match=r"is for 'x', and the choices are \[1\], \[2\]"),
    ):
        made.optimize(among("ab", [[1], [2]]), n_trials=3)


def test_ceilings_know_of_what_is_not_proposed() -> None:
    table: Table = {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 1.0, "y": 2.0}, "only": {"o": 5.0}}

    def objective(trial: optuna.Trial) -> float:
        value = among("ab", ["x", "y"])(trial)
        trial.suggest_categorical("only", ["o"])
        return value

    made = study(objective, 3, ceilings=[(table, 8.0)])
    assert sorted(sums(made, table)) == [7, 8, 8]


def test_what_is_enqueued_in_part_is_completed_under_the_ceiling() -> None:
    table: Table = {name: {"a": 0.0, "b": 1.0} for name in "wxyzuv"}
    made = study(among("wxyzuv", ["a", "b"]), 4, ceilings=[(table, 3.0)])
    for _ in range(5):
        made.enqueue_trial({"w": "b", "x": "b"})
    made.optimize(among("wxyzuv", ["a", "b"]), n_trials=5)
    assert all(trial.params["w"] == trial.params["x"] == "b" for trial in made.trials[4:])
    # Of the sixteen ways to complete it, five are under the ceiling.
    assert sum(total <= 3 for total in sums(made, table)) == 9
    assert len(set(plans(made))) == 9


def test_after_the_last_plan_under_a_ceiling_come_others_once() -> None:
    table: Table = {name: {"a": 0.0, "b": 1.0, "c": 1.0} for name in "xyz"}
    made = study(among("xyz", list("abc")), 27, ceilings=[(table, 1.0)])
    assert max(sums(made, table)[:7]) <= 1
    assert len(set(plans(made))) == 27


def test_a_constant_cost_changes_no_proposal() -> None:
    rng = np.random.default_rng(3)
    effects, prices = rng.normal(size=(8, 4)), rng.uniform(size=(8, 4))

    def found(base: float, told: bool) -> list[tuple[Any, ...]]:
        table: Table = {f"p{i}": dict(zip("abcd", row, strict=True)) for i, row in enumerate(prices.tolist())}
        made = optuna.create_study(
            directions=["maximize", "minimize"],
            sampler=NormSampler(seed=0, costs={1: table | ({"stem": {"s": base}} if told else {})}),
        )

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            plan = ["abcd".index(trial.suggest_categorical(f"p{i}", list("abcd"))) for i in range(8)]
            trial.suggest_categorical("stem", ["s"])
            where = np.arange(8)
            return float(effects[where, plan].sum()), float(prices[where, plan].sum() + base)

        made.optimize(objective, n_trials=30)
        return plans(made)

    assert found(0.0, told=True) == found(50.0, told=True) == found(50.0, told=False)


# --- names ----------------------------------------------------------------------------------------


def test_a_name_that_no_trial_has_is_warned_of() -> None:
    table: Table = {"a": {"x": 1.0, "y": 2.0}, "bee": {"x": 1.0, "y": 2.0}}
    with pytest.warns(UserWarning, match=r"ceilings\[0\] names 'bee', which no trial has"):
        study(among("ab", ["x", "y"]), 3, ceilings=[(table, 3.0)])


def test_a_table_may_be_of_parameters_that_come_and_go_alone() -> None:
    def objective(trial: optuna.Trial) -> float:
        value = among("ab", ["x", "y"])(trial)
        return value + (trial.suggest_categorical("c", ["p", "q"]) == "q" if value < 2 else 0)

    made = study(objective, 8, ceilings=[({"c": {"p": 1.0, "q": 2.0}}, 1.5)])
    assert {trial.params.get("c") for trial in made.trials} == {"p", None}
    other = optuna.create_study(sampler=NormSampler(prior={"d": {"p": 1.0}}))
    with pytest.raises(SearchError, match="prior is for 'd', and the study's parameters are"):
        other.optimize(objective, n_trials=8)
