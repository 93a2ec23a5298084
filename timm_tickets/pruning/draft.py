"""Drafts of tickets: what a search says of the tickets that it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..core.masks import sparsity
from ..core.states import State
from ..distributed.fsdp2 import local
from ..sparse.pretrained import Pretrained, cached_pretrained
from ..sparse.subnet import Subnet
from ..tickets.ticket import Ticket


class Draft:
    """Makes the tickets of one search.

    Args:
        subnet: The model with its mask; its origin and notes go into every ticket.
        metadata: What else does.

    Attributes:
        metadata: What goes into every ticket; callers may add to it.
        shapes: Of the model's tensors, by name, once the search has begun.
    """

    def __init__(self, subnet: Subnet, metadata: dict[str, Any]):
        self.subnet, self.metadata = subnet, metadata
        self.shapes: dict[str, Sequence[int]] = {}
        self._pretrained: tuple[Pretrained | None] | None = None  # looked for once

    def now(self) -> Ticket:
        """The ticket that the present mask gives, a copy."""
        subnet, start = self.subnet, self.subnet.start
        ticket = self.ticket(subnet.mask, subnet.baked_state() if start is None else start, subnet.start_epoch)
        return replace(Ticket.from_state(ticket.values, ticket.masks, ticket.metadata), pretrained=ticket.pretrained)

    def final(self, start: State) -> Ticket:
        """The ticket of a search that has ended: nobody will rewind to what is pruned now, so the start becomes it."""
        subnet = self.subnet
        mask = subnet.hand_over_mask_()
        values = subnet.pruned_state(start, mask)
        live = {_memory(value) for value in map(local, subnet.model.state_dict().values()) if value.is_cpu}
        for name in start:
            if _memory(start[name]) in live:  # a method has made the model's own tensors the start
                start[name] = values[name].clone()
            else:
                start[name].copy_(values[name])
        return replace(self.ticket(mask, start, subnet.start_epoch), values=dict(start))

    def ticket(self, mask: Mapping[str, Tensor], start: Mapping[str, Tensor], start_epoch: float) -> Ticket:
        """The ticket of a mask over a start, whose values are made as they are read."""
        counts = {name: int(layer.sum()) for name, layer in mask.items()}
        facts = {"sparsity": sparsity(mask), "kept": counts, "start_epoch": start_epoch, "notes": self.subnet.notes}
        origin = {"origin": self.subnet.origin} if self.subnet.origin else {}
        ticket = Ticket.over(self.subnet.pruned_state(start, mask), mask, {**self.metadata, **facts, **origin})
        ticket.pretrained = self._pretrained_start()
        return ticket

    def _pretrained_start(self) -> Pretrained | None:
        """The pretrained weights a method says it started from, if this machine has them; a search fetches nothing."""
        tag = self.subnet.origin.get("tag")
        if tag is None:
            return None
        if self._pretrained is None:
            self._pretrained = (cached_pretrained(tag, self.shapes),)
        return self._pretrained[0]


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
