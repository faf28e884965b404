"""ONNX files of strangers: every attack is refused, no other file is opened, mutations break nothing."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normsearch

onnx = pytest.importorskip("onnx", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'normsearch[onnx]'")

import onnx_attacks  # noqa: E402
from onnx_attacks import ATTACKS, GOOD  # noqa: E402

from benchmarks.fuzz_onnx import fuzz, seeds  # noqa: E402
from normsearch import onnx_graph  # noqa: E402
from normsearch.admission.onnx_files import OPERATORS, admitted, read  # noqa: E402

_IN_OPEN = 0x20


class Canary:
    """A file with a secret, and whether anybody opened it, in Python or not, by this name or another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"secret" + b"\0" * 10)
        libc = ctypes.CDLL(None, use_errno=True)
        self._watch = libc.inotify_init1(os.O_NONBLOCK)
        assert self._watch >= 0
        assert libc.inotify_add_watch(self._watch, os.fsencode(path), _IN_OPEN) >= 0

    @property
    def opened(self) -> bool:
        try:
            return bool(os.read(self._watch, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._watch)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    if sys.platform != "linux":
        pytest.skip("needs inotify, which Linux has")
    made = Canary(tmp_path / "canary")
    yield made
    made.close()


@pytest.mark.parametrize(
    ("name", "location"),
    [(name, "canary") for name in ATTACKS]
    + [(name, place) for name in ATTACKS if "external" in name for place in ("hard link", "absolute")],
)
def test_attack_is_refused_and_the_canary_never_opened(name: str, location: str, canary: Canary) -> None:
    build, reason = ATTACKS[name]
    linked = canary.path.with_name("linked")
    os.link(canary.path, linked)
    where = {"canary": "canary", "hard link": "linked", "absolute": str(canary.path)}[location]
    path = canary.path.with_name("model.onnx")
    path.write_bytes(build(where))
    with pytest.raises(normsearch.CheckpointError) as refused:
        onnx_graph.load(path)
    assert reason in str(refused.value)
    assert str(refused.value).startswith(str(path))
    assert not canary.opened


def test_the_canary_would_be_seen(canary: Canary) -> None:
    path = canary.path.with_name("model.onnx")
    path.write_bytes(ATTACKS["external initializer"][0]("canary"))
    assert onnx.load(path).graph.initializer[0].raw_data.startswith(b"secret")
    assert canary.opened


@pytest.mark.parametrize("kind", ["folder", "empty", "missing", "pipe"])
def test_no_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(normsearch.CheckpointError, match=str(path)):
        read(path)


def test_what_torch_wrote_is_told_from_onnx(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = torch.nn.Linear(2, 2)
    torch.export.save(torch.export.export(model, (torch.ones(1, 2),)), tmp_path / "model.pt2")
    (tmp_path / "model.pt2").rename(path)
    with pytest.raises(
        normsearch.CheckpointError, match=r"a zip archive, not .* exported program to model\.pt2"
    ):
        read(path)


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    assert admitted(GOOD, tmp_path) == onnx.ModelProto.FromString(GOOD)
    for length in range(len(GOOD)):
        with pytest.raises(normsearch.CheckpointError):
            admitted(GOOD[:length], tmp_path)


def test_operators_are_onnx_own() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    # An older onnx knows fewer; none may be known to nobody.
    assert len(OPERATORS - known) < 12
    assert not OPERATORS & {"ImageDecoder", "StringConcat", "StringNormalizer", "RegexFullMatch"}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for content in (data, GOOD + data, onnx_attacks.wire(7, data)):
        try:
            admitted(content, Path("model.onnx"))
        except normsearch.CheckpointError:
            continue


def test_mutated_files() -> None:
    outcomes = fuzz(seeds(), 400, 1)
    assert outcomes["read"] > 10
    assert outcomes["converted"] > 5
    assert outcomes["CheckpointError"] > 200
