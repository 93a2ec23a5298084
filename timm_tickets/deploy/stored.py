"""Reading our own files of models: safetensors with a header of JSON in their metadata. Nothing in them is executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from safetensors import safe_open
from torch import Tensor

from ..core.errors import SettingError, TicketError, shown
from ..tickets.publish import harmless

H = TypeVar("H", bound=BaseModel)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of ``timm.create_model`` that are not read from a file, as they may do more than shape a model.

    Raises:
        SettingError: There are such.
    """
    if lost := beyond_shape(arguments):
        raise SettingError(f"arguments: a file cannot say {', '.join(lost)}; leave out what shapes no model")


def beyond_shape(arguments: Mapping[str, Any]) -> list[str]:
    """Those that may do more than shape a model, such as open a checkpoint."""
    return sorted(arguments.keys() - harmless(arguments).keys())


def read_stored(path: Path, key: str, header: type[H], unlike: str) -> tuple[H, dict[str, Tensor]]:
    """The header and the tensors of a file.

    Args:
        path: The file.
        key: Of the metadata, where the header is.
        header: What it has to be.
        unlike: What to say of a file that has none, after its name.

    Raises:
        FileNotFoundError: There is no such file.
        TicketError: It has no such header, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(key)
            if text is None:
                raise TicketError(f"{path} {unlike}")
            found = header.model_validate_json(text)
            return found, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (TicketError, OSError):
        raise
    except Exception as error:  # safetensors' and pydantic's own
        raise TicketError(f"{path} is damaged, or is no such file: {shown(str(error), 300)}") from None
