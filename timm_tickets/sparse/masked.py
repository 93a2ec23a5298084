"""The masks of a model's prunable weights: they live where the weights live, in the same memory for good."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core import topk
from ..core.lazy import Lazy
from ..core.masks import AllKept, Counted, Masks, all_kept, full_masks, kept, layer_counts
from ..distributed.fsdp2 import local, reshard_, shard_of
from .named_weights import NamedWeights
from .standardised import prune_

if TYPE_CHECKING:
    from .holder import Holder


class MaskedWeights(NamedWeights):
    """A model's prunable weights and a mask over each.

    A mask that prunes something is on its weight's device: behind a gate it is the gate's, elsewhere the hooks that
    hold it read it there. Nobody asks the device for one that is set within a step. In a model that FSDP2 has split
    masks are whole and on the CPU, where they are cut, but for the gates'.

    Args:
        model: The model, wrapped or not.
        names: Names of the prunable weights.

    Attributes: those of `NamedWeights`, and
        changes: How often the mask was set: whoever keeps a copy of the model masks that again when it grows.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__(model, names)
        self._mask = full_masks(self.weights())  # on the CPU as long as nothing is pruned
        self._known = Counted({}, {name: mask.numel() for name, mask in self._mask.items()})
        self._holder: Holder | None = None
        self._held: set[str] = set()
        self._lent = False
        self.changes = 0

    @property
    def mask(self) -> Masks:
        """The present mask, bool, copied to the CPU; replace it with `set_mask_`."""
        return dict(self.live_mask())

    def live_mask(self) -> Lazy:
        """As `mask`, but each is copied when it is read, as it then is."""
        return Lazy(self.names, lambda name: self._stored(name).to("cpu", copy=True))

    def device_mask(self) -> Counted | AllKept:
        """The present mask where it lives, not copied: `set_mask_` writes into it. How much it keeps is not asked."""
        if reshard_(self.model):
            found = {name: self._stored(name).cpu() for name in self.names}
            return Counted(found, self._known.counts, self._known.kept)
        weights = self.weights()
        if not self.gates and self._known.counts is not None and all(map(self._whole, self.names)):
            return all_kept(weights)
        return Counted({n: self._there(n, weights[n]) for n in self.names}, self._known.counts, self._known.kept)

    def _stored(self, name: str) -> Tensor:
        return self.gates[name].mask if name in self.gates else self._mask[name]

    def _there(self, name: str, weight: Tensor) -> Tensor:
        """A mask on its weight's device, for good; of a model that is not split."""
        if name not in self.gates and self._mask[name].device != weight.device:
            self._mask[name] = self._mask[name].to(weight.device)
        return self._stored(name)

    def _whole(self, name: str) -> bool:
        """Whether a layer is known to keep everything."""
        return self._known.counts is not None and self._known.counts[name] == self._mask_size(name)

    def _mask_size(self, name: str) -> int:
        return self._stored(name).numel()

    def counts(self) -> dict[str, int]:
        """How many weights each layer keeps; a device is asked where nobody knows."""
        if self._known.counts is None:
            self._known = Counted({}, layer_counts({name: self._stored(name) for name in self.names}))
        return layer_counts(self._known)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights now pruned, in [0, 1)."""
        if self._known.kept is None:
            self.counts()
        return 1 - kept(self._known) / sum(map(self._mask_size, self.names))

    @torch.no_grad()
    def set_mask_(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the mask and zero what it prunes; behind a gate, let through what it keeps. Hooks follow at once.

        Masks that say how much they keep (`Counted`, as a cut gives them) are believed.
        """
        if torch.compiler.is_compiling():  # a step behind gates; `note_moved_` follows it
            for name, gate in self.gates.items():
                gate.mask.copy_(masks[name])
            return
        self._known = Counted({}, getattr(masks, "counts", None), getattr(masks, "kept", None))
        split, weights = reshard_(self.model), {} if self._all_gated() else self.weights()
        for name in self.names:
            new = masks[name].detach()
            if self._lent and name not in self.gates:
                self._mask[name] = new.to(self._mask[name].device, torch.bool, copy=True)
            else:
                mask = self._stored(name) if split or name in self.gates else self._there(name, weights[name])
                mask.copy_(new)
        self._lent = False
        if self._holder is not None and not self._all_gated():
            self._holder.take_(self._to_hold(ask=False))
        self.changes += 1
        self.apply_()

    def note_moved_(self) -> None:
        """A compiled or captured step has set the gates' masks, so that nothing is known of them any more."""
        self._known = Counted({})
        self.changes += 1

    def hand_over_mask_(self) -> Masks:
        """The mask for good, on the CPU: what is set later is written elsewhere where it lives there too."""
        found = {name: self._stored(name).cpu() for name in self.names}
        self._lent = any(mask is self._stored(name) for name, mask in found.items())
        return found

    def _all_gated(self) -> bool:
        return len(self.gates) == len(self.names)

    def _to_hold(self, ask: bool, whole: bool = False) -> Masks:
        """The masks that prune something, and all that did; where a card would be asked for that, all masks."""
        names = [name for name in self.names if name not in self.gates]
        weights = self.weights() if names else {}
        split = reshard_(self.model)
        found = {name: self._mask[name] if split else self._there(name, weights[name]) for name in names}
        if self._known.counts is None and names and (ask or topk.on_host(found[names[0]])):
            self.counts()
        self._held |= {name for name in names if whole or not self._whole(name)}
        return {name: mask for name, mask in found.items() if name in self._held}

    @torch.no_grad()
    def apply_(self) -> None:
        """Set every pruned weight to exactly zero; not behind a gate, where the gate does that."""
        if self._all_gated():
            return
        split = reshard_(self.model)
        for name, weight in self.weights().items():
            if name not in self.gates and not self._whole(name):
                mask = self._mask[name] if split else self._there(name, weight)
                prune_(local(weight), shard_of(mask, weight), name in self.standardised)
