"""Exported programs: their sites are the model's, and converting one is what converting the model is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import normsearch
from benchmarks.programs import UNIFORM
from normsearch import convert, find_sites
from normsearch.cli import app
from normsearch.graph import rewrite
from normsearch.opening import opened
from normsearch.programs import plan_in


class Network(nn.Module):
    """Every kind of producer and of site: shared, without affine, without statistics, on features."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.act = nn.ReLU(inplace=True)
        self.c2, self.b2 = nn.Conv2d(32, 19, 3, bias=False), nn.BatchNorm2d(19, eps=1e-3)
        self.silu, self.ct = nn.SiLU(), nn.ConvTranspose2d(19, 8, 2, 2)
        self.b3, self.drop = nn.BatchNorm2d(8, affine=False), nn.Dropout(0.2)
        self.linear, self.b4 = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.b5 = nn.BatchNorm2d(8, track_running_stats=False)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("shift", torch.ones(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.silu(self.b2(self.c2(self.act(self.b1(self.c1(x))))))
        y = self.b5(self.b3(self.ct(y)).relu()) + self.shift
        return self.b4(self.linear(self.drop(y).mean((2, 3)))), y


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.1, generator=generator)
                if module.track_running_stats:
                    module.running_mean.normal_(0, 0.1, generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
                    module.num_batches_tracked.fill_(3)
    return model.double()


def made(training: bool) -> nn.Module:
    torch.manual_seed(0)
    return randomized(Network()).train(training)


def drawn(batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 10, 10, generator=generator, dtype=torch.float64)


def exported(model: nn.Module, x: Tensor | None = None, **options: Any) -> ExportedProgram:
    shapes = ({0: Dim("batch")},)
    x = drawn(2) if x is None else x
    return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False, **options)


def reloaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@pytest.fixture(scope="module")
def programs() -> dict[tuple[bool, bool], ExportedProgram]:
    """By train mode and decomposition; read from a file."""
    found = {}
    for training in (False, True):
        program = reloaded(exported(made(training)))
        found |= {(training, False): program, (training, True): program.run_decompositions()}
    return found


def distance(found: Any, wanted: Any) -> float:
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    return max(float(((a - b).norm() / b.norm()).detach()) for a, b in pairs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
def test_sites_are_those_of_the_model(
    programs: dict[tuple[bool, bool], ExportedProgram], training: bool, decomposed: bool
) -> None:
    found = {site.path: site for site in find_sites(programs[training, decomposed])}
    wanted = {site.path: site for site in find_sites(made(training), drawn(2))}
    assert set(found) == set(wanted) == {f"b{number}" for number in range(1, 6)}
    for path, site in wanted.items():
        here = found[path]
        assert here.open_batch == training
        if decomposed:
            # SiLU is two operators there.
            assert (here.producer, here.input_shapes, here.calls) == (
                site.producer,
                site.input_shapes,
                site.calls,
            )
        else:
            assert {**vars(here), "open_batch": False} == vars(site)


def check(
    programs: dict[tuple[bool, bool], ExportedProgram], spelling: str, training: bool, decomposed: bool
) -> None:
    """Outputs at three batch sizes, gradients, buffers and names equal those of the converted model."""
    program, model = programs[training, decomposed], made(training)
    plan = normsearch.plan(program, [spelling, "frozen", "batch"])
    converted = reloaded(convert(program, plan))
    choice = {path: [method, "batch"] for path, method in plan.items()}
    eager = convert(model, choice, inputs=drawn(2))
    module: Any = converted.module()
    for batch in (2, 3, 8) if training else (1, 3, 8):
        torch.manual_seed(0)
        found = module(drawn(batch, batch))
        torch.manual_seed(0)
        wanted = eager(drawn(batch, batch))
        assert distance(found, wanted) < 1e-12
    for output in (found, wanted):
        sum(part.square().sum() for part in output).backward()
    gradients, expected = (
        {name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (module, eager)
    )
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        # The gate of batch_instance lets gradients pass at its bound too.
        if not name.endswith(".rho"):
            assert float((gradients[name] - gradient).norm()) <= 1e-9 * (1 + float(gradient.norm())), name
    assert set(converted.state_dict) == set(eager.state_dict())
    buffers = dict(module.named_buffers())
    for name, buffer in eager.named_buffers():
        assert torch.allclose(buffers[name], buffer, rtol=1e-12, atol=1e-12), name
    left = {site.path for site in find_sites(converted)}
    assert left == {path for path, method in plan.items() if method.name == "batch"}
    assert dict(plan_in(converted) or {}) == dict(plan)


@pytest.mark.parametrize("spelling", UNIFORM)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_converting_a_program_is_converting_the_model(
    programs: dict[tuple[bool, bool], ExportedProgram], spelling: str, training: bool
) -> None:
    check(programs, spelling, training, decomposed=False)


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param(one, marks=() if one in ("group", "spectral", "batch_renorm") else pytest.mark.slow)
        # Their plans know no activation there, and so differ from the model's.
        for one in UNIFORM
        if one not in ("evonorm_s0",)
    ],
)
def test_decomposed_programs_too(programs: dict[tuple[bool, bool], ExportedProgram], spelling: str) -> None:
    for training in (False, True):
        check(programs, spelling, training, decomposed=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")
@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "levit_128s", "mixnet_s"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_real_networks(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = randomized(timm.create_model(name, num_classes=3)).train(training)
    x = torch.randn(
        2, 3, 224 if name.startswith("levit") else 64, 224 if name.startswith("levit") else 64
    ).double()
    program = exported(model, x)
    for spelling in ("group", "switchable", "weight", "evonorm_s0"):
        plan = normsearch.plan(program, [spelling, "frozen"])
        eager = convert(model, dict(plan), inputs=x)
        torch.manual_seed(0)
        found = convert(program, plan).module()(x)
        torch.manual_seed(0)
        assert distance(found, eager(x)) < 1e-10


def test_runs_in_a_process_that_cannot_import_normsearch(
    programs: dict[tuple[bool, bool], ExportedProgram], tmp_path: Path
) -> None:
    methods = {"b1": "switchable", "b2": "weight", "b3": "spectral", "b4": "batch_renorm", "b5": "instance"}
    program = convert(programs[True, False], methods)
    torch.export.save(program, tmp_path / "converted.pt2")
    torch.manual_seed(0)
    torch.save((drawn(7), program.module()(drawn(7))), tmp_path / "expected.pt")
    code = (
        "import sys; sys.modules['normsearch'] = None; import torch; "
        "program = torch.export.load('converted.pt2').module(); x, wanted = torch.load('expected.pt'); "
        "torch.manual_seed(0); found = program(x); "
        "print(max(float((a - b).detach().abs().max()) for a, b in zip(found, wanted)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, env={}
    )
    assert float(done.stdout) == 0, done.stderr


def test_everything_else_stays(programs: dict[tuple[bool, bool], ExportedProgram]) -> None:
    program = programs[True, False]
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    code = program.graph_module.code
    converted = rewrite(program, normsearch.plan(program, {"b2": "group"}))
    assert program.graph_module.code == code
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict.items())
    gone = {"b2.running_mean", "b2.running_var", "b2.num_batches_tracked"}
    assert set(before) - set(converted.state_dict) == gone
    assert list(converted.state_dict) == [name for name in before if name not in gone]
    assert str(converted.range_constraints) == str(program.range_constraints)
    assert not {t.data_ptr() for t in converted.state_dict.values()} & {
        t.data_ptr() for t in program.state_dict.values()
    }
    kept = {node.name: node for node in converted.graph.nodes}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.name in kept and "batch_norm" not in node.name:
            assert kept[node.name].target == node.target
            assert kept[node.name].meta.get("stack_trace") == node.meta.get("stack_trace")
    (node,) = [n for n in converted.graph.nodes if n.target is torch.ops.aten.group_norm.default]
    stack = list(node.meta["nn_module_stack"].values())
    assert stack[-1] == ("b2", "torch.nn.modules.normalization.GroupNorm")
    assert {site.path for site in find_sites(converted)} == {"b1", "b3", "b4", "b5"}


class Tied(nn.Module):
    """One BatchNorm called twice, two convolutions with one weight, keywords, a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm2d(4)
        self.same = self.norm

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        y = self.same(self.b(self.norm(self.a(x)).relu_()))
        with torch.no_grad():
            mean = y.mean()
        return {"y": y * scale, "mean": mean}


@pytest.mark.parametrize("spelling", ["group", "batch_renorm", "weight", "frozen"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_what_is_shared_stays_shared(spelling: str, training: bool) -> None:
    torch.manual_seed(0)
    model = randomized(Tied()).train(training)
    x, scale = torch.randn(2, 4, 6, 6).double(), torch.ones(1).double()
    shapes = {"x": {0: Dim("batch", max=100)}, "scale": None}
    program = reloaded(torch.export.export(model, (x,), {"scale": scale}, dynamic_shapes=shapes))
    (site,) = find_sites(program)
    assert (site.path, site.calls) == ("norm", 2)
    converted = reloaded(convert(program, spelling))
    found = converted.module()(torch.cat([x, x]), scale=scale)
    wanted = convert(model, spelling)(torch.cat([x, x]), scale=scale)
    assert distance(found, wanted) < 1e-12
    weights = [name for name in converted.state_dict if name.rpartition(".")[2] in ("weight", "weight_v")]
    pointers = {converted.state_dict[name].data_ptr() for name in weights if name[0] in "ab"}
    assert len(pointers) == 1


class Other(nn.Module):
    """Calls that belong to no layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.gamma, self.beta = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.register_buffer("mean", torch.rand(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "standardized":
            weight = F.batch_norm(self.conv.weight.reshape(1, 4, -1), None, None, training=True)
            return self.bn(F.conv2d(x, weight.reshape_as(self.conv.weight)))
        x = self.conv(x)
        if self.kind == "read":
            return self.bn(x) + self.bn.weight.sum()
        if self.kind == "computed":
            return F.batch_norm(x, self.mean, self.var, self.gamma * 2, self.beta)
        return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta)


def test_calls_that_are_no_layer_are_reported() -> None:
    x = torch.randn(2, 3, 6, 6)
    for kind, why in (("read", "numbers are read by"), ("computed", "computed weight or statistic")):
        program = exported(Other(kind).eval(), x)
        (site,) = find_sites(program)
        assert site.kind == "functional"
        assert why in str(site.detail)
        with pytest.raises(normsearch.RefusedError, match=why):
            convert(program, "group")


def test_functions_and_standardized_weights() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = Other("function").eval()
    program = exported(model, x)
    assert [site.path for site in find_sites(program)] == ["norm"]
    converted = convert(program, "frozen")
    assert distance(converted.module()(x), model(x)) < 1e-6
    assert not {"gamma", "beta", "mean", "var"} & set(converted.state_dict)
    assert [site.path for site in find_sites(exported(Other("standardized").eval(), x))] == ["bn"]


def test_an_open_batch_size_is_no_number() -> None:
    model = made(training=True)
    with pytest.raises(normsearch.RefusedError, match="leaves open"):
        convert(exported(model), "ghost")
    plan = normsearch.plan(exported(model), ["ghost", "group"])
    assert {method.name for method in plan.values()} == {"group"}
    fixed = torch.export.export(made(training=True), (drawn(4),), strict=False)
    plan = normsearch.plan(fixed, "ghost(size=2)")
    torch.manual_seed(0)
    found = convert(fixed, plan).module()(drawn(4))
    torch.manual_seed(0)
    assert distance(found, convert(model, dict(plan))(drawn(4))) < 1e-12


def described(program: ExportedProgram) -> list[Any]:
    """Every operator on tensors with its arguments and what it makes, open sizes as what they come to."""
    numbers: dict[fx.Node, Any] = {}
    found: list[Any] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat):
            numbers[node] = str(value)
            continue
        if node.target is torch.ops.aten.slice.Tensor and node.args[2:] == (0, sys.maxsize):
            # Where a size is open, x[:, 1] takes all of the first dimension by an operator of its own.
            numbers[node] = numbers[node.args[0]]
            continue
        numbers[node] = len(found)
        shapes = [
            (str(t.shape), str(t.stride()), t.dtype) for t in tree_leaves(value) if isinstance(t, Tensor)
        ]
        found.append((node.target, map_arg((node.args, node.kwargs), numbers.__getitem__), shapes))
    return found


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param(one, marks=() if one in ("switchable", "spectral") else pytest.mark.slow)
        for one in UNIFORM
    ],
)
def test_operators_are_those_that_symbols_find(
    programs: dict[tuple[bool, bool], ExportedProgram], spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for training in (False, True):
        program = programs[training, False]
        plan = normsearch.plan(program, [spelling, "frozen", "batch"])
        noted = convert(program, plan)
        with monkeypatch.context() as patch:
            patch.setattr("normsearch.aten_layers.noted", lambda *arguments: None)
            traced = convert(program, plan)
        assert described(noted) == described(traced)


@pytest.mark.parametrize(
    "spelling", ["batch_renorm", "switchable", "sparse_switchable", "weight(mean_only=true)"]
)
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
def test_the_variance_of_a_single_value_says_nothing(spelling: str, decomposed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 10), nn.BatchNorm2d(8))
    program = exported(randomized(model).train())
    converted: Any = reloaded(
        convert(program.run_decompositions() if decomposed else program, spelling)
    ).module()
    eager = convert(model, spelling)
    for batch in (1, 3, 1):
        assert distance(converted(drawn(batch)), eager(drawn(batch))) < 1e-12
        buffers = dict(converted.named_buffers())
        for name, buffer in eager.named_buffers():
            assert torch.allclose(buffers[name], buffer, rtol=1e-12, atol=0), name


def test_what_cannot_be_done_says_so(programs: dict[tuple[bool, bool], ExportedProgram]) -> None:
    program = programs[False, False]
    with pytest.raises(normsearch.ModelError, match="cannot be edited in place"):
        convert(program, "group", in_place=True)
    with pytest.raises(normsearch.ModelError, match="does not say how it was converted"):
        normsearch.calibrate(program, program, [(drawn(2),)] * 2)
    with pytest.raises(normsearch.ModelError, match="give two of a kind"):
        normsearch.calibrate(convert(program, "group"), made(False), [(drawn(2),)] * 2)


def test_measuring_a_program_is_measuring_the_model() -> None:
    model = made(training=False)
    program = exported(model)
    batches = [drawn(4, seed) for seed in range(4)]
    converted, eager = convert(program, "group"), convert(model, "group")
    reports = [normsearch.compare(*pair, batches) for pair in ((program, converted), (model, eager))]
    assert abs(reports[0].drift.relative_l2 - reports[1].drift.relative_l2) < 1e-12
    assert reports[0].batch_norms == reports[1].batch_norms
    effects = [normsearch.sensitivity(one, ["instance", "group"], batches[:1]) for one in (program, model)]
    for site, drifts in effects[1].drift.items():
        assert effects[0].drift[site] == pytest.approx(drifts, abs=1e-12)
    assert normsearch.profile(converted, batches[0], repeats=1).parameters == sum(
        parameter.numel() for parameter in eager.parameters()
    )


def test_calibrating_a_program_is_calibrating_the_model() -> None:
    model = made(training=False)
    program = exported(model)
    batches = [drawn(4, seed) for seed in range(4)]
    converted, eager = convert(program, "group"), convert(model, "group")
    calibrated = normsearch.calibrate(converted, program, batches, budget=3)
    wanted = normsearch.calibrate(eager, model, batches, budget=3)
    records = [normsearch.calibration_record(one) for one in (calibrated, wanted)]
    assert records[0] is not None
    assert records[1] is not None
    assert records[0].error.after == pytest.approx(records[1].error.after, rel=1e-9)
    assert records[0].error.after < records[0].error.before
    assert records[0].whitened == records[1].whitened
    assert distance(reloaded(calibrated).module()(drawn(3)), wanted(drawn(3))) < 1e-9
    # The plan goes on with it, so that it can be calibrated further.
    again = normsearch.calibrate(reloaded(calibrated), program, batches, budget=1)
    assert plan_in(again) == plan_in(converted)


def test_opened_graphs_compute_what_the_program_computes(
    programs: dict[tuple[bool, bool], ExportedProgram],
) -> None:
    for program in programs.values():
        before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
        module = opened(program)
        torch.manual_seed(0)
        found = module(drawn(3))
        torch.manual_seed(0)
        copies = reloaded(program).module()
        assert distance(found, copies(drawn(3))) < 1e-12
        assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict.items())


def test_export_writes_what_runs(tmp_path: Path) -> None:
    model = made(training=False)
    converted = convert(model, ["weight", "frozen", "batch"])
    path = tmp_path / "model.pt2"
    normsearch.export(converted, path, drawn(2))
    assert not converted.training
    loaded = normsearch.load(path)
    assert isinstance(loaded.model, ExportedProgram)
    assert distance(loaded.model.module()(drawn(5)), converted(drawn(5))) < 1e-12
    with pytest.raises(normsearch.CheckpointError, match="exists"):
        normsearch.export(converted, path, drawn(2))
    with pytest.raises(normsearch.CheckpointError, match=r"exported as \.pt2"):
        normsearch.export(converted, tmp_path / "model.xyz", drawn(2))
    with pytest.raises(normsearch.ModelError, match=r"failed on the given inputs|cannot export"):
        normsearch.export(converted, tmp_path / "other.pt2", torch.randn(2, 4, 10, 10).double())

    class Reading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum())

    with pytest.raises(normsearch.ModelError, match="cannot export Reading"):
        normsearch.export(Reading(), tmp_path / "other.pt2", drawn(2))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize("spelling", [*UNIFORM, "switchable(bn_logit=40)", "group(whiten=true)"])
@pytest.mark.parametrize("training", [False, True])
def test_what_export_wrote_is_read(spelling: str, training: bool, tmp_path: Path) -> None:
    converted = convert(made(training=training), [spelling, "batch"], inputs=drawn(4))
    path = tmp_path / "model.pt2"
    normsearch.export(converted, path, drawn(4))
    if spelling == "ghost" and training:
        # Chunks of a batch of any size: what torch says of the sizes is beyond what is read from files.
        with pytest.raises(normsearch.CheckpointError, match="which is no comparison of sizes"):
            normsearch.load(path)
        return
    module = normsearch.load(path).model.module()
    torch.manual_seed(0)
    found = module(drawn(4))
    torch.manual_seed(0)
    assert distance(found, converted(drawn(4))) < 1e-12


def test_export_in_train_mode_leaves_the_model_alone(tmp_path: Path) -> None:
    model = convert(made(training=True), ["batch_renorm", "batch"])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    normsearch.export(model, tmp_path / "model.pt2", drawn(4))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    module: Any = torch.export.load(tmp_path / "model.pt2").module()
    sum(part.square().sum() for part in module(drawn(3))).backward()
    assert all(p.grad is not None for name, p in module.named_parameters() if "unused" not in name)
    assert int(module.get_buffer("b1.num_batches_tracked")) == 4


def test_the_module_of_a_program_is_refused_with_the_way_out() -> None:
    program = torch.export.export(made(training=False), (drawn(2),))
    for act in (
        lambda: convert(program.module(), "group"),
        lambda: normsearch.sensitivity(program.module(), ["group"], [drawn(2)]),
    ):
        with pytest.raises(normsearch.ModelError, match=r"calls aten\.batch_norm.*ExportedProgram itself"):
            act()


class Plain(nn.Module):
    """Batch norms with and without numbers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.third = nn.BatchNorm2d(4, affine=False)
        self.fourth = nn.BatchNorm2d(4)
        self.fifth = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
        self.sixth = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)))
        result: Tensor = self.sixth(self.fifth(self.fourth(x)))
        return result


@pytest.mark.parametrize("decomposed", [False, True])
def test_sites_are_in_the_order_of_the_model(decomposed: bool) -> None:
    model = Plain().eval()
    program = torch.export.export(model, (torch.randn(2, 4, 3, 3),))
    if decomposed:
        program = program.run_decompositions()
    paths = [site.path for site in find_sites(program)]
    # Without numbers of its own, a layer has no name in a program.
    assert [path for path in paths if hasattr(model, path)] == ["first", "second", "third", "fourth", "sixth"]
    assert not hasattr(model, paths[4])
    assert len(paths) == 6


@pytest.mark.parametrize("order", [1, -1])
def test_a_program_is_compared_with_a_checkpoint(
    order: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    normsearch.export(model, "net.pt2", torch.randn(2, 3, 32, 32))
    torch.save({"ema": {"shadow": model.state_dict()}}, "net.pth")
    network = ["-a", "timm/resnet10t", "--arguments", "num_classes=3", "--entry", "ema.shadow"]
    files = ["net.pt2", "net.pth"][::order]
    done = CliRunner().invoke(app, ["compare", *files, *network, "--input-shape", "3x32x32", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["drift"]["relative_l2"] < 1e-5


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    normsearch.export(made(training=False), "model.pt2", drawn(2))
    run = CliRunner().invoke
    done = run(app, ["convert", "model.pt2", "--to", "group", "-o", "out.pt2", "--input-shape", "3x10x10"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "out.pt2"]
    assert dict(normsearch.load("out.pt2").plan or {}) == dict(normsearch.plan(made(False), "group"))
    shown = run(app, ["sites", "model.pt2", "--json"])
    assert '"path": "b1"' in shown.output
    compared = run(app, ["compare", "model.pt2", "out.pt2", "--input-shape", "3x10x10", "--json"])
    assert '"relative_l2"' in compared.output
    for arguments, message in (
        (["convert", "out.pt2", "--to", "layer", "-o", "again.pt2"], "is converted already"),
        (["convert", "model.pt2", "--to", "layer", "-o", "x.safetensors"], "written as .pt2"),
        (["sites", "model.pt2", "--architecture", "torchvision/resnet18"], "needs no architecture"),
        (["compare", "model.pt2", "out.pt2", "-a", "x:y", "--input-shape", "3x8x8"], "needs no architecture"),
    ):
        refused = run(app, arguments)
        assert refused.exit_code == 1
        assert message in refused.output
