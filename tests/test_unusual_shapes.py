"""Odd numbers of channels, small batches and unbatched inputs: an answer, or an error that says why."""

from __future__ import annotations

import pytest
import torch
from small_networks import close, images, net, trained
from torch import Tensor, nn

from normsearch import (
    RefusedError,
    ShapeError,
    convert,
    plan,
)

torch.set_num_threads(1)

METHODS = ["frozen", "group", "layer", "layer(axes=channel)", "rms", "batch_renorm", "batch_instance"]
METHODS += ["instance", "switchable"]


# --- odd channel counts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "groups", "expected"),
    [(19, None, 1), (36, None, 2), (48, None, 3), (19, 4, 1), (30, 4, 3), (48, 32, 24), (7, 32, 7)],
)
def test_odd_channel_counts_get_a_number_of_groups_that_divides_them(
    channels: int, groups: int | None, expected: int
) -> None:
    spelling = "group" if groups is None else f"group(groups={groups})"
    converted = convert(net(channels), spelling)
    assert converted[1].num_groups == expected
    assert converted(images()).shape == (4, 4, 6, 6)


@pytest.mark.parametrize("method", METHODS)
def test_odd_channel_counts_run_and_train(method: str) -> None:
    converted = convert(net(19), method).train()
    converted(images()).square().sum().backward()
    assert torch.isfinite(converted[0].weight.grad).all()
    assert converted[0].weight.grad.abs().sum() > 0


# --- batch size and shapes ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["group", "layer", "layer(axes=channel)", "rms", "frozen"])
def test_training_at_batch_size_one_works_on_a_map_of_one_element(method: str) -> None:
    x = images(1, size=3)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), trained(nn.BatchNorm2d(32)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(x)
    converted = convert(model, method)
    y = converted(x)
    y.square().sum().backward()
    assert y.std() > 0.1
    assert converted[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["group", "layer"])
def test_training_on_one_sample_equals_training_on_it_inside_a_batch(method: str) -> None:
    converted = convert(net(), method).train()
    close(converted(images()[:1]), converted(images())[:1])


def test_batch_instance_refuses_one_value_per_channel_in_training() -> None:
    converted = convert(nn.Sequential(nn.BatchNorm2d(8)), "batch_instance").train()
    with pytest.raises(ShapeError, match=r"more than one value per channel in training, got \(1, 8, 1, 1\)"):
        converted(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize("inputs", [None, images()], ids=["shape unknown", "shape known"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "instance"])
def test_an_unbatched_image_is_an_error(method: str, inputs: Tensor | None) -> None:
    # nn.Conv2d takes (C, H, W); BatchNorm2d does not, and nothing that replaces it may misread it.
    converted = convert(net(), method, inputs=inputs).eval()
    with pytest.raises((ValueError, RuntimeError)):
        converted(images()[0])


@pytest.mark.parametrize("method", ["identity", "weight", "spectral"])
def test_folded_layers_take_what_the_convolution_takes(method: str) -> None:
    network = trained(nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8))).eval()
    converted = convert(network, method).eval()
    x = torch.randn(2, 3, 13)
    with pytest.raises((ValueError, RuntimeError)):
        network(x[0])
    close(converted(x[0]), network(x)[0])


@pytest.mark.parametrize("inputs", [None, images()], ids=["shape unknown", "shape known"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("instance", "group", "layer")])
def test_an_unbatched_image_as_high_as_it_has_channels_is_an_error(
    method: str, inputs: Tensor | None
) -> None:
    # (C, H, W) with H = C would pass for (N, C, L): BatchNorm2d refuses three dimensions, so must these.
    # nn.GroupNorm cannot tell, whoever builds it; the README says so.
    converted = convert(net(), method, inputs=inputs).eval()
    with pytest.raises((ValueError, RuntimeError)):
        converted(images(size=8)[0])


@pytest.mark.parametrize("inputs", [None, images()], ids=["shape unknown", "shape known"])
def test_an_unbatched_image_through_instance_norm_is_an_error_or_the_same_function(
    inputs: Tensor | None,
) -> None:
    # torch's InstanceNorm2d reads (C, H, W) as one sample, rightly.
    converted = convert(net(), "instance", inputs=inputs).eval()
    x = images(size=8)
    close(converted(x[0]), converted(x)[0])


@pytest.mark.parametrize("inputs", [None, torch.randn(8, 8, 5)], ids=["shape unknown", "shape known"])
def test_rows_through_instance_norm_are_not_read_as_one_sequence(inputs: Tensor | None) -> None:
    # (N, C) with N = C passes for an unbatched (C, L) in torch's InstanceNorm1d.
    converted = convert(nn.Sequential(nn.BatchNorm1d(8)), "instance", inputs=inputs).eval()
    with pytest.raises((ValueError, RuntimeError)):
        converted(torch.randn(8, 8))


@pytest.mark.parametrize("method", ["group(groups=8)", "instance"])
def test_one_element_per_group_is_refused_where_the_shape_is_known(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 6), nn.BatchNorm2d(8))
    with pytest.raises(RefusedError, match=r"1: .*output would be constant"):
        plan(model, method, inputs=images())


@pytest.mark.parametrize("method", ["group(groups=8)", "instance"])
def test_one_element_per_group_is_a_named_error_where_it_is_not(method: str) -> None:
    converted = convert(nn.Sequential(nn.Conv2d(3, 8, 6), nn.BatchNorm2d(8)), method)
    with pytest.raises(ShapeError, match=r"^1: .*one element per group"):
        converted(images())
