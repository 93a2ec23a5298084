"""What Accelerate trains with: refused at the start where masks cannot be kept in it, and made deterministic."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch.distributed.fsdp import CPUOffloadPolicy

from ..config.parts import TrainingSettings
from ..config.recipe import Recipe
from ..core.errors import SettingError
from ..core.warn import warn
from ..distributed.cards import refuse_sharing
from ..distributed.processes import world_size


def check_engine(accelerator: Accelerator, recipe: Recipe) -> None:
    """Refuse, before anything is trained, what `accelerate launch` was told and cannot be done.

    Raises:
        SettingError: DeepSpeed, Megatron or FSDP1; a batch that the processes cannot share; cards that they share; or a
            part of the recipe that FSDP2 cannot do.
    """
    if accelerator.num_processes != world_size():
        raise SettingError(
            f"accelerate: it counts {accelerator.num_processes} processes where {world_size()} work together, so each "
            "would train on everything; let `timm_tickets.processes.join_processes()` be the first to ask Accelerate"
        )
    refuse_sharing(accelerator.num_processes)
    size, count = recipe.training.batch_size, accelerator.num_processes
    if size % count:
        raise SettingError(
            f"training.batch_size: {size} images cannot be shared by {count} processes in equal parts; set a multiple "
            f"of {count}, or start a number of processes that divides it"
        )
    kind, asked = accelerator.distributed_type, parse_flag_from_env("ACCELERATE_USE_FSDP")
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise SettingError(
            f"accelerate: {kind.value} takes weights apart, where no mask can be kept; launch with DDP (`--multi_gpu`) "
            "or FSDP2 (`--use_fsdp --fsdp_version 2`)"
        )
    if asked and kind != DistributedType.FSDP and accelerator.num_processes > 1:
        warn("accelerate: FSDP was asked for and is not there on CPUs; every process holds the whole model")
    if kind != DistributedType.FSDP:
        return
    plugin: Any = accelerator.state.fsdp_plugin
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise SettingError(
            "accelerate: FSDP2's CPU offload is not supported; launch with `--fsdp_offload_params false`"
        )
    if recipe.training.torchcompile:
        raise SettingError("training.torchcompile: FSDP2 has to split a model before it is compiled; leave it out")
    if recipe.training.model_ema:
        raise SettingError("training.model_ema: no average is kept of weights that FSDP2 has split; set it to false")
    if recipe.retrain.tweaks:
        raise SettingError("retrain.tweaks: not with FSDP2; train the ticket with DDP, or leave them out")
    # It would leave all but the first process without the buffers; here every process builds the same model anyway.
    plugin.cpu_ram_efficient_loading = False


@contextmanager
def deterministic(asked: bool | None, device: torch.device) -> Iterator[None]:
    """Within the block, algorithms that give the same bits each time, or the fastest; afterwards as it was before.

    Args:
        asked: The setting; None is True for CPUs, False for others.
        device: What is trained on.
    """
    on = device.type == "cpu" if asked is None else asked
    backend: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic  # pyright: ignore[reportAttributeAccessIssue]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, fills = backend.benchmark, memory.fill_uninitialized_memory
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # stays: cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
        backend.benchmark = memory.fill_uninitialized_memory = False
    elif device.type == "cuda" and not before[0]:  # whoever has asked torch for them gets them
        backend.benchmark = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        backend.benchmark, memory.fill_uninitialized_memory = benchmark, fills


def memory_format(t: TrainingSettings, device: torch.device) -> torch.memory_format:
    """How weights and images lie in memory: as `channels_last` says, else so on CPUs and in mixed precision."""
    last = t.amp or device.type == "cpu" if t.channels_last is None else t.channels_last
    return torch.channels_last if last else torch.contiguous_format
