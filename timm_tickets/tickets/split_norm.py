"""timm's split batch normalisation (``--split-bn``): every part of a batch has a normalisation of its own.

`timm.layers.convert_splitbn_model` gives each one the values of the model's; the others than the first are named
``<norm>.aux_bn.<number>`` and are of use in training only.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from timm.layers import SplitBatchNorm2d
from torch import nn

T = TypeVar("T")
_AUXILIARY = re.compile(r"(.*)\.aux_bn\.\d+(\.[^.]+)")


def split_as(values: Mapping[str, T], model: nn.Module) -> Mapping[str, T]:
    """A state dict with the auxiliary normalisations that a model has: as if it had been split with these values.

    Those that are there and that the model has are left as they are; those that it has not are left out.
    """
    split = [name for name, module in model.named_modules() if isinstance(module, SplitBatchNorm2d)]
    there = [name for name in values if (found := _AUXILIARY.fullmatch(name)) and found[1] + found[2] in values]
    if not split and not there:
        return values
    wanted = model.state_dict()
    out = {name: value for name, value in values.items() if name in wanted or name not in there}
    for name in wanted:
        found = _AUXILIARY.fullmatch(name)
        if found and found[1] in split and name not in out and found[1] + found[2] in out:
            out[name] = out[found[1] + found[2]]
    return out
