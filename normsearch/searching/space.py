"""SearchSpace: which methods may stand where, and which sites must agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from torch import nn

from normsearch.errors import SearchError
from normsearch.methods import Method, Refusal, parse_method
from normsearch.plans import Plan, Row, refusal_at
from normsearch.searching.tables import Table
from normsearch.site_effects import chosen
from normsearch.sites import NormSite, analyse

#: One normalization by the batch, one by the sample, one by the map, and mixtures that learn their weights.
METHODS = ("batch", "group", "layer", "instance", "batch_instance", "switchable", "batch_renorm")


@dataclass(frozen=True)
class Choice:
    """One decision of the search: the method of one site, or of several that are tied.

    Attributes:
        sites: paths, in the order in which data reaches them.
        methods: spellings that may be chosen. A tied site where one cannot stand gets the first of the
            space's methods that can.

    """

    sites: tuple[str, ...]
    methods: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the study's parameter: the path, or the first and the number of those tied to it."""
        first = self.sites[0] or "(model)"
        return first if len(self.sites) == 1 else f"{first} +{len(self.sites) - 1}"


@dataclass(frozen=True)
class SearchSpace:
    """Every plan that a search may try.

    Attributes:
        sites: every site of the model, those that keep their BatchNorm included.
        methods: spellings in the order of preference.
        allowed: for each site that is searched, in the order of data where it is known, the methods that
            may stand there.
        choices: the decisions: each searched site is in one.
        refusals: why a method may not stand at a site.

    Example:
        >>> import torch
        >>> from normsearch.searching import SearchSpace
        >>> layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.BatchNorm2d(8)]
        >>> space = SearchSpace.of(torch.nn.Sequential(*layers), ["batch", "group"])
        >>> [(choice.name, choice.methods) for choice in space.choices]
        [('1', ('batch', 'group')), ('2', ('batch', 'group'))]
        >>> space.size
        4

    """

    sites: tuple[NormSite, ...]
    methods: tuple[str, ...]
    allowed: Mapping[str, tuple[str, ...]]
    choices: tuple[Choice, ...]
    refusals: tuple[Refusal, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        methods: Sequence[str | Method] = METHODS,
        *,
        sites: Iterable[str] | None = None,
        inputs: Any = None,
        batch_independent: bool = False,
    ) -> SearchSpace:
        """Return the space of a model, one choice per site.

        Args:
            model: the model.
            methods: methods or spellings to choose from.
            sites: glob patterns of site paths to search; by default all. The others keep their BatchNorm.
            inputs: one forward pass's inputs, which tell shapes.
            batch_independent: leave out every method whose outputs depend on other samples.

        Raises:
            SearchError: there is nothing to choose.
            PlanError: the model has no BatchNorm, or a pattern matches none.
            MethodError: a spelling is not valid.

        """
        parsed = _parsed(methods)
        dataflow = any(method.needs_dataflow for method in parsed)
        found = analyse(model, inputs, dataflow=dataflow)
        searched = chosen(found, sites, model, "search")
        refusals: list[Refusal] = []
        allowed: dict[str, tuple[str, ...]] = {}
        for site in searched:
            here = []
            for method in parsed:
                refusal = refusal_at(site, method)
                if refusal is None and batch_independent and not method.batch_independent:
                    refusal = method.refuse(
                        site,
                        "its outputs depend on the other samples",
                        "allow it with batch_independent=False",
                    )
                if refusal is None:
                    here.append(str(method))
                else:
                    refusals.append(refusal)
            if not here:
                raise SearchError(
                    f"no method may stand at {site.path!r}: "
                    + "; ".join(f"{r.method}: {r.reason}" for r in refusals if r.site == site.path)
                    + "; add a method, or leave the site out with sites="
                )
            allowed[site.path] = tuple(here)
        choices = tuple(Choice((path,), here) for path, here in allowed.items())
        space = cls(found, tuple(map(str, parsed)), allowed, choices, tuple(refusals))
        if space.size < 2:
            fit = [m for m in METHODS if parse_method(m).batch_independent or not batch_independent]
            where = " whose outputs do not depend on the batch" if batch_independent else ""
            raise SearchError(
                f"with {', '.join(space.methods)} there is one plan only{where}; give methods= that differ, "
                f"for example {', '.join(fit)}"
            )
        return space

    @property
    def size(self) -> int:
        """The number of plans."""
        return math.prod(len(choice.methods) for choice in self.choices)

    @property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        """Optuna's distributions of the choices that there are: those with two methods at least."""
        return {c.name: CategoricalDistribution(c.methods) for c in self.choices if len(c.methods) > 1}

    def without(self, vetoes: Mapping[str, Sequence[str]], reason: str) -> SearchSpace:
        """Return the space without some methods at some sites; a site's last one stays.

        Args:
            vetoes: spellings by site path.
            reason: what the refusals say.

        """
        allowed, refusals = dict(self.allowed), list(self.refusals)
        for path, spellings in vetoes.items():
            if path not in allowed:
                continue
            kept = tuple(m for m in allowed[path] if m not in spellings)
            if kept:
                gone = [m for m in allowed[path] if m not in kept]
                remedy = "search without veto, or choose another method"
                refusals += [Refusal(path, spelling, reason, remedy) for spelling in gone]
                allowed[path] = kept
        return replace(
            self,
            allowed=allowed,
            choices=tuple(Choice(c.sites, self._common(c.sites, allowed)) for c in self.choices),
            refusals=tuple(refusals),
        )

    def in_order(self, paths: Sequence[str]) -> SearchSpace:
        """Return the space with its choices in the order in which data reaches their first sites."""
        rank = {path: index for index, path in enumerate(paths)}
        last = len(rank)
        choices = sorted(self.choices, key=lambda choice: rank.get(choice.sites[0], last))
        return replace(self, choices=tuple(choices))

    def tied(self, most: int) -> SearchSpace:
        """Return a space of at most ``most`` choices: neighbours in a stage are tied, small groups first.

        A stage is a run of sites whose maps have the same size. Only when every stage is one choice are
        neighbouring stages joined.

        Raises:
            SearchError: ``most`` is below 1.

        """
        if most < 1:
            raise SearchError(f"most={most}: give at least 1")
        groups = [choice.sites for choice in self.choices]
        stage = {site.path: site.input_shapes[0][2:] if site.input_shapes else None for site in self.sites}
        while len(groups) > most:
            pairs = range(len(groups) - 1)
            same = [i for i in pairs if stage[groups[i][-1]] == stage[groups[i + 1][0]]]
            at = min(same or pairs, key=lambda i: len(groups[i]) + len(groups[i + 1]))
            groups[at : at + 2] = [groups[at] + groups[at + 1]]
        choices = tuple(Choice(sites, self._common(sites, self.allowed)) for sites in groups)
        return replace(self, choices=choices)

    def _common(self, sites: Sequence[str], allowed: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        """Return the methods that may stand at half of these sites or more."""
        counts = {m: sum(m in allowed[path] for path in sites) for m in self.methods}
        common = tuple(m for m, count in counts.items() if 2 * count >= len(sites))
        return common or (max(counts, key=lambda m: counts[m]),)

    def plan(self, params: Mapping[str, Any]) -> Plan:
        """Return the plan that a trial's parameters say.

        Raises:
            SearchError: a choice is missing, or is none that may stand there.

        """
        at: dict[str, Method] = {}
        for choice in self.choices:
            spelling = params.get(choice.name, choice.methods[0])
            if choice.name not in params and len(choice.methods) > 1:
                raise SearchError(
                    f"the parameters say nothing of {choice.name!r}; take those of a trial of this search"
                )
            if spelling not in choice.methods:
                raise SearchError(
                    f"{spelling!r} is no choice at {choice.name!r}; there are {', '.join(choice.methods)}"
                )
            for path in choice.sites:
                here = spelling if spelling in self.allowed[path] else self.allowed[path][0]
                at[path] = self._parsed[here]
        rows = []
        for site in self.sites:
            method = at.get(site.path, self._parsed["batch"])
            rows.append(Row(site, method.resolve(site), (), method.notes(site)))
        return Plan(tuple(rows))

    def params(self, methods: Mapping[str, str]) -> dict[str, str]:
        """Return the parameters nearest to a method for each site: what most sites of a choice have.

        Args:
            methods: spellings by site path; a site that is missing, or whose method may not stand there,
                counts for the choice's first method.

        """
        found = {}
        for choice in self.choices:
            wanted = [methods.get(path) for path in choice.sites]
            votes = {m: wanted.count(m) for m in choice.methods}
            found[choice.name] = max(votes, key=lambda m: votes[m])
        return self.free(found)

    def uniform(self, method: str) -> dict[str, str]:
        """Return the parameters with one method wherever it may stand, the choices' first elsewhere."""
        return self.params({path: method for choice in self.choices for path in choice.sites})

    def uniform_method(self, params: Mapping[str, Any]) -> str | None:
        """Return the method that stands wherever it may, the preferred of several; None for a mix."""
        free = self.free(params)
        return next((method for method in self.methods if self.uniform(method) == free), None)

    def free(self, params: Mapping[str, str]) -> dict[str, str]:
        """Return the parameters that a study knows of: those with two methods at least."""
        return {name: params[name] for name in self.distributions}

    def by_choice(self, table: Table) -> dict[str, dict[str, float]]:
        """Return a table by site as one by choice: sums over tied sites, with what really stands at each."""
        return {
            choice.name: {
                m: sum(
                    table[path][m if m in self.allowed[path] else self.allowed[path][0]]
                    for path in choice.sites
                )
                for m in choice.methods
            }
            for choice in self.choices
        }

    @cached_property
    def _parsed(self) -> dict[str, Method]:
        return {spelling: parse_method(spelling) for spelling in (*self.methods, "batch")}


def random_params(space: SearchSpace, rng: np.random.Generator) -> dict[str, str]:
    """Return a plan's parameters, each choice at random."""
    return {
        name: str(distribution.choices[int(rng.integers(len(distribution.choices)))])
        for name, distribution in space.distributions.items()
    }


def _parsed(methods: Sequence[str | Method]) -> list[Method]:
    several = [methods] if isinstance(methods, str | Method) else list(methods)
    if not several:
        raise SearchError(f"methods is empty; give some to choose from, for example {', '.join(METHODS)}")
    parsed = [one if isinstance(one, Method) else parse_method(one) for one in several]
    return list(dict.fromkeys(parsed))
