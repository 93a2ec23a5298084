"""The formats of exports, and the libraries that they need, which are asked for by name where they are missing."""

from collections.abc import Sequence
from importlib.util import find_spec

from ..core.errors import SettingError, unknown

ONNX = ("onnx", "onnxscript", "onnxruntime")
OPENVINO = ("openvino", *ONNX)
# Each with the end of its files' names and the libraries that it needs.
FORMATS: dict[str, tuple[str, Sequence[str]]] = {
    "timm": ("_timm.safetensors", ()),
    "compact": ("_compact.safetensors", ()),
    "onnx": (".onnx", ONNX),
    "openvino": (".xml", OPENVINO),
    "2:4": ("_2_4.safetensors", ()),
    "csr": ("_csr.safetensors", ()),
}


def check_format(name: str) -> None:
    """Refuse, without waiting for torch, a format that there is not, or whose libraries are missing.

    Raises:
        SettingError: It cannot be written here.
    """
    if name not in FORMATS:
        raise SettingError(unknown("to", name, FORMATS))
    require(f"--to {name}", FORMATS[name][1])


def missing(names: Sequence[str]) -> list[str]:
    """Those of these libraries that are not installed."""
    return [name for name in names if find_spec(name) is None]


def require(what: str, names: Sequence[str]) -> None:
    """Refuse what needs libraries that are not installed.

    Raises:
        SettingError: One is missing.
    """
    if left := missing(names):
        raise SettingError(
            f"{what} needs {' and '.join(left)}, which {'is' if len(left) == 1 else 'are'} not installed: "
            f"pip install 'timm-tickets[export]', or pip install {' '.join(left)}"
        )
