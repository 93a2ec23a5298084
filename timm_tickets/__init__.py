"""Lottery tickets for any timm model. See README.md; the public names are those in `__init__.pyi`.

Names are imported when first used, so that ``import timm_tickets`` and the command line's help do not wait for torch.
The papers' networks (`networks`, ``cifar_*``) are registered with timm by then, or at once where timm is there already:
after ``import timm, timm_tickets`` timm.create_model finds them.
"""

import importlib
import sys
from typing import Any

import lazy_loader

__version__ = "0.1.0"
_import_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        importlib.import_module(".sparse.networks", __name__)
    return _import_name(name)


if "timm" in sys.modules:  # then torch is there as well, and nobody waits for it
    importlib.import_module(".sparse.networks", __name__)
