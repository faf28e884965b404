"""The options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Keep(StrEnum):
    """What new layers keep of the old ones."""

    FUNCTION = "function"
    AFFINE = "affine"
    NOTHING = "nothing"


File = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A .safetensors, .pt or .pth file, an exported program, .pt2, or an ONNX file.",
        show_default=False,
    ),
]
MaybeFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CHECKPOINT]",
        help="A .safetensors, .pt or .pth file, an exported program, .pt2, or an ONNX file; without one, "
        "fresh weights.",
        show_default=False,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--architecture",
        "-a",
        help="What built the network: torchvision/NAME, timm/NAME, segmentation_models_pytorch/NAME, or "
        "package.module:factory, which imports and runs that code. Not needed where the file says it.",
    ),
]
Arguments = Annotated[
    list[str] | None, typer.Option("--arguments", help="An argument of the architecture: name=value; repeat.")
]
Entry = Annotated[
    str | None,
    typer.Option(
        help="Which entry of a training checkpoint to take: model_ema, or ema.shadow inside another."
    ),
]
Shape = Annotated[
    str | None, typer.Option(help="Shape of one sample, 3x224x224: random inputs of it tell layer shapes.")
]
_INPUTS = (
    "Inputs, never labels: a folder of images, or arrays scaled as in training in an .npz, .npy or "
    ".safetensors file; arr_0, arr_1, ... are positional arguments, others are named."
)
Inputs = Annotated[Path | None, typer.Option(help=_INPUTS, show_default=False)]
NeededInputs = Annotated[Path, typer.Option("--inputs", help=_INPUTS, show_default=False)]
Batch = Annotated[int, typer.Option(min=1, max=65536, help="Number of samples in a forward pass.")]
#: How many where convert --report, compare and report measure the same thing.
MEASURED = 8
Samples = Annotated[
    int, typer.Option(min=1, help="The most samples that are used, evenly spread over all there are.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="Of a folder's images: the shorter side is resized to this, the middle square is taken. "
        "[default: 224]",
        show_default=False,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Subtracted from pixels in [0, 1]: three numbers for RGB, one for grey images. "
        "[default: 0.485,0.456,0.406]",
        show_default=False,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        help="What pixels are divided by afterwards. [default: 0.229,0.224,0.225]", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Original = Annotated[Path, typer.Argument(help="The checkpoint before conversion.", show_default=False)]
Threshold = Annotated[float, typer.Option(help="The drift above which a method is vetoed at a site.")]
Title = Annotated[str | None, typer.Option(help="What the report is about.", show_default=False)]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        "-t",
        help="A method; several, in order of preference, with commas; or pattern=method for the sites whose "
        "path matches. Repeat; the first pattern that matches counts, a method alone is for the rest.",
    ),
]


Logits = Annotated[bool, typer.Option("--logits", help="Outputs are logits: report KL and agreement.")]
