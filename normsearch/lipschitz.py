"""operator_norms: how much each convolution and linear layer can stretch its input, measured and bounded."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normsearch.errors import ModelError
from normsearch.forward import evaluating, preserved, refuse_meta, try_call
from normsearch.reparametrization import rows
from normsearch.reports import Environment
from normsearch.tracing import WEIGHTED

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerNorms:
    """Norms of one layer as a linear map, its bias left out.

    Attributes:
        path: the layer's path.
        layer: its class.
        matrix: largest singular value of the weight as a matrix with one row per output channel.
        operator: norm of the map itself at the input size seen, by power iteration (a lower estimate that
            converges from below); None if no forward pass reached the layer.
        bound: what ``operator`` cannot exceed: matrix · √(number of outputs that one input position reaches
            through the kernel); None where padding copies positions.

    """

    path: str
    layer: str
    matrix: float
    operator: float | None
    bound: float | None


@dataclass(frozen=True)
class OperatorNorms:
    """The norms of a model's convolutions and linear layers; made by ``operator_norms``.

    Attributes:
        layers: one entry per layer, in the order of ``named_modules``.
        environment: device, dtype and versions.

    """

    layers: tuple[LayerNorms, ...]
    environment: Environment

    @property
    def product(self) -> float:
        """Product of the layers' operator norms.

        It bounds the Lipschitz constant of a chain of these layers with activations of slope at most one
        between them, and nothing else: a shortcut adds, and other layers have norms of their own.
        """
        return math.prod(layer.operator for layer in self.layers if layer.operator is not None)

    def to_json(self) -> str:
        """Return every number as JSON."""
        return json.dumps(asdict(self) | {"product": self.product}, indent=2)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title="operator norms", caption=f"product of the operator norms: {self.product:.4g}")
        table.add_column("layer", overflow="fold")
        for name in ("matrix", "operator", "bound"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            numbers = (layer.matrix, layer.operator, layer.bound)
            table.add_row(layer.path, *("-" if x is None else f"{x:.4g}" for x in numbers))
        return table


def operator_norms(model: nn.Module, inputs: Any, *, iterations: int = 100) -> OperatorNorms:
    """Measure how much each convolution and linear layer can stretch its input.

    For a layer x ↦ Wx + b the operator norm is max ‖Wx‖/‖x‖, found by power iteration on WᵀW at the input
    size that a forward pass shows. The largest singular value σ of the weight as a matrix bounds it:
    ‖W‖ ≤ σ √m, where an input position reaches m = ∏ ⌈k/s⌉ outputs (kernel k, stride s; m = ∏ k for
    transposed convolutions, 1 for linear layers). ``spectral(gain=fixed)`` makes σ one, so a k×k convolution
    of stride 1 has norm at most k.

    Args:
        model: the model; it is run in eval mode and left as it was.
        inputs: one forward pass's inputs, for the input sizes of the layers.
        iterations: power iterations per layer.

    Raises:
        ModelError: the model fails on ``inputs``, has no such layer, or ``iterations`` is not positive.

    Source: Miyato et al., 2018, arXiv:1802.05957 (matrix); Sedghi et al., 2019, arXiv:1805.10408 (map).

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> bounded = normsearch.convert(model, "spectral(gain=fixed)")
        >>> norms = normsearch.operator_norms(bounded, torch.randn(1, 3, 8, 8)).layers[0]
        >>> round(norms.matrix, 3), norms.operator < 3
        (1.0, True)

    """
    if not isinstance(iterations, int) or iterations < 1:
        raise ModelError(f"iterations={iterations!r}: give a whole number of power iterations, at least 1")
    layers: dict[str, nn.Module] = {
        path: module for path, module in model.named_modules() if isinstance(module, WEIGHTED)
    }
    if not layers:
        raise ModelError(f"{type(model).__name__} has no convolution or linear layer to measure")
    refuse_meta(model, "measure")
    shapes = _input_shapes(model, layers, inputs)
    with evaluating(model):
        measured = tuple(
            LayerNorms(
                path=path,
                layer=type(layer).__name__,
                matrix=_largest_singular_value(layer),
                operator=_operator_norm(layer, shapes[path], iterations) if path in shapes else None,
                bound=_bound(layer),
            )
            for path, layer in layers.items()
        )
    return OperatorNorms(measured, Environment.here(model))


def _input_shapes(model: nn.Module, layers: dict[str, nn.Module], inputs: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape, of one sample, in which each layer got its first input."""
    shapes: dict[str, tuple[int, ...]] = {}
    with ExitStack() as stack:
        for path, layer in layers.items():

            def remember(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                if args and isinstance(args[0], Tensor):
                    shapes.setdefault(path, (1, *args[0].shape[1:]))

            stack.callback(layer.register_forward_pre_hook(remember).remove)
        stack.enter_context(preserved(model))
        stack.enter_context(evaluating(model))
        try_call(model, inputs)
    return shapes


def _largest_singular_value(layer: nn.Module) -> float:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return float(torch.linalg.matrix_norm(rows(weight.detach().double(), layer), 2))


def _operator_norm(layer: nn.Module, shape: tuple[int, ...], iterations: int) -> float:
    """Return the norm of the layer's linear part by power iteration in double precision."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    zero = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    offset = layer(zero)

    def linear(x: Tensor) -> Tensor:
        moved: Tensor = (layer(x) - offset).double()
        return moved

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device)
    norm = 0.0
    for _ in range(iterations):
        x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
        with torch.enable_grad():
            leaf = x.to(weight.dtype).requires_grad_()
            output = linear(leaf)
            (back,) = torch.autograd.grad(output, leaf, output.detach())
        norm, x = float(output.detach().norm()), back.double()
    return norm


def _bound(layer: nn.Module) -> float | None:
    sigma = _largest_singular_value(layer)
    if not isinstance(layer, _ConvNd):
        return sigma
    # Any other padding copies positions, which then reach more outputs than the kernel overlaps.
    if layer.padding_mode != "zeros":
        return None
    if isinstance(layer, _ConvTransposeNd):
        return sigma * math.sqrt(math.prod(layer.kernel_size))
    # Offsets d·o ≡ c (mod s) repeat every s / gcd(s, d) positions of the kernel.
    reached = (
        math.ceil(k / (s // math.gcd(s, d)))
        for k, s, d in zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    )
    return sigma * math.sqrt(math.prod(reached))
