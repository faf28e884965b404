"""calibrate: bring a converted ONNX graph back to its original by least squares, site after site."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from normsearch.affine_fitting import along, line, residual, sums
from normsearch.batches import Batches
from normsearch.calibration import Calibration, Rung
from normsearch.errors import ModelError
from normsearch.forward import try_call
from normsearch.methods.upstream import fold_into
from normsearch.onnx_graph.affines import Affine, affine_of, multiply
from normsearch.onnx_graph.emitting import Emitter
from normsearch.onnx_graph.files import Source, opened
from normsearch.onnx_graph.folding import as_module, write_producer
from normsearch.onnx_graph.graphs import names, opset
from normsearch.onnx_graph.neighbours import feed_of, node_path
from normsearch.onnx_graph.running import Runtime
from normsearch.onnx_graph.sites import Place, find_places
from normsearch.pairing import Errors, relative
from normsearch.progress import OnProgress, Stage
from normsearch.reports import Change

_RECORD = "normsearch.calibration"
#: A held-out error at which nothing is left to do but rounding.
_ROUNDING = 1e-6


def calibration_record(model: ir.Model) -> Calibration | None:
    """Return what ``calibrate`` did when it made ``model``; None if it did not make it."""
    found = model.meta.get(_RECORD)
    return found if isinstance(found, Calibration) else None


def calibrate(
    converted: Source,
    original: Source,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> ir.Model:
    """Bring a converted ONNX graph back to its original with a few unlabelled inputs.

    Site after site in the order of the data, a scale and a shift per channel are fitted by least squares to
    the original's output there, as it comes out of the sites fitted before; the sums are kept, not the
    outputs. Where the convolution or linear node before feeds nothing else, it is also tried to whiten the
    site's input by the original's running statistics inside that node. Two rungs, each kept only if it lowers
    the error on held-out batches: least squares with whitening where that leaves less, then without.

    Sites in subgraphs, and those that end without a scale and a shift, are left as they are.

    Args:
        converted: what ``convert`` made of ``original``, or its path; it is left untouched.
        original: the model before, or its path; it is left untouched.
        batches: inputs, never labels, two batches at least, as for ``normsearch.calibrate``.
        seed: for loaders that shuffle.
        on_progress: called after every site.

    Returns:
        A new model; ``calibration_record`` tells what was done.

    Raises:
        CheckpointError: a file cannot be read.
        ModelError: there are fewer than two batches, they can be read only once, change or hold NaN; a model
            fails; the outputs do not match or are not finite; the models do not belong together.

    Source: least squares as in ``normsearch.calibrate``.

    """
    before, after = opened(original), opened(converted)
    with torch.random.fork_rng(devices=[]):
        data = Batches(batches, seed)
    return _Ladder(before, after, data, on_progress).climb()


@dataclass(frozen=True)
class _Shared:
    """A site of the original whose output the converted graph has under the same name."""

    place: Place
    output: str

    @property
    def path(self) -> str:
        return self.place.site.path


class _Ladder:
    """The rungs, and what each brought."""

    def __init__(
        self, original: ir.Model, converted: ir.Model, data: Batches, on_progress: OnProgress | None
    ) -> None:
        self._original, self._now, self._data, self._on_progress = original, converted, data, on_progress
        self._shared = tuple(_shared(original, converted))
        self._rungs: list[Rung] = []

    @torch.no_grad()
    def climb(self) -> ir.Model:
        """Try the rungs and return the best model."""
        start, first = self._now, self._measure(self._now)
        errors = first
        whitened: tuple[str, ...] = ()
        gained: tuple[str, ...] = ()
        for name, whiten in (("whitening and least squares", True), ("least squares", False)):
            if errors.total <= _ROUNDING or (errors is not first and not whiten):
                break
            began, candidate = time.monotonic(), start.clone()
            fitting = _Fitting(self._original, candidate, self._data)
            fitting.fit(self._shared, Stage(name, len(self._shared), self._on_progress), whiten=whiten)
            found = self._measure(candidate)
            kept = found.total < errors.total
            self._rungs.append(Rung(name, found.total, kept, 0, time.monotonic() - began))
            if kept:
                errors, self._now = found, candidate
                whitened, gained = tuple(fitting.whitened), tuple(fitting.gained)
        model = self._now if self._now is not start else start.clone()
        model.meta[_RECORD] = Calibration(
            Change(first.total, errors.total),
            {path: Change(error, errors.sites[path]) for path, error in first.sites.items()},
            tuple(self._rungs),
            whitened,
            gained,
            self._data.count,
            self._data.held_out_count,
        )
        return model

    def _measure(self, model: ir.Model) -> Errors:
        """Measure how far outputs and sites are from the original's over the held-out batches."""
        outputs = [value.name or "" for value in self._original.graph.outputs]
        if outputs != [value.name for value in model.graph.outputs]:
            raise ModelError("the two graphs have other outputs; give a model and what convert made of it")
        sites = {shared.path: shared.output for shared in self._shared}
        visible = list(dict.fromkeys([*outputs, *sites.values()]))
        runtimes = Runtime(self._original, visible), Runtime(model, visible)
        total = [0.0, 0.0]
        apart: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for inputs in self._data.held_out():
            old, new = (try_call(runtime, inputs) for runtime in runtimes)
            for name in outputs:
                _add(total, old.get(name), new.get(name), name)
            for path, name in sites.items():
                _add(apart[path], old[name], new[name], path)
        per_site = {path: relative(*apart[path]) for path in sites}
        if total[1] > 0:
            return Errors(relative(*total), per_site)
        return Errors(sum(per_site.values()) / max(len(per_site), 1), per_site)


def _add(into: list[float], old: Tensor | None, new: Tensor | None, name: str) -> None:
    if old is None or not old.is_floating_point():
        return
    if new is None or new.shape != old.shape:
        raise ModelError(
            f"{name} has other shapes in the two graphs; give a model and what convert made of it"
        )
    if not bool(old.isfinite().all()) or not bool(new.isfinite().all()):
        raise ModelError(f"{name} is not finite; check the inputs and the weights")
    into[0] += float((new.double() - old.double()).square().sum())
    into[1] += float(old.double().square().sum())


def _shared(original: ir.Model, converted: ir.Model) -> Iterator[_Shared]:
    """Yield the sites of the main graph whose output another node of the converted graph puts out."""
    made = {value.name: node for node in converted.graph for value in node.outputs}
    for place in find_places(original):
        if place.node.graph is not original.graph:
            continue
        name = place.node.outputs[0].name or ""
        if name in made and made[name].op_type != "BatchNormalization":
            yield _Shared(place, name)


class _Fitting:
    """One pass over the sites of a converted graph, which is changed.

    Attributes:
        whitened: paths of the sites whose input is whitened.
        gained: paths of the nodes that gained a bias for it.

    """

    def __init__(self, original: ir.Model, model: ir.Model, data: Batches) -> None:
        self._original, self._model, self._data = original, model, data
        self.whitened: list[str] = []
        self.gained: list[str] = []

    def fit(self, sites: Iterable[_Shared], stage: Stage, *, whiten: bool) -> None:
        """Fit every site, each after those before it."""
        for shared in sites:
            affine = self._affine(self._model, shared)
            if affine is not None:
                self._fit(shared, whiten=whiten)
            stage.advance()

    def _affine(self, model: ir.Model, shared: _Shared) -> Affine | None:
        value = _value(model, shared.output)
        channels = shared.place.site.channels
        return None if value is None or channels is None else affine_of(value, channels)

    def _fit(self, shared: _Shared, *, whiten: bool) -> None:
        found = self._whitening(shared) if whiten else None
        total, whitened = self._sums(shared, found)
        if found is not None and residual(whitened) < residual(total):
            self._whiten(shared, found)
            total = whitened
        affine = self._affine(self._model, shared)
        assert affine is not None
        multiply(affine, *line(total))

    def _sums(self, shared: _Shared, whitening: _Whitening | None) -> tuple[Tensor, Tensor]:
        """Return the sums of regressions of the original's output on the site's, as it is and whitened."""
        target = Runtime(self._original, [shared.output])
        values = [shared.output] if whitening is None else [shared.output, whitening.input]
        current, alone = Runtime(self._model, values), None
        if whitening is not None:
            other = self._model.clone()
            affine = self._affine(other, shared)
            assert affine is not None
            affine.set(*whitening.affine)
            alone = Runtime(other, [shared.output], {whitening.input: whitening.dtype})
        totals = torch.zeros(2, 6, shared.place.site.channels or 0, dtype=torch.float64)
        for inputs in self._data.fitted():
            wanted = _rows(try_call(target, inputs)[shared.output])
            found = try_call(current, inputs)
            totals[0] += sums(_rows(found[shared.output]), wanted)
            if whitening is not None and alone is not None:
                x = whitening.applied(found[whitening.input])
                totals[1] += sums(_rows(alone(x)[shared.output]), wanted)
        return totals[0], totals[1]

    def _whitening(self, shared: _Shared) -> _Whitening | None:
        """Return how a site's input is whitened by the node before; None where that node cannot."""
        place = shared.place
        producer, source, old = place.site.producer, place.node.inputs[0], feed_of(place.node)
        if producer is None or not producer.foldable or place.parameters is None or source is None:
            return None
        value = _value(self._model, source.name or "")
        feed = None if value is None else value.producer()
        if feed is None or old is None or feed.op_type != old.op_type:
            return None
        gamma, beta, mean, variance = place.parameters
        scale = (variance + place.site.eps).rsqrt()
        dtype = place.dtype or ir.DataType.FLOAT
        return _Whitening(source.name or "", feed, dtype, scale, -mean * scale, (gamma, beta))

    def _whiten(self, shared: _Shared, found: _Whitening) -> None:
        """Fold a whitening into the node before a site."""
        if len(found.feed.inputs) == 2:
            self.gained.append(node_path(found.feed))
        folded = fold_into(as_module(found.feed), shared.place.trained(), found.scale, found.shift)
        taken = names(self._model)
        e = Emitter(shared.path, opset(self._model), found.dtype, 2, taken, found.feed.domain)
        write_producer(self._model, e, found.feed, folded)
        affine = self._affine(self._model, shared)
        assert affine is not None
        affine.set(*found.affine)
        self.whitened.append(shared.path)


@dataclass(frozen=True)
class _Whitening:
    """x̂ = scale·x + shift, by a site's running statistics, in the node before it.

    Attributes:
        input: the name of the site's input.
        feed: the node that puts it out.
        dtype: its type.
        scale: per channel.
        shift: per channel.
        affine: γ and β, which fit an input of mean 0 and variance 1.

    """

    input: str
    feed: ir.Node
    dtype: ir.DataType
    scale: Tensor
    shift: Tensor
    affine: tuple[Tensor, Tensor]

    def applied(self, x: Tensor) -> Tensor:
        """Return the whitened input."""
        return (x * along(self.scale, x) + along(self.shift, x)).to(x.dtype)


def _value(model: ir.Model, name: str) -> ir.Value | None:
    return next((value for node in model.graph for value in node.outputs if value.name == name), None)


def _rows(x: Tensor) -> Tensor:
    return x.double().transpose(0, 1).flatten(1)
