"""Every example in README.md and in docstrings runs, and the README says what the code says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import normsearch
from normsearch import METHODS

README = (Path(__file__).parent.parent / "README.md").read_text()


#: What imports onnx, which is an extra.
_ONNX = ("normsearch.onnx_graph", "normsearch.admission.onnx_files")
_HAS_ONNX = importlib.util.find_spec("onnx") is not None


def _modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(normsearch.__path__, "normsearch."):
        if info.name.startswith(_ONNX) and not _HAS_ONNX:
            continue
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def test_docstring_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    attempted = 0
    for module in _modules():
        torch.manual_seed(0)
        result = doctest.testmod(
            module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE
        )
        assert result.failed == 0, module.__name__
        attempted += result.attempted
    assert attempted >= 20


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", README))))
def test_readme_example(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each block is run after those before it, as a reader would.
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    for block in blocks[: number + 1]:
        if "onnx" in block and not _HAS_ONNX:
            pytest.skip("needs the extra onnx: pip install 'normsearch[onnx]'")
        exec(compile(block, "README.md", "exec"), scope)


def test_readme_table_of_methods_is_complete_and_true() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| [^|]+ \| (exact|approximate)", README, re.MULTILINE))
    assert {normsearch.parse_method(spelling).name for spelling in rows} == set(METHODS)
    for spelling, word in rows.items():
        assert (word == "exact") == normsearch.parse_method(spelling).exact, spelling
