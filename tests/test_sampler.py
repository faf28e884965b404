"""NormSampler: its Gaussian process against slow formulas, and what every study of plans may rely on."""

from __future__ import annotations

import itertools
import re
from statistics import NormalDist
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normsearch.errors import SearchError
from normsearch.searching import NormSampler
from normsearch.searching.acquisitions import hypervolume_improvement
from normsearch.searching.ceilings import Ceilings
from normsearch.searching.climbing import Goal, KnownSum
from normsearch.searching.surrogate import PlanSurrogate, Space

METHODS = ("batch", "group", "layer", "instance")


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def points(seed: int, sites: int = 5, methods: int = 3, count: int = 12) -> tuple[Space, Any, Any]:
    """Random plans with scores, one site short of a method."""
    rng = np.random.default_rng(seed)
    allowed = np.ones((sites, methods), dtype=bool)
    allowed[0, methods - 1] = False
    plans = np.stack([rng.integers(0, row.sum(), count) for row in allowed], axis=1)
    return Space(allowed), plans, rng.normal(size=count)


def slow_covariance(space: Space, surrogate: PlanSurrogate, x: Any, y: Any) -> float:
    """The covariance of two plans, by loops over the formula in the module's docstring."""
    sites, methods = space.sites, space.methods
    shared, own, pairs, every, _ = surrogate.variances
    c = []
    for site in range(sites):
        chance = 1 / space.allowed[site].sum()
        c.append(((x[site] == y[site]) - chance) / (1 - chance))
    total = shared * sum(
        ((x[a] == y[b]) - 1 / methods) / sites / (1 - 1 / methods) for a in range(sites) for b in range(sites)
    )
    total += own * sum(surrogate.relevance[s] / sites * c[s] for s in range(sites))
    total += pairs * sum(c[s] * c[s + 1] for s in range(sites - 1)) / (sites - 1)
    total += every * sum(c[a] * c[b] for a in range(sites) for b in range(a)) / (sites * (sites - 1) / 2)
    return float(total)


def test_a_plan_that_was_given_up_is_not_proposed_again() -> None:
    study = optuna.create_study(sampler=NormSampler())
    plans = []
    for number in range(9):
        trial = study.ask()
        plans.append(tuple(trial.suggest_categorical(site, METHODS[:3]) for site in "ab"))
        if number % 3:
            study.tell(
                trial,
                state=optuna.trial.TrialState.PRUNED if number % 3 == 1 else optuna.trial.TrialState.FAIL,
            )
        else:
            study.tell(trial, 0.0)
    assert len(set(plans)) == 9


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_predictions_are_those_of_the_formula(seed: int) -> None:
    space, plans, scores = points(seed)
    surrogate = PlanSurrogate(space, plans, scores)
    new = points(seed + 1)[1][:4]
    gram = np.array([[slow_covariance(space, surrogate, a, b) for b in plans] for a in plans])
    inverse = np.linalg.inv(gram + surrogate.variances[4] * np.eye(len(plans)))
    z = (scores - scores.mean()) / scores.std()
    level = np.ones(len(z)) @ inverse @ z / inverse.sum()
    mean, deviation = surrogate.predict(new)
    for plan, m, d in zip(new, mean, deviation, strict=True):
        k = np.array([slow_covariance(space, surrogate, plan, other) for other in plans])
        variance = slow_covariance(space, surrogate, plan, plan) - k @ inverse @ k
        assert m == pytest.approx(
            scores.mean() + scores.std() * (level + k @ inverse @ (z - level)), abs=1e-9
        )
        assert d == pytest.approx(scores.std() * variance**0.5, rel=1e-6)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_walk_expects_what_predict_does(seed: int, with_prior: bool) -> None:
    space, plans, scores = points(seed)
    rng = np.random.default_rng(seed)
    prior = rng.normal(size=space.allowed.shape) if with_prior else None
    surrogate = PlanSurrogate(space, plans, scores, prior)
    known = KnownSum(rng.normal(size=space.allowed.shape))
    for model in (surrogate, known):
        now = points(seed + 1)[1][:3]
        walk = Goal(scores, model).walk(now)
        for site in [*range(space.sites), *rng.permutation(space.sites)]:
            mean, deviation = walk.changes(site)
            for method in np.flatnonzero(space.allowed[site]):
                changed = now.copy()
                changed[:, site] = method
                expected, spread = model.predict(changed)
                assert mean[:, method] == pytest.approx(expected, abs=1e-9)
                assert deviation[:, method] == pytest.approx(spread, abs=1e-6)
            now[:, site] = rng.integers(0, space.allowed[site].sum(), 3)
            walk.set(site, now[:, site])


def test_variances_find_what_explains_the_scores() -> None:
    rng = np.random.default_rng(0)
    space = Space(np.ones((8, 4), dtype=bool))
    plans = rng.integers(0, 4, (150, 8))
    effects = rng.normal(size=(8, 4))
    effects[4:] = 0
    scores = effects[np.arange(8), plans].sum(1) + 0.05 * rng.normal(size=150)
    surrogate = PlanSurrogate(space, plans, scores)
    assert surrogate.variances[1] > 5 * surrogate.variances[2:4].sum()
    assert surrogate.variances[4] < 0.05
    assert surrogate.relevance[:4].min() > surrogate.relevance[4:].max()
    fresh = rng.integers(0, 4, (200, 8))
    predicted = surrogate.predict(fresh)[0]
    assert np.corrcoef(predicted, effects[np.arange(8), fresh].sum(1))[0, 1] > 0.99


@pytest.mark.parametrize(("sign", "trusted"), [(1.0, True), (-1.0, False)])
def test_a_prior_is_trusted_as_far_as_scores_confirm_it(sign: float, trusted: bool) -> None:
    rng = np.random.default_rng(0)
    space = Space(np.ones((8, 4), dtype=bool))
    effects, plans = rng.normal(size=(8, 4)), rng.integers(0, 4, (40, 8))
    scores = effects[np.arange(8), plans].sum(1)
    slopes = PlanSurrogate(space, plans, scores, sign * effects).slopes
    assert (slopes > 0.3).all() if trusted else (slopes == 0).all()


# --- studies --------------------------------------------------------------------------------------


def objective(trial: optuna.Trial) -> float:
    plan = [trial.suggest_categorical(f"bn{site}", METHODS) for site in range(6)]
    return sum(METHODS.index(m) * (site % 3 - 1) for site, m in enumerate(plan)) + 0.5 * (plan[0] == plan[1])


def params(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


def run(trials: int, storage: Any = None, objective: Any = objective, **options: Any) -> optuna.Study:
    study = optuna.create_study(
        direction=options.pop("direction", "maximize"),
        sampler=NormSampler(**options),
        storage=storage,
        study_name="plans",
        load_if_exists=True,
    )
    study.optimize(objective, n_trials=trials)
    return study


def test_it_finds_the_best_plan_with_few_trials() -> None:
    # The best is 6.5; one random plan in 256 reaches 6.
    assert min(run(40, seed=seed).best_value for seed in range(3)) >= 6


def test_minimising_mirrors_maximising() -> None:
    up, down = run(25, seed=3), run(25, seed=3, direction="minimize", objective=lambda t: -objective(t))
    assert params(up) == params(down)


def test_one_seed_gives_one_study_and_another_seed_another() -> None:
    assert params(run(20, seed=1)) == params(run(20, seed=1))
    assert params(run(20, seed=1)) != params(run(20, seed=2))


def test_a_resumed_study_goes_on_as_it_would_have(tmp_path: Any) -> None:
    def storage() -> optuna.storages.JournalStorage:
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
        return optuna.storages.JournalStorage(backend)

    run(13, storage(), seed=5)
    assert params(run(12, storage(), seed=5)) == params(run(25, seed=5))


def test_no_plan_is_proposed_twice_until_all_were() -> None:
    def small(trial: optuna.Trial) -> float:
        return float(trial.suggest_categorical("a", [0, 1, 2]) == trial.suggest_categorical("b", [0, 1, 2]))

    plans = [tuple(trial.params.values()) for trial in run(12, objective=small, seed=0).trials]
    assert len(set(plans[:9])) == 9
    assert len(plans) == 12


def test_running_trials_are_not_proposed_again() -> None:
    study = run(20, seed=0)
    waiting = [study.ask() for _ in range(6)]
    plans = [tuple(trial.suggest_categorical(f"bn{site}", METHODS) for site in range(6)) for trial in waiting]
    assert len(set(plans)) == 6


def test_uniform_plans_come_first() -> None:
    plans = [tuple(trial.params.values()) for trial in run(4, seed=0).trials]
    assert plans == [(method,) * 6 for method in METHODS]


def test_sites_with_fewer_methods_never_get_others() -> None:
    def vetoed(trial: optuna.Trial) -> float:
        plan = [trial.suggest_categorical(f"bn{s}", METHODS[: 2 + s % 3]) for s in range(6)]
        return float(plan.count("layer"))

    assert run(30, objective=vetoed, seed=0).best_value == 4


def test_other_parameters_are_sampled_at_random() -> None:
    def mixed(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("rate", 1e-4, 1e-1, log=True)
        return objective(trial) - abs(np.log10(rate) + 2)

    rates = [trial.params["rate"] for trial in run(20, objective=mixed, seed=0).trials]
    assert len(set(rates)) == 20
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)


def test_failed_trials_and_infeasible_ones_do_not_lead() -> None:
    def constrained(trial: optuna.Trial) -> float:
        value = objective(trial)
        # What would be best is not allowed.
        trial.set_constraint("instances", sum(m == "instance" for m in trial.params.values()) - 1.0)
        if trial.number == 7:
            raise optuna.TrialPruned
        return value

    study = run(40, objective=constrained, seed=0)
    late = study.trials[20:]
    assert sum(all(v <= 0 for v in trial.constraints.values()) for trial in late) >= len(late) / 2


def test_two_objectives_with_a_known_cost() -> None:
    costs = {f"bn{s}": {m: float(i) for i, m in enumerate(METHODS)} for s in range(6)}

    def both(trial: optuna.Trial) -> tuple[float, float]:
        value = objective(trial)
        return value, sum(costs[name][m] for name, m in trial.params.items())

    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=NormSampler(seed=0, costs={1: costs})
    )
    study.optimize(both, n_trials=40)
    front = {tuple(trial.values) for trial in study.best_trials}
    assert max(value for value, _ in front) >= 5
    assert min(cost for _, cost in front) == 0
    assert len(front) >= 6


def hypervolume(points: Any, corner: tuple[float, float]) -> float:
    """The area that points dominate above a corner, by counting the cells of the grid that they span."""
    inside = [p for p in points if p[0] > corner[0] and p[1] > corner[1]]
    xs, ys = (sorted({corner[axis], *(p[axis] for p in inside)}) for axis in (0, 1))
    return sum(
        (right - left) * (high - low)
        for left, right in itertools.pairwise(xs)
        for low, high in itertools.pairwise(ys)
        if any(p[0] >= right and p[1] >= high for p in inside)
    )


@given(st.integers(0, 10_000), st.sampled_from([0, 1]))
@settings(max_examples=10, deadline=None)
def test_expected_hypervolume_is_the_mean_of_many_draws(seed: int, uncertain: int) -> None:
    rng = np.random.default_rng(seed)
    scores, known = rng.normal(size=(2, 6))
    corner = float(scores.min()), float(known.min())
    promise = hypervolume_improvement(scores, known, corner, uncertain=uncertain)
    means, deviations, others = rng.normal(size=3), rng.uniform(0.2, 2, 3), rng.normal(size=3)
    goals = [(means, deviations), (others, np.zeros(3))]
    found = promise(goals if uncertain == 0 else goals[::-1])
    front = list(zip(scores, known, strict=True))
    before = hypervolume(front, corner)
    levels = (np.arange(2000) + 0.5) / 2000
    for value, mean, deviation, other in zip(found, means, deviations, others, strict=True):
        draws = [mean + deviation * NormalDist().inv_cdf(level) for level in levels]
        gains = [hypervolume([*front, (draw, other)], corner) - before for draw in draws]
        assert value == pytest.approx(np.mean(gains), abs=0.01 + 0.01 * value)


def ceilings_of(seed: int, count: int) -> tuple[Space, Any, Any, set[tuple[int, ...]]]:
    """A small space with whole-number sums, their limits, and every plan that keeps to them."""
    space = points(seed, sites=4)[0]
    rng = np.random.default_rng(seed)
    tables = rng.integers(-5, 10, (count, *space.allowed.shape)).astype(float)
    limits = rng.integers(-10, 25, count).astype(float)
    plans = itertools.product(*(np.flatnonzero(row).tolist() for row in space.allowed))
    under = {p for p in plans if (tables[:, range(4), p].sum(1) <= limits).all()}
    return space, tables, limits, under


@given(st.integers(0, 10_000), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_ceilings_permit_what_the_sums_do(seed: int, count: int) -> None:
    space, tables, limits, under = ceilings_of(seed, count)
    ceilings, rng = Ceilings(space, tables, limits), np.random.default_rng(seed)
    plans = np.stack([space.random(rng) for _ in range(3)])
    for site in range(space.sites):
        for row, plan in zip(ceilings.permitted(plans, site), plans, strict=True):
            changed = [(*plan[:site].tolist(), m, *plan[site + 1 :].tolist()) for m in range(space.methods)]
            assert row.tolist() == [one in under for one in changed]
    for plan in plans:
        assert ceilings.permit(plan) == (tuple(plan) in under)
        near = tuple(ceilings.near(plan))
        assert near in under or count > 1 or not under
        assert near == tuple(plan) or not ceilings.permit(plan)
    seen: set[tuple[int, ...]] = set()
    while (found := ceilings.unseen(seen, rng)) is not None:
        assert tuple(found) not in seen
        seen.add(tuple(found.tolist()))
    assert seen == under


@pytest.mark.parametrize("objectives", [1, 2])
def test_no_plan_over_a_ceiling_while_there_is_one_under_it(objectives: int) -> None:
    names = [f"bn{site}" for site in range(6)]
    costs = {name: {m: float(i) for i, m in enumerate(METHODS)} for name in names}
    others = {name: {m: float(3 - i) for i, m in enumerate(METHODS)} for name in names}

    def cost(trial: Any) -> float:
        return sum(costs[name][m] for name, m in trial.params.items())

    def value(trial: optuna.Trial) -> Any:
        return (objective(trial), cost(trial))[:objectives] if objectives > 1 else objective(trial)

    # Of the sums 0 to 18 of six sites, at most 2: 28 plans.
    study = optuna.create_study(
        directions=["maximize", "minimize"][:objectives],
        sampler=NormSampler(seed=0, costs={1: costs} if objectives > 1 else None, ceilings=[(costs, 2.0)]),
    )
    study.optimize(value, n_trials=32)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 32
    assert all(cost(trial) <= 2 for trial in study.trials[:28])
    # Then there is none left.
    assert all(cost(trial) > 2 for trial in study.trials[28:])
    both = optuna.create_study(sampler=NormSampler(seed=0, ceilings=[(costs, 9.0), (others, 9.0)]))
    both.optimize(objective, n_trials=20)
    assert all(cost(trial) == 9 for trial in both.trials)


def test_two_objectives_of_which_no_trial_meets_the_constraints() -> None:
    costs = {f"bn{s}": {m: float(i) for i, m in enumerate(METHODS)} for s in range(6)}

    def broken(trial: optuna.Trial) -> tuple[float, float]:
        trial.set_constraint("never", 1.0)
        return objective(trial), sum(costs[name][m] for name, m in trial.params.items())

    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=NormSampler(seed=0, costs={1: costs})
    )
    study.optimize(broken, n_trials=15)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 15


@pytest.mark.parametrize("seed", [-1, 1.5, True, "x"])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(SearchError, match="seed="):
        NormSampler(seed=seed)
    NormSampler(seed=np.int64(3))


def test_a_prior_holds_finite_numbers() -> None:
    with pytest.raises(SearchError, match=r"prior\['a'\]\['x'\] = nan"):
        NormSampler(prior={"a": {"x": float("nan")}})


def test_a_ceiling_is_a_finite_number() -> None:
    with pytest.raises(SearchError, match=r"ceilings\[0\]'s limit = nan"):
        NormSampler(ceilings=[({"a": {"x": 1.0}}, float("nan"))])
    with pytest.raises(SearchError, match=r"ceilings\[1\]\['a'\]\['x'\] = inf"):
        NormSampler(ceilings=[({}, 1.0), ({"a": {"x": float("inf")}}, 1.0)])


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"prior": 5}, "prior = 5: give {parameter: {choice: number}}"),
        ({"prior": {"bn0": 5}}, "prior['bn0'] = 5: give {choice: number}"),
        ({"costs": 5}, "costs=5: give {number of an objective: table}"),
        ({"costs": {"x": {}}}, "costs['x']: give the objective's number"),
        ({"costs": {-1: {}}}, "costs[-1]: give the objective's number"),
        ({"costs": {0: {"a": {"x": "1"}}}}, "costs[0]['a']['x'] = '1': give a finite number"),
        ({"ceilings": 5}, "ceilings=5: give a list of pairs"),
        ({"ceilings": [5]}, "ceilings=[5]: give a list of pairs"),
        ({"ceilings": [({}, 1.0, 2.0)]}, "give a list of pairs"),
    ],
)
def test_tables_of_other_forms_are_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(SearchError, match=re.escape(said)):
        NormSampler(**tables)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"prior": {"c": {"x": 1.0}}}, "prior is for 'c', and the study's parameters are 'bn0', 'bn1'"),
        (
            {"prior": {"bn0": {"x": 1.0}}},
            "prior['bn0'] is for 'x', and the choices are 'batch', 'group', 'layer', 'instance'",
        ),
        ({"costs": {1: {"bn0": {"group": 1.0}}}}, "costs[1]: the study has 1 objectives"),
        ({"costs": {0: {"bn1": {1: 1.0}}}}, "costs[0]['bn1'] is for 1, and"),
        (
            {"costs": {0: {"bn1": {"group": 1.0}}}},
            "costs[0]['bn1'] does not say what 'batch', 'layer'",
        ),
        ({"ceilings": [({"bm0": {"group": 1.0}}, 1.0)]}, "ceilings[0] is for 'bm0', and the study's"),
        (
            {"ceilings": [({"bn0": {"Group": 1.0}}, 1.0)]},
            "ceilings[0]['bn0'] is for 'Group', and",
        ),
        ({"ceilings": [({"bn0": {"group": 1.0}}, 1.0)]}, "ceilings[0]['bn0'] does not say what 'batch'"),
    ],
)
def test_tables_that_have_nothing_to_do_with_a_study_are_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(SearchError, match=re.escape(said)):
        run(2, seed=0, **tables)


def test_a_table_may_name_less_than_there_is_and_more() -> None:
    run(20, seed=0, prior={"bn3": {"group": 1.0, "of old": 2.0}, "gone": {"x": 1.0}})


@pytest.mark.parametrize(
    "choices", [(0, 0.0, False, "a"), (1, True, None, 1.0), (float("nan"), float("nan"), 0, "a")]
)
def test_equal_choices_are_one_as_they_are_to_optuna(choices: tuple[Any, ...]) -> None:
    def score(trial: optuna.Trial) -> float:
        return sum(repr(trial.suggest_categorical(f"bn{i}", choices)) == repr(choices[-1]) for i in range(3))

    study = optuna.create_study(direction="maximize", sampler=NormSampler(seed=0))
    study.optimize(score, n_trials=20)
    plans = [tuple(map(repr, trial.params.values())) for trial in study.trials]
    distinct = len(
        {optuna.distributions.CategoricalDistribution(choices).to_internal_repr(c) for c in choices}
    )
    assert len(set(plans)) == min(20, distinct**3)


@pytest.mark.parametrize("state", ["FAIL", "PRUNED", "RUNNING"])
def test_no_plan_is_proposed_twice_before_any_is_complete(state: str) -> None:
    study = optuna.create_study(sampler=NormSampler(seed=0))
    plans = []
    for _ in range(27):
        trial = study.ask()
        plans.append(tuple(trial.suggest_categorical(f"bn{i}", METHODS[:3]) for i in range(3)))
        if state != "RUNNING":
            study.tell(trial, state=optuna.trial.TrialState[state])
    assert len(set(plans)) == 27
    assert plans[:3] == [(method,) * 3 for method in METHODS[:3]]


def test_choices_need_not_be_hashable() -> None:
    def score(trial: optuna.Trial) -> float:
        return sum(trial.suggest_categorical(f"bn{i}", [[1, 2], [3], "a"]) == [3] for i in range(3))

    study = optuna.create_study(direction="maximize", sampler=NormSampler(seed=0))
    with pytest.warns(UserWarning, match="persistent storage"):
        study.optimize(score, n_trials=20)
    assert study.best_value == 3


def test_scores_beyond_what_can_be_squared_count_as_the_worst() -> None:
    def exploding(trial: optuna.Trial) -> float:
        value = objective(trial)
        return 1e300 if "instance" in trial.params.values() else -value

    study = run(30, objective=exploding, direction="minimize", seed=0)
    assert np.mean([trial.value < 1e300 for trial in study.trials[15:]]) > 0.5


def test_plans_of_failed_and_pruned_trials_are_not_proposed_again() -> None:
    def fragile(trial: optuna.Trial) -> float:
        value = objective(trial)
        if value > 3:
            raise optuna.TrialPruned if trial.number % 2 else ValueError("no memory")
        return value

    study = optuna.create_study(direction="maximize", sampler=NormSampler(seed=0))
    study.optimize(fragile, n_trials=40, catch=(ValueError,))
    plans = [tuple(trial.params.values()) for trial in study.trials]
    assert len(set(plans)) == 40


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_infinite_scores_count_as_the_worst(direction: str) -> None:
    sign = 1 if direction == "maximize" else -1

    def diverging(trial: optuna.Trial) -> float:
        value = objective(trial)
        return -sign * np.inf if "instance" in trial.params.values() else sign * value

    study = run(30, objective=diverging, direction=direction, seed=0)
    assert np.isfinite([trial.value for trial in study.trials[15:]]).mean() > 0.5


def test_parameters_that_come_and_go_do_no_harm() -> None:
    def conditional(trial: optuna.Trial) -> float:
        value = objective(trial)
        if trial.params["bn0"] == "group":
            value += 0.1 * trial.suggest_int("groups", 1, 8)
            value += trial.suggest_categorical("affine", [True, False])
        if trial.number > 20:
            value -= trial.suggest_float("late", 0.0, 1.0)
        return float(value)

    study = run(35, objective=conditional, seed=0)
    assert study.best_value > 5
    assert all(set(trial.params) >= {f"bn{site}" for site in range(6)} for trial in study.trials)


def test_a_misleading_prior_costs_little() -> None:
    wrong = {f"bn{s}": {m: -float(i * (s % 3 - 1)) for i, m in enumerate(METHODS)} for s in range(6)}
    assert min(run(40, seed=seed, prior=wrong).best_value for seed in range(3)) >= 6


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_a_good_prior_saves_trials(direction: str, sign: int) -> None:
    right = {f"bn{s}": {m: sign * float(i * (s % 3 - 1)) for i, m in enumerate(METHODS)} for s in range(6)}
    study = run(8, objective=lambda t: sign * objective(t), direction=direction, seed=0, prior=right)
    assert sign * study.best_value >= 6


def test_the_same_proposals_however_trials_are_stored(tmp_path: Any) -> None:
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
    stored = run(25, optuna.storages.JournalStorage(backend), seed=4)
    assert params(stored) == params(run(25, seed=4))
