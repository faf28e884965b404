"""A converted model beside its original: run on the same inputs in eval mode and watched site by site."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from normsearch.errors import ModelError
from normsearch.forward import copied, evaluating, preserved, try_call, unwrapped
from normsearch.sites import NormSite, analyse, with_calls_lifted

#: Picks what to match from a model's output.
Outputs = Callable[[Any], Any]
#: Called with a site's path and the new layer's input and output and the original layer's output, in data
#: order; a tensor that it returns takes the output's place.
Visit = Callable[[str, Tensor, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class SitePair:
    """A site where another layer stands now.

    Attributes:
        site: what is known about the original's layer.
        old: the original's layer.
        new: the normalization that replaced it, without the activation that a fused layer carries.

    """

    site: NormSite
    old: nn.Module
    new: nn.Module

    def target(self, x: Tensor, output: Tensor) -> Tensor:
        """Return what the original's normalization made of ``x``: its output before a fused activation."""
        if self.site.activation is None:
            return output.detach().clone()
        old: Any = self.old
        mean, variance = old.running_mean, old.running_var
        return F.batch_norm(x, mean, variance, old.weight, old.bias, mean is None, 0.0, old.eps)


class Pair:
    """An original and a copy of what it was converted to, whose numbers may be changed.

    Args:
        original: the model before; it is never changed.
        converted: the model after; it is copied.
        outputs: picks what to match from a model's output.
        inputs: one forward pass's inputs, which show how a linear layer's features are read.

    Attributes:
        model: the copy, to be returned.
        original: the network before, without wrappers, as a graph where only that shows its layers.
        network: the network inside ``model``, without wrappers.
        sites: where another layer stands now, by path in the network.

    Raises:
        ModelError: the models do not belong together, or the converted one cannot be copied.

    """

    def __init__(
        self, original: nn.Module, converted: nn.Module, outputs: Outputs | None, inputs: Any
    ) -> None:
        for model in (original, converted):
            if not isinstance(model, nn.Module):
                raise ModelError(f"expected two torch.nn.Module, got {type(model).__name__}")
        try:
            self.model = copied(converted)
        except ModelError as error:
            raise ModelError(
                f"the converted {type(converted).__name__} cannot be copied ({error.__cause__}), and "
                "calibration leaves what it is given untouched; make copy.deepcopy(converted) possible"
            ) from error
        self.network = unwrapped(self.model)[0]
        self.original = with_calls_lifted(unwrapped(original)[0])
        self._outputs = outputs
        self.sites = {pair.site.path: pair for pair in self._pairs(inputs)}

    def _pairs(self, inputs: Any) -> Iterator[SitePair]:
        modules = dict(self.network.named_modules(remove_duplicate=False))
        for site in analyse(self.original, inputs, dataflow=True):
            new = modules.get(site.path)
            if new is None:
                if site.kind == "functional":
                    continue
                raise ModelError(
                    f"the original normalizes at {site.path!r}, where the converted "
                    f"{type(self.network).__name__} has no layer; give a model and what convert made of it"
                )
            old = self.original.get_submodule(site.path)
            if type(new) is type(old):
                continue
            fused = site.activation is not None and "norm" in new._modules
            yield SitePair(site=site, old=old, new=new.get_submodule("norm") if fused else new)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put both networks into evaluation mode without gradients; restore modes and random state."""
        with evaluating(self.original), evaluating(self.network):
            yield

    def run(self, inputs: Any, visit: Visit | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs to match, of the original and of the converted network.

        Args:
            inputs: one forward pass's inputs.
            visit: sees every call of a site whose input has one shape in both networks.

        Raises:
            ModelError: a network fails, or the outputs do not match or are not finite.

        """
        # A network may keep what it computes in eval mode, as LeViT does: it would soon be out of date.
        with preserved(self.original), preserved(self.network), ExitStack() as hooks:
            targets: dict[str, list[Tensor]] = defaultdict(list)
            for path, pair in self.sites.items() if visit is not None else ():
                note = _noting(pair, targets[path])
                handle = pair.old.register_forward_hook(note, with_kwargs=True)
                hooks.callback(handle.remove)
            with torch.no_grad():
                before = self._pick(try_call(self.original, inputs))
            for path, pair in self.sites.items() if visit is not None else ():
                assert visit is not None
                watch = _watching(path, targets[path], visit)
                handle = pair.new.register_forward_hook(watch, with_kwargs=True)
                hooks.callback(handle.remove)
            after = self._pick(try_call(self.network, inputs))
        _check(before, after)
        return before, after

    def _pick(self, output: Any) -> list[Tensor]:
        picked = output if self._outputs is None else self._outputs(output)
        floats = [x for x in tree_leaves(picked) if isinstance(x, Tensor) and x.is_floating_point()]
        if self._outputs is None and not floats:
            raise ModelError(
                "the outputs hold no floating-point tensor; give outputs=, a function that picks comparable "
                "tensors from a model's output, or outputs=lambda output: () to match the sites alone"
            )
        return floats

    def errors(self, batches: Sequence[Any] | Iterator[Any]) -> Errors:
        """Measure how far the converted network is from the original over some batches."""
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

        def add(name: str, old: Tensor, new: Tensor) -> None:
            wide = old.double()
            sums[name][0] += float((new.double() - wide).square().sum())
            sums[name][1] += float(wide.square().sum())

        def visit(path: str, x: Tensor, output: Tensor, target: Tensor) -> None:
            add(path, target, output)

        outputs = [0.0, 0.0]
        for inputs in batches:
            for old, new in zip(*self.run(inputs, visit), strict=True):
                wide = old.double()
                outputs[0] += float((new.double() - wide).square().sum())
                outputs[1] += float(wide.square().sum())
        sites = {path: relative(*sums[path]) for path in self.sites if path in sums}
        if outputs[1] > 0:
            return Errors(relative(*outputs), sites)
        return Errors(sum(sites.values()) / max(len(sites), 1), sites)


@dataclass(frozen=True)
class Errors:
    """Relative L2 distances, ‖converted − original‖ / ‖original‖.

    Attributes:
        total: of the outputs; the mean of the sites' where no output is matched.
        sites: of each site's output, by path.

    """

    total: float
    sites: dict[str, float]


def relative(distance: float, norm: float) -> float:
    """Return √(distance / norm) of two sums of squares."""
    return math.sqrt(distance / norm) if norm else float(distance > 0)


def _noting(pair: SitePair, targets: list[Tensor]) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        targets.append(pair.target(_first(args, kwargs), output))

    return note


def _watching(path: str, targets: list[Tensor], visit: Visit) -> Callable[..., Tensor | None]:
    calls = iter(targets)

    def watch(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        target = next(calls, None)
        # A detector's heads see as many regions as it found: other ones cannot be compared.
        if target is None or target.shape != output.shape or not output.numel():
            return None
        return visit(path, _first(args, kwargs), output, target)

    return watch


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor


def _check(before: list[Tensor], after: list[Tensor]) -> None:
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (before, after)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"the outputs do not match: shapes {shapes[0]} of the original, {shapes[1]} of the converted "
            "model; give a model and what convert made of it, or outputs=, a function that picks comparable "
            "tensors (outputs=lambda output: () matches the sites alone, as a detector's boxes need)"
        )
    for name, tensors in (("original", before), ("converted model", after)):
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise ModelError(f"the outputs of the {name} are not finite; check the inputs and the weights")
    if any(not tensor.numel() for tensor in before):
        raise ModelError("the outputs hold no number: the batch is empty; give at least one sample")
