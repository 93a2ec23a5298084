"""ONNX: written by torch's exporter, run by onnxruntime, and put in place only where both compute the same."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import TicketError, shown
from ..storage.files import replacing
from .formats import ONNX, require
from .runners import onnxruntime_run

TOLERANCE = 1e-4  # of the largest output
_TINY = 1e-3  # an output that is less is rounding: of a network that lets nothing through
_ONE_FILE = 2**31 - 2**27  # bytes of weights; protobuf's limit is 2 GiB
_DRAWN = (1, 3)  # images of the batches that are compared


def write_onnx(
    model: nn.Module, size: Sequence[int], path: Path, batch: int | None = None, told: Mapping[str, str] | None = None
) -> float:
    """Write a model as ONNX.

    Args:
        model: In evaluation mode, on the CPU.
        size: Channels, height and width of an image.
        path: The file; weights of 2 GiB and more lie beside it, in ``<name>.data``.
        batch: Images at a time; any number where None.
        told: What stands in the file beside the model.

    Returns:
        The largest difference of an output from torch's, on random images.

    Raises:
        SettingError: A library is missing.
        TicketError: torch cannot export the model, or onnxruntime computes something else; nothing is written.
        OSError: It cannot be written; what stood there before is untouched.
    """
    require("ONNX", ONNX)
    program = exported(model, size, batch)
    program.model.metadata_props.update({f"timm_tickets.{key}": value for key, value in (told or {}).items()})
    large = sum(value.nbytes for value in model.state_dict().values()) >= _ONE_FILE
    beside = replacing(path.with_name(f"{path.name}.data")) if large else nullcontext()
    with replacing(path) as temporary, beside as data:  # the weights are in place first
        program.save(str(temporary), external_data=large)
        differs = difference(model, onnxruntime_run(temporary), size, batch)
        if differs > TOLERANCE:
            raise TicketError(
                f"onnxruntime computes otherwise than torch: outputs differ by {differs:.2g} of the largest, more than "
                f"{TOLERANCE:g}; nothing was written. Report it with the architecture"
            )
        if data is not None:
            temporary.with_name(f"{path.name}.data").replace(data)
    return differs


def exported(model: nn.Module, size: Sequence[int], batch: int | None = None) -> Any:
    """torch's ONNX program of a model; see `write_onnx`."""
    images = torch.zeros(batch or 2, *size)  # 1 would be taken for a constant
    dynamic = None if batch else ({0: "batch" if _names_dimensions() else torch.export.Dim.DYNAMIC},)
    names: Any = {"input_names": ["images"], "output_names": ["logits"]}
    try:
        with torch.no_grad(), _quiet():
            model(images)  # some layers fix their padding in the first call
            return torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=dynamic, verbose=False, **names)
    except Exception as error:  # the exporter's own, and whatever a model's code raises when it is traced
        fixed = "" if batch else "; a fixed number of images (--batch 1) may be possible"
        raise TicketError(
            f"torch {torch.__version__} cannot export this model: {type(error).__name__}: "
            f"{shown(' '.join(str(error).split()), 600)}{fixed}; a later torch may export more"
        ) from error


@torch.no_grad()
def difference(model: nn.Module, run: Callable[[Any], Any], size: Sequence[int], batch: int | None = None) -> float:
    """The largest difference of what runs a model from it, on random images, over the largest output.

    Raises:
        TicketError: The model's own outputs are not finite.
    """
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for count in (batch,) if batch else _DRAWN:
        images = torch.randn(count, *size, generator=generator)
        one, two = first(model(images)), torch.from_numpy(run(images.numpy()))
        if not bool(one.isfinite().all()):
            raise TicketError(
                "the model puts out NaN or infinity on random images, so nothing can be compared with it, and nothing "
                "was written; look at its training"
            )
        if one.shape != two.shape or not bool(two.isfinite().all()):
            return float("inf")
        largest = max(largest, float((one - two).abs().max() / one.abs().max().clamp(min=_TINY)))
    return largest


def first(outputs: Any) -> Tensor:
    """The class scores among a model's outputs; models with a head for distillation give more."""
    return outputs[0] if isinstance(outputs, tuple | list) else outputs


def _names_dimensions() -> bool:
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own workings on the way."""
    import logging

    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
