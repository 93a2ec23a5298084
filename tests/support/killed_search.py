"""A search that is killed at a chosen moment, again and again: the script behind test_faults.py.

    python killed_search.py '{"overrides": [...], "lives": [3, 17, 0], "signal": 9}'

Each life is a process of its own, forked before torch has done any work, that searches until its n-th moment and there
gets the signal; 0 lets it live. Moments are what a search does outside torch: a loss, an optimizer step, a piece of a
checkpoint written, a file flushed, renamed or deleted. Prints one line of JSON a life, with the sizes of the batches
that this process trained on. Under torchrun there is one life, of this very process, and `rank` says whose it is; with
`split` FSDP2 splits the model, with `seeds` each of them is searched, with `cards` the machine seems to have so many.
"""

import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def arm(moment: int, number: int) -> dict[str, int]:
    """Count moments, and at this one send this process a signal; the count."""
    import timm_tickets as tt
    from timm_tickets.storage import checkpoint_file as checkpoint

    seen = {"moments": 0}

    def watched(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        calls = {"made": 0}
        # A checkpoint is written in hundreds of pieces, which would leave no chance to the other moments.
        every = 200 if name == "write" else 1

        def call(*args: Any, **kwargs: Any) -> Any:
            calls["made"] += 1
            seen["moments"] += calls["made"] % every == 0
            if seen["moments"] == moment and calls["made"] % every == 0:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    for owner, name in (
        (tt.Training, "loss"),
        (tt.Training, "_stepped"),
        (checkpoint._Hashing, "write"),
        (os, "fsync"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "mkdir"),
    ):
        watched(owner, name)
    return seen


def split_models() -> None:
    """Have Accelerate split models by FSDP2 on CPUs too, where it would not by itself."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from timm_tickets.training import trainer

    class Splitting(Accelerator):
        def __init__(self, **kwargs: Any):
            super().__init__(**kwargs)
            if self.num_processes == 1:
                return
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = plugin

    trainer.Accelerator = Splitting  # type: ignore[misc]


def live(order: dict[str, Any], moment: int) -> None:
    from rich.console import Console

    import timm_tickets as tt

    if "cards" in order:
        import torch

        os.environ.pop("ACCELERATE_USE_CPU", None)
        torch.cuda.device_count = lambda: order["cards"]
    if order.get("split"):
        split_models()
    console = Console(file=io.StringIO(), width=200)
    mine = order.get("rank") in (None, int(os.environ.get("RANK", 0)))
    seen = arm(moment if mine else 0, order.get("signal", 9))
    batches: list[int] = []
    loss = tt.Training.loss

    def counted(run: Any, criterion: Any, output: Any, target: Any) -> Any:
        batches.append(len(target))
        return loss(run, criterion, output, target)

    tt.Training.loss = counted  # type: ignore[method-assign]
    from accelerate.state import PartialState

    def splits() -> bool:
        return PartialState().distributed_type == "FSDP"

    recipe, overrides = order.get("recipe", "digits_imp"), order["overrides"]
    if order.get("seeds"):
        result = tt.search_seeds(recipe, order["seeds"], overrides, console=console)[0]
    else:
        result = tt.search(recipe, overrides, console=console)
    told = {"fingerprint": result.ticket.fingerprint, "said": console.file.getvalue()}  # type: ignore[attr-defined]
    told |= seen | {"batches": sorted(set(batches)), "losses": len(batches), "splits": splits()}
    print(json.dumps(told) + "\n", end="", flush=True)  # at once, or those of several processes would be mixed


def main() -> None:
    order = json.loads(sys.argv[1])
    import timm_tickets.experiments.search  # noqa: F401 - once, for all lives

    if "RANK" in os.environ:
        return live(order, order["lives"][0])
    for moment in order["lives"]:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(order, moment)
                code = 0
            except SystemExit as stopped:
                code = stopped.code  # type: ignore[assignment]
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)  # type: ignore[arg-type]
        _, status = os.waitpid(child, 0)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
