"""How fast a ticket is: the same network dense, with zeros, compacted and exported, side by side in one run."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..config.parts import DataSettings
from ..config.recipe import load_recipe
from ..core.errors import SettingError, TrainingError, unknown
from ..core.masks import sparsity
from ..data.datasets import Data, loader_of
from ..storage.files import read_json, read_state, write_state
from ..structure.compact import compacted
from .compact_file import save_compact
from .export import removed
from .formats import missing
from .onnx_file import write_onnx
from .openvino_file import convert
from .runners import ENGINES, Kind, memory_of, run_of, torch_model
from .source import MODEL, Source, load_source, rebuilt, zeros
from .sparse_file import plain_state, write_sparse
from .stored import beyond_shape

_LEAST = 0.02  # seconds that a sample takes at least; calls are repeated until then
_WARM = 0.2  # a call that takes longer needs no call before it to be warm


@dataclass(frozen=True)
class Row:
    """What was measured of one model in one engine.

    Attributes:
        engine: What runs it.
        variant: ``dense``, ``zeros``, ``compacted`` or ``csr``.
        latency: Seconds of one image, a round each.
        batch: Seconds of a batch, a round each.
        memory: Mebibytes to hold it and run a batch; None where not measured.
        file: Bytes of its file.
        parameters: Numbers that it keeps.
        macs: Multiply-accumulates of one image; None where they cannot be counted.
        top1: Percent of the test images; None without data.
    """

    engine: str
    variant: str
    latency: Sequence[float] = ()
    batch: Sequence[float] = ()
    memory: float | None = None
    file: int = 0
    parameters: int = 0
    macs: int | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Speed:
    """What was measured, and of what.

    Attributes:
        source: The sparse model.
        rows: Each model in each engine.
        batch: Images of a batch.
        threads: That each engine worked with.
        sparsity: Of the weights that have zeros, the fraction that is zero.
        dense: Whose weights the dense model has.
        notes: What was left out, and why.
    """

    source: Source = field(repr=False)
    rows: Sequence[Row]
    batch: int
    threads: int
    sparsity: float
    dense: str
    notes: Sequence[str] = ()


def measure(
    address: str | Path,
    *,
    weights: str | Path | None = None,
    image_size: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    batch: int = 32,
    rounds: int = 15,
    threads: int | None = None,
    engines: Sequence[str] | None = None,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Speed:
    """Measure a ticket's network on this machine's CPU, each model in each engine in turn, round after round.

    Args:
        address: As `load_source` takes it; so also weights, image_size and arguments.
        weights: A checkpoint.
        image_size: Pixels.
        arguments: Of ``timm.create_model``.
        batch: Images of a batch.
        rounds: How often each is timed.
        threads: That each engine works with; torch's number where None.
        engines: Of ``torch``, ``onnxruntime`` and ``openvino``; those that are installed where None.
        data: A recipe, whose test images are scored; the search's where it is known.
        overrides: Of the recipe, such as ``data.data_dir=photos``.
        say: Told what is being done.

    Raises:
        SettingError: A wrong setting, or an engine that is not installed.
        TicketError, OSError: As `load_source`.
    """
    for name in engines or ():
        if name not in ENGINES:
            raise SettingError(unknown("engine", name, ENGINES))
        if left := missing(ENGINES[name]):
            raise SettingError(f"engine: {name} needs {', '.join(left)}: pip install 'timm-tickets[export]'")
    source = load_source(address, weights, image_size, arguments)
    threads, before = threads or torch.get_num_threads(), torch.get_num_threads()
    images, left = None, []
    try:
        settings = _data_of(source, data, overrides)
        images = None if settings is None else _Scored(settings, source)
    except SettingError as error:
        if data is not None or overrides:
            raise
        left = [f"top-1 is left out, for the images of the search cannot be had: {error}"]
    try:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory(prefix="timm-tickets-") as folder:
            models = _Models(source, Path(folder), threads, engines, say)
            rows = [*_measured(models, source, batch, rounds, images, say)]
    finally:
        torch.set_num_threads(before)
    masks = zeros(source.model)
    return Speed(source, rows, batch, threads, sparsity(masks) if masks else 0.0, models.dense, [*left, *models.notes])


class _Models:
    """The files of all models, and what is known of each before it is timed.

    Attributes:
        kinds: What is run.
        counts: Parameters and multiply-accumulates, by variant.
        dense: Whose weights the dense model has.
        notes: What was left out.
    """

    def __init__(self, source: Source, folder: Path, threads: int, engines: Any, say: Callable[[str], None]):
        self.notes: list[str] = []
        self.counts: dict[str, tuple[int, int | None]] = {}
        self.kinds: list[Kind] = []
        size, made = source.images.input_size, source.built.model_dump()
        dense, self.dense, self.trained = _dense(source)
        modules = {"dense": dense, **self._sparse(source, say)}
        for variant, module in modules.items():
            self.counts[variant] = _parameters(module), macs_of(module, size)
            file = folder / f"{variant}.safetensors"
            try:
                if variant == "compacted":
                    save_compact(module, file, source.built.arguments)
                else:
                    write_state(file, plain_state(module))
                self.kinds.append(Kind(engine="torch", variant=variant, file=file, threads=threads, **made))
            except SettingError as error:
                self.notes.append(f"torch {variant} is left out: {error}")
        linear = [name for name in zeros(source.model) if not source.compact and _is_linear(source.model, name)]
        if linear and (lost := beyond_shape(source.built.arguments)):
            self.notes.append(f"torch csr is left out: its file cannot say {', '.join(lost)}")
        elif linear:
            write_sparse(file := folder / "csr.safetensors", "csr", source.model, linear, source.built, {})
            self.kinds.append(kind := Kind(engine="torch", variant="csr", file=file, threads=threads))
            self.counts["csr"] = _parameters(torch_model(kind)), None
        for engine in ("onnxruntime", "openvino"):
            if engines is None and (left := missing(ENGINES[engine])):
                self.notes.append(f"{engine} is left out: {', '.join(left)} not installed (timm-tickets[export])")
                continue
            if engines is not None and engine not in engines:
                continue
            for variant, module in modules.items():
                file = folder / f"{variant}.onnx"
                if not file.exists():
                    say(f"exporting {variant} to ONNX")
                    write_onnx(module, size, file)
                if engine == "openvino":
                    convert(file, file := file.with_suffix(".xml"), {})
                self.kinds.append(Kind(engine=engine, variant=variant, file=file, threads=threads))
        if engines is not None and "torch" not in engines:
            self.kinds = [kind for kind in self.kinds if kind.engine != "torch"]

    def _sparse(self, source: Source, say: Callable[[str], None]) -> dict[str, nn.Module]:
        """The sparse model, and the smaller one where channels can be taken out of it."""
        if source.compact:
            return {"compacted": source.model}
        say("looking for channels that nothing reads")
        try:
            found = compacted(source.model)
        except SettingError as error:
            self.notes.append(f"compacted is left out: {error}")
            return {"zeros": source.model}
        self.notes += removed(found)
        return {"zeros": source.model, **({"compacted": found.model} if found.removed else {})}


def _measured(models: _Models, source: Source, batch: int, rounds: int, images: Any, say: Callable[[str], None]) -> Any:
    size = source.images.input_size
    say(f"memory, in a process each: {len(models.kinds)} models")
    memory: dict[str, float | None] = {}
    for kind in models.kinds:
        try:
            memory[kind.name] = memory_of(kind, size, batch)
        except TrainingError as error:  # times are worth having without it
            models.notes.append(str(error))
    runs = {kind.name: run_of(kind) for kind in models.kinds}
    one, many = (np.random.default_rng(0).standard_normal((n, *size), dtype=np.float32) for n in (1, batch))
    seconds = sum(sample(run, given) for run in runs.values() for given in (one, many) for _ in range(2)) / 2
    say(f"{rounds} rounds of {len(runs)} models, about {rounds * 1.5 * max(seconds, 2 * _LEAST * len(runs)):.0f} s")
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for given, taken in zip((one, many), times[name], strict=True):
                taken.append(sample(run, given))
    untrained = {"dense"} if not models.trained else set()
    untrained |= (
        {kind.variant for kind in models.kinds if kind.variant != "dense"} if source.trained is False else set()
    )
    scored = {kind.name: runs[kind.name] for kind in models.kinds if kind.variant not in untrained}
    top1 = {} if images is None else images.score(scored, batch)
    for kind in models.kinds:
        parameters, macs = models.counts[kind.variant]
        yield Row(
            kind.engine,
            kind.variant,
            *times[kind.name],
            memory.get(kind.name),
            sum(file.stat().st_size for file in kind.files),
            parameters,
            macs,
            top1.get(kind.name),
        )


def sample(run: Callable[[Any], Any], images: Any, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, the mean of as many as take long enough to be timed; caches are warm.

    Args:
        run: What is timed.
        images: What it is given.
        clock: ``time.process_time`` counts the processor's time, which other programs on the machine change less.
    """
    began = clock()
    run(images)
    first = clock() - began
    if first > _WARM:
        return first
    began, calls = clock(), 0
    while (taken := clock() - began) < _LEAST or not calls:
        run(images)
        calls += 1
    return taken / calls


def _dense(source: Source) -> tuple[nn.Module, str, bool]:
    """The dense network: as the search has trained it, where it has; else with random weights."""
    if source.folder is not None:
        for name in ("dense", "round_00"):
            file, record = source.folder / name / MODEL, read_json(source.folder / name / "run.json")
            if not file.is_file() or not isinstance(record, dict) or record.get("sparsity") != 0:
                continue
            if record.get("all_images", True):
                state = read_state(file)
                model = rebuilt(source.built, state, str(file))
                model.load_state_dict(state)
                return model, f"trained, {name} of the search", True
    return rebuilt(source.built, None, source.name), "random weights, which are as fast", False


def _parameters(model: nn.Module) -> int:
    """Numbers that a model keeps as parameters; of a CSR tensor its values."""
    return sum(p.values().numel() if p.layout == torch.sparse_csr else p.numel() for p in model.parameters())


@torch.no_grad()
def macs_of(model: nn.Module, size: Sequence[int]) -> int:
    """Multiply-accumulates of one image: half of what torch counts as floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *size))
    return counter.get_total_flops() // 2


def _is_linear(model: nn.Module, name: str) -> bool:
    place, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(place), nn.Linear)


def _data_of(source: Source, data: str | Path | None, overrides: Sequence[str]) -> DataSettings | None:
    """The images that are scored: of the recipe that is given, of the search, or the digits that a ticket names."""
    stored = None if source.folder is None else source.folder / "recipe.yaml"
    named = source.ticket.metadata.get("recipe") if source.ticket else None
    if data is not None or (stored is not None and stored.is_file()):
        settings = load_recipe(data or stored or "", overrides).data  # pyright: ignore[reportArgumentType]
    elif isinstance(named, dict) and named.get("dataset") == "digits" and source.trained is not False:
        settings = DataSettings(workers=0)
    elif overrides:
        raise SettingError("set: changes the recipe of --data, which is not given")
    else:
        return None
    channels, height, width = source.images.input_size
    if height != width:
        raise SettingError(f"data: images of {height} x {width} cannot be scored here; leave --data out")
    return settings.with_channels(channels).model_copy(update={"img_size": height})


class _Scored:
    """The test images of a recipe."""

    def __init__(self, settings: DataSettings, source: Source):
        self.data, self.source = Data(settings), source
        self.workers = settings.workers
        classes = getattr(source.model, "num_classes", None)
        if classes is not None and self.data.num_classes > classes:
            raise SettingError(
                f"data: has {self.data.num_classes} classes, and the model {classes}; give the recipe that it was "
                "trained with"
            )

    def score(self, runs: Mapping[str, Callable[[Any], Any]], batch: int) -> dict[str, float]:
        """Percent that each gets right of the test images, which are read once."""
        test = self.data.test_set(self.source.model)
        right, count = dict.fromkeys(runs, 0), 0
        for images, labels in loader_of(test, batch, self.workers if len(test) > 1_000 else 0):  # pyright: ignore
            count += len(labels)
            for name, run in runs.items():
                right[name] += int((run(images.numpy()).argmax(1) == labels.numpy()).sum())
        return {name: 100 * number / count for name, number in right.items()}
