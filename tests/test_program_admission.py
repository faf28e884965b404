"""Exported programs from strangers: nothing in them runs, what is known is read, everything else refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from program_attacks import ATTACKS, MODEL, Network, altered, entry, valid, with_json

import normsearch
from benchmarks.fuzz_admission import PROGRAMS, fuzz, program_seeds
from normsearch.admission import programs
from normsearch.admission.expressions import is_guard, is_size


@pytest.fixture(scope="module")
def data() -> bytes:
    return valid()


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_in_a_file_runs(data: bytes, canary: Path, tmp_path: Path, name: str) -> None:
    attack = ATTACKS[name]
    path = tmp_path / "evil.pt2"
    path.write_bytes(attack.make(data, canary))
    if attack.harmless:
        normsearch.load(path).model.module()(torch.randn(3, 3, 8, 8))
    else:
        with pytest.raises(normsearch.CheckpointError):
            normsearch.load(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.works])
def test_the_attacks_work_on_who_trusts_them(data: bytes, canary: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.pt2"
    path.write_bytes(ATTACKS[name].make(data, canary))
    try:
        torch.export.load(path).module()(torch.randn(3, 3, 8, 8))
    except Exception:
        # Some break what they run in.
        assert canary.exists()
    assert canary.exists()


def test_what_is_read_is_the_program(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(data)
    loaded = normsearch.load(path)
    trusted = torch.export.load(path)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded.model.module()(x), trusted.module()(x))
    assert loaded.model.example_inputs is None
    assert str(loaded.model.graph_signature) == str(trusted.graph_signature)
    assert str(loaded.model.range_constraints) == str(trusted.range_constraints)
    assert loaded.model.constants["constant"].shape == (8, 1, 1)
    with pytest.raises(normsearch.CheckpointError, match="needs no architecture"):
        normsearch.load(path, "torchvision/resnet18")


def test_metadata_that_torch_would_look_up_is_left_out(data: bytes, tmp_path: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        for node in value["graph_module"]["graph"]["nodes"]:
            node["metadata"]["source_fn_stack"] = "x,torch.hub.load"
            node["metadata"]["stack_trace"] = 'File "x", line 1, in f\r\nimport os'
        value["graph_module"]["metadata"] = {"custom": json.dumps({"other": 1, "normsearch": {"plan": "{}"}})}

    path = tmp_path / "model.pt2"
    path.write_bytes(with_json(data, MODEL, change))
    program = programs.read(path)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    assert not any({"source_fn_stack", "stack_trace"} & set(node.meta) for node in nodes)
    assert all("nn_module_stack" in node.meta for node in nodes)
    assert program.graph_module.meta["custom"] == {"normsearch": {"plan": "{}"}}
    # A plan in it is read as one from anywhere.
    with pytest.raises(normsearch.PlanError):
        normsearch.load(path)


def test_a_converted_program_keeps_its_plan(tmp_path: Path) -> None:
    program = torch.export.export(Network().eval(), (torch.randn(2, 3, 8, 8),))
    plan = normsearch.plan(program, "group")
    path = tmp_path / "converted.pt2"
    normsearch.save(normsearch.convert(program, plan), path)
    loaded = normsearch.load(path)
    assert loaded.plan == plan
    assert loaded.architecture is None
    with pytest.raises(normsearch.CheckpointError, match="exists"):
        normsearch.save(program, path)
    with pytest.raises(normsearch.CheckpointError, match=r"written as \.pt2"):
        normsearch.save(program, tmp_path / "x.safetensors")


def test_another_file_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    for content in (b"", b"PK\x03\x04", data[: len(data) // 2], altered(data, {MODEL: None})):
        path = tmp_path / "model.pt2"
        path.write_bytes(content)
        with pytest.raises(normsearch.CheckpointError, match=r"model\.pt2"):
            normsearch.load(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot read .*model.pt2': No such file or directory; check the path"),
        ("empty", "model.pt2 is empty"),
        ("folder", "model.pt2 is a directory"),
        ("pipe", "model.pt2 is not a regular file"),
    ],
)
def test_no_regular_file(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    make = {"empty": path.touch, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
    make.get(kind, lambda: None)()
    with pytest.raises(normsearch.CheckpointError, match=message):
        normsearch.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Integer(-1), Mul(Integer(2), Symbol('s0', integer=True)))",
        "FloorDiv(Symbol('s0', positive=True, integer=True), Integer(2))",
        "Pow(Symbol('s0'), Integer(2))",
        "IntTrueDiv(Integer(1), Symbol('u0', integer=True))",
        "StrictLessThan(Integer(1), Symbol('s0'))",
    ],
)
def test_sizes_as_torch_writes_them(text: str) -> None:
    assert is_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "Symbol('s0').__class__",
        "Symbol('x; import os')",
        "Pow(Integer(9), Integer(999999999))",
        "Pow(Integer(9), Pow(Integer(9), Integer(8)))",
        "eval(Symbol('s0'))",
        "Lambda(Symbol('s0'), Symbol('s0'))",
        "Symbol('s0', positive=print())",
        "[1 for x in (1,)]",
        "Integer(1) if Integer(1) else Integer(2)",
        "lambda: 1",
        "Integer(True)",
        "Integer('9')",
        "9**9**9",
        "(" * 5000 + ")" * 5000,
        "Integer(1)\n",
        "",
        None,
    ],
)
def test_other_expressions_are_refused(text: Any) -> None:
    assert not is_size(text)


def test_conditions() -> None:
    assert is_guard("L['x'].size()[0] >= 2")
    assert is_guard("L['args'][0].size()[0] * 2 == L['kwargs']['y'].size()[1] and 1 < L['x'].stride()[0]")
    for text in (
        "__import__('os').system('true') == 0",
        "L['x'].__class__ == 1",
        "L['x'].size(print())[0] == 1",
        "L['a\"b'].size()[0] == 1",
        "x.size()[0] == 1",
        "L['x'].size()[0]",
        "print(1) == 1",
        "1",
    ):
        assert not is_guard(text)


@given(st.text(alphabet="SymbolIntegerAddMul()'s0123, =.*_[]xL", max_size=60))
def test_no_text_breaks_the_grammars(text: str) -> None:
    for ask in (is_size, is_guard):
        assert ask(text) in (True, False)


def test_mutated_programs_are_read_or_refused(tmp_path: Path) -> None:
    outcomes = fuzz(program_seeds(), PROGRAMS, ".pt2", 150, 0, tmp_path)
    assert sum(outcomes.values()) == 150
    assert outcomes["CheckpointError"] > 50


def test_every_number_of_a_graph_may_be_wrong(data: bytes, tmp_path: Path) -> None:
    """Other numbers of the right kind get past the grammar: torch must answer, not crash."""
    rng = random.Random(0)
    path = tmp_path / "model.pt2"
    for _ in range(30):
        value = json.loads(entry(data, MODEL))
        metas = list(value["graph_module"]["graph"]["tensor_values"].values())
        meta = rng.choice(metas)
        meta[rng.choice(["sizes", "strides"])] = [
            {"as_int": rng.choice([0, 1, 2**40, 2**62])} for _ in range(rng.randrange(6))
        ]
        path.write_bytes(altered(data, {MODEL: json.dumps(value).encode()}))
        with contextlib.suppress(normsearch.NormsearchError):
            assert normsearch.find_sites(normsearch.load(path).model)[0].path == "bn"
