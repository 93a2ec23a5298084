"""Scoring: what a model gets right, and the metrics of a run."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


@torch.no_grad()
def top1_and_loss(
    model: nn.Module,
    batches: Iterable[Any],
    classes: Sequence[int] | None,
    accelerator: Accelerator,
    laid_out: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Top-1 accuracy (percent) and cross-entropy, of all processes' images together.

    Args:
        model: The model, in evaluation mode.
        batches: Images and class indices, from a loader that Accelerate has prepared.
        classes: The classes among which it chooses; all where None.
        accelerator: Says what is cast, and gathers from the processes.
        laid_out: Puts images into the model's memory format.
    """
    sums = torch.zeros(3, device=accelerator.device, dtype=torch.float64)
    for images, target in batches:
        with accelerator.autocast():
            output = model(laid_out(images))
        output = output[0] if isinstance(output, tuple | list) else output
        output, target = accelerator.gather_for_metrics((output.float(), target))
        if classes is not None:
            outside = torch.ones(output.shape[1], dtype=torch.bool, device=output.device)
            outside[torch.as_tensor(classes)] = False
            output = output.masked_fill(outside, -torch.inf)
        sums[0] += nn.functional.cross_entropy(output, target, reduction="sum")
        sums[1] += (output.argmax(1) == target).sum()
        sums[2] += len(target)
    loss, correct, count = sums.tolist()
    return {"top1": 100 * correct / count, "loss": loss / count}


def run_metrics(
    best: dict[str, float], val: dict[str, float], test: dict[str, float], seconds: float
) -> dict[str, Any]:
    """The metrics of a run, as its record and ticket have them.

    Args:
        best: Of the epoch with the best validation.
        val: Of the last one.
        test: Of the test split.
        seconds: That it took.
    """
    return {
        "val_top1_best": best["top1"],
        "val_epoch_best": int(best["epoch"]) + 1 if "epoch" in best else None,
        "val_top1": val["top1"],
        "val_loss": val["loss"],
        "test_top1": test["top1"],
        "test_loss": test["loss"],
        "seconds": round(seconds, 2),
    }
