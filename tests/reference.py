"""Slow, obvious implementations: loops over samples and channels in double precision.

One function per method: ``reference(x, state, eps, training)`` returns the output of the layer that the
method builds. ``state`` holds the layer's parameters and buffers by name as before the forward pass. Adding
a method means adding its function here; the contract tests fail without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Reference = Callable[[Tensor, State, float, bool], Tensor]


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of everything in ``values``."""
    mean = values.sum() / values.numel()
    return mean, ((values - mean) ** 2).sum() / values.numel()


def assemble(x: Tensor, entry: Callable[[int, int], Tensor]) -> Tensor:
    """Build an output of x's shape from entry(n, c)."""
    rows = [torch.stack([entry(n, c) for c in range(x.shape[1])]) for n in range(x.shape[0])]
    return torch.stack(rows)


def affine(state: State, c: int, value: Tensor) -> Tensor:
    """γ_c value + β_c."""
    weight, bias = state.get("weight"), state.get("bias")
    scaled = value if weight is None else weight[c] * value
    return scaled if bias is None else scaled + bias[c]


def batch_statistics(x: Tensor, state: State, c: int, training: bool) -> tuple[Tensor, Tensor]:
    """The batch's in training, or without running statistics; else the running ones."""
    if training or state.get("running_mean") is None:
        return moments(x[:, c])
    return state["running_mean"][c], state["running_var"][c]


def batch(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
    def entry(n: int, c: int) -> Tensor:
        mean, variance = batch_statistics(x, state, c, training)
        return affine(state, c, (x[n, c] - mean) / (variance + eps).sqrt())

    return assemble(x, entry)


def frozen(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
    return batch(x, state, eps, False)


def group_of(groups: int) -> Reference:
    def group(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
        size = x.shape[1] // groups

        def entry(n: int, c: int) -> Tensor:
            first = c // size * size
            mean, variance = moments(x[n, first : first + size])
            return affine(state, c, (x[n, c] - mean) / (variance + eps).sqrt())

        return assemble(x, entry)

    return group


def channel_layer(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
    flat = x.reshape(*x.shape[:2], -1)
    normalized = torch.stack(
        [
            torch.stack(
                [
                    (flat[n, :, i] - moments(flat[n, :, i])[0]) / (moments(flat[n, :, i])[1] + eps).sqrt()
                    for i in range(flat.shape[2])
                ],
                dim=1,
            )
            for n in range(x.shape[0])
        ]
    ).reshape(x.shape)
    return assemble(x, lambda n, c: affine(state, c, normalized[n, c]))


def rms(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
    def entry(n: int, c: int) -> Tensor:
        mean_square = (x[n] ** 2).sum() / x[n].numel()
        return affine(state, c, x[n, c] / (mean_square + eps).sqrt())

    return assemble(x, entry)


def instance(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
    return group_of(x.shape[1])(x, state, eps, training)


def batch_renorm_with(r_max: float, d_max: float) -> Reference:
    def batch_renorm(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
        if not training:
            return batch(x, state, eps, False)

        def entry(n: int, c: int) -> Tensor:
            mean, variance = moments(x[:, c])
            # r and d are constants: no gradient flows through them.
            fixed_mean, fixed_sigma = mean.detach(), (variance.detach() + eps).sqrt()
            sigma_batch = (variance + eps).sqrt()
            sigma = (state["running_var"][c] + eps).sqrt()
            r = min(max(float(fixed_sigma / sigma), 1 / r_max), r_max)
            d = min(max(float((fixed_mean - state["running_mean"][c]) / sigma), -d_max), d_max)
            return affine(state, c, (x[n, c] - mean) / sigma_batch * r + d)

        return assemble(x, entry)

    return batch_renorm


def batch_instance(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
    def entry(n: int, c: int) -> Tensor:
        batch_mean, batch_var = batch_statistics(x, state, c, training)
        mean, variance = moments(x[n, c])
        of_batch = (x[n, c] - batch_mean) / (batch_var + eps).sqrt()
        of_instance = (x[n, c] - mean) / (variance + eps).sqrt()
        rho = state["rho"][c].clamp(0, 1)
        return affine(state, c, rho * of_batch + (1 - rho) * of_instance)

    return assemble(x, entry)


def switchable(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
    of_mean, of_var = state["mean_logits"].softmax(0), state["var_logits"].softmax(0)
    return mixed(x, state, eps, training, of_mean, of_var)


def mixed(x: Tensor, state: State, eps: float, training: bool, of_mean: Tensor, of_var: Tensor) -> Tensor:
    """Normalize by weighted statistics of instance, layer and batch."""

    def entry(n: int, c: int) -> Tensor:
        parts = [moments(x[n, c]), moments(x[n]), batch_statistics(x, state, c, training)]
        mean = sum(w * part[0] for w, part in zip(of_mean, parts, strict=True))
        variance = sum(w * part[1] for w, part in zip(of_var, parts, strict=True))
        return affine(state, c, (x[n, c] - mean) / (variance + eps).sqrt())

    return assemble(x, entry)


def filter_response(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
    def entry(n: int, c: int) -> Tensor:
        mean_square = (x[n, c] ** 2).sum() / x[n, c].numel()
        y = affine(state, c, x[n, c] / (mean_square + eps).sqrt())
        tau = state.get("tau")
        return y if tau is None else torch.where(y > tau[c], y, tau[c])

    return assemble(x, entry)


def evonorm_s0_of(groups: int) -> Reference:
    def evonorm_s0(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
        size = x.shape[1] // groups

        def entry(n: int, c: int) -> Tensor:
            first = c // size * size
            _, variance = moments(x[n, first : first + size])
            gate = 1 / (1 + (-state["v"][c] * x[n, c]).exp())
            return affine(state, c, x[n, c] * gate / (variance + eps).sqrt())

        return assemble(x, entry)

    return evonorm_s0


def ghost_of(size: int) -> Reference:
    def ghost(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
        if not training:
            return batch(x, state, eps, training)
        count = math.ceil(len(x) / size)
        # As equal as can be: 10 samples in chunks of at most 4 are 4, 3 and 3.
        sizes = [len(x) // count + (i < len(x) % count) for i in range(count)]
        return torch.cat([batch(chunk, state, eps, training) for chunk in x.split(sizes)])

    return ghost


def ibn(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
    def entry(n: int, c: int) -> Tensor:
        per_instance = c < x.shape[1] // 2
        mean, variance = moments(x[n, c]) if per_instance else batch_statistics(x, state, c, training)
        return affine(state, c, (x[n, c] - mean) / (variance + eps).sqrt())

    return assemble(x, entry)


def sparsemax(z: Tensor) -> Tensor:
    """Try every set of survivors; the projection is the one whose numbers are consistent."""
    for size in range(len(z), 0, -1):
        threshold = (z.sort(descending=True).values[:size].sum() - 1) / size
        if all(value > threshold for value in z.sort(descending=True).values[:size]):
            return torch.stack([value - threshold if value > threshold else value * 0 for value in z])
    raise AssertionError("one survivor is always consistent")


def sparsestmax(z: Tensor, radius: float) -> Tensor:
    """Out to the circle, and where that leaves the triangle, along the edge to where they cross."""
    p = sparsemax(z)
    if radius >= math.sqrt(2 / 3) - 1e-12:
        return torch.eye(3, dtype=z.dtype)[int(z.argmax())]
    distance = ((p - 1 / 3) ** 2).sum().sqrt()
    if distance >= radius:
        return p
    if distance < 1e-14:
        return 1 / 3 + radius / math.sqrt(2 / 3) * (torch.eye(3, dtype=z.dtype)[2] - 1 / 3)
    p = 1 / 3 + radius * (p - 1 / 3) / distance
    if p.min() >= 0:
        return p
    out = int(p.argmin())
    first, second = (i for i in range(3) if i != out)
    more, less = (first, second) if p[first] > p[second] else (second, first)
    # On this edge q = (½ + t, ½ − t, 0) has distance √(1/6 + 2t²) from the centre.
    t = math.sqrt((radius**2 - 1 / 6) / 2)
    q = p * 0
    q[more], q[less] = 0.5 + t, 0.5 - t
    return q


def sparse_switchable_in(steps: int) -> Reference:
    def sparse_switchable(x: Tensor, state: State, eps: float, training: bool) -> Tensor:
        radius = math.sqrt(2 / 3) * min(int(state["sparse_step"]) / steps, 1)
        of_mean, of_var = (sparsestmax(state[name], radius) for name in ("mean_logits", "var_logits"))
        return mixed(x, state, eps, training, of_mean, of_var)

    return sparse_switchable


#: By the spelling of a method with its options resolved, for the sizes that the contract tests use.
REFERENCES: Mapping[str, Reference] = {
    "batch": batch,
    "frozen": frozen,
    "group(groups=2)": group_of(2),
    "layer": group_of(1),
    "layer(axes=channel)": channel_layer,
    "rms": rms,
    "instance": instance,
    "batch_renorm": batch_renorm_with(3.0, 5.0),
    "batch_renorm(r_max=1.0, d_max=0.0)": batch_renorm_with(1.0, 0.0),
    "batch_instance": batch_instance,
    "switchable": switchable,
    "filter_response": filter_response,
    "evonorm_s0(groups=2)": evonorm_s0_of(2),
    "ghost": ghost_of(32),
    "ghost(size=2)": ghost_of(2),
    "ibn": ibn,
    "sparse_switchable": sparse_switchable_in(10_000),
}


def filters(weight: Tensor, transposed: bool, groups: int) -> list[Tensor]:
    """A mask over the weight for each output channel: ones where its filter is."""
    found = []
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    for out in range(outputs):
        where = torch.zeros_like(weight)
        if transposed:
            group, inside = divmod(out, weight.shape[1])
            size = weight.shape[0] // groups
            where[group * size : (group + 1) * size, inside] = 1
        else:
            where[out] = 1
        found.append(where)
    return found


def weight_norm(state: State, transposed: bool, groups: int) -> Tensor:
    """g_c v_c / ‖v_c‖, and zero for a zero filter."""
    v = state["weight_v"]
    total = torch.zeros_like(v)
    for gain, where in zip(state["weight_g"], filters(v, transposed, groups), strict=True):
        length = ((v * where) ** 2).sum().sqrt()
        total = total + (v * where * gain / length if length > 0 else v * 0)
    return total


def spectral_norm(state: State, transposed: bool, groups: int) -> Tensor:
    """gain_c W_c / σ with σ from a full singular value decomposition."""
    weight = state["weight_orig"]
    places = filters(weight, transposed, groups)
    matrix = torch.stack([weight[where > 0] for where in places])
    sigma = torch.linalg.svdvals(matrix)[0]
    gain = state.get("gain")
    return sum(
        (weight * where / sigma * (1 if gain is None else gain[c]) for c, where in enumerate(places)),
        start=torch.zeros_like(weight),
    )


def standardized_weight(state: State, transposed: bool, groups: int) -> Tensor:
    """gain_c (v_c − mean v_c) / std v_c + offset_c, and the offset alone for a constant filter."""
    v = state["weight_v"]
    total = torch.zeros_like(v)
    for c, where in enumerate(filters(v, transposed, groups)):
        mean, variance = moments(v[where > 0])
        standard = (v - mean) / variance.sqrt() if variance > 0 else v * 0
        total = total + (standard * state["weight_gain"][c] + state["weight_offset"][c]) * where
    return total


#: For methods that rewrite the layer before a site: the weight that it uses, from its state.
WEIGHT_REFERENCES: Mapping[str, Callable[[State, bool, int], Tensor]] = {
    "weight": weight_norm,
    "weight(mean_only=true)": weight_norm,
    "spectral": spectral_norm,
    "spectral(gain=fixed)": spectral_norm,
    "identity": lambda state, transposed, groups: state["weight"],
    "group(groups=2, weight_standardization=true)": standardized_weight,
}
