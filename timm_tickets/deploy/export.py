"""Exporting: a ticket, or the trained model of a search, as a file that something else runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core.errors import SettingError, TicketError
from ..core.masks import sparsity
from ..storage.files import write_state
from ..structure.compact import Compact, compacted
from .compact_file import save_compact
from .formats import FORMATS, check_format
from .source import Source, load_source, zeros
from .sparse_file import fits_2_4, lacks_2_4, plain_state, write_sparse


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: It.
        source: What is in it.
        told: What to know about it, a paragraph each.
        code: Lines of Python that load it.
    """

    path: Path
    source: Source
    told: Sequence[str]
    code: Sequence[str]


def export(
    address: str | Path,
    to: str,
    output: str | Path | None = None,
    *,
    weights: str | Path | None = None,
    image_size: int | None = None,
    batch: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    compact: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write a sparse model in a format that something else reads.

    Args:
        address: A ticket, or the folder (a round's too, or the model.safetensors) that a search has left: then the
            trained weights.
        to: ``timm``, ``compact``, ``onnx``, ``openvino``, ``2:4`` or ``csr``.
        output: The file; in the working directory, named after the ticket, where None.
        weights: For a ticket: a checkpoint with the weights that were trained under it.
        image_size: Height and width of an image in pixels; the search's where that is known, else timm's.
        batch: Images at a time, for ``onnx`` and ``openvino``; any number where None.
        arguments: Further ones of ``timm.create_model``, where a ticket does not say them.
        compact: Whether channels that nothing reads are taken out first; for ``onnx`` and ``openvino``.
        overwrite: Whether a file that stands there is replaced.

    Raises:
        SettingError: An unknown format, a missing library, a file that stands there, or a size that does not go.
        TicketError: It is no ticket and no trained model, or cannot be put in this format.
        OSError: It cannot be read or written; what stood there before is untouched.
    """
    check_format(to)
    if batch is not None and to not in ("onnx", "openvino"):
        raise SettingError(f"batch: {to} takes any number of images; leave it out")
    if compact and to not in ("onnx", "openvino"):
        raise SettingError("compact: is for onnx and openvino; --to compact writes the smaller model itself")
    source = load_source(address, weights, image_size, arguments)
    if source.compact and to not in ("onnx", "openvino"):
        raise SettingError(f"to: {address} is smaller than what timm builds, so it goes to onnx and openvino only")
    path = Path(f"{source.name}{FORMATS[to][0]}") if output is None else Path(output)
    if to == "openvino" and path.suffix != ".xml":
        raise SettingError(f"output: {path} is not valid; OpenVINO's files are NAME.xml and NAME.bin: name the .xml")
    for file in (path, path.with_suffix(".bin")) if to == "openvino" else (path,):
        if file.is_dir():
            raise SettingError(f"output: {file} is a folder; name a file in it")
        if file.exists() and not overwrite:
            raise SettingError(f"output: {file} exists; give another --output, or --overwrite")
    found = compacted(source.model) if compact else None
    if found is not None:
        source = replace(source, model=found.model, compact=True)
    told, code = _WRITERS[to](source, path, batch)
    return Exported(path, source, [*(removed(found) if found else ()), *told], code)


_Told = tuple[Sequence[str], Sequence[str]]


def _timm(source: Source, path: Path, batch: int | None) -> _Told:
    write_state(path, plain_state(source.model), {"format": "pt", **source.facts})
    arguments = "".join(f", {key}={value!r}" for key, value in source.built.arguments.items())
    size, more = " ".join(map(str, source.images.input_size)), dict(source.built.arguments)
    options = [f"--{key.replace('_', '-')} {more.pop(key)}" for key in ("num_classes", "in_chans") if key in more]
    options += ["--model-kwargs", *(f"{key}={value}".replace(" ", "") for key, value in more.items())] if more else []
    told = (
        f"a plain timm checkpoint, dense in size: {_sparsity(source)}",
        f"timm's validate.py: --model {source.built.architecture} --checkpoint {path} {' '.join(options)} "
        f"--input-size {size}",
    )
    return told, (f"timm.create_model({source.built.architecture!r}{arguments}, checkpoint_path={str(path)!r})",)


def _compact(source: Source, path: Path, batch: int | None) -> _Told:
    found = compacted(source.model)
    save_compact(found.model, path, source.built.arguments, source.facts)
    counts = [sum(one.numel() for one in model.parameters()) for model in (source.model, found.model)]
    told = f"{counts[1]:,} of {counts[0]:,} parameters are left ({counts[1] / counts[0]:.1%})"
    return (*removed(found), told), (
        "import timm_tickets",
        f"model = timm_tickets.load_compact({str(path)!r})  # smaller than timm's, and fit to be trained on",
    )


def removed(found: Compact) -> list[str]:
    """What was taken out of a model, and what was not."""
    gone = f"{found.removed:,} of {found.groups:,} channels and heads are taken out, since nothing reads them"
    return [gone] * bool(found.removed) + found.told()


def _onnx(source: Source, path: Path, batch: int | None) -> _Told:
    from .onnx_file import write_onnx

    differs = write_onnx(source.model, source.images.input_size, path, batch, source.facts)
    return (_same("onnxruntime", differs, batch), f"images: {source.images.told}"), (
        f"session = onnxruntime.InferenceSession({str(path)!r})",
        'logits, = session.run(None, {"images": images})  # a NumPy array',
    )


def _openvino(source: Source, path: Path, batch: int | None) -> _Told:
    from .openvino_file import write_openvino

    differs = write_openvino(source.model, source.images.input_size, path, batch, source.facts)
    return (_same("OpenVINO", differs, batch), f"images: {source.images.told}"), (
        f'model = openvino.Core().compile_model({str(path)!r}, "CPU")',
        "logits = model(images)[0]  # a NumPy array",
    )


def _two_of_four(source: Source, path: Path, batch: int | None) -> _Told:
    fits, left = fits_2_4(source.model)
    masked = zeros(source.model)
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    told = [f"stays dense: {', '.join(names)} ({why})" for why, names in reasons.items()]
    useful = [name for name in fits if name in masked]
    if not useful:
        raise TicketError(
            "no layer of this model can be held as 2:4, which has two of every four columns kept:\n  "
            + "\n  ".join(told)
            + "\nsearch with pruner.granularity=2:4 on a model with wide linear layers, such as a ViT"
        )
    write_sparse(path, "2:4", source.model, useful, source.built, source.facts)
    told = [f"2:4: {', '.join(useful)}", *told]
    device = torch.device("cuda")
    told.append(why if (why := lacks_2_4(device)) else "this machine's card multiplies by 2:4 weights")
    return told, (
        "import timm_tickets",
        f"model = timm_tickets.load_2_4({str(path)!r})  # on the card, in float16; device='cpu' for dense weights",
    )


def _csr(source: Source, path: Path, batch: int | None) -> _Told:
    names = [*zeros(source.model)]
    if not names:
        raise TicketError("the model has no zeros: there is nothing sparse to write")
    write_sparse(path, "csr", source.model, names, source.built, source.facts)
    linear = sum(isinstance(source.model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear) for name in names)
    told = (
        f"{linear} linear layers multiply by torch's CSR tensors; {len(names) - linear} others are filled in as dense"
    )
    return (f"{_sparsity(source)}", told), (
        "import timm_tickets",
        f"model = timm_tickets.load_csr({str(path)!r})",
    )


_WRITERS: dict[str, Callable[[Source, Path, int | None], _Told]] = {
    "timm": _timm,
    "compact": _compact,
    "onnx": _onnx,
    "openvino": _openvino,
    "2:4": _two_of_four,
    "csr": _csr,
}


def _same(engine: str, differs: float, batch: int | None) -> str:
    count = f"{batch} at a time" if batch else "any number at a time"
    return f"{engine} computes the same as torch on random images: {differs:.1g} of the largest output; {count}"


def _sparsity(source: Source) -> str:
    masks = zeros(source.model)
    if not masks:
        return "none of its weights is zero"
    return f"in {len(masks)} layers {sparsity(masks):.1%} of the weights are exactly zero"
