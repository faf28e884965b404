"""How much of a trained network's score a few unlabelled inputs bring back after conversion.

    python -m benchmarks.calibration [TASK ...] [--methods METHOD ...] [--fresh]

Every task of benchmarks/tasks.py under every method: the score of the original, of the plain swap, of the
swap with γ and β copied, after convert, and after calibrate with at most 256 unlabelled inputs. Finished
cases are kept in results/calibration.json and not run again. Bars: originals reach their floor and the plain
swap loses ten points; group and layer keep 99 % of the original after calibration; instance keeps 90 %, or
its destroyed sites are vetoed by name and the mixed plan keeps 99 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import normsearch
from benchmarks.tasks import TASKS, Task
from normsearch.sensitivities import THRESHOLD

METHODS = (
    "group",
    "group(groups=32)",
    "layer",
    "layer(axes=channel)",
    "rms",
    "instance",
    "instance or group",
)
RESULTS = Path(__file__).parent / "results" / "calibration.json"


@dataclass(frozen=True)
class Effort:
    """How many inputs a task is calibrated with, in batches of which size, and for how many steps."""

    inputs: int
    batch: int
    steps: int


EFFORT = {
    "digits": Effort(256, 32, 300),
    "signals": Effort(256, 32, 300),
    "shapes": Effort(256, 16, 100),
    "crepe-tiny": Effort(256, 16, 120),
    "crepe-full": Effort(32, 8, 8),
}


@dataclass(frozen=True)
class Result:
    """One task under one method: scores, what calibration did and what it took."""

    task: str
    method: str
    metric: str
    original: float
    plain: float
    copied: float
    converted: float
    calibrated: float
    inputs: int
    seconds: float
    cpu_seconds: float
    threads: int
    vetoed: list[str]
    calibration: dict[str, Any]

    @property
    def kept(self) -> float:
        """The share of the original's score that is left after calibration."""
        return self.calibrated / self.original


def veto_threshold(drifts: list[float]) -> float:
    """Return the largest drift of a single site at which all up to it together stay below half THRESHOLD.

    Drifts of single sites add up as independent errors do, in squares; without this, many sites that are each
    harmless destroy a network together. The other half is for group norm at all other sites.
    """
    total, largest = 0.0, min(drifts) / 2
    for drift in sorted(drifts):
        total += drift**2
        if total**0.5 > THRESHOLD / 2:
            break
        largest = drift
    return largest


def plan_for(task: Task, method: str, inputs: torch.Tensor) -> tuple[normsearch.Plan, list[str]]:
    """Return the plan and the sites that a veto keeps from instance norm, each with why."""
    if method == "instance":
        # Where instance norm is refused, on (N, C), nothing else is instance norm: group stands in.
        return normsearch.plan(task.model, {"*": ["instance", "group"]}, inputs=inputs[:2]), []
    if method == "instance or group":
        found = normsearch.sensitivity(task.model, "instance", [inputs[:32]])
        threshold = veto_threshold([d["instance"] for d in found.drift.values() if d["instance"] is not None])
        reasons = {refusal.site: refusal.reason for refusal in found.refusals}
        veto = [
            f"{site}: {reasons.get(site) or f'drift {found.drift[site][vetoed]:.2f}'}"
            for site, methods in found.vetoes(threshold).items()
            for vetoed in methods
        ]
        to = found.preferring("instance", "group", threshold=threshold)
        return normsearch.plan(task.model, to, inputs=inputs[:2]), veto
    return normsearch.plan(task.model, method, inputs=inputs[:2]), []


def measure(key: str, task: Task, method: str, original: float) -> Result:
    """Convert and calibrate once, beside the score of the original."""
    effort = EFFORT[key]
    inputs = task.inputs[: effort.inputs]
    plan, veto = plan_for(task, method, inputs)

    def swapped(keep: Any) -> nn.Module:
        return normsearch.convert(task.model, plan, keep=keep).eval()

    converted = swapped("function")
    start, cpu = time.perf_counter(), time.process_time()
    calibrated = normsearch.calibrate(converted, task.model, inputs.split(effort.batch), budget=effort.steps)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    record = normsearch.calibration_record(calibrated)
    assert record is not None
    return Result(
        task=key,
        method=method,
        metric=task.metric,
        original=original,
        plain=task.score(swapped("nothing")),
        copied=task.score(swapped("affine")),
        converted=task.score(converted),
        calibrated=task.score(calibrated),
        inputs=len(inputs),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        threads=torch.get_num_threads(),
        vetoed=veto,
        calibration=json.loads(record.to_json()),
    )


def missed(results: Iterable[Result]) -> list[str]:
    """Return the bars that were missed."""
    found = []
    by_case = {(r.task, r.method): r for r in results}
    for (task, method), r in by_case.items():
        floor = 0.85 if r.metric == "mean IoU" else 0.95
        if r.original < floor:
            found.append(f"{task}: the original reaches {r.original:.3f}, not {floor}")
        if method == "group" and r.original - r.plain < 0.1:
            found.append(f"{task}: the plain swap loses {r.original - r.plain:.3f} only")
        if method in ("group", "layer") and r.kept < 0.99:
            found.append(f"{task}, {method}: {r.kept:.1%} of the original is left, not 99 %")
        # Two cores for a minute: on a busy machine the clock tells nothing.
        if r.cpu_seconds > 120:
            found.append(f"{task}, {method}: calibration took {r.cpu_seconds:.0f} CPU seconds, not 120")
        if method == "instance or group" and r.kept < 0.99:
            found.append(f"{task}, {method}: {r.kept:.1%} of the original is left, not 99 %")
        if method == "instance" and r.kept < 0.9:
            mixed = by_case.get((task, "instance or group"))
            if mixed is None or not mixed.vetoed:
                found.append(f"{task}, instance: {r.kept:.1%} is left and no site is vetoed")
    return found


def table(key: str, results: list[Result]) -> Table:
    """Return one task's results as a table."""
    first = results[0]
    made = Table(
        title=f"{key}: {first.metric} {first.original:.4f} before conversion",
        caption=f"{first.inputs} unlabelled inputs, {first.threads} threads, torch {torch.__version__}",
    )
    for column in (
        "method",
        "plain swap",
        "γ, β copied",
        "converted",
        "calibrated",
        "kept",
        "seconds",
        "CPU s",
    ):
        made.add_column(column, justify="left" if column == "method" else "right")
    for r in results:
        scores = (f"{value:.4f}" for value in (r.plain, r.copied, r.converted, r.calibrated))
        made.add_row(r.method, *scores, f"{r.kept:.1%}", f"{r.seconds:.0f}", f"{r.cpu_seconds:.0f}")
    return made


def _read() -> list[Result]:
    if not RESULTS.exists():
        return []
    return [Result(**result) for result in json.loads(RESULTS.read_text())["results"]]


def _write(results: list[Result]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    document = {"torch": torch.__version__, "results": [asdict(result) for result in results]}
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.rename(RESULTS)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, print the tables; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], help="all by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--fresh", action="store_true", help="run finished cases again")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, results = Console(), _read()
    for key in options.tasks or TASKS:
        done = {r.method for r in results if r.task == key and not options.fresh}
        missing = [method for method in options.methods if method not in done]
        if missing:
            task = TASKS[key]()
            original = task.score(task.model)
        for method in missing:
            result = measure(key, task, method, original)
            # Another process may have finished other cases meanwhile.
            results = [r for r in _read() if (r.task, r.method) != (key, method)] + [result]
            results.sort(key=lambda r: (list(TASKS).index(r.task), METHODS.index(r.method)))
            _write(results)
            console.print(f"{key} {method}: {result.converted:.4f} to {result.calibrated:.4f}")
        console.print(table(key, [r for r in results if r.task == key]))
    misses = missed(results)
    for miss in misses:
        console.print(f"missed: {miss}", style="red")
    return 1 if misses else 0


if __name__ == "__main__":
    raise SystemExit(main())
