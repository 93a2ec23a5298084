"""History: the runs of a search that have ended, written down in its folder and replayed when it is continued."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import SettingError
from ..core.lazy import Lazy
from ..core.states import State
from ..distributed.processes import apart, from_first
from ..tickets.ticket import Ticket
from .beginning import begun, first_state
from .run_end import End
from .run_files import appearing_run, following, replayed, write_run
from .training import Training


class History:
    """What a search has behind it, in a folder; where there is none, nothing is kept and nothing replayed.

    Args:
        folder: The search's.

    Attributes:
        replayed: Names of the runs that were read from the folder instead of trained.
        lineage: What the runs of each round follow, as `Place.follows`, and at the end what comes after the last.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.replayed: list[str] = []
        self.lineage: list[str | None] = [None]

    def begin_(self, identity: Mapping[str, Any], state: State, recipe: str | None) -> State:
        """The state that the search begins with: as given; in a folder, as it was given the first time.

        Args:
            identity: What makes it this search, in JSON types.
            state: The model as given.
            recipe: Hash of the recipe it is of, if any.

        Raises:
            SettingError: The folder belongs to a search with other settings, or of another model.
        """
        if self.folder is None:
            return state
        state, follows = begun(self.folder, identity, state, recipe)
        self.lineage = [follows]
        return state

    def first_state(self, names: Iterable[str]) -> Lazy:
        """The state that the search began with, each tensor read when it is wanted.

        Raises:
            SettingError: It has no folder; the search keeps no copy that it does not need.
        """
        if self.folder is None:
            raise SettingError("folder: the first state is kept there; create the pruner with one, or copy the model")
        return first_state(self.folder, names)

    def replay(self, run: Training) -> End | None:
        """What a run ended with, where the folder has it."""
        if self.folder is None:
            return None
        with apart(run.processes):
            end = replayed(self.folder / run.name, run.place.follows)
        if end is not None:
            self.replayed.append(run.name)
        return end

    def gathered(self, run: Training) -> End:
        """What a run ended with that other processes have trained: waited for."""
        assert self.folder is not None  # runs are handed out only where there is one
        return appearing_run(self.folder / run.name, run.place.follows)

    def write_(self, run: Training, end: End, ticket: Ticket, baked: Mapping[str, Tensor] | None) -> None:
        """Write a run down, as `write_run`; only the process that writes calls this."""
        if self.folder is not None:
            write_run(self.folder / run.name, run, end, ticket, baked)

    def follow_(self, ends: Sequence[End]) -> None:
        """A round has ended with these: the next one follows it."""
        if self.folder is not None:  # only who has written a run down knows the digest of its end
            after = following(self.lineage[-1], [end.digest for end in ends])
            self.lineage.append(from_first(after))
