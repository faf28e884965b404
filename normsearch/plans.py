"""Plan: which method stands at which site; ``plan`` and ``explain`` make one from what a user asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from normsearch.compatibility import model_notes, refused_operators, refused_wrappers
from normsearch.errors import PlanError, RefusedError
from normsearch.forward import is_lazy, materialised
from normsearch.methods import METHODS, Method, Refusal, parse_method
from normsearch.opening import Model, as_module
from normsearch.sites import NormSite, analyse
from normsearch.tables import Column, Listing

#: What ``to`` may be: a spelling, a method, an order of preference, or glob patterns of paths to these.
Choice = str | Method | Sequence[str | Method]
To = Choice | Mapping[str, Choice]
Where = Callable[[NormSite], bool]

_BATCH = METHODS["batch"]()


@dataclass(frozen=True)
class Row:
    """What is decided for one site.

    Attributes:
        site: the site.
        method: the method that will stand there, every option resolved; None where all were refused.
        refusals: why each method that was asked for before it cannot stand there.
        notes: what a user should know.

    """

    site: NormSite
    method: Method | None
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What a plan would do at every site, refusals included; nothing is raised.

    Attributes:
        rows: one per site.
        notes: what concerns the model as a whole.

    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The refusals that stand in the way of a plan: those of sites left without a method."""
        return tuple(refusal for row in self.rows if row.method is None for refusal in row.refusals)

    def to_json(self) -> str:
        """Return the table as JSON."""
        rows = [
            {
                "site": asdict(row.site),
                "method": None if row.method is None else str(row.method),
                "exact": None if row.method is None else row.method.exact_at(row.site),
                "refusals": [asdict(refusal) for refusal in row.refusals],
                "notes": row.notes,
            }
            for row in self.rows
        ]
        return json.dumps({"rows": rows, "notes": self.notes}, indent=2)

    def __rich__(self) -> Listing:
        return _table(self.rows, self.notes)


@dataclass(frozen=True)
class Plan(Mapping[str, Method]):
    """A method for every site of a model: the record of what is, or was, changed.

    A mapping from site path to ``Method`` with every option resolved; ``batch`` sites stay as they are.
    ``Plan.from_json(plan.to_json()) == plan``.

    Attributes:
        rows: one per site, in the model's order, each with its method.
        notes: what concerns the model as a whole.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> dict(normsearch.plan(model, "group"))
        {'1': Group(groups=2, weight_standardization=False, whiten=False)}

    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[NormSite, ...]:
        """The sites, in the model's order."""
        return tuple(row.site for row in self.rows)

    @property
    def changes(self) -> tuple[tuple[NormSite, Method], ...]:
        """The sites that get another layer, each with its method."""
        return tuple((row.site, self[row.site.path]) for row in self.rows if row.method != _BATCH)

    @property
    def exact(self) -> bool:
        """Whether the eval-mode function is kept exactly at every site."""
        return all(self[site.path].exact_at(site) for site in self.sites)

    @property
    def batch_independent(self) -> bool:
        """Whether no sample's output will depend on the other samples, in train mode too."""
        return all(method.batch_independent for method in self.values())

    def __getitem__(self, path: str) -> Method:
        for row in self.rows:
            if row.site.path == path and row.method is not None:
                return row.method
        raise KeyError(path)

    def __iter__(self) -> Iterator[str]:
        return (row.site.path for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_json(self) -> str:
        """Return the plan as JSON; ``from_json`` reads it back."""
        rows = [
            {"site": asdict(row.site), "method": str(row.method), "notes": row.notes} for row in self.rows
        ]
        return json.dumps({"rows": rows, "notes": self.notes}, indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan written by ``to_json``; the text may come from anywhere and is validated.

        Raises:
            PlanError: not JSON, or not a plan.
            MethodError: a method's spelling is not valid.

        """
        # pydantic takes a third of a second to import: only where something is read from outside.
        from normsearch.documents import read_plan

        rows, notes = read_plan(text)
        return cls(tuple(Row(site, parse_method(spelling), (), row) for site, spelling, row in rows), notes)

    def __rich__(self) -> Listing:
        return _table(self.rows, self.notes)


def explain(
    model: Model, to: To, *, inputs: Any = None, where: Where | None = None, weights: bool = False
) -> Explanation:
    """Return what ``plan`` would decide for every site, with every refusal, without raising for them.

    Args:
        model: the model.
        to: as for ``plan``.
        inputs: as for ``plan``.
        where: as for ``plan``.
        weights: as for ``plan``.

    Raises:
        PlanError: the model has no normalization site, or a pattern matches none.
        MethodError: a spelling is not valid.
        ModelError: the model fails on ``inputs``.

    """
    patterns = _patterns(to)
    model = as_module(model)
    refused_wrappers(model)
    if inputs is not None and is_lazy(model):
        model = materialised(model, inputs)
    dataflow = any(method.needs_dataflow for methods in patterns.values() for method in methods)
    sites = analyse(model, inputs, dataflow=dataflow, weights=weights)
    if not sites:
        refused_operators(model)
        _refuse_converted(model)
    rows = decided(sites, to, where, type(model).__name__)
    changed = [row for row in rows if row.method != _BATCH]
    renumbered = [
        row.site for row in changed if row.method is None or not _keeps_affine(row.method, row.site)
    ]
    return Explanation(rows, model_notes(model, [row.site for row in changed], renumbered))


def _keeps_affine(method: Method, site: NormSite) -> bool:
    """Whether a site's γ and β stay as they are, and where they are."""
    # timm's norm + act layers become a Sequential, which has the numbers one level below.
    return method.carries_parameters and site.activation is None


def _refuse_converted(model: nn.Module) -> None:
    """Raise a ``PlanError`` for a model without BatchNorm that has layers of normsearch."""
    own = [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("normsearch.methods.")]
    if own:
        raise PlanError(
            f"{type(model).__name__} has no BatchNorm layer but {len(own)} of normsearch "
            f"({', '.join(sorted(set(own)))}): it is converted already; start from the original model"
        )


def decided(sites: Sequence[NormSite], to: To, where: Where | None, owner: str) -> tuple[Row, ...]:
    """Decide for every site, with every refusal.

    Args:
        sites: of the model.
        to: as for ``plan``.
        where: as for ``plan``.
        owner: what the model is called in an error.

    Raises:
        PlanError: there is no site, or a pattern matches none.
        MethodError: a spelling is not valid.

    """
    patterns = _patterns(to)
    if where is not None and not callable(where):
        raise PlanError(
            f"where={where!r}: give a function of a NormSite, such as lambda site: site.channels > 32"
        )
    if not sites:
        raise PlanError(
            f"{owner} has no BatchNorm layer: there is nothing to convert; "
            "find_sites(model) lists what normsearch sees"
        )
    unused = [pattern for pattern in patterns if not any(_matches(pattern, site) for site in sites)]
    if unused:
        raise PlanError(
            f"no site matches {', '.join(map(repr, unused))}; paths look like {sites[0].path!r} "
            f"and {sites[-1].path!r}, and * matches any text, dots included"
        )
    return tuple(_decide(site, patterns, where) for site in sites)


def plan(
    model: Model, to: To, *, inputs: Any = None, where: Where | None = None, weights: bool = False
) -> Plan:
    """Decide which method stands at which site.

    Args:
        model: any nn.Module, or a ``torch.export.ExportedProgram``.
        to: a method or its spelling (``"group(groups=8)"``); a list of them in order of preference, of
            which each site gets the first that does not refuse it; or a mapping from glob patterns of
            site paths to these, of which the first that matches counts, ``*`` last. Sites that none matches
            stay ``batch``.
        inputs: one forward pass's inputs, which tell shapes: instance norm can then refuse 1×1 maps now
            instead of at run time.
        where: keeps every site ``batch`` for which it returns False.
        weights: include convolutions and linear layers that feed no BatchNorm, for ``weight`` and
            ``spectral``.

    Raises:
        RefusedError: a method cannot stand at a site; every refusal is in ``.refusals``.
        PlanError: the model has no normalization site, or a pattern matches none.
        MethodError: a spelling is not valid.
        ModelError: the model fails on ``inputs``.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> normsearch.plan(model, {"1": ["instance", "group"]}, inputs=torch.randn(1, 3, 3, 3))["1"]
        Group(groups=2, weight_standardization=False, whiten=False)

    """
    return planned(explain(model, to, inputs=inputs, where=where, weights=weights))


def planned(explanation: Explanation) -> Plan:
    """Return the plan that an explanation without refusals is.

    Raises:
        RefusedError: a site was left without a method.

    """
    if explanation.refusals:
        raise RefusedError(explanation.refusals)
    return Plan(
        tuple(Row(row.site, row.method, (), row.notes) for row in explanation.rows), explanation.notes
    )


def _patterns(to: To) -> dict[str, tuple[Method, ...]]:
    if isinstance(to, Mapping):
        if not to:
            raise PlanError("the mapping of patterns to methods is empty; give at least {'*': method}")
        for pattern in to:
            if not isinstance(pattern, str):
                raise PlanError(
                    f"a mapping goes from patterns of site paths, which are text, got {pattern!r}"
                )
        patterns = {pattern: _methods(choice) for pattern, choice in to.items()}
        # What matches everything is for what is left, wherever it stands.
        rest = {"*": patterns.pop("*")} if "*" in patterns else {}
        return patterns | rest
    return {"*": _methods(to)}


def _methods(choice: Choice) -> tuple[Method, ...]:
    if isinstance(choice, str | Method):
        choice = [choice]
    if not isinstance(choice, Sequence) or not choice:
        raise PlanError(
            f"expected a method, its spelling, a list of them, or a mapping from path patterns to them; "
            f"got {choice!r}"
        )
    found = []
    for one in choice:
        if not isinstance(one, str | Method):
            raise PlanError(f"expected a method or its spelling, got {one!r}")
        found.append(one if isinstance(one, Method) else parse_method(one))
    return tuple(found)


def _matches(pattern: str, site: NormSite) -> bool:
    return any(fnmatchcase(path, pattern) for path in (site.path, *site.aliases))


def _decide(site: NormSite, patterns: Mapping[str, tuple[Method, ...]], where: Where | None) -> Row:
    methods = next((methods for pattern, methods in patterns.items() if _matches(pattern, site)), (_BATCH,))
    if where is not None and not where(site):
        methods = (_BATCH,)
    refusals: list[Refusal] = []
    for method in methods:
        refusal = refusal_at(site, method)
        if refusal is None:
            return Row(site, method.resolve(site), tuple(refusals), method.notes(site))
        refusals.append(refusal)
    return Row(site, None, tuple(refusals))


def refusal_at(site: NormSite, method: Method) -> Refusal | None:
    """Return why ``method`` cannot stand at ``site``: for what the site is, or by the method's own rule."""
    if method == _BATCH:
        return None
    return _site_refusal(site, method) or method.refusal(site)


_REMEDY = {
    "lazy": ("its number of channels is not known yet", "run one forward pass first, or give inputs="),
    "parametrized": (
        "its weight is parametrized",
        "call torch.nn.utils.parametrize.remove_parametrizations first, or leave it out with where=",
    ),
    "scripted": (
        "it is compiled TorchScript",
        "convert the nn.Module, then export the result, or torch.jit.trace it",
    ),
    "custom": (
        "",
        "leave it out with where=lambda site: site.kind != 'custom', or replace it by torch's layer",
    ),
    "functional": (
        "",
        "leave it out with where=lambda site: site.kind != 'functional', or make it a BatchNorm layer",
    ),
}


def _site_refusal(site: NormSite, method: Method) -> Refusal | None:
    # A functional call that became a layer has no detail, unless that layer's statistics are broken.
    convertible = site.kind == "functional" and (site.detail is None or site.track_running_stats)
    if site.kind in _REMEDY and not convertible:
        reason, remedy = _REMEDY[site.kind]
        return method.refuse(site, site.detail or reason, remedy)
    if site.detail is not None:
        return method.refuse(
            site,
            site.detail,
            "repair the checkpoint, reset the layer (reset_running_stats()) and train on, or leave it out "
            "with where=",
        )
    if site.kind == "weight" and not method.of_weights:
        return method.refuse(
            site,
            "the layer has no BatchNorm, only a weight",
            "choose weight or spectral, or leave it out with where=lambda site: site.kind != 'weight'",
        )
    # timm's norm + act layers become a Sequential, which has the numbers one level below.
    left = () if site.activation is not None else method.leaves(site)
    missing = [name for name in site.read if name not in left]
    if missing:
        return method.refuse(
            site,
            f"a forward method of the model reads its {' and '.join(missing)}, which the new layer does not "
            "have",
            "choose frozen or batch_renorm, or leave it out with where=lambda site: not site.read"
            if site.activation is None
            else "leave it out with where=lambda site: not site.read",
        )
    if site.tied and not method.carries_parameters:
        return method.refuse(
            site,
            f"its weight or bias is also {', '.join(site.tied)}, which folding statistics would untie",
            "untie them first, or choose batch_renorm, batch_instance or frozen",
        )
    return None


def _table(rows: Sequence[Row], notes: Sequence[str]) -> Listing:
    columns = (
        Column("site"),
        Column("method"),
        Column("function", optional=True),
        Column("channels", number=True, optional=True),
        Column("layer", optional=True),
        Column("notes", prose=True),
    )
    lines = []
    for row in rows:
        said = [f"{refusal.method}: {refusal.reason}; {refusal.remedy}" for refusal in row.refusals]
        method = row.method
        lines.append(
            (
                row.site.path or "(model)",
                "refused" if method is None else str(method),
                "" if method is None else "exact" if method.exact_at(row.site) else "approximate",
                str(row.site.channels or "?"),
                row.site.layer.rpartition(".")[2],
                "\n".join((*row.notes, *said)),
            )
        )
    return Listing(f"{len(rows)} sites", columns, lines, notes)
