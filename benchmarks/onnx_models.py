"""ONNX files: a trained classifier rewritten without its code, and networks exported after conversion.

    python -m benchmarks.onnx_models [--crops 2000] [--only classifier|architectures]

The classifier tells upright text from text turned by 180° (``text_crops``). Every BatchNormalization node is
replaced by each method; accuracy is measured without data, and for some after calibration with 256 crops of
another seed, without labels. Then small networks are converted to group normalization in torch, exported, and
run by onnxruntime at another batch size. Writes results/onnx_models.json; a network whose result is there is
not run again, unless --fresh. The exit code is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

import normsearch
from benchmarks.text_crops import crops, model_file
from normsearch import onnx_graph
from normsearch.onnx_graph.running import Runtime

RESULTS = Path(__file__).parent / "results" / "onnx_models.json"
EXACT = ("identity", "frozen", "weight", "spectral", "batch_renorm", "switchable(bn_logit=40)")
CALIBRATED = ("group", "layer")
OTHERS = ("rms", "group(groups=4)", "instance")
#: How close to the original's a calibrated model's accuracy must be, and a file's output to torch's.
SHARE, CLOSE = 0.99, 1e-4

#: Small networks and the side of their input images.
ARCHITECTURES = {
    "torchvision/resnet18": 64,
    "torchvision/mobilenet_v2": 64,
    "timm/test_resnet": 64,
    "timm/test_byobnet": 64,
    "timm/test_efficientnet": 64,
    "timm/resnet10t": 64,
    "timm/resnet14t": 64,
    "timm/resnet18d": 64,
    "torchvision/vgg11_bn": 64,
    "torchvision/vgg13_bn": 64,
    "timm/lcnet_035": 64,
    "timm/lcnet_050": 64,
    "timm/repvgg_a0": 64,
    "timm/selecsls42": 64,
    "timm/mobilenetv3_small_050": 64,
    "torchvision/mobilenet_v3_small": 64,
    "timm/tinynet_e": 64,
    "timm/convmixer_768_32": 64,
    "timm/levit_128s": 224,
    "torchvision/mnasnet0_5": 64,
    "torchvision/shufflenet_v2_x0_5": 64,
    "timm/ghostnet_050": 64,
    "timm/mixnet_s": 64,
    "timm/rexnet_100": 64,
}


def accuracy(model: ir.Model, inputs: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the share of crops whose direction is found, and the probabilities."""
    runtime = Runtime(model)
    found = torch.cat([next(iter(runtime(batch).values())) for batch in inputs.split(50)])
    return float((found.argmax(1) == labels).double().mean()), found


def classifier(count: int) -> dict[str, Any]:
    """Rewrite the trained classifier by each method and measure it."""
    inputs, labels = crops(count, 0)
    unlabelled = crops(256, 1)[0].split(32)
    original = onnx_graph.load(model_file())
    before, outputs = accuracy(original, inputs, labels)
    sites = len(onnx_graph.find_sites(original))
    print(f"the original: {100 * before:.2f} % of {count} crops, {sites} BatchNormalization nodes")
    rows = []
    for spelling in (*EXACT, *CALIBRATED, *OTHERS):
        converted = onnx_graph.convert(original, spelling, inputs=inputs[:2])
        onnx.checker.check_model(ir.to_proto(converted), full_check=True)
        left = len(onnx_graph.find_sites(converted))
        after, found = accuracy(converted, inputs, labels)
        row: dict[str, Any] = {
            "method": spelling,
            "sites_left": left,
            "accuracy": after,
            "largest_difference": float((found - outputs).abs().max()),
        }
        if spelling in CALIBRATED:
            start = time.perf_counter()
            calibrated = onnx_graph.calibrate(converted, original, unlabelled)
            row["calibration_seconds"] = round(time.perf_counter() - start, 1)
            row["calibrated_accuracy"] = accuracy(calibrated, inputs, labels)[0]
            record = onnx_graph.calibration_record(calibrated)
            assert record is not None
            row["error"] = [record.error.before, record.error.after]
            row["whitened"] = len(record.whitened)
        rows.append(row)
        print(row, flush=True)
    exact = [row for row in rows if row["method"] in EXACT]
    verdict = {
        "all_replaced": all(row["sites_left"] == 0 for row in rows),
        "exact_ones_are": all(row["largest_difference"] < 1e-5 for row in exact),
        "calibrated_share": {
            row["method"]: row["calibrated_accuracy"] / before for row in rows if "calibrated_accuracy" in row
        },
    }
    return {"crops": count, "sites": sites, "accuracy": before, "rows": rows, "verdict": verdict}


def exported(name: str, side: int) -> dict[str, Any]:
    """Convert a network to group normalization, export it, and run the file beside it."""
    torch.manual_seed(0)
    model = normsearch.build(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    inputs = torch.randn(2, 3, side, side)
    converted = normsearch.convert(model, ["group", "frozen"], inputs=inputs)
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "model.onnx", time.perf_counter()
        normsearch.export(converted, path, inputs)
        seconds = time.perf_counter() - start
        file = onnx_graph.load(path)
    others = torch.randn(3, 3, side, side)
    with torch.no_grad():
        wanted = converted(others)
    found = next(iter(Runtime(file)(others).values()))
    kinds = Counter(node.op_type for node in file.graph)
    return {
        "network": name,
        "sites": len(normsearch.find_sites(model)),
        "group_normalizations": kinds["GroupNormalization"],
        "difference": float((found - wanted).abs().max() / wanted.abs().max()),
        "export_seconds": round(seconds, 1),
    }


def architectures(known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Export every network that is not known yet; one that fails says so and is no result."""
    for name, side in ARCHITECTURES.items():
        if name in known:
            yield known[name]
            continue
        try:
            row = exported(name, side)
        except normsearch.NormsearchError as error:
            # Without the path of the file that would have been.
            row = {"network": name, "error": str(error).rpartition(".onnx ")[2][:300]}
        print(row, flush=True)
        yield row


def main() -> int:
    """Run what is asked for, write the results and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crops", type=int, default=2000)
    parser.add_argument("--only", choices=("classifier", "architectures"))
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.fresh else {}
    )
    document["versions"] = {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }
    missed = []
    if options.only != "architectures":
        document["classifier"] = classifier(options.crops)
        _write(document)
    if options.only != "classifier":
        known = {row["network"]: row for row in document.get("architectures", []) if "error" not in row}
        rows = []
        for row in architectures(known):
            rows.append(row)
            document["architectures"] = rows
            _write(document)
        close = [row for row in rows if row.get("difference", 1) <= CLOSE]
        print(f"{len(close)} of {len(rows)} exported networks within {CLOSE} of torch")
        missed += [str(row) for row in rows if row not in close]
    if "classifier" in document:
        verdict = document["classifier"]["verdict"]
        shares = {name: round(share, 4) for name, share in verdict["calibrated_share"].items()}
        print(f"calibrated accuracy as a share of the original's, {SHARE} asked: {shares}")
        missed += [name for name, share in shares.items() if share < SHARE]
        missed += [name for name in ("all_replaced", "exact_ones_are") if not verdict[name]]
    for miss in missed:
        print(f"missed: {miss}")
    return 1 if missed else 0


def _write(document: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    partial = RESULTS.with_suffix(".part")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(RESULTS)


if __name__ == "__main__":
    raise SystemExit(main())
