"""Cards: whether the processes of a machine have to share its GPUs, and how they then talk to one another.

A small network leaves a card idle most of the time, so that several trainings of it can go side by side: COLT's
partitions, the starting values of continuous sparsification, seeds, a ticket and its controls. Accelerate gives a
process the card of its number on the machine, modulo the cards there are. NCCL refuses two processes on one card, so
what they gather goes over gloo; each training is one process's own, and what they gather is small.

One process that stacks the parameters of several runs (`torch.func`'s vmap) is no way to have this: on CPUs a stacked
step takes more than the steps one after the other (benchmarks/results/parallel_runs.md).
"""

import os

import torch
from accelerate.utils import parse_flag_from_env

from ..core.errors import SettingError


def sharing() -> tuple[int, int] | None:
    """How many processes of this machine share how many cards; None where each has one of its own, or there is none.

    It reads the environment that torchrun and ``accelerate launch`` give, so that it is known before the processes
    meet. Machines that work together have to be alike in this: all over gloo, or none.
    """
    # With the second each process sees a card of its own, as the user says: DDP then asks for none by its number.
    if parse_flag_from_env("ACCELERATE_USE_CPU") or parse_flag_from_env("ACCELERATE_BYPASS_DEVICE_MAP"):
        return None
    processes, cards = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    return (processes, cards) if 0 < cards < processes else None


def refuse_sharing(count: int) -> None:
    """Refuse one training by several processes that share cards: they would take turns, and wait for one another.

    Args:
        count: Processes of the training.

    Raises:
        SettingError: They share them.
    """
    if count == 1 or (shared := sharing()) is None:
        return
    raise SettingError(
        f"parallel: {told(shared)}, and a training of {count} processes would only wait for itself there; set "
        "parallel=runs and processes_per_run=1, so that each process trains runs of its own. To train a single ticket, "
        "start one process, or as many as there are cards. Where each process sees another card as its only one, set "
        "ACCELERATE_BYPASS_DEVICE_MAP=true in the environment"
    )


def told(shared: tuple[int, int]) -> str:
    """Who shares what, in words.

    >>> told((4, 1))
    '4 processes share 1 card'
    """
    processes, cards = shared
    return f"{processes} processes share {cards} card{'s' * (cards > 1)}"
