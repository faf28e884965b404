"""What is left of a trained network's accuracy after conversion, without data and without training.

    python -m benchmarks.fidelity [--quick]

CREPE (trained weights; 400 tones of known pitch) and a residual network on digits; beside every method the
same swap with γ and β copied, the plain reset swap, and Opacus' ModuleValidator.fix. Bars: group keeps at
least 99 % of CREPE's accuracy, and exact methods keep outputs to 1e-10 relative in double precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import normsearch
from benchmarks import crepe, digits

SPELLINGS = (
    "group",
    "group(groups=32)",
    "group(weight_standardization=true)",
    "group(whiten=true)",
    "layer",
    "layer(axes=channel)",
    "layer(whiten=true)",
    "rms",
    "rms(whiten=true)",
    "instance",
    "filter_response",
    "evonorm_s0",
    "ibn",
    "switchable",
    "switchable(bn_logit=40)",
    "sparse_switchable",
    "batch_renorm",
    "ghost",
    "batch_instance",
    "frozen",
)
BAR = 0.99


@dataclass(frozen=True)
class Result:
    """One network under one method: accuracies, and the drift of the folded conversion in fp64."""

    network: str
    method: str
    exact: bool
    original: float
    folded: float
    copied: float
    plain: float
    drift: float


def opacus_swap(model: nn.Module) -> nn.Module:
    """Return what Opacus makes of a model: group normalization with everything reset."""
    with warnings.catch_warnings():
        # Importing Opacus and running its converter both warn; neither matters to the numbers.
        warnings.simplefilter("ignore")
        from opacus.validators import ModuleValidator

        fixed: nn.Module = ModuleValidator.fix(copy.deepcopy(model))
    return fixed.eval()


def measure(
    name: str, model: nn.Module, example: Tensor, accuracy: Callable[[nn.Module], float]
) -> tuple[list[Result], float]:
    """Return a result per method, and the accuracy of Opacus' swap."""
    original, double = accuracy(model), copy.deepcopy(model).double()
    results = []
    for spelling in track(SPELLINGS, name, transient=True):
        # A shape would refuse instance norm on maps of one element; these networks have none.
        plan = normsearch.plan(model, spelling)
        converted = {
            keep: accuracy(normsearch.convert(model, plan, keep=keep).eval())
            for keep in ("function", "affine", "nothing")
        }
        report = normsearch.compare(double, normsearch.convert(double, spelling), [example.double()])
        results.append(
            Result(
                name,
                spelling,
                plan.exact,
                original,
                converted["function"],
                converted["affine"],
                converted["nothing"],
                report.drift.relative_l2,
            )
        )
    return results, accuracy(opacus_swap(model))


def main(arguments: list[str] | None = None) -> int:
    """Run every network, print a table, write results/fidelity.json; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out CREPE full (four minutes)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    frames, pitch = crepe.tones(400)
    train, test = digits.data()
    networks: list[tuple[str, nn.Module, Tensor, Callable[[nn.Module], float]]] = [
        ("CREPE tiny", crepe.load("tiny"), frames[:8], lambda m: crepe.accuracy(m, frames, pitch)),
        ("digits ResNet", digits.train(train), test.images[:8], lambda m: digits.accuracy(m, test)),
    ]
    if not options.quick:
        networks.append(
            ("CREPE full", crepe.load("full"), frames[:8], lambda m: crepe.accuracy(m, frames, pitch))
        )
    console, every, opacus = Console(), [], {}
    for name, model, example, accuracy in networks:
        results, opacus[name] = measure(name, model, example, accuracy)
        every += results
        console.print(_table(name, results, opacus[name]))
    _write({"torch": torch.__version__, "opacus": opacus, "results": [asdict(r) for r in every]})
    misses = [r for r in every if r.exact and r.drift > 1e-10] + [
        r for r in every if r.method == "group" and "CREPE" in r.network and r.folded < BAR * r.original
    ]
    for miss in misses:
        console.print(f"missed: {miss}", style="red")
    return 1 if misses else 0


def _table(name: str, results: list[Result], opacus: float) -> Table:
    table = Table(
        title=f"{name}: accuracy {results[0].original:.4f} before conversion",
        caption=f"Opacus' ModuleValidator.fix: {opacus:.4f}; torch {torch.__version__}",
    )
    for column in ("method", "eval function", "folded", "γ, β copied", "plain swap", "output drift (fp64)"):
        table.add_column(column, justify="left" if column in ("method", "eval function") else "right")
    for r in results:
        kind = "exact" if r.exact else "approximate"
        table.add_row(
            r.method, kind, f"{r.folded:.4f}", f"{r.copied:.4f}", f"{r.plain:.4f}", f"{r.drift:.1e}"
        )
    return table


def _write(document: dict[str, Any]) -> None:
    path = Path(__file__).parent / "results" / "fidelity.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
