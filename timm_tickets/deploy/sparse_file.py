"""Sparse layouts as safetensors, without pickle: torch's CSR and 2:4; a file is loaded onto a fresh timm model.

Its metadata say what timm builds the model from and which weights are stored how; every other tensor is there as it is.
Of a weight ``w`` seen as a matrix (out, in * kernel) there are

- ``w.crow``, ``w.col``, ``w.values`` (``csr``): torch.sparse_csr_tensor's parts, columns as int16 where that is enough;
- ``w.values``, ``w.index`` (``2:4``): of every four columns the two that are kept, and, two bits each, which they are.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..core.errors import SettingError, TicketError, shown
from ..sparse.prunable import build_to_inspect
from ..storage.files import write_state
from .source import Built, rebuilt
from .stored import beyond_shape, check_arguments, read_stored

_KEY, _FORMAT = "timm_tickets_sparse", 1
# Of torch's 2:4 tensors: rows and columns have to be a multiple of these, in half precision, with CUTLASS.
ROWS, COLUMNS = 32, 64


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal[1]
    layout: Literal["csr", "2:4"]
    built: Built
    weights: list[str]
    told: dict[str, str]


def write_sparse(
    path: Path, layout: Literal["csr", "2:4"], model: nn.Module, names: list[str], built: Built, told: Mapping[str, str]
) -> None:
    """Write a model with some of its weights in a sparse layout.

    Args:
        path: The file.
        layout: ``csr``, or ``2:4``.
        model: On the CPU.
        names: The weights, by name; with ``2:4`` each has at most two of every four columns.
        built: What timm builds it from.
        told: What stands in the file beside it.

    Raises:
        OSError: It cannot be written; what stood there before is untouched.
        SettingError: A file cannot say these arguments.
    """
    check_arguments(built.arguments)
    state, pack = plain_state(model), {"csr": _csr, "2:4": _two_of_four}[layout]
    for name in names:
        matrix = state.pop(name).flatten(1)
        state |= {f"{name}.{part}": value.contiguous() for part, value in pack(matrix).items()}
    header = _Header(format=_FORMAT, layout=layout, built=built, weights=names, told=dict(told))
    write_state(path, state, {_KEY: header.model_dump_json()})


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict as safetensors takes it: tensors that share no memory."""
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()
    }


def load_csr(path: str | Path) -> nn.Module:
    """The model of a ``csr`` file, in evaluation mode on the CPU: its linear layers multiply by torch's CSR tensors.

    Convolutions, for which torch has none, are filled in as dense weights. Run it under ``torch.no_grad()``: torch's
    CSR products refuse ``torch.inference_mode()``.

    Raises:
        FileNotFoundError: There is no such file.
        SettingError: timm does not have the architecture.
        TicketError: It is no such file, or is damaged.
    """
    model, tensors, _ = _read(Path(path), "csr")
    for name, parts in tensors.items():
        place, _, leaf = name.rpartition(".")
        module, weight = model.get_submodule(place), model.get_parameter(name)
        if isinstance(module, nn.Linear) and leaf == "weight":
            module.weight = nn.Parameter(parts, requires_grad=False)
        else:
            weight.copy_(parts.to_dense().view_as(weight))
    return model


def load_2_4(path: str | Path, device: str | torch.device = "cuda", dtype: torch.dtype = torch.float16) -> nn.Module:
    """The model of a ``2:4`` file, in evaluation mode; on a card its weights are torch's semi-structured tensors.

    Args:
        path: The file.
        device: ``cpu`` gives a dense model, which computes the same.
        dtype: Of the model: float16 or bfloat16 on a card.

    Raises:
        FileNotFoundError: There is no such file.
        SettingError: The device has no 2:4 units, or timm does not have the architecture.
        TicketError: It is no such file, or is damaged.
    """
    device = torch.device(device)
    if device.type != "cpu" and (why := lacks_2_4(device)):
        raise SettingError(f"device: {why}; device='cpu' gives the same model with dense weights")
    model, tensors, _ = _read(Path(path), "2:4")
    for name, matrix in tensors.items():
        model.get_parameter(name).copy_(matrix)
    model = model.to(device, dtype)
    for name in tensors if device.type != "cpu" else ():
        place, _, _ = name.rpartition(".")
        module: Any = model.get_submodule(place)
        module.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(module.weight.detach()), False)
    return model


def lacks_2_4(device: torch.device) -> str:
    """Why a device cannot multiply by 2:4 weights; empty where it can."""
    if not torch.cuda.is_available():
        return (
            f"{device.type!r} is not there: 2:4 weights need an NVIDIA card of compute capability 8.0 (Ampere) or later"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or major < 8:
        return (
            f"{torch.cuda.get_device_name(device)} has no 2:4 units (compute capability {major}.{minor}; 8.0 is needed)"
        )
    return ""


def fits_2_4(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Which weights torch's 2:4 tensors can hold, and why the others cannot: those with zeros, or a shape that fits."""
    fits: list[str] = []
    left: dict[str, str] = {}
    for place, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
            continue
        name, matrix = f"{place}.weight", weight.detach().flatten(1)
        rows, columns = matrix.shape
        if not isinstance(module, nn.Linear):
            left[name] = f"{type(module).__name__}: torch has 2:4 for linear layers only"
        elif rows % ROWS or columns % COLUMNS:
            left[name] = f"{rows} x {columns} is not a multiple of {ROWS} x {COLUMNS}"
        elif (most := int((matrix.view(rows, -1, 4) != 0).sum(-1).max())) > 2:
            left[name] = f"keeps {most} of some four weights"
        else:
            fits.append(name)
    return fits, left


def _csr(matrix: Tensor) -> dict[str, Tensor]:
    kept = matrix != 0
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    narrow = torch.int16 if matrix.shape[1] <= 2**15 else torch.int32
    return {"crow": crow.to(torch.int32), "col": kept.nonzero()[:, 1].to(narrow), "values": matrix[kept]}


def _two_of_four(matrix: Tensor) -> dict[str, Tensor]:
    fours = matrix.reshape(-1, 4)
    # The kept ones first, in their order; where fewer than two are kept, zeros fill up.
    place = (fours == 0).to(torch.uint8).sort(dim=1, stable=True).indices[:, :2].sort(dim=1).values
    values = fours.gather(1, place).view(matrix.shape[0], -1)
    bits = (place[:, 0] | place[:, 1] << 2).to(torch.uint8)
    if len(bits) % 2:
        bits = torch.cat([bits, bits.new_zeros(1)])
    return {"values": values, "index": bits[::2] | bits[1::2] << 4}


def _read(path: Path, layout: str) -> tuple[nn.Module, dict[str, Tensor], _Header]:
    """A model with all that is stored plainly, and its sparse weights: CSR tensors, or dense 2:4 matrices."""
    unlike = f"is no file of `timm-tickets export --to {layout}`: it does not say so"
    header, state = read_stored(path, _KEY, _Header, unlike)
    if header.layout != layout:
        raise TicketError(f"{path} was exported --to {header.layout}; load it with the function for that")
    sparse: dict[str, Tensor] = {}
    if lost := beyond_shape(header.built.arguments):
        raise TicketError(f"{path} wants timm.create_model to be given {shown(', '.join(lost))}, which no file may say")
    with torch.no_grad():
        outline = build_to_inspect(header.built.architecture, header.built.arguments).state_dict()
        for name in header.weights:
            parts = {part: state.pop(f"{name}.{part}", None) for part in ("crow", "col", "values", "index")}
            sparse[name] = _unpacked(path, name, parts, outline)
        model = rebuilt(header.built, state | {name: outline[name] for name in sparse}, str(path))
        model.load_state_dict(state, strict=False)  # the names are known to be all there
    return model, sparse, header


def _unpacked(path: Path, name: str, parts: dict[str, Any], outline: Mapping[str, Tensor]) -> Tensor:
    if name not in outline or outline[name].ndim < 2:
        raise TicketError(f"{path}: {shown(name)} is no weight of the model that it says it is of")
    shape = outline[name].shape
    rows, columns = shape[0], math.prod(shape[1:])
    crow, col, values, index = (parts[key] for key in ("crow", "col", "values", "index"))
    try:
        if crow is not None:
            with warnings.catch_warnings():  # that CSR is in beta
                warnings.simplefilter("ignore")
                wide = (crow.to(torch.int32), col.to(torch.int32), values)
                return torch.sparse_csr_tensor(*wide, (rows, columns), check_invariants=True)
        bits = torch.stack([index & 15, index >> 4], 1).flatten()[: rows * columns // 4]
        place = torch.stack([bits & 3, bits >> 2], 1).long()
        return values.new_zeros(rows * columns // 4, 4).scatter_(1, place, values.view(-1, 2)).view(rows, columns)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise TicketError(f"{path} is damaged: {shown(name)}: {shown(str(error), 300)}") from None
