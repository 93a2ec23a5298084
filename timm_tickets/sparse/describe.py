"""What timm needs to build a model again, as far as the model itself can tell."""

from typing import Any

from torch import nn


def model_name(model: nn.Module) -> str:
    """Its timm architecture, or the name of its class where it has none."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What timm needs to build the model again, as far as the model itself can tell: JSON types only."""
    config = getattr(model, "pretrained_cfg", None) or {}
    stem = config.get("first_conv")
    stem_weight = dict(model.named_parameters()).get(f"{stem}.weight") if isinstance(stem, str) else None
    return {
        "architecture": config.get("architecture"),
        "num_classes": getattr(model, "num_classes", None),
        "in_chans": None if stem_weight is None else stem_weight.shape[1],
    }
