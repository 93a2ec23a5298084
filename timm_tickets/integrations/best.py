"""timm's best checkpoints under a pruner that prunes while it trains: those of the sparsity that was asked for.

Before that is reached a model has more weights and often the better metric; among timm's best it would pass for the
ticket. timm's saver asks its task for nothing but the state to save, so the saver's method is wrapped, for all savers;
it acts on those of a task that trains a ticket or a run.
"""

from functools import wraps
from typing import Any

from timm.utils import CheckpointSaver


def rank_finished_only_() -> None:
    """Have every saver ask its task, before a checkpoint is ranked, whether those before it still count."""
    save: Any = CheckpointSaver.save_checkpoint
    if getattr(save, "asks_the_task", False):
        return

    @wraps(save)
    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (ask := getattr(getattr(self, "task", None), "before_ranking_", None)) is not None:
            ask(self)
        return save(self, *args, **kwargs)

    save_checkpoint.asks_the_task = True  # pyright: ignore[reportAttributeAccessIssue]
    CheckpointSaver.save_checkpoint = save_checkpoint
