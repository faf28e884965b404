"""What DESIGN demands of the code as a whole: imports go down, importing is light, the wheel is clean."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import normsearch

PACKAGE = Path(normsearch.__file__).parent
#: Lower modules first; a module imports only from its own row's left or from rows above.
LAYERS = (
    ("errors", "progress", "reparametrization", "layer_sources", "text", "operators", "readings"),
    ("forward", "registries", "files", "tables", "batches", "program_tensors"),
    ("tracing", "architectures", "program_layers"),
    ("passes", "observation", "memory", "aten_calls"),
    ("compiled",),
    ("moments", "opening"),
    ("lifting", "aten_layers"),
    ("closing",),
    ("activations", "functional"),
    ("dataflow",),
    ("sites",),
    ("methods", "dependence", "compatibility"),
    ("reports",),
    ("documents",),
    ("plans",),
    ("optimizers", "sensitivities"),
    ("surgery", "lipschitz"),
    ("state_dicts",),
    ("conversion", "measurement", "recalibration", "resumption", "pairing"),
    ("affine_fitting", "distillation", "programs"),
    ("calibration",),
    ("graph", "admission", "site_effects", "site_outputs"),
    ("fitting", "inputs", "reporting"),
    ("onnx_graph",),
    ("exporting",),
    ("checkpoints", "arguments"),
    ("rebuilding", "training_state"),
    ("training",),
    ("searching",),
    ("commands",),
    ("cli",),
    ("__main__",),
)


def _imports(path: Path) -> set[str]:
    """Names of normsearch's top-level modules that a file imports at run time, not for types alone."""
    tree = ast.parse(path.read_text())
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            block.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("normsearch.")}


def test_imports_go_down_only() -> None:
    rank = {name: level for level, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in rank, f"{own} has no place in LAYERS"
        for other in _imports(path) - {own}:
            assert rank[other] < rank[own], f"{path.name} imports {other}, which is not below it"


def test_library_never_imports_the_service() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "api"
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "api" for alias in node.names)


def test_only_children_import_the_library() -> None:
    users = set()
    for path in (PACKAGE.parent / "api").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            place = path.relative_to(PACKAGE.parent / "api").parts[0]
            users |= {place for name in found if name.split(".")[0] in ("normsearch", "torch")}
    assert users == {"engine"}


def test_server_holds_nothing_in_memory_that_others_need() -> None:
    code = "import sys, api.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert {"api", "fastapi"} <= loaded, done.stderr
    assert not loaded & {"torch", "normsearch", "numpy", "optuna", "dbos", "alembic", "psycopg"}


def test_importing_loads_nothing_and_its_names_nothing_heavy_but_torch() -> None:
    code = (
        "import sys, normsearch; assert 'torch' not in sys.modules; import torch; before = set(sys.modules); "
        "[getattr(normsearch, name) for name in normsearch.__all__ if name != 'search']; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    third_party = set(ast.literal_eval(loaded)) - set(sys.stdlib_module_names) - {"normsearch"}
    assert not third_party & {"rich", "typer", "pydantic", "torchvision", "timm", "optuna", "safetensors"}
    assert third_party <= {"torch", "sympy", "mpmath", "networkx"}, third_party


def test_public_names_are_where_type_checkers_look() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name: node.module for alias in node.names}
    for name in normsearch.__all__:
        module = found[name]
        value = getattr(importlib.import_module(module), name)
        assert getattr(normsearch, name) is value
        assert name in dir(normsearch)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        normsearch.nothing  # noqa: B018


def test_no_module_is_named_like_a_public_function() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert not modules & {name for name in normsearch.__all__ if callable(getattr(normsearch, name))}


def test_wheel_holds_the_package_alone(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=PACKAGE.parent,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], check=True, capture_output=True, text=True
    ).stdout
    folders = {line.split("/")[0] for line in listing.splitlines()[1:]}
    assert folders == {"normsearch", f"normsearch-{normsearch.__version__}.dist-info"}
    templates = {path.name for path in (PACKAGE / "reporting" / "templates").iterdir()}
    assert {name for name in templates if f"normsearch/reporting/templates/{name} " in listing} == templates


def test_every_public_name_is_documented() -> None:
    public = [getattr(normsearch, name) for name in normsearch.__all__]
    assert not [thing.__name__ for thing in public if callable(thing) and not thing.__doc__]
