"""OpenVINO: its two files, converted from the ONNX program, and run by it."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import TicketError
from ..storage.files import replacing
from .formats import OPENVINO, require
from .onnx_file import TOLERANCE, difference, write_onnx
from .runners import openvino_run


def write_openvino(
    model: nn.Module, size: Sequence[int], path: Path, batch: int | None = None, told: Mapping[str, str] | None = None
) -> float:
    """Write a model as OpenVINO's ``.xml`` and the ``.bin`` beside it, in float32; else as `write_onnx`.

    Args:
        model: In evaluation mode, on the CPU.
        size: Channels, height and width of an image.
        path: The ``.xml``.
        batch: Images at a time; any number where None.
        told: What stands in the file beside the model.
    """
    require("OpenVINO", OPENVINO)
    weights = path.with_suffix(".bin")
    with replacing(path) as temporary, replacing(weights) as beside:  # the weights are in place first
        onnx = temporary.with_suffix(".onnx")
        write_onnx(model, size, onnx, batch)
        convert(onnx, temporary, told or {})
        differs = difference(model, openvino_run(temporary), size, batch)
        if differs > TOLERANCE:
            raise TicketError(
                f"OpenVINO computes otherwise than torch: outputs differ by {differs:.2g} of the largest, more than "
                f"{TOLERANCE:g}; nothing was written. Report it with the architecture"
            )
        temporary.with_suffix(".bin").replace(beside)
    return differs


def convert(onnx: Path, path: Path, told: Mapping[str, str]) -> None:
    """Convert an ONNX file to an ``.xml`` and its ``.bin``, without rounding."""
    openvino: Any = import_module("openvino")  # may be missing

    model = openvino.convert_model(str(onnx))
    for key, value in told.items():
        model.set_rt_info(value, ["timm_tickets", key])
    openvino.save_model(model, str(path), compress_to_fp16=False)
