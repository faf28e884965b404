"""A network of torch as an ONNX model."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normsearch.errors import ModelError
from normsearch.forward import arguments, evaluating, open_batches

#: The first in which GroupNormalization has a scale and a shift per channel; older runtimes know it too.
OPSET = 21


def exported(model: nn.Module, inputs: Any) -> ir.Model:
    """Return a network's eval function as an ONNX model, its batch size open where the network allows that.

    ``nn.GroupNorm``, ``nn.LayerNorm`` and ``nn.InstanceNorm`` become the operators of these names.

    Args:
        model: the network; it is left as it was.
        inputs: one forward pass's inputs.

    Raises:
        ModelError: the network cannot be exported.

    """
    given = arguments(inputs)
    try:
        # The exporter writes its progress to stdout and warns about what it tries first.
        with evaluating(model), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            program = torch.onnx.export(
                model,
                given.args,
                kwargs=given.kwargs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=open_batches(model, given),
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            f"torch.onnx cannot export {type(model).__name__} ({type(error).__name__}: {str(error)[:500]}); "
            "models whose forward depends on values in a way that no graph shows stay Python"
        ) from error
    assert program is not None
    made: ir.Model = program.model
    return made


def leaves(args: Any) -> tuple[Tensor, ...]:
    """Return positional inputs as the graph takes them: their tensors in order."""
    return tuple(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
