"""compare and profile: every number against one worked out by hand, and nothing left changed behind."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from normsearch import Crop, ModelError, PlanError, compare, convert, profile
from normsearch.dependence import batch_size
from normsearch.reports import BatchDependence, Change

torch.set_num_threads(1)


class Affine(nn.Module):
    """y = factor·x + shift: outputs that can be worked out by hand."""

    def __init__(self, factor: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + self.shift


class Packed(nn.Module):
    """An output in a container, as detection and segmentation models return it."""

    def __init__(self, factor: float, aux: float, kind: type = dict) -> None:
        super().__init__()
        self.factor, self.aux, self.kind = factor, aux, kind

    def forward(self, x: Tensor) -> Any:
        parts = {"logits": self.factor * x, "aux": self.aux * x, "classes": x.argmax(1)}
        return parts if self.kind is dict else tuple(parts.values())


def norm_net(**options: Any) -> nn.Sequential:
    """A network whose BatchNorm is trained; outputs are maps of the input's size."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16, **options),
        nn.ReLU(),
        nn.Conv2d(16, 2, 3, padding=1),
    )
    nn.init.normal_(model[1].running_mean, std=0.3)
    nn.init.uniform_(model[1].running_var, 0.2, 0.6)
    return model


def images(count: int = 6, size: int = 12) -> Tensor:
    # Brightness differs between samples and across the image, so statistics do too.
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, size, size, generator=generator)
    return x + torch.linspace(-1, 1, count).reshape(-1, 1, 1, 1) + torch.linspace(-1, 2, size)


# --- drift ----------------------------------------------------------------------------------------


def test_drift_is_the_relative_distance_over_all_batches() -> None:
    batches = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 12.0], [0.0, 0.0]])]
    report = compare(Affine(), Affine(shift=1.0), batches)
    # Six outputs moved by 1 each; the originals' squares sum to 25 + 144.
    assert report.drift.relative_l2 == pytest.approx(math.sqrt(6) / 13)
    assert (report.drift.kl, report.drift.top1_agreement) == (None, None)


def test_drift_of_a_model_from_itself_is_zero() -> None:
    assert compare(norm_net(), norm_net(), [images()]).drift.relative_l2 == 0


def test_drift_from_an_output_of_zeros_is_one() -> None:
    assert compare(Affine(0.0), Affine(0.0, 5.0), [torch.ones(3, 2)]).drift.relative_l2 == 1
    assert compare(Affine(0.0), Affine(0.0), [torch.ones(3, 2)]).drift.relative_l2 == 0


def test_logits_give_divergence_and_agreement() -> None:
    # Original: (3/4, 1/4) and (1/4, 3/4). Converted: (1/2, 1/2) twice, whose top class is the first.
    log3 = math.log(3)
    report = compare(Affine(), Affine(0.0), [torch.tensor([[log3, 0.0], [0.0, log3]])], logits=True)
    assert report.drift.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert report.drift.top1_agreement == 0.5


def test_logits_of_maps_count_every_pixel() -> None:
    log3 = math.log(3)
    x = torch.zeros(1, 2, 2, 2)
    x[0, 1, 0, 0] = log3
    report = compare(Affine(), Affine(0.0), [x], logits=True)
    # Three of four pixels are uniform before and after; in one the second class led.
    assert report.drift.kl == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 4)
    assert report.drift.top1_agreement == 0.75


def test_logits_need_a_class_dimension() -> None:
    with pytest.raises(ModelError, match=r"logits=True needs outputs \(N, classes, ...\), got \(4,\)"):
        compare(Affine(), Affine(), [torch.ones(4)], logits=True)


# --- outputs and inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, tuple])
def test_every_floating_point_output_counts_by_default(kind: type) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    report = compare(Packed(1, 1, kind), Packed(2, 1, kind), [x])
    # One of two equal parts moved by its own length.
    assert report.drift.relative_l2 == pytest.approx(math.sqrt(1 / 2))


def test_outputs_picks_from_a_dict() -> None:
    x = torch.randn(4, 3)
    pick = lambda output: output["aux"]  # noqa: E731
    assert compare(Packed(1, 1), Packed(7, 3), [x], outputs=pick).drift.relative_l2 == pytest.approx(2)


def test_outputs_picks_from_a_tuple() -> None:
    x = torch.randn(4, 3)
    report = compare(Packed(1, 1, tuple), Packed(7, 3, tuple), [x], outputs=lambda output: output[0])
    assert report.drift.relative_l2 == pytest.approx(6)


def test_outputs_that_do_not_match_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"shapes \[\(4, 3\)\] before, \[\(4, 2\)\] after; give outputs="):
        compare(Affine(), nn.Linear(3, 2), [torch.randn(4, 3)])


def test_outputs_without_a_floating_point_tensor_are_an_error() -> None:
    with pytest.raises(ModelError, match="no floating-point tensor; give outputs="):
        compare(Packed(1, 1), Packed(1, 1), [torch.randn(4, 3)], outputs=lambda output: output["classes"])


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batch_is_an_error(batches: Any) -> None:
    with pytest.raises(ModelError, match="compare got no batch"):
        compare(Affine(), Affine(), batches)


def test_a_model_that_fails_is_named() -> None:
    with pytest.raises(ModelError, match="Linear failed on the given inputs with RuntimeError"):
        compare(nn.Linear(3, 2), nn.Linear(3, 2), [torch.randn(4, 7)])


def test_batches_may_come_from_a_generator_as_arguments_or_keywords() -> None:
    class Sum(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + self.factor * b

    a, b = torch.zeros(3, 2), torch.ones(3, 2)
    for inputs in ((a, b), {"a": a, "b": b}):
        report = compare(Sum(1), Sum(3), (inputs for _ in range(2)))
        assert report.drift.relative_l2 == pytest.approx(2)


def test_a_list_is_one_argument_and_its_items_are_samples() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = norm_net()

        def forward(self, samples: list[Tensor]) -> Tensor:
            return self.net(torch.stack(samples))

    model = Detector()
    report = compare(model, convert(model, "group"), [list(images())])
    assert report.batch_dependence.before.train_batches > 0.01
    assert report.batch_dependence.after.train_batches < 1e-6


# --- metric and counts ----------------------------------------------------------------------------


def test_the_metric_is_called_for_both_in_eval_mode_without_gradients() -> None:
    states: list[tuple[bool, bool]] = []

    def metric(model: nn.Module) -> float:
        states.append((model.training, torch.is_grad_enabled()))
        return model.factor  # type: ignore[return-value]

    report = compare(Affine(2.0).train(), Affine(5.0).train(), [torch.ones(3, 1)], metric=metric)
    assert report.metric == Change(2.0, 5.0)
    assert states == [(False, False), (False, False)]


def test_without_a_metric_there_is_none() -> None:
    assert compare(Affine(), Affine(), [torch.ones(3, 1)]).metric is None


@pytest.mark.parametrize(
    ("method", "added"),
    [("group", 0), ("batch_renorm", 0), ("frozen", 0), ("batch_instance", 16), ("switchable", 6)],
)
def test_parameters_and_batch_norms_are_counted(method: str, added: int) -> None:
    model = norm_net()
    report = compare(model, convert(model, method), [images()])
    count = (3 * 16 * 9 + 16) + 2 * 16 + (16 * 2 * 9 + 2)
    assert report.parameters == Change(count, count + added)
    assert report.batch_norms == Change(1, 0)


# --- batch dependence -----------------------------------------------------------------------------


def test_batch_norm_depends_on_the_batch_in_training_only_and_group_norm_never() -> None:
    model = norm_net()
    dependence = compare(model, convert(model, "group"), [images()]).batch_dependence
    assert dependence.before.eval_alone < 1e-6
    assert dependence.before.eval_batches < 1e-6
    assert dependence.before.train_alone > 0.01
    assert dependence.before.train_batches > 0.01
    after = dependence.after
    assert max(after.eval_alone, after.eval_batches, after.train_alone, after.train_batches) < 1e-6
    assert (dependence.before.note, after.note) == (None, None)


def test_batch_dependence_has_the_written_value() -> None:
    # The whole model is a BatchNorm over one feature, so the sample's output can be worked out.
    model = nn.BatchNorm1d(1, affine=False, eps=1e-12).double()
    x = torch.tensor([[0.0], [2.0], [4.0], [10.0]]).double()
    dependence = compare(model, model, [x]).batch_dependence.before
    # Samples 0 and 1: mean 1, deviation 1, so sample 0 gives −1. Samples 0, 2, 3: mean 14/3, variance 152/9.
    other = -(14 / 3) / math.sqrt(152 / 9)
    assert dependence.train_batches == pytest.approx(abs(-1 - other) / abs(other), rel=1e-9)
    assert dependence.train_alone is None
    assert "batch of 1: ValueError: Expected more than 1 value per channel" in (dependence.note or "")
    assert (dependence.eval_alone, dependence.eval_batches) == (0, 0)


def test_dropout_does_not_count_as_dependence() -> None:
    model = nn.Sequential(norm_net(), nn.Dropout(0.5))
    dependence = compare(model, convert(model, "group"), [images()]).batch_dependence
    assert dependence.after.train_batches < 1e-6
    assert dependence.before.train_batches > 0.01


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_too_small_to_compare_is_noted(count: int) -> None:
    model = norm_net()
    found = compare(model, model, [images(count)]).batch_dependence.before
    note = f"the first batch has {count} samples; three are needed to put one into two batches"
    assert found == BatchDependence(None, None, None, None, note)


def test_models_and_random_state_are_left_as_they_were() -> None:
    model = nn.Sequential(norm_net(momentum=None), nn.Dropout(0.5)).train()
    model[0][1].eval()
    converted = convert(model, "batch_renorm")
    before = [
        ({k: v.clone() for k, v in m.state_dict().items()}, [x.training for x in m.modules()])
        for m in (model, converted)
    ]
    identities = [id(buffer) for buffer in converted.buffers()]
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    compare(model, converted, [images()], crop=Crop(8, 2))
    assert torch.equal(torch.rand(3), expected)
    assert [id(buffer) for buffer in converted.buffers()] == identities
    for subject, (state, modes) in zip((model, converted), before, strict=True):
        assert [module.training for module in subject.modules()] == modes
        torch.testing.assert_close(dict(subject.state_dict()), state, rtol=0, atol=0)
        assert all(p.grad is None for p in subject.parameters())


def test_buffers_are_restored_where_training_mode_fails() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            if self.training:
                raise ValueError("training needs targets")
            return x

    model = Failing()
    found = compare(model, model, [torch.randn(4, 2) + 5]).batch_dependence.before
    assert (found.train_alone, found.train_batches) == (None, None)
    assert "train mode" in (found.note or "")
    assert torch.equal(model.norm.running_mean, torch.zeros(2))
    assert int(model.norm.num_batches_tracked) == 0
    assert model.training


# --- crops ----------------------------------------------------------------------------------------


def test_group_norm_depends_on_the_crop_and_batch_norm_does_not() -> None:
    model = norm_net()
    found = compare(model, convert(model, "group"), [images()], crop=Crop(size=8, margin=2)).crop_dependence
    assert found.before < 1e-6
    assert found.after > 0.01


def test_a_margin_narrower_than_the_receptive_field_shows() -> None:
    model = norm_net()
    assert compare(model, model, [images()], crop=Crop(size=8, margin=0)).crop_dependence.before > 1e-3


def test_crops_of_strided_networks_are_cut_by_the_stride() -> None:
    model = nn.Sequential(norm_net(), nn.Conv2d(2, 2, 4, stride=4))
    found = compare(model, convert(model, "group"), [images(size=24)], crop=Crop(size=16, margin=4))
    assert found.crop_dependence.before < 1e-6
    assert found.crop_dependence.after > 0.01


@pytest.mark.parametrize(
    ("crop", "match"),
    [
        (Crop(12, 2), "smaller than the 12×12 image, larger than two margins"),
        (Crop(8, 4), "smaller than the 12×12 image, larger than two margins"),
    ],
)
def test_a_tile_that_does_not_fit_names_the_rule(crop: Crop, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        compare(norm_net(), norm_net(), [images()], crop=crop)


def test_a_tile_that_the_stride_does_not_divide_names_the_stride() -> None:
    model = nn.Sequential(norm_net(), nn.Conv2d(2, 2, 4, stride=4))
    with pytest.raises(ModelError, match=r"use a multiple of the network's stride \(4\)"):
        compare(model, model, [images(size=24)], crop=Crop(15, 2))


def test_crops_need_maps() -> None:
    model = nn.Sequential(norm_net(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ModelError, match=r"crop= needs one output map \(N, C, H, W\)"):
        compare(model, model, [images()], crop=Crop(8, 2))
    with pytest.raises(ModelError, match=r"crop= needs exactly one input \(N, C, H, W\), got 0"):
        compare(Affine(), Affine(), [torch.randn(4, 3)], crop=Crop(8, 2))


# --- JSON and tables ------------------------------------------------------------------------------


def _refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


def loads(text: str) -> Any:
    """Read JSON as the standard has it: without NaN and Infinity."""
    return json.loads(text, parse_constant=_refuse_constant)


def text_of(renderable: Any) -> str:
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_a_report_is_valid_json() -> None:
    model = norm_net()
    report = compare(model, convert(model, "group"), [images()], logits=True, metric=lambda m: 0.5)
    document = loads(report.to_json())
    assert document["drift"]["relative_l2"] == report.drift.relative_l2
    assert document["metric"] == {"before": 0.5, "after": 0.5}
    assert document["batch_norms"] == {"before": 1, "after": 0}
    assert document["crop_dependence"] is None
    assert document["environment"]["torch"] == torch.__version__
    assert (document["environment"]["device"], document["environment"]["dtype"]) == ("cpu", "float32")


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_numbers_that_are_not_finite_become_null(factor: float) -> None:
    report = compare(Affine(), Affine(factor), [torch.ones(4, 2)], metric=lambda m: factor)
    document = loads(report.to_json())
    assert document["drift"]["relative_l2"] is None
    assert document["metric"]["after"] is None


def test_a_report_renders_as_a_table() -> None:
    model = norm_net()
    report = compare(
        model, convert(model, "group"), [images()], logits=True, metric=lambda m: 0.25, crop=Crop(8, 2)
    )
    text = text_of(report)
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") == 4}
    assert f"{report.drift.relative_l2:.4g}" in rows["output drift (relative L2)"]
    assert f"{report.drift.top1_agreement:.4g}" in rows["same top-1 class"]
    assert rows["metric"].count("0.25") == 2
    assert f"{report.batch_dependence.before.train_batches:.4g}" in rows["batch dependence, train"]
    assert f"{report.crop_dependence.after:.4g}" in rows["crop dependence"]
    assert rows["parameters"].count("770") == 2
    assert f"torch {torch.__version__}" in text


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([images(4)], "1 batch of 4 samples"),
        ([images(4), images(2)], "2 batches, the first of 4 samples"),
        ([images(1)], "1 batch of 1 sample"),
    ],
)
def test_a_report_says_how_many_samples_were_measured(batches: list[Tensor], told: str) -> None:
    report = compare(norm_net(), norm_net(), batches)
    assert (report.batches, report.batch_size) == (len(batches), len(batches[0]))
    assert told in text_of(report)


def test_a_list_of_images_is_counted_wherever_it_stands() -> None:
    listed = [torch.randn(3, 8, 8) for _ in range(5)]
    assert [batch_size(inputs) for inputs in (listed, (listed,), {"x": images(4)})] == [5, 5, 4]


def test_what_was_not_measured_is_a_dash() -> None:
    text = text_of(compare(norm_net(), norm_net(), [images(2)]))
    line = next(line for line in text.splitlines() if "batch dependence, train" in line)
    assert line.count("-") == 2


# --- profile --------------------------------------------------------------------------------------


def test_compiled_models_are_compared_as_what_is_inside_and_timed_as_they_are() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    converted = convert(inner, "group")
    x = torch.randn(4, 3, 8, 8)
    pair = [torch.compile(model, backend=backend) for model in (inner, converted)]
    assert compare(*pair, [x], logits=True) == compare(inner, converted, [x], logits=True)
    assert not graphs
    compiled, plain = profile(pair[0], x, repeats=1), profile(inner, x, repeats=1)
    assert len(graphs) == 1
    assert compiled.peak_memory_bytes == plain.peak_memory_bytes
    assert compiled.parameters == plain.parameters


def test_profile_counts_parameters_exactly() -> None:
    assert profile(norm_net(), images(), repeats=1).parameters == (27 * 16 + 16) + 32 + (144 * 2 + 2)


def test_a_shared_parameter_counts_once() -> None:
    layer = nn.Linear(4, 4, bias=False)
    assert profile(nn.Sequential(layer, layer), torch.randn(2, 4), repeats=1).parameters == 16


@pytest.mark.parametrize(
    ("layers", "maps"),
    [
        # In maps of 2 × 16 × 16 floats, one per channel; the input itself is the caller's.
        ([nn.Conv2d(3, 8, 3, padding=1)], 8),
        ([nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()], 16),
        ([nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)], 8),
        # What a layer reads lives until it is done; what came before that is freed.
        ([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)], 12),
    ],
)
def test_peak_memory_is_what_must_be_alive_at_once(layers: list[nn.Module], maps: int) -> None:
    measured = profile(nn.Sequential(*layers), torch.randn(2, 3, 16, 16), repeats=1).peak_memory_bytes
    expected = maps * 2 * 16 * 16 * 4
    # Small buffers inside an operation may come on top.
    assert expected <= measured <= 1.1 * expected


def test_latency_is_ordered_and_grows_with_the_work() -> None:
    small = profile(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 16, 16), repeats=5)
    large = profile(nn.Conv2d(3, 64, 3), torch.randn(4, 3, 128, 128), repeats=5)
    assert 0 < small.latency_least_ms <= small.latency_ms <= small.latency_most_ms
    assert large.latency_least_ms > small.latency_least_ms


def test_profile_counts_its_passes_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(norm_net(), nn.Dropout(0.5)).train()
    modes: list[bool] = []
    model.register_forward_hook(lambda m, args, y: modes.append(m.training))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    profile(model, images(), repeats=3)
    # Two to warm up, three timed, one for memory.
    assert modes == [False] * 6
    assert model.training
    assert torch.equal(torch.rand(3), expected)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_profile_needs_a_positive_number_of_repeats() -> None:
    with pytest.raises(PlanError, match="repeats=0: give a whole number, at least 1"):
        profile(Affine(), torch.ones(1), repeats=0)


def test_profile_names_a_model_that_fails() -> None:
    with pytest.raises(ModelError, match="Linear failed on the given inputs"):
        profile(nn.Linear(3, 2), torch.ones(1, 7))


def test_a_profile_is_valid_json_and_renders_as_a_table() -> None:
    found = profile(norm_net().double(), images().double(), repeats=2)
    document = loads(found.to_json())
    assert document["parameters"] == 770
    assert document["environment"]["dtype"] == "float64"
    text = text_of(found)
    assert "770" in text
    assert f"{found.latency_ms:.2f} ms" in text
    assert f"{found.peak_memory_bytes / 2**10:.1f} KiB" in text
    assert found.batch_size == len(images())
    assert f"1 batch of {len(images())} samples" in text
    large = replace(found, peak_memory_bytes=3 * 2**20, batch_size=None)
    assert "3.0 MiB" in text_of(large)
    assert "1 batch " in text_of(large)


def test_an_empty_batch_is_an_error() -> None:
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ModelError, match="the batch is empty"):
        compare(model, model, [torch.zeros(0, 3, 5, 5)], logits=True)


class Swapped(nn.Module):
    """The same outputs in another order of keys, or under another name."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: x if name == "out" else 3 * x for name in self.names}


def test_outputs_in_a_dict_are_compared_by_name_and_not_by_place() -> None:
    report = compare(Swapped(("out", "aux")), Swapped(("aux", "out")), [torch.ones(4, 2)])
    assert report.drift.relative_l2 == 0


def test_outputs_with_other_names_do_not_match() -> None:
    with pytest.raises(ModelError, match=r"\['aux'\].*before.*\['extra'\].*after"):
        compare(Swapped(("out", "aux")), Swapped(("out", "extra")), [torch.ones(4, 2)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_original_whose_outputs_are_not_finite_cannot_be_compared(bad: float) -> None:
    with pytest.raises(ModelError, match="NaN or infinite"):
        compare(Affine(), Affine(), [torch.full((4, 2), bad)], logits=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare(Affine().state_dict(), Affine(), [torch.ones(1)]), "expected a torch.nn.Module"),
        (lambda: profile("resnet18", torch.ones(1)), "expected a torch.nn.Module, got str"),
        (lambda: Crop(8.5, 2), "Crop\\(size=8.5\\)"),
        (lambda: Crop(0, 0), "Crop\\(size=0\\)"),
        (lambda: Crop(8, -1), "Crop\\(margin=-1\\)"),
    ],
)
def test_arguments_of_other_types_are_named(call: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        call()


def test_repeats_are_whole_numbers() -> None:
    with pytest.raises(PlanError, match=r"repeats=1\.5"):
        profile(Affine(), torch.ones(1, 2), repeats=1.5)  # type: ignore[arg-type]
