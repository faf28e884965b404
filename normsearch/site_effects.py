"""sensitivity: how far the output moves when a single site changes, for every site and method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.compatibility import refused_operators
from normsearch.errors import ModelError, PlanError, ShapeError
from normsearch.forward import evaluating, is_lazy, materialised, preserved, refuse_meta, unwrapped
from normsearch.measurement import DriftSums, Outputs, floating_tensors
from normsearch.methods import Method, Refusal, parse_method
from normsearch.opening import Model, as_module
from normsearch.plans import refusal_at
from normsearch.progress import OnProgress, Stage
from normsearch.reports import Environment
from normsearch.resumption import Runs, copies, resumed
from normsearch.sensitivities import Sensitivity
from normsearch.sites import NormSite, analyse, with_calls_lifted
from normsearch.surgery import candidate
from normsearch.tracing import trace


def sensitivity(
    model: Model,
    methods: str | Method | Sequence[str | Method],
    batches: Iterable[Any],
    *,
    sites: Iterable[str] | None = None,
    outputs: Outputs | None = None,
    on_progress: OnProgress | None = None,
) -> Sensitivity:
    """Measure how far a model's output moves when a single site changes, for every site and method.

    d = ‖f_s,m(x) − f(x)‖ / ‖f(x)‖ over all outputs of all batches in eval mode, f_s,m being the model with
    method m at site s alone, initialised from the trained layer as ``convert`` does. It finds the few sites
    where a method destroys what the rest of the network needs, before anything is trained.

    One model stays in memory and is never edited: while a candidate is measured, hooks let it answer for
    the layer that stands there. Where torch.fx can trace the model, what lies before a site is computed
    once per batch; elsewhere, and where the graph does not compute what the model does, each measurement is
    a whole forward pass. Memory does not grow with the number of batches. The inputs are read without any
    accounting for privacy.

    Args:
        model: the trained network, or an exported program; it is left as it was, also when interrupted.
        methods: methods or spellings to try at every site.
        batches: inputs, never labels: a tuple is ``*args``, a dict ``**kwargs``, anything else one argument.
        sites: glob patterns of site paths to restrict the measurement to; by default all.
        outputs: picks what to compare from a model's output; by default every floating-point tensor in it.
        on_progress: called after every measurement of one batch.

    Returns:
        A ``Sensitivity``, the sites in the order in which data reaches them. A method that refuses a site
        has drift None there and its ``Refusal`` in ``refusals``; so has every method at a site that no
        batch reached.

    Raises:
        PlanError: the model has no BatchNorm, a pattern matches none, or no method is given.
        MethodError: a spelling is not valid.
        ModelError: the model fails, outputs are not finite or hold no numbers, or there is no batch.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
        >>> result = normsearch.sensitivity(model.eval(), ["group", "frozen"], batches)
        >>> result.drift["1"]["frozen"] < 1e-6 < result.drift["1"]["group"]
        True

    """
    tried = parsed_methods(methods)
    model = as_module(model)
    if isinstance(model, nn.Module):
        refuse_meta(model, "measure")
    count = length_hint(batches)
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ModelError("sensitivity got no batch; give at least one input")
    if isinstance(model, nn.Module) and is_lazy(model):
        model = materialised(model, copies(first))
    dataflow = any(method.needs_producer for method in tried)
    found = chosen(analyse(model, copies(first), dataflow=dataflow), sites, model, "measure")
    subject = with_calls_lifted(model, certain=any(site.kind == "functional" for site in found))
    pick = _picking(outputs)
    every = chain([first], iterator)
    # Held no longer than the others.
    del first
    with _undisturbed(subject):
        effects, refusals = _effects(subject, found, tried)
        order = _Order(subject, found)
        inner = unwrapped(subject)[0]
        leaves = [old for effect in effects for old, _ in effect.pairs]
        graph = trace(inner, leaves, training=False) if leaves else "there is nothing to resume"
        stage = Stage("sensitivity", count * len(effects), on_progress)
        for number, inputs in enumerate(every, 1):
            whole = Runs(inner, inputs, torch.get_rng_state())
            with order.watched():
                reference = pick(whole.output([]))
            _check(reference, number)
            _add(effects, resumed(whole, graph, reference, pick), reference, pick, stage)
            del whole, inputs
    return _result(order, found, tried, effects, refusals, Environment.here(model))


@dataclass
class _Effect:
    """One method at one site."""

    site: NormSite
    method: Method
    pairs: list[tuple[nn.Module, nn.Module]]
    sums: DriftSums = field(default_factory=lambda: DriftSums(logits=False))
    refusal: Refusal | None = None

    def add(self, run: Runs, reference: list[Tensor], pick: Any) -> None:
        """Measure one batch."""
        if self.refusal is not None:
            return
        try:
            self.sums.add(reference, pick(run.output(self.pairs)))
        except Exception as error:
            cause = error.__cause__ if isinstance(error, ModelError) and error.__cause__ else error
            if not isinstance(cause, ShapeError):
                raise ModelError(
                    f"{self.method} at {self.site.path!r} failed with {type(cause).__name__}: {cause}; leave "
                    "the method or the site out"
                ) from cause
            self.refusal = self.method.refuse(self.site, str(cause), "choose another method for this site")

    @property
    def drift(self) -> float | None:
        """The relative distance; infinite where an output was not finite, None where it was refused."""
        if self.refusal is not None:
            return None
        value = self.sums.drift().relative_l2
        return value if value == value else float("inf")


def _add(effects: list[_Effect], run: Runs, reference: list[Tensor], pick: Outputs, stage: Stage) -> None:
    """Measure one batch, those first whose layers data reaches first."""
    for effect in sorted(effects, key=lambda effect: run.start(effect.pairs)):
        effect.add(run, reference, pick)
        stage.advance(f"{effect.site.path}: {effect.method}")


def parsed_methods(given: str | Method | Sequence[str | Method]) -> list[Method]:
    """Return methods to measure, each once.

    Raises:
        PlanError: there is none.
        MethodError: a spelling is not valid.

    """
    several = [given] if isinstance(given, str | Method) else list(given)
    if not several:
        raise PlanError("sensitivity got no method; give at least one, for example 'group'")
    parsed = [one if isinstance(one, Method) else parse_method(one) for one in several]
    return list(dict.fromkeys(parsed))


def chosen(
    found: tuple[NormSite, ...], patterns: Iterable[str] | None, model: nn.Module, purpose: str
) -> list[NormSite]:
    """Return the sites of a network of torch that patterns name, as ``matching`` does."""
    if not found:
        refused_operators(model)
    return matching(found, patterns, type(model).__name__, purpose)


def matching(
    found: tuple[NormSite, ...], patterns: Iterable[str] | None, name: str, purpose: str
) -> list[NormSite]:
    """Return the sites that glob patterns of paths or aliases name; all without patterns.

    Raises:
        PlanError: there is no site to do anything with, or a pattern matches none.

    """
    if not found:
        raise PlanError(f"{name} has no BatchNorm layer: there is nothing to {purpose}")
    if patterns is None:
        return list(found)
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    matches = {
        pattern: [s for s in found if any(fnmatchcase(path, pattern) for path in (s.path, *s.aliases))]
        for pattern in wanted
    }
    unused = [pattern for pattern, matched in matches.items() if not matched]
    if unused or not wanted:
        raise PlanError(
            f"no site matches {', '.join(map(repr, unused)) or 'an empty list'}; paths look like "
            f"{found[0].path!r} and {found[-1].path!r}, and * matches any text, dots included"
        )
    paths = {site.path for matched in matches.values() for site in matched}
    return [site for site in found if site.path in paths]


def _picking(outputs: Outputs | None) -> Outputs:
    return floating_tensors if outputs is None else lambda output: floating_tensors(outputs(output))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    with preserved(model), evaluating(model), torch.compiler.set_stance("force_eager"):
        yield


def _effects(
    model: nn.Module, sites: list[NormSite], methods: list[Method]
) -> tuple[list[_Effect], list[Refusal]]:
    effects, refusals = [], []
    for site in sites:
        for method in methods:
            refusal = refusal_at(site, method)
            if refusal is not None:
                refusals.append(refusal)
                continue
            resolved = method.resolve(site)
            pairs = [] if method.name == "batch" else candidate(model, site, resolved)
            effects.append(_Effect(site, method, pairs))
    return effects, refusals


class _Order:
    """Watches in which order forward passes reach the sites for the first time."""

    def __init__(self, model: nn.Module, sites: list[NormSite]) -> None:
        self.reached: dict[str, None] = {}
        # What is no layer in the graph, an F.batch_norm call that cannot become one, is refused anyway.
        known = {path for path, _ in model.named_modules()}
        self._layers = [(s.path, model.get_submodule(s.path)) for s in sites if s.path in known]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch one forward pass."""
        with ExitStack() as stack:
            for path, layer in self._layers:
                if isinstance(layer, torch.jit.ScriptModule):
                    continue
                hook = layer.register_forward_pre_hook(
                    lambda layer, args, path=path: self.reached.setdefault(path)
                )
                stack.callback(hook.remove)
            yield


def _check(reference: list[Tensor], batch: int) -> None:
    if not reference or not all(tensor.numel() for tensor in reference):
        raise ModelError(
            f"the outputs of batch {batch} hold no number; give at least one sample, and outputs= to pick "
            "floating-point tensors from the output"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in reference):
        raise ModelError(
            f"the model's own output of batch {batch} is not finite; look for NaN or infinite values in the "
            "inputs, or pick other outputs with outputs="
        )


def _result(
    order: _Order,
    sites: list[NormSite],
    methods: list[Method],
    effects: list[_Effect],
    refusals: list[Refusal],
    environment: Environment,
) -> Sensitivity:
    measured = {(effect.site.path, effect.method): effect for effect in effects}
    paths = [*order.reached, *(site.path for site in sites if site.path not in order.reached)]
    drift: dict[str, dict[str, float | None]] = {path: {} for path in paths}
    for site in sites:
        for method in methods:
            effect = measured.get((site.path, method))
            value = None if effect is None else effect.drift
            if effect is not None and effect.refusal is not None:
                refusals.append(effect.refusal)
            elif effect is not None and site.path not in order.reached:
                value = None
                refusals.append(
                    method.refuse(site, "no batch reached the site", "choose a method for it by other means")
                )
            drift[site.path][str(method)] = value
    return Sensitivity(tuple(paths), tuple(map(str, methods)), drift, tuple(refusals), environment)
