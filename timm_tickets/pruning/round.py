"""A round: the runs that a method asks for at once, numbered, replayed or trained, gathered."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..core.errors import SettingError
from ..core.states import State, sharing
from ..distributed.processes import wait_for_others
from ..sparse.subnet import Subnet
from .checks import check_round
from .history import History
from .run import Place, Run
from .run_end import End
from .training import Training

Parallel = Literal["runs", "data", "auto"]


def next_round(name: str, search: Any, ends: list[End] | None) -> list[Run] | None:
    """Give a method of this name what its last round ended with; the runs of its next one, None when it has ended."""
    try:
        requests = search.send(ends) if isinstance(search, Generator) else search
    except StopIteration:
        return None
    check_round(name, requests)
    return requests


def handed_out(parallel: Parallel, count: int, groups: int, folder: Path | None) -> bool:
    """Whether so many runs of a round go to different groups of processes.

    Raises:
        SettingError: They do, and there is no folder to gather them through.
    """
    hand_out = parallel != "data" and groups > 1 and (parallel == "runs" or count > 1)
    if hand_out and folder is None:
        raise SettingError(
            "folder: runs that are handed out to several processes are gathered through one; create the pruner "
            "with a folder that all processes see, or set its parallel to 'data'"
        )
    return hand_out


def placed(requests: Sequence[Run], subnet: Subnet, at: Place, epochs: int, seed: int) -> list[Training]:
    """The trainings of a round's requests: numbered, with their schedules.

    Args:
        requests: What the method asks for.
        subnet: The model with its mask.
        at: The place of the first of them.
        epochs: Length of the schedule where a request says none.
        seed: The method's.
    """
    runs: list[Training] = []
    for part, asked in enumerate(requests):
        single = len(requests) == 1
        name = f"round_{at.round:02d}" + ("" if single else f"_part_{part}")
        place = replace(at, name=name, index=at.index + part, part=part, single=single)
        start_epoch = subnet.start_epoch if asked.from_rewind else 0.0
        runs.append(Training(asked, subnet, place, asked.epochs or epochs, start_epoch, seed))
    return runs


def carried_out(
    runs: Sequence[Training],
    subnet: Subnet,
    history: History,
    train: Callable[[Training], Generator[Training, None, End]],
    share: tuple[int, int],
) -> Generator[Training, None, list[End]]:
    """Train the runs of a round, as far as the history has not got them; what all of them ended with.

    Args:
        runs: The runs.
        subnet: The model with its mask.
        history: Where runs that have ended are written down.
        train: Has the user train a run, and gives what it ended with.
        share: Number of this process's group and how many there are: each trains its own runs, and reads the others'.
    """
    mine, groups = share
    single = len(runs) == 1
    beginning = None if single else _Beginning(subnet)
    ends: dict[int, End] = {}

    def take_(run: Training, end: End) -> None:
        if not single:  # the model goes on to the next one
            end.copy_()
        ends[run.part] = end

    for run in runs:
        if run.part % groups != mine:
            continue
        if (end := history.replay(run)) is not None:
            _bring_to_(subnet, end)
        else:
            if beginning is not None:
                beginning.return_(subnet)
            end = yield from train(run)
        take_(run, end)
    if groups > 1:
        wait_for_others()
        for run in runs:
            if run.part not in ends:
                end = history.gathered(run)
                if run is runs[-1]:
                    _bring_to_(subnet, end)  # as if this process had trained them all
                take_(run, end)
    found = [ends[run.part] for run in runs]
    if single and found[0].rewind is not None:
        subnet.set_start_(found[0].rewind, found[0].rewind_epoch)
    history.follow_(found)
    return found


def _bring_to_(subnet: Subnet, end: End) -> None:
    """Bring the model to where a run has ended."""
    subnet.set_mask_(end.mask)
    subnet.load_(end.state)
    subnet.load_scores_(end.scores)


class _Beginning:
    """Where all runs of a round begin, if they are several: the model's state, mask and scores."""

    def __init__(self, subnet: Subnet):
        start = subnet.start or {}
        self.mask = subnet.mask
        shown = subnet.pruned_state(start, {} if subnet.gates else self.mask)
        self.state: State = sharing(subnet.live_state(), start, shown)
        self.scores = subnet.scores()

    def return_(self, subnet: Subnet) -> None:
        subnet.set_mask_(self.mask)
        subnet.load_(self.state)
        subnet.load_scores_(self.scores)
