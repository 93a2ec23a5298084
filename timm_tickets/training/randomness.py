"""Random states: where an epoch's draws stand, so that a run goes on in the middle of one as if never stopped."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from ..data.subset import Shuffled
from ..sparse.optimizers import plain_optimizer

RandomStates = dict[str, Any]


def random_states() -> RandomStates:
    """The states of torch's, Python's and numpy's generators, as tensors and primitives."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(gauss)),
    }


def set_random_states_(states: RandomStates) -> None:
    """Put the generators where `random_states` found them."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def own_generator(optimizer: Any) -> Any:
    """The optimizer inside, if it draws from a generator of its own (timm's Adahessian); else None."""
    inner = plain_optimizer(optimizer)
    return inner if isinstance(getattr(inner, "generator", None), torch.Generator) else None


class Epoch:
    """One epoch's batches, from any of them on, with the random states that go with that place.

    Accelerate's loader is a batch ahead of the training. Without workers, what augments that batch has been drawn
    before the step's own draws; so a place in the epoch has two states: as that batch began to be loaded, and now. With
    workers, they draw from generators of their own (`data.seed_item_`), and the first is not needed.

    Args:
        loader: The loader the batches come from; over a `Shuffled` sampler.
        sampler: That sampler.
        batch_size: Items of one step, over all processes.
        workers: Of the loader.
    """

    def __init__(self, loader: Any, sampler: Shuffled, batch_size: int, workers: int):
        self.loader, self.sampler, self.batch_size = loader, sampler, batch_size
        self.follow = workers == 0
        self._loading: RandomStates | None = None
        self._to_set: list[RandomStates] = []

    def states(self) -> dict[str, Any]:
        """The random states that go with the batch whose step has just been taken."""
        return {"loading": self._loading, "now": random_states()}

    def batches(self, seed: int, skip: int = 0, states: dict[str, Any] | None = None) -> Iterator[Any]:
        """Seed everything, and give the batches.

        Args:
            seed: Of the epoch: its order and its draws.
            skip: Batches to leave out.
            states: What `states` gave after as many batches; None where the draws begin with the seed.
        """
        set_seed(seed)
        self.sampler.seed, self.sampler.first = seed, skip * self.batch_size
        self.sampler.before = self._before if self.follow else None
        after = None
        if states is not None and self.follow:
            self._to_set = [states["loading"], states["now"]]
        elif states is not None:
            after = states["now"]
        try:
            for batch in self.loader:
                if batch is None:  # Accelerate 1.6, where an epoch has no batch left; asked for another, it would fail
                    self.loader.end()
                    return
                if after is not None:
                    set_random_states_(after)
                    after = None
                yield batch
        finally:
            self._to_set = []
            self.sampler.first, self.sampler.before = 0, None

    def _before(self, item: int) -> None:
        """The sampler is about to give this item: at a batch's first one, or at the end, put back or remember."""
        if item % self.batch_size and item < len(self.sampler):
            return
        if self._to_set:
            set_random_states_(self._to_set.pop(0))
        self._loading = random_states()
