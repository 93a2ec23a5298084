"""Lottery tickets for any timm model. See README.md; the public names are those in ``__all__``.

Names are imported when first used, so that ``import timm_tickets`` and the command line's help do not wait for torch.
The papers' networks (`networks`, ``cifar_*``) are registered with timm by then, or at once where timm is there already:
after ``import timm, timm_tickets`` timm.create_model finds them.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import difference, overlap, union
    from .end import End
    from .experiment import search, train, transfer
    from .hub import push
    from .masks import Masks, intersect, layer_sparsities, shuffled_masks, sparsity
    from .method import Method, OneShot
    from .prunable import Part, inspect_model, prunable_names
    from .pruner import Pruner
    from .recipe import Recipe, list_recipes, load_recipe
    from .registry import (
        create_pruner,
        create_tweaks,
        get_method,
        get_tweak,
        list_pruners,
        list_tweaks,
        register_pruner,
        register_tweak,
    )
    from .replicates import search_seeds
    from .run import Rewind, Run
    from .settings import SettingError, TrainingError
    from .starts import Pretrained
    from .subnet import Subnet
    from .task import TicketTask
    from .ticket import Ticket, TicketError, load_ticket
    from .ticket_size import weigh
    from .tweak import Tweak, Tweaks

_MODULES = {
    "masks": ("Masks", "intersect", "layer_sparsities", "shuffled_masks", "sparsity"),
    "method": ("Method", "OneShot"),
    "prunable": ("Part", "inspect_model", "prunable_names"),
    "pruner": ("Pruner",),
    "end": ("End",),
    "run": ("Rewind", "Run"),
    "recipe": ("Recipe", "list_recipes", "load_recipe"),
    "registry": (
        *("create_pruner", "get_method", "list_pruners", "register_pruner"),
        *("create_tweaks", "get_tweak", "list_tweaks", "register_tweak"),
    ),
    "compare": ("difference", "overlap", "union"),
    "experiment": ("search", "train", "transfer"),
    "replicates": ("search_seeds",),
    "hub": ("push",),
    "settings": ("SettingError", "TrainingError"),
    "starts": ("Pretrained",),
    "subnet": ("Subnet",),
    "task": ("TicketTask",),
    "ticket": ("Ticket", "TicketError", "load_ticket"),
    "ticket_size": ("weigh",),
    "tweak": ("Tweak", "Tweaks"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_DOCUMENTED = ("masks", "networks", "processes", "scores")  # modules that README names: there without being imported

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 - grouped by module, as above
    "Masks", "intersect", "layer_sparsities", "prunable_names", "shuffled_masks", "sparsity",
    "Method", "OneShot",
    "Part", "inspect_model",
    "Pruner",
    "End", "Rewind", "Run",
    "Recipe", "list_recipes", "load_recipe",
    "create_pruner", "get_method", "list_pruners", "register_pruner",
    "create_tweaks", "get_tweak", "list_tweaks", "register_tweak",
    "search", "search_seeds", "train", "transfer",
    "difference", "overlap", "union",
    "push",
    "SettingError", "TrainingError",
    "Subnet", "Pretrained",
    "Ticket", "TicketError", "load_ticket", "weigh",
    "TicketTask",
    "Tweak", "Tweaks",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _DOCUMENTED:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".networks", __name__)
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


if "timm" in sys.modules:  # then torch is there as well, and nobody waits for it
    importlib.import_module(".networks", __name__)
