"""compare and profile: what a conversion changed in a model's outputs, and what a model costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from normsearch.dependence import Crop, batch_dependence, batch_size, crop_dependence
from normsearch.errors import ModelError, PlanError
from normsearch.forward import evaluating, refuse_meta, try_call, uncompiled
from normsearch.memory import peak_memory
from normsearch.opening import Model, as_module
from normsearch.reports import Change, Drift, Environment, Profile, Report
from normsearch.sites import analyse

Outputs = Callable[[Any], Any]
Metric = Callable[[nn.Module], float]


def compare(
    original: Model,
    converted: Model,
    batches: Iterable[Any],
    *,
    outputs: Outputs | None = None,
    logits: bool = False,
    metric: Metric | None = None,
    crop: Crop | None = None,
) -> Report:
    """Measure what a conversion changed.

    Both models run in eval mode on every batch. Drift is the relative L2 distance
    ‖converted − original‖ / ‖original‖ over all outputs of all batches. On the first batch it is measured
    how much a sample's output depends on the others, in eval and in train mode (dropout and drop-path off,
    running statistics restored). Models, random state and modes are left as they were. Of a model wrapped by
    ``torch.compile`` the network inside is measured: it would be compiled again for each mode and batch size,
    and a compiler's rounding is no effect of the conversion.

    Args:
        original: the model before, or an exported program.
        converted: the model after, or an exported program. A program stays in the mode that it was exported
            in, but for BatchNorm layers and what is made of them in the original.
        batches: inputs, never labels: a tuple is ``*args``, a dict ``**kwargs``, both at once
            ``Arguments(args, kwargs)``, anything else one argument.
        outputs: picks what to compare from a model's output; by default every floating-point tensor in it.
        logits: say that outputs are logits (N, classes, ...): adds the mean KL divergence in nats of the
            converted model's from the original's prediction, and the share of equal top-1 classes.
        metric: a number for a model, for example its accuracy; called for both, in eval mode.
        crop: a tile's side and margin in pixels: how far a tile computed alone differs from the same pixels
            of the whole. Needs outputs that are maps.

    Raises:
        ModelError: a model fails, outputs do not match, the original's outputs are not finite, or there is
            no batch.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> converted = normsearch.convert(model, "frozen")
        >>> normsearch.compare(model, converted, [torch.randn(4, 3, 8, 8)]).drift.relative_l2 < 1e-6
        True

    """
    original, converted = uncompiled(as_module(original)), uncompiled(as_module(converted))
    _check_models(original, converted)
    for model in (original, converted):
        refuse_meta(model, "compare")
    pick = outputs or (lambda output: output)
    sums = DriftSums(logits)
    first, count = None, 0
    with evaluating(original), evaluating(converted):
        for inputs in batches:
            first, count = inputs if first is None else first, count + 1
            before, after = (_named(pick(try_call(model, inputs))) for model in (original, converted))
            _same_places(before, after)
            sums.add(list(before.values()), [after[place] for place in before])
        if first is None:
            raise ModelError("compare got no batch; give at least one input")
        scores = None if metric is None else (float(metric(original)), float(metric(converted)))
    dependence = tuple(
        batch_dependence(model, first, lambda output: floating_tensors(pick(output)))
        for model in (original, converted)
    )
    crops = None
    if crop is not None:
        crops = tuple(
            crop_dependence(model, first, lambda output: floating_tensors(pick(output)), crop)
            for model in (original, converted)
        )
    return Report(
        drift=sums.drift(),
        metric=None if scores is None else Change(*scores),
        batch_dependence=Change(*dependence),
        crop_dependence=None if crops is None else Change(*crops),
        parameters=Change(_parameters(original), _parameters(converted)),
        batch_norms=Change(_batch_norms(original), _batch_norms(converted)),
        batches=count,
        batch_size=batch_size(first),
        environment=Environment.here(converted),
    )


def profile(model: Model, inputs: Any, *, repeats: int = 10) -> Profile:
    """Measure parameters, latency and peak memory of one forward pass in eval mode.

    A model wrapped by ``torch.compile`` is timed as it is, compiled; its memory is that of the network
    inside, operation by operation.

    Args:
        model: the model.
        inputs: one forward pass's inputs.
        repeats: number of timed passes, after two that are not timed.

    Returns:
        Parameters as a count, latency in milliseconds (median, least and most), peak memory of tensors
        allocated during the pass in bytes.

    Raises:
        ModelError: the model fails on ``inputs``.
        PlanError: ``repeats`` is not positive.

    """
    if not isinstance(repeats, int) or repeats < 1:
        raise PlanError(f"repeats={repeats!r}: give a whole number, at least 1")
    model = as_module(model)
    _check_models(model)
    with evaluating(model):
        times = []
        for turn in range(repeats + 2):
            _synchronize(model)
            start = time.perf_counter()
            try_call(model, inputs)
            _synchronize(model)
            if turn >= 2:
                times.append((time.perf_counter() - start) * 1e3)
        peak = peak_memory(lambda: try_call(uncompiled(model), inputs), _device(model))
    return Profile(
        parameters=_parameters(model),
        latency_ms=median(times),
        latency_least_ms=min(times),
        latency_most_ms=max(times),
        peak_memory_bytes=peak,
        environment=Environment.here(model),
        batch_size=batch_size(inputs),
    )


class DriftSums:
    """Drift over batches in constant memory."""

    def __init__(self, logits: bool) -> None:
        self._logits = logits
        self._distance = self._norm = self._divergence = 0.0
        self._agreeing = self._predictions = 0

    def add(self, before: list[Tensor], after: list[Tensor]) -> None:
        """Add the outputs of one batch."""
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (before, after)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"the outputs do not match: shapes {shapes[0]} before, {shapes[1]} after; give outputs=, a "
                "function that picks comparable tensors from a model's output"
            )
        if any(tensor.numel() == 0 for tensor in before):
            raise ModelError("the outputs hold no number: the batch is empty; give at least one sample")
        if not before:
            raise ModelError("the outputs hold no floating-point tensor; give outputs= to pick one")
        if not all(tensor.isfinite().all() for tensor in before):
            raise ModelError(
                "the original's outputs hold NaN or infinite values, to which no distance can be measured; "
                "check the inputs, or give outputs= to pick finite ones"
            )
        for old, new in zip(before, after, strict=True):
            self._distance += float((new.double() - old.double()).square().sum())
            self._norm += float(old.double().square().sum())
            if self._logits:
                self._add_logits(old.double(), new.double())

    def _add_logits(self, old: Tensor, new: Tensor) -> None:
        if old.dim() < 2:
            raise ModelError(
                f"logits=True needs outputs (N, classes, ...), got {tuple(old.shape)}; pick with outputs="
            )
        p, q = old.log_softmax(1), new.log_softmax(1)
        self._divergence += float((p.exp() * (p - q)).sum())
        self._agreeing += int((old.argmax(1) == new.argmax(1)).sum())
        self._predictions += old.shape[0] * old.shape[2:].numel()

    def drift(self) -> Drift:
        """Return the drift over all that was added."""
        relative = (self._distance / self._norm) ** 0.5 if self._norm else float(self._distance > 0)
        if not self._logits:
            return Drift(relative, None, None)
        return Drift(relative, self._divergence / self._predictions, self._agreeing / self._predictions)


def floating_tensors(output: Any) -> list[Tensor]:
    """Return every floating-point tensor in a model's output."""
    return list(_named(output).values())


def _named(output: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors in a model's output by their places in it."""
    leaves, _ = tree_flatten_with_path(output)
    return {
        keystr(place): leaf.detach()
        for place, leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def _same_places(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    if set(before) != set(after):
        raise ModelError(
            f"the outputs do not match: tensors at {sorted(before)} before, {sorted(after)} after; give "
            "outputs=, a function that picks comparable tensors"
        )


def _check_models(*models: nn.Module) -> None:
    for model in models:
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}; load the model first")


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _batch_norms(model: nn.Module) -> int:
    return len(analyse(model, None, dataflow=False))


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _synchronize(model: nn.Module) -> None:
    if _device(model).type == "cuda":
        torch.cuda.synchronize(_device(model))
