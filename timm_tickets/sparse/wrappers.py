"""The plain model inside DDP, torch.compile and their like."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..core.private import inside_compiled


def plain_model(model: nn.Module) -> nn.Module:
    """The timm model inside DistributedDataParallel, DataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif (inner := inside_compiled(model)) is not None:
            model = inner
        else:
            return model
