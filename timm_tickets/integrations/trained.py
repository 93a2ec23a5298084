"""What a timm task is given to train: a ticket, or one run of a pruner; and the ticket when the search is done."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..core.errors import SettingError, check, shown
from ..distributed.processes import apart
from ..pruning.pruner import Pruner
from ..pruning.registry import get_method
from ..pruning.run import rewind_parts
from ..pruning.training import Training
from ..sparse.subnet import Subnet
from ..tickets.ticket import Ticket, load_ticket

FINAL = "final.ticket"  # in the folder of a search that is done
Start = Literal["ticket", "model", "transfer"]


@dataclass
class Trained:
    """What is trained.

    Attributes:
        subnet: The model with its mask.
        told: What is trained and from whose weights, for the log.
        identity: What makes it this training and no other, in JSON types; `--resume` compares it.
        pruner: The pruner, where it is one of its runs or its ticket.
        run: The run; None where a ticket is trained.
        start_epoch: Epochs of the schedule that lie before the weights it starts from.
    """

    subnet: Subnet
    told: str
    identity: dict[str, Any] = field(default_factory=dict)
    pruner: Pruner | None = None
    run: Training | None = None
    start_epoch: float = 0.0


def given(
    model: nn.Module,
    ticket: Ticket | str | Path | None,
    pruner: Pruner | str | None,
    start: Start | None,
    start_epoch: float | None,
    folder: str | Path | None,
    epochs: int | None,
    settings: dict[str, Any],
) -> Trained:
    """Put on a plain model what `wrap` was given to train.

    Raises:
        SettingError: What was given does not go together, or cannot be trained by timm's tasks.
        TicketError: The ticket does not fit the model.
    """
    if (ticket is None) == (pruner is None):
        raise SettingError("task: give either a ticket to train, or a pruner to search with")
    if ticket is not None:
        if unfit := [*settings, *(["folder"] if folder is not None else [])]:
            raise SettingError(f"{unfit[0]}: is a pruner's setting, and a ticket is trained; leave it out")
        out = _of_ticket(model, ticket, start or "ticket", start_epoch)
    else:
        if start is not None or start_epoch is not None:
            raise SettingError(
                f"{'start_epoch' if start is None else 'start'}: is for a ticket; a pruner prunes the model as it is "
                "given, and a search goes on from its folder"
            )
        out = _of_pruner(model, _created(pruner, model, folder, epochs, settings))
    if epochs is not None and out.start_epoch >= epochs:
        raise SettingError(
            f"epochs: what is trained starts from epoch {out.start_epoch:g} of its schedule, and the script has "
            f"{epochs}: nothing would be trained; give it more epochs"
            + ("" if out.run else ", or start_epoch=0 to train all of them from the ticket's weights")
        )
    return out


def _of_ticket(model: nn.Module, given: Ticket | str | Path, start: Start, start_epoch: float | None) -> Trained:
    ticket = given if isinstance(given, Ticket) else load_ticket(given)
    maker = ticket.metadata.get("pruner")
    named = (
        f"the ticket {ticket.fingerprint[:12]} ({shown(maker.get('name') if isinstance(maker, dict) else 'own masks')})"
    )
    if start == "transfer":
        ticket = ticket.transfer_(model)
        whose = "its weights where they fit, the model's head"
    elif start == "model":
        ticket.mask_(model)
        whose = "the model's own weights under the ticket's masks"
    elif start == "ticket":
        ticket.apply_(model)
        whose = "the ticket's weights (those that the model was created with are overwritten)"
    else:
        raise SettingError(f"start: '{start}' is not valid; it must be 'ticket', 'model' or 'transfer'")
    subnet = Subnet(model, tuple(ticket.masks))
    subnet.set_mask_(ticket.masks)
    late = ticket.metadata.get("start_epoch", 0.0) if start == "ticket" else 0.0
    late = late if start_epoch is None else start_epoch
    told = f"trains {named} from {whose}, sparsity {subnet.sparsity:.4f}{_from_epoch(_whole(late))}"
    return Trained(subnet, told, {"ticket": ticket.fingerprint}, start_epoch=late)


def _created(
    given: Pruner | str | None, model: nn.Module, folder: str | Path | None, epochs: int | None, settings: Any
) -> Pruner:
    if isinstance(given, Pruner):
        if settings or folder is not None:
            name = next(iter(settings), "folder")
            raise SettingError(f"{name}: goes with a pruner's name; give a pruner that is there its settings when made")
        if given.subnet.model is not model:
            raise SettingError("pruner: it prunes another model; create it with the model that the task is given")
        if epochs not in (None, given.method.epochs) and given.runs != 0:
            raise SettingError(
                f"epochs: the script trains {epochs} and the pruner was created for {given.method.epochs}; create it "
                f"with epochs={epochs}"
            )
        return given
    settings = {**settings, **({} if epochs is None else {"epochs": epochs})}
    pruner = Pruner(check(get_method(str(given)), settings, "pruner"), model, folder)
    if epochs is None and pruner.runs != 0 and not pruner.subnet.gates:
        raise SettingError(
            f"epochs: {given} needs to know how many the script trains; give epochs=args.epochs of train.py "
            "(--set epochs=N of `timm-tickets run`, where the script parses none)"
        )
    return pruner


def _of_pruner(model: nn.Module, pruner: Pruner) -> Trained:
    name, folder = pruner.method.name, pruner.folder
    begun = folder is not None and (folder / "pruner.json").exists()
    run = _next_run(pruner)
    settings = pruner.method.described()
    if run is None:  # then no schedule depends on them
        del settings["epochs"]
    identity = {"search": settings, "run": None if run is None else run.name}
    if run is None:
        told = (
            f"trains the ticket that {name} has found, from the weights it rewinds to, sparsity {pruner.sparsity:.4f}"
        )
        if pruner.runs != 0:
            told = f"the search in {folder} is done, its runs are all there; {told}"
        late = pruner.subnet.start_epoch
        return Trained(pruner.subnet, f"{told}{_from_epoch(_whole(late))}", identity, pruner, start_epoch=late)
    whose = "the search's rewind point" if run.round else "the weights that the search began with"
    if not begun:
        whose = "the model's own weights"
    told = (
        f"trains {place(run, pruner)} of {name}, {run.schedule_epochs} epochs from {whose}; sparsity now "
        f"{pruner.sparsity:.4f}, in the end {pruner.method.sparsity:.4f}{_from_epoch(_whole(run.start_epoch))}"
    )
    return Trained(pruner.subnet, told, identity, pruner, run, run.start_epoch)


def place(run: Training, pruner: Pruner) -> str:
    """Which run of how many it is, in words."""
    count = f" of {pruner.runs}" if pruner.runs else ""
    return f"run {run.index + 1}{count} ({run.name})"


def _next_run(pruner: Pruner) -> Training | None:
    """The run that a training of the model is to be; None where the pruner's ticket is there to be trained."""
    name = pruner.method.name
    if pruner.subnet.gates:
        raise SettingError(
            f"pruner: {name} learns its masks, which timm's checkpoints cannot hold; search with it in a loop of your "
            "own or with `timm-tickets search`, then train its ticket"
        )
    if pruner.folder is None and pruner.runs not in (0, 1):
        raise SettingError(
            f"folder: {name} needs {pruner.runs or 'several'} trainings, and a task trains one; give it a folder "
            "(folder='search', --folder of `timm-tickets run`) and train again with the same one until the ticket is "
            "there"
        )
    run = next(pruner, None)
    if run is not None and run.reads_only:
        raise SettingError(
            f"pruner: {name} reads the gradients of a few batches before any training; run it in a loop of your own or "
            "with `timm-tickets search`, then train its ticket"
        )
    if run is not None and run.request.rewind is not None:
        number, unit = rewind_parts(run.request.rewind)
        if unit == "it" and number:
            raise SettingError(
                f"rewind: '{run.request.rewind}' lies within an epoch, and timm's train.py begins at whole ones; "
                "rewind to an epoch, such as '1ep'"
            )
    return run


def _whole(epoch: float) -> int:
    if abs(epoch - round(epoch)) > 1e-6:
        raise SettingError(
            f"start_epoch: the weights are those of epoch {epoch:g} of their training, and timm's train.py begins at "
            "whole epochs; rewind to one ('1ep'), or give a ticket start_epoch=0 to train the whole schedule from it"
        )
    return round(epoch)


def _from_epoch(epoch: int) -> str:
    return f", on from epoch {epoch} of the schedule (--start-epoch {epoch})" if epoch else ""


def final_ticket(pruner: Pruner) -> Path | None:
    """Write the ticket of a search whose last run has just been written down, as ``final.ticket`` in its folder.

    On a copy of the model, as the script may go on with its own; by this process alone, as only one of them saves
    checkpoints.

    Returns:
        Where it is; None where the search wants more runs, or has no folder.
    """
    run = pruner.run
    if pruner.folder is None or run is None or (pruner.runs is not None and run.index + 1 < pruner.runs):
        return None
    with apart(1):
        again = Pruner(pruner.method, copy.deepcopy(pruner.subnet.model), pruner.folder)
        again.metadata = pruner.metadata
        if next(again, None) is not None:
            return None
        again.ticket.save(pruner.folder / FINAL)
    return pruner.folder / FINAL
