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
    Path, typer.Argument(metavar="CHECKPOINT", help="A .safetensors, .pt or .pth file.", show_default=False)
]
MaybeFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CHECKPOINT]",
        help="A .safetensors, .pt or .pth file; without one, fresh weights.",
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
    str | None, typer.Option(help="Which entry of a training checkpoint to take, for example model_ema.")
]
Shape = Annotated[
    str | None, typer.Option(help="Shape of one sample, 3x224x224: random inputs of it tell layer shapes.")
]
Inputs = Annotated[Path | None, typer.Option(help="Inputs from an .npz, .npy or .safetensors file.")]
Batch = Annotated[int, typer.Option(min=1, max=65536, help="Number of random samples.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        "-t",
        help="A method; several, in order of preference, with commas; or pattern=method for the sites whose "
        "path matches. Repeat.",
    ),
]


Logits = Annotated[bool, typer.Option("--logits", help="Outputs are logits: report KL and agreement.")]
