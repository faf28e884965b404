"""ONNX graphs: every method in every form and opset is what the conversion of the twin in torch is."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import normsearch

onnx = pytest.importorskip("onnx", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
ir = pytest.importorskip("onnx_ir", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'normsearch[onnx]'")

from onnx_networks import CHANNELS, FORMS, Twin, Writer, model, proto, value  # noqa: E402

from normsearch import METHODS, onnx_graph  # noqa: E402
from normsearch.onnx_graph.files import as_proto  # noqa: E402
from normsearch.onnx_graph.running import Runtime  # noqa: E402

OPSETS = (9, 11, 13, 17, 18, 21, 22)
SPELLINGS = (
    *METHODS,
    "group(groups=8)",
    "group(groups=32)",
    "group(weight_standardization=true)",
    "layer(axes=channel)",
    "frozen(trainable=true)",
    "switchable(bn_logit=40)",
    "weight(mean_only=true)",
    "spectral(gain=fixed)",
    "evonorm_s0(groups=4)",
)
INPUTS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def to(spelling: str) -> dict[str, Any]:
    """A method everywhere, but where an input (N, C) does not allow it."""
    return {"bn4": [spelling, "group"], "*": [spelling, "spectral"]}


@cache
def twin(shared: bool = False) -> Twin:
    return Twin(shared=shared).eval()


@cache
def eager(spelling: str, shared: bool) -> tuple[Tensor, dict[str, str]]:
    """The output of the twin as converted in torch, in double precision, and its plan."""
    network = Twin(shared=shared).double().eval()
    plan = normsearch.plan(network, to(spelling), inputs=INPUTS.double())
    with torch.no_grad():
        output = normsearch.convert(network, plan)(INPUTS.double())
    return output, {path: str(method) for path, method in plan.items()}


def run(converted: Any, x: Tensor = INPUTS) -> Tensor:
    (output,) = Runtime(converted)(x).values()
    return output


def kinds(converted: Any) -> list[str]:
    return [node.op_type for node in converted.graph.all_nodes()]


def checked(converted: Any) -> Any:
    """ONNX's checker and its strict shape inference pass."""
    onnx.checker.check_model(ir.to_proto(converted), full_check=True)
    return converted


#: What the fast suite leaves out of all forms in all opsets.
FAST = {("initializers", 9), ("initializers", 17), ("initializers", 21), *((form, 11) for form in FORMS[1:])}


@pytest.mark.parametrize(
    ("form", "opset"),
    [
        pytest.param(form, opset, marks=() if (form, opset) in FAST else pytest.mark.slow)
        for form in FORMS
        for opset in OPSETS
    ],
)
def test_every_method_is_the_eager_conversion(form: str, opset: int) -> None:
    shared = form == "shared"
    original = model(twin(shared), form, opset)
    text = ir.to_proto(original)
    for spelling in SPELLINGS:
        wanted, methods = eager(spelling, shared)
        plan = onnx_graph.plan(original, to(spelling), inputs=INPUTS)
        assert {path: str(method) for path, method in plan.items()} == methods
        converted = checked(onnx_graph.convert(original, plan))
        assert ("BatchNormalization" in kinds(converted)) == (spelling == "batch")
        found = run(converted)
        assert (found - wanted).abs().max() < 3e-5 * wanted.abs().max(), spelling
        # A sample alone, in a batch of another size.
        torch.testing.assert_close(run(converted, INPUTS[:1]), found[:1], rtol=1e-4, atol=1e-4)
        assert converted.opset_imports == original.opset_imports
    assert ir.to_proto(original) == text


@pytest.mark.parametrize("opset", OPSETS)
def test_operators_are_those_that_the_opset_has(opset: int) -> None:
    original = model(twin(), opset=opset)
    group, layer, instance, channel = (
        kinds(onnx_graph.convert(original, {"bn4": "batch", "*": spelling}))
        for spelling in ("group(groups=4)", "layer", "instance", "layer(axes=channel)")
    )
    assert group.count("GroupNormalization") == (3 if opset >= 21 else 0)
    assert group.count("InstanceNormalization") == (0 if opset >= 21 else 3)
    assert layer.count("LayerNormalization") == (3 if opset >= 17 else 0)
    assert channel.count("LayerNormalization") == (3 if opset >= 17 else 0)
    assert instance.count("InstanceNormalization") == 3
    assert len(instance) == len(kinds(original))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_a_site_stays(form: str) -> None:
    before = proto(twin(form == "shared"), form, 17)
    before.metadata_props.add(key="character", value="a\nb")
    before.doc_string, before.producer_name = "what it is", "somebody"
    before.graph.doc_string = "a graph"
    before.graph.value_info.append(value("sum", "batch", CHANNELS, 8, 8))
    for node in before.graph.node:
        node.doc_string = f"about {node.name}"
        node.metadata_props.add(key="scope", value=node.name)
    original = ir.from_proto(before)
    assert as_proto(onnx_graph.convert(original, "batch")) == before
    after = as_proto(onnx_graph.convert(original, "group"))
    for name in ("metadata_props", "doc_string", "producer_name", "ir_version", "opset_import"):
        assert getattr(after, name) == getattr(before, name)
    assert after.graph.doc_string == before.graph.doc_string
    assert after.graph.output == before.graph.output
    assert after.graph.input[0] == before.graph.input[0]
    assert {info.name for info in before.graph.value_info} <= {info.name for info in after.graph.value_info}
    left = {node.name: node for node in after.graph.node}
    for node in before.graph.node:
        if node.op_type not in ("BatchNormalization", "Constant", "Identity"):
            assert left[node.name] == node
    names = {name for node in after.graph.node for name in (*node.input, *node.output)}
    dead = {f"bn{n}.{key}" for n in (1, 2, 3, 4) for key in ("running_mean", "running_var")}
    assert not names & dead
    assert not {tensor.name for tensor in after.graph.initializer} & dead
    assert not {info.name for info in after.graph.input} & dead
    scopes = {entry.value for node in after.graph.node for entry in node.metadata_props}
    assert {"bn1", "bn2", "bn3", "bn4"} <= scopes


def test_folding_leaves_nothing_at_a_site() -> None:
    original = model(twin())
    converted = checked(onnx_graph.convert(original, "identity", inputs=INPUTS))
    assert sorted(kinds(converted)) == sorted(
        kind for kind in kinds(original) if kind != "BatchNormalization"
    )
    assert [output.name for output in converted.graph.outputs] == ["bn4.y"]
    torch.testing.assert_close(run(converted), run(original), rtol=1e-5, atol=1e-5)


def test_sites_say_what_stands_around_them() -> None:
    sites = {site.path: site for site in onnx_graph.find_sites(model(twin()))}
    assert list(sites) == ["bn1", "bn2", "bn3", "bn4"]
    bn1, bn4 = sites["bn1"], sites["bn4"]
    assert (bn1.channels, bn1.eps, bn1.ranks, bn1.input_shapes) == (
        CHANNELS,
        1e-3,
        (4,),
        ((1, CHANNELS, 8, 8),),
    )
    assert bn1.producer is not None
    assert (bn1.producer.path, bn1.producer.layer, bn1.producer.foldable) == ("conv1", "onnx.Conv", True)
    assert bn1.followed_by is not None
    assert (bn1.followed_by.path, bn1.followed_by.removable) == ("act1", True)
    assert sites["bn3"].producer is not None
    assert sites["bn3"].producer.transposed
    assert bn4.producer is not None
    assert bn4.producer.layer == "onnx.Gemm"
    assert bn4.followed_by is None
    seen = onnx_graph.find_sites(model(twin()), INPUTS)
    assert [site.input_shapes[0][0] for site in seen] == [3, 3, 3, 3]


def test_a_plan_is_json_and_fits_its_model_only() -> None:
    original = model(twin())
    plan = onnx_graph.plan(original, {"bn1": "group", "*": "frozen"})
    again = normsearch.Plan.from_json(plan.to_json())
    assert again == plan
    torch.testing.assert_close(
        run(onnx_graph.convert(original, again)), run(onnx_graph.convert(original, plan))
    )
    other = proto(twin(), "initializers", 17)
    other.graph.node[1].name = "norm"
    with pytest.raises(normsearch.PlanError, match=r"'bn1'.*no BatchNorm"):
        onnx_graph.convert(ir.from_proto(other), plan)
    with pytest.raises(normsearch.PlanError, match="matches 'nothing'"):
        onnx_graph.plan(original, {"nothing": "group"})


def small(
    w: Writer,
    output: str,
    *,
    opset: int = 17,
    shape: tuple[Any, ...] = ("batch", 4, 5, 5),
    out: tuple[Any, ...] = (),
    dtype: int = 1,
) -> Any:
    """A graph of x → output, of one shape where ``out`` is not given."""
    made = w.model(opset, [value("x", *shape, dtype=dtype)], [value(output, *(out or shape), dtype=dtype)])
    return ir.from_proto(made)


def norm(channels: int = 4, seed: int = 0) -> torch.nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.BatchNorm2d(channels)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        tensor.data.normal_(generator=generator)
    layer.running_var.uniform_(0.5, 2, generator=generator)
    return layer.eval()


def test_subgraphs_are_rewritten_too() -> None:
    inner = Writer("initializers")
    inner.batch_norm("x", "inner", norm())
    then = onnx.helper.make_graph(
        inner.nodes, "then", [], [value("inner.y", "batch", 4, 5, 5)], inner.initializers
    )
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["same"])], "else", [], [value("same", "batch", 4, 5, 5)]
    )
    w = Writer("initializers")
    w.node("ReduceMax", ["x"], "largest", keepdims=0)
    w.node("Less", ["largest", w.constant("limit", torch.tensor(10.0))], "small")
    w.node("If", ["small"], "y", then_branch=then, else_branch=other)
    original = small(w, "y")
    x = torch.randn(2, 4, 5, 5)
    assert [site.path for site in onnx_graph.find_sites(original, x)] == ["inner"]
    for spelling in ("group(groups=2)", "instance", "frozen", "rms"):
        converted = checked(onnx_graph.convert(original, spelling))
        assert "BatchNormalization" not in kinds(converted)
        wanted = normsearch.convert(torch.nn.Sequential(norm()), spelling)(x)
        torch.testing.assert_close(run(converted, x), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(converted, x + 20), x + 20)
    network = torch.nn.Sequential(norm())
    expected = normsearch.sensitivity(network, "group(groups=2)", [x]).drift["0"]["group(groups=2)"]
    found = onnx_graph.sensitivity(original, "group(groups=2)", [x]).drift["inner"]["group(groups=2)"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_sites_of_one_name_are_told_apart() -> None:
    branches = []
    for number in range(2):
        inner = Writer("initializers")
        inner.batch_norm("x", "", norm(seed=number))
        output = [value(".y", "batch", 4, 5, 5)]
        branches.append(onnx.helper.make_graph(inner.nodes, f"b{number}", [], output, inner.initializers))
    w = Writer("initializers")
    w.constant("c", torch.tensor(1.0))
    w.node("Cast", ["c"], "condition", to=onnx.TensorProto.BOOL)
    w.node("If", ["condition"], "z", then_branch=branches[0], else_branch=branches[1])
    w.node("Add", [w.batch_norm("z", "a", norm()), w.batch_norm("x", "b", norm())], "y")
    w.nodes[2].name = w.nodes[3].name = "norm"
    original = small(w, "y")
    assert [site.path for site in onnx_graph.find_sites(original)] == [".y", ".y#2", "a.y", "b.y"]
    # The branches are attributes, in the order of their names: the else branch comes first.
    converted = checked(onnx_graph.convert(original, {".y": "group", "*": "frozen"}))
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        wanted = norm()(norm(seed=0)(x)) + norm()(x)
    torch.testing.assert_close(run(converted, x), wanted, rtol=1e-5, atol=1e-5)


def test_a_loop_body_reads_constants_of_the_outer_graph() -> None:
    w = Writer("initializers")
    layer = norm()
    names = [
        w.constant(f"p.{key}", getattr(layer, key))
        for key in ("weight", "bias", "running_mean", "running_var")
    ]
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("BatchNormalization", ["state", *names], ["next"], "inner"),
            onnx.helper.make_node("Identity", ["condition"], ["go_on"]),
        ],
        "body",
        [
            value("turn", dtype=onnx.TensorProto.INT64),
            value("condition", dtype=onnx.TensorProto.BOOL),
            value("state", "batch", 4, 5, 5),
        ],
        [value("go_on", dtype=onnx.TensorProto.BOOL), value("next", "batch", 4, 5, 5)],
    )
    w.node("Constant", [], "turns", value=onnx.helper.make_tensor("n", onnx.TensorProto.INT64, [], [3]))
    w.node("Loop", ["turns", "", "x"], "y", body=body)
    original = small(w, "y")
    x = torch.randn(2, 4, 5, 5)
    twin_ = normsearch.convert(torch.nn.Sequential(norm()), "group(groups=2)")
    converted = checked(onnx_graph.convert(original, "group(groups=2)"))
    torch.testing.assert_close(run(converted, x), twin_(twin_(twin_(x))), rtol=1e-4, atol=1e-5)
    assert not [name for name in converted.graph.initializers if name.startswith("p.")]


def test_what_cannot_be_rewritten_is_refused_by_name() -> None:
    w = Writer("initializers")
    names = [w.constant(f"p.{key}", torch.ones(4)) for key in ("scale", "bias", "mean")]
    w.node("Abs", [w.constant("v", torch.ones(4))], "computed")
    w.node("BatchNormalization", ["x", *names, "computed"], "y", "norm")
    with pytest.raises(
        normsearch.RefusedError, match="norm: group refused: its variance is computed in the graph"
    ):
        onnx_graph.convert(small(w, "y"), "group")

    w = Writer("initializers")
    names = [w.constant(f"p.{key}", torch.ones(4)) for key in ("scale", "bias", "mean", "variance")]
    w.nodes.append(
        onnx.helper.make_node("BatchNormalization", ["x", *names], ["y", "m", "v"], "norm", training_mode=1)
    )
    with pytest.raises(normsearch.RefusedError, match="it is in training mode"):
        onnx_graph.convert(small(w, "y"), "group")
    assert onnx_graph.plan(small(w, "y"), "batch").rows[0].notes[0].startswith("it is in training mode")

    w = Writer("initializers")
    layer = norm()
    layer.running_var[1] = float("nan")
    w.batch_norm("x", "norm", layer)
    with pytest.raises(normsearch.RefusedError, match="running variance is not finite in 1 of 4"):
        onnx_graph.convert(small(w, "norm.y"), "group")

    w = Writer("initializers")
    w.batch_norm("x", "norm", norm())
    with pytest.raises(normsearch.RefusedError, match="identity refused: no convolution or linear layer"):
        onnx_graph.convert(small(w, "norm.y"), "identity")
    with pytest.raises(normsearch.PlanError, match="no BatchNorm layer"):
        onnx_graph.plan(onnx_graph.convert(small(w, "norm.y"), "frozen"), "group")
    with pytest.raises(normsearch.PlanError, match="keep='all'"):
        onnx_graph.convert(small(w, "norm.y"), "frozen", keep="all")  # type: ignore[arg-type]
    with pytest.raises(normsearch.ModelError, match="got Linear"):
        onnx_graph.find_sites(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(
        normsearch.ModelError, match=r"the ONNX graph takes x float .*; got 0 in order and y by name"
    ):
        onnx_graph.find_sites(small(w, "norm.y"), {"y": torch.ones(1)})


def test_a_batch_norm_in_a_function_is_named() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[N,2,4,4] x, float[2] s) => (float[N,2,4,4] y) { y = local.block(x, s) }
        <domain: "local", opset_import: ["": 17]>
        block (x, s) => (y) { y = BatchNormalization(x, s, s, s, s) }
    """
    original = ir.from_proto(onnx.parser.parse_model(text))
    (site,) = onnx_graph.find_sites(original)
    assert site.kind == "custom"
    with pytest.raises(
        normsearch.RefusedError, match="it stands in the function 'block'; inline functions first"
    ):
        onnx_graph.convert(original, "group")


def test_older_opsets_are_refused() -> None:
    original = model(twin())
    original.opset_imports[""] = 8
    with pytest.raises(normsearch.ModelError, match=r"opset 8; 9 to \d+ are rewritten"):
        onnx_graph.convert(original, "group")


@pytest.mark.parametrize(
    "spelling", ["group(groups=2)", "layer", "layer(axes=channel)", "rms", "instance", "switchable"]
)
@pytest.mark.parametrize("opset", [11, 21])
def test_an_input_of_unknown_rank(spelling: str, opset: int) -> None:
    w = Writer("initializers")
    w.node("Reshape", ["x", "sizes"], "z")
    w.node("Flatten", [w.batch_norm("z", "norm", norm())], "y")
    inputs = [value("x", "numbers"), value("sizes", "rank", dtype=onnx.TensorProto.INT64)]
    original = ir.from_proto(w.model(opset, inputs, [value("y", "batch", "rest")]))
    (site,) = onnx_graph.find_sites(original)
    assert site.ranks == (2, 3, 4, 5)
    converted = checked(onnx_graph.convert(original, spelling))
    for x, layer in (
        (torch.randn(2, 4, 5, 6), torch.nn.BatchNorm2d),
        (torch.randn(2, 4, 7), torch.nn.BatchNorm1d),
    ):
        twin_ = layer(4).eval()
        twin_.load_state_dict(norm().state_dict())
        wanted = normsearch.convert(torch.nn.Sequential(twin_), spelling)(x)
        found = Runtime(converted)(x.flatten(), torch.tensor(x.shape))["y"]
        torch.testing.assert_close(found, wanted.flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [13, 22])
def test_double_and_half_precision(opset: int) -> None:
    """A normalization alone: onnxruntime has no convolution in double precision."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64) + 3
    layer = norm().double()
    layer.load_state_dict({key: v.half() for key, v in layer.state_dict().items()})
    for spelling in (
        "group(groups=2)",
        "layer",
        "layer(axes=channel)",
        "instance",
        "rms",
        "switchable",
        "ibn",
    ):
        wanted = normsearch.convert(torch.nn.Sequential(layer), spelling, inputs=x)(x)
        for dtype, kind, bound in (
            (torch.float64, onnx.TensorProto.DOUBLE, 1e-12),
            (torch.float16, onnx.TensorProto.FLOAT16, 5e-3),
        ):
            w = Writer("initializers", onnx.helper.tensor_dtype_to_np_dtype(kind))
            w.batch_norm("x", "norm", layer)
            original = small(w, "norm.y", opset=opset, shape=("batch", 4, 6, 6), dtype=kind)
            found = run(checked(onnx_graph.convert(original, spelling)), x.to(dtype))
            assert found.dtype == dtype
            assert (found - wanted).abs().max() < bound * wanted.abs().max(), spelling


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_linear_nodes_take_the_scale_over(kind: str) -> None:
    w = Writer("initializers")
    weight, bias = torch.randn(6, 4), torch.randn(1, 4)
    if kind == "MatMul":
        w.node("MatMul", ["x", w.constant("w", weight)], "z", "linear")
    else:
        w.node(
            "Gemm", ["x", w.constant("w", weight), w.constant("b", bias)], "z", "linear", alpha=0.5, beta=2.0
        )
    layer = torch.nn.BatchNorm1d(4).eval()
    layer.load_state_dict(norm().state_dict())
    w.batch_norm("z", "norm", layer)
    original = small(w, "norm.y", shape=("batch", 6), out=("batch", 4))
    x = torch.randn(5, 6)
    with torch.no_grad():
        wanted = layer(x @ weight) if kind == "MatMul" else layer(0.5 * x @ weight + 2 * bias)
    for spelling in ("identity", "weight", "spectral"):
        converted = checked(onnx_graph.convert(original, spelling))
        assert kinds(converted) == (["MatMul", "Add"] if kind == "MatMul" else ["Gemm"])
        torch.testing.assert_close(run(converted, x), wanted, rtol=1e-4, atol=1e-5)


def test_a_producer_that_is_read_twice_keeps_its_weight() -> None:
    w = Writer("initializers")
    w.node("Conv", ["x", w.constant("w", torch.randn(4, 4, 1, 1))], "z", "conv")
    w.node("Add", ["z", w.batch_norm("z", "norm", norm())], "y", "sum")
    original = small(w, "y")
    (site,) = onnx_graph.find_sites(original)
    assert site.producer is not None
    assert site.producer.detail == "its output is read elsewhere too"
    x = torch.randn(2, 4, 5, 5)
    converted = checked(onnx_graph.convert(original, "weight"))
    torch.testing.assert_close(run(converted, x), run(original, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        normsearch.RefusedError, match="cannot be folded into conv: its output is read elsewhere"
    ):
        onnx_graph.convert(original, "identity")


def test_files_are_written_whole_and_read_back(tmp_path: Any) -> None:
    path, original = tmp_path / "out.onnx", model(twin())
    converted = onnx_graph.convert(original, "group")
    onnx_graph.save(converted, path)
    assert as_proto(onnx_graph.load(path)) == as_proto(converted)
    with pytest.raises(normsearch.CheckpointError, match="exists"):
        onnx_graph.save(converted, path)
    with pytest.raises(normsearch.CheckpointError, match=r"written as \.onnx"):
        onnx_graph.save(converted, tmp_path / "out.pb")
    broken = onnx_graph.convert(original, "group")
    next(iter(broken.graph)).op_type = "Nothing"
    with pytest.raises(normsearch.CheckpointError, match="not valid ONNX"):
        onnx_graph.save(broken, tmp_path / "broken.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return list(torch.randn(64, 3, 8, 8, generator=generator).split(8))


@pytest.mark.parametrize("form", ["initializers", "inputs"])
@pytest.mark.parametrize("opset", [11, 21])
@pytest.mark.parametrize("spelling", ["group(groups=8)", "layer(axes=channel)"])
def test_calibration_brings_the_original_back(
    form: str, opset: int, spelling: str, batches: list[Tensor]
) -> None:
    original = model(twin(), form, opset)
    converted = onnx_graph.convert(original, {"bn4": "frozen", "*": spelling})
    texts = ir.to_proto(original), ir.to_proto(converted)
    calibrated = checked(onnx_graph.calibrate(converted, original, batches))
    assert (ir.to_proto(original), ir.to_proto(converted)) == texts
    record = onnx_graph.calibration_record(calibrated)
    assert record is not None
    assert record.error.after < 0.6 * record.error.before
    assert list(record.sites) == ["bn1", "bn2", "bn3", "bn4"]
    assert (record.batches, record.held_out) == (8, 2)
    assert onnx_graph.calibration_record(converted) is None
    report = onnx_graph.compare(original, calibrated, batches[6:7])
    before = onnx_graph.compare(original, converted, batches[6:7])
    assert report.drift.relative_l2 < before.drift.relative_l2
    assert (report.batch_norms.before, report.batch_norms.after) == (4, 0)
    assert report.batch_dependence.after.train_batches is None
    assert report.batch_dependence.after.eval_alone is not None
    assert report.batch_dependence.after.eval_alone < 1e-6


def test_least_squares_is_the_regression(batches: list[Tensor]) -> None:
    """One site, no weight before it to whiten in: γ and β are those of a regression solved by other means."""
    w = Writer("initializers")
    w.batch_norm("x", "norm", norm())
    original = small(w, "norm.y")
    converted = onnx_graph.convert(original, "group(groups=2)")
    given = [torch.randn(4, 4, 5, 5) * torch.arange(1, 5).reshape(1, 4, 1, 1) for _ in range(4)]
    calibrated = onnx_graph.calibrate(converted, original, given)
    y, t = (
        torch.cat([run(one, x) for x in given[:3]]).double().transpose(0, 1).flatten(1)
        for one in (converted, original)
    )
    wanted = torch.cat([run(converted, given[3]).double().transpose(0, 1).flatten(1)], 1)
    for channel in range(4):
        line = torch.stack([y[channel], torch.ones_like(y[channel])], 1)
        slope, intercept = torch.linalg.lstsq(line, t[channel, :, None]).solution.flatten()
        wanted[channel] = slope * wanted[channel] + intercept
    found = run(calibrated, given[3]).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_calibration_whitens_where_channels_differ_widely(batches: list[Tensor]) -> None:
    network = Twin()
    with torch.no_grad():
        spread = torch.logspace(-1.5, 1.5, CHANNELS)
        network.conv2.weight.mul_(spread.reshape(-1, 1, 1, 1))
        x = torch.cat(batches)
        y = network.conv2(network.act1(network.bn1.eval()(network.conv1(x))))
        network.bn2.running_mean.copy_(y.mean((0, 2, 3)))
        network.bn2.running_var.copy_(y.var((0, 2, 3)))
    original = model(network.eval())
    converted = onnx_graph.convert(original, {"bn2": "group(groups=1)"})
    calibrated = checked(onnx_graph.calibrate(converted, original, batches))
    record = onnx_graph.calibration_record(calibrated)
    assert record is not None
    assert record.whitened == ("bn2",)
    assert record.gained_bias == ("conv2",)
    assert record.sites["bn2"].after < 0.5 * record.sites["bn2"].before


def test_calibration_refuses_what_does_not_belong_together(batches: list[Tensor]) -> None:
    original = model(twin())
    w = Writer("initializers")
    w.batch_norm("x", "norm", norm())
    with pytest.raises(normsearch.ModelError, match="other outputs"):
        onnx_graph.calibrate(small(w, "norm.y"), original, batches)
    with pytest.raises(normsearch.ModelError, match="needs two at least"):
        onnx_graph.calibrate(original, original, batches[:1])
    calibrated = onnx_graph.calibrate(original, original, batches[:2])
    record = onnx_graph.calibration_record(calibrated)
    assert record is not None
    assert record.rungs == ()


def test_every_layer_that_a_method_builds_has_operators() -> None:
    from normsearch.onnx_graph.layers import LAYERS

    built = {
        type(layer)
        for spelling in SPELLINGS
        for layer in normsearch.convert(Twin().eval(), to(spelling), inputs=INPUTS).modules()
        if type(layer).__module__.startswith("normsearch.methods.") and not hasattr(layer, "kernel_size")
    }
    assert {kind for kind in built if not hasattr(kind, "prefix")} <= set(LAYERS)


def test_a_trained_classifier_of_another_framework() -> None:
    crops = pytest.importorskip("benchmarks.text_crops")
    try:
        path = crops.model_file()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    original = onnx_graph.load(path)
    x = torch.randn(2, 3, 48, 192, generator=torch.Generator().manual_seed(0))
    assert len(onnx_graph.find_sites(original)) == 35
    for spelling in ("identity", "frozen", "weight"):
        converted = checked(onnx_graph.convert(original, spelling, inputs=x))
        assert not onnx_graph.find_sites(converted)
        torch.testing.assert_close(run(converted, x), run(original, x), rtol=1e-5, atol=1e-5)
