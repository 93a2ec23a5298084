"""Running an exported file on the CPU, whatever engine it is for; and how much memory that takes."""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..core.errors import TrainingError, shown
from .formats import ONNX, OPENVINO

ENGINES = {"torch": (), "onnxruntime": ONNX, "openvino": OPENVINO}
_MIB = 1 << 20


class Kind(BaseModel):
    """What is run.

    Attributes:
        engine: ``torch``, ``onnxruntime`` or ``openvino``.
        variant: ``dense``, ``zeros``, ``compacted`` or ``csr``.
        file: Its file.
        architecture: What timm builds torch's dense models from.
        arguments: Of timm.create_model.
        threads: How many it works with; the engine's own choice where None.
    """

    engine: str
    variant: str
    file: Path
    architecture: str = ""
    arguments: dict[str, Any] = {}
    threads: int | None = None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.variant}"

    @property
    def files(self) -> list[Path]:
        """All that belong to it."""
        return [self.file, self.file.with_suffix(".bin")] if self.engine == "openvino" else [self.file]


def run_of(kind: Kind) -> Callable[[Any], Any]:
    """A function of a float32 NumPy array of images (batch, channels, height, width)."""
    if kind.engine == "onnxruntime":
        return onnxruntime_run(kind.file, kind.threads)
    return openvino_run(kind.file, kind.threads) if kind.engine == "openvino" else _torch(kind)


def onnxruntime_run(path: Path, threads: int | None = None) -> Callable[[Any], Any]:
    """An ONNX file, run by onnxruntime with so many threads; its own choice where None."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or 0, 3
    # Its threads wait for the next call by turning, and what is timed after it would have to share the cores with them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def openvino_run(path: Path, threads: int | None = None) -> Callable[[Any], Any]:
    """An OpenVINO ``.xml``, run by it in float32 with so many threads; its own choice where None."""
    openvino: Any = import_module("openvino")  # may be missing

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda images: compiled(images)[0]


def _torch(kind: Kind) -> Callable[[Any], Any]:
    import torch

    if kind.threads:
        torch.set_num_threads(kind.threads)
    model = torch_model(kind)

    def run(images: Any) -> Any:
        with torch.no_grad():  # torch's CSR products refuse inference_mode
            output = model(torch.from_numpy(images))
        return (output[0] if isinstance(output, tuple | list) else output).numpy()

    return run


def torch_model(kind: Kind) -> Any:
    """The module of a file of torch's, in evaluation mode."""
    if kind.variant == "csr":
        from .sparse_file import load_csr

        return load_csr(kind.file)
    if kind.variant == "compacted":
        from .compact_file import load_compact

        return load_compact(kind.file)
    from ..storage.files import read_state
    from .source import Built, rebuilt

    state = read_state(kind.file)
    model = rebuilt(Built(architecture=kind.architecture, arguments=kind.arguments), state, str(kind.file))
    model.load_state_dict(state)
    return model


def memory_of(kind: Kind, size: Sequence[int], batch: int) -> float | None:
    """Mebibytes that a process of its own takes to hold a model and run a batch, at most.

    Not counted is what the process has before it reads the model: Python, and the libraries that run it.

    Args:
        kind: The model.
        size: Channels, height and width of an image.
        batch: Images at a time.

    Returns:
        None where the system does not tell: elsewhere than on Linux.

    Raises:
        TrainingError: The process failed; the message has its last line.
    """
    if not sys.platform.startswith("linux"):
        return None
    order = json.dumps({"kind": kind.model_dump(mode="json"), "shape": [batch, *size]})
    code = "import sys; from timm_tickets.deploy.runners import _tell_memory; _tell_memory(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, order], capture_output=True, text=True)
    if done.returncode:
        told = shown((done.stderr.splitlines() or ["killed, as where memory is short"])[-1], 200)
        raise TrainingError(f"the process that measures the memory of {kind.name} failed ({done.returncode}): {told}")
    return float(done.stdout)


def _tell_memory(order: str) -> None:
    """Of the process that `memory_of` starts: print the mebibytes."""
    import numpy

    given = json.loads(order)
    kind = Kind.model_validate(given["kind"])
    if kind.engine == "torch":
        from . import source, sparse_file  # noqa: F401 - torch and timm with them
    else:
        __import__(kind.engine)
    images = numpy.random.default_rng(0).standard_normal(given["shape"], dtype=numpy.float32)
    before = _resident("VmRSS")
    run = run_of(kind)
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: what loading took for a while is gone
    run(images)
    print((_resident("VmHWM") - before) / _MIB)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
