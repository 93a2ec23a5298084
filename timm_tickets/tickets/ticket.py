"""Tickets: masks, the weights to start from, and what they are; saved in one small file that is safe to open.

The file is described in header.py.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import TicketError, shown
from ..core.lazy import Lazy
from ..core.masks import Masks, kept, sparsity, total
from ..core.states import State
from ..distributed.fsdp2 import load_state_
from ..sparse.describe import describe_model
from ..sparse.named_weights import aliases
from ..sparse.pretrained import Pretrained
from ..sparse.subnet import Subnet
from ..sparse.wrappers import plain_model
from ..structure.compact import compacted
from . import reader, writer
from .address import ticket_at
from .header import fingerprint, pruned_value
from .split_norm import split_as
from .transfer import corresponding, not_weights


@dataclass(eq=False, repr=False)
class Ticket:
    """A sparse subnetwork of a timm model and the weights it starts from.

    Attributes:
        masks: By parameter name, bool, True where the weight is kept.
        values: The whole state dict to start from, on the CPU; what the masks prune counts as zero.
        metadata: Architecture and its arguments, pruner and settings, versions, metrics: JSON types only. Under
            ``origin`` a method's claim of where the start comes from (`starts.Origin`); saving checks it bit for bit.
        pretrained: The pretrained weights that the values were made from, where that is so: saving checks it and then
            writes their tag and a hash instead of every tensor that is theirs.
    """

    masks: Masks
    values: Mapping[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    pretrained: Pretrained | None = None

    def __repr__(self) -> str:
        # A file may say anything here, and be shown before anybody has looked at it.
        facts = (self.metadata.get(key) for key in ("model", "pruner"))
        told = [one.get(key) for one, key in zip(facts, ("architecture", "name"), strict=True) if isinstance(one, dict)]
        names = "".join(f"{shown(name, 60)}, " for name in told if isinstance(name, str))
        count = f"{kept(self.masks):,} of {total(self.masks):,} weights kept in {len(self.masks)} layers"
        return f"Ticket({names}{f'sparsity {self.sparsity:.4f}, ' if self.masks else ''}{count})"

    @classmethod
    def of(cls, model: nn.Module, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> "Ticket":
        """The ticket of these masks over a model's present weights; the model is not changed."""
        inner = plain_model(model)
        state = Subnet(inner, ()).state()
        for name, others in aliases(inner, masks).items():
            state |= {one: state[one].masked_fill(~masks[name].cpu(), 0) for one in others}
        return cls.from_state(state, masks, {"model": describe_model(inner), **(metadata or {})})

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], masks: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> "Ticket":
        """The ticket of these masks over a state dict on the CPU, both copied."""
        masks = {name: mask.to("cpu", copy=True) for name, mask in masks.items()}
        # A layer at a time: a pruned state and its clone would be two more copies of the model beside the ticket.
        values = {
            name: pruned_value(name, value, masks) if name in masks else value.clone() for name, value in state.items()
        }
        return cls.over(values, masks, metadata)

    @classmethod
    def over(cls, values: Mapping[str, Tensor], masks: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> "Ticket":
        """The ticket of these very values and masks, which from here on are its own."""
        return cls(dict(masks), values, {**metadata, "versions": _versions()})

    def state(self) -> State:
        """The state dict to start from: `values`, exactly zero where pruned.

        Give it to a model by `apply_`, which also moves what weight-standardised layers keep to mean zero.
        """
        return {name: pruned_value(name, value, self.masks) for name, value in self.values.items()}

    @property
    def sparsity(self) -> float:
        """Fraction of the weights under the masks that is pruned, in [0, 1)."""
        return sparsity(self.masks)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the masks and of the model the ticket rebuilds: names, dtypes, shapes and every bit."""
        return fingerprint(self.masks, self.values)

    def save(self, path: str | Path, dtype: str | None = None) -> dict[str, Any]:
        """Write the ticket: to a temporary file, then renamed. What a seed or pretrained weights give is left out.

        Args:
            path: Where to.
            dtype: None keeps every value as it is. ``float16`` or ``bfloat16`` rounds the floating-point values that
                the file stores (not what is regenerated); loading gives them back in their own dtype.

        Returns:
            What rounding lost: ``dtype``, ``max_absolute_error`` and ``max_relative_error`` over the stored values; the
            file says it too, in ``metadata["rounding"]``. Empty where nothing was rounded.

        Raises:
            OSError: It could not be written; a file that stood there before is untouched.
            SettingError: Another dtype.
            TicketError: It has no masks, holds a tensor of a dtype that tickets do not know, or a value that is too
                large for the asked dtype.
        """
        state = Lazy(self.values, lambda name: pruned_value(name, self.values[name], self.masks))
        return writer.write(Path(path), self.masks, state, dict(self.metadata), self.pretrained, dtype)

    def apply_(self, model: nn.Module) -> nn.Module:
        """Turn a model of the same architecture into the ticket: its starting weights, zero where pruned.

        Applying twice is the same as applying once. Train on with `attach`, or the pruned weights grow back.

        Raises:
            TicketError: Another architecture, parameters that differ in name or shape, or a mask over what is not a
                parameter; the model is unchanged.
        """
        inner = _plain(model)
        self.check_architecture(inner)
        values = split_as(self.values, inner)
        self._check_names(inner.state_dict(), values)
        self._check_masks(inner)
        load_state_(inner, split_as(self.state(), inner))
        Subnet(inner, tuple(self.masks)).set_mask_(self.masks)  # moves what standardised layers keep to mean zero
        return model

    def mask_(self, model: nn.Module) -> nn.Module:
        """Prune a model of the same architecture as the ticket is, and leave it its own weights.

        Raises:
            TicketError: Another architecture, or a mask over what is not a parameter; the model is unchanged.
        """
        inner = plain_model(model)
        self.check_architecture(inner)
        self._check_masks(inner)
        Subnet(inner, tuple(self.masks)).set_mask_(self.masks)
        return model

    def check_architecture(self, model: nn.Module) -> None:
        """Refuse a model of another architecture.

        Raises:
            TicketError: It is one.
        """
        model_facts = self.metadata.get("model")
        expected = model_facts.get("architecture") if isinstance(model_facts, dict) else None
        found = describe_model(model)["architecture"]
        if expected and found and expected != found:
            raise TicketError(
                f"this ticket is for '{shown(expected)}', the model is '{found}'; create a '{shown(expected)}' instead"
            )

    def transfer_(self, model: nn.Module) -> "Ticket":
        """Put the ticket on its architecture built for another task: other classes, input channels or image size.

        Args:
            model: The model, freshly built for the target; what the ticket says nothing of stays as it is.

        Returns:
            The ticket of the model as it now is: fit to be saved, attached and trained. A mask on the old classifier is
            not among its masks: the new head is dense.

        Raises:
            TicketError: Another architecture, tensors that cannot correspond, or masks over what is not a weight, each
                named; or all masks are on the old classifier. The model is unchanged.
        """
        inner = _plain(model)
        self.check_architecture(inner)
        state, masks = corresponding(self.state(), self.masks, inner)
        load_state_(inner, state)
        Subnet(inner, tuple(masks)).set_mask_(masks)
        facts: Any = self.metadata.get("model")
        described = (facts if isinstance(facts, dict) else {}) | describe_model(inner)
        described.pop("kwargs", None)  # those of the source's task
        # Measured on the source, or true of its masks only.
        gone = ("metrics", "dense", "start_epoch", "kept", "sparsity", "notes")
        kept = {key: value for key, value in self.metadata.items() if key not in gone}
        facts = {**kept, "model": described, "sparsity": sparsity(masks), "transferred_from": self.fingerprint}
        moved = Ticket.of(inner, masks, facts)
        moved.pretrained = self.pretrained  # saving checks what is still theirs
        return moved

    def attach(self, model: nn.Module, optimizer: Any) -> Any:
        """Keep the ticket's masks through training: pruned weights are exactly zero now and after every step.

        Args:
            model: The model the ticket was applied to.
            optimizer: Its optimizer, plain or wrapped by Accelerate.

        Returns:
            The same optimizer.

        Raises:
            TicketError: A mask is over what is not a parameter of the model, or of another shape; it is unchanged.
        """
        inner = _plain(model)
        self._check_masks(inner)
        subnet = Subnet(inner, tuple(self.masks))
        subnet.set_mask_(self.masks)
        subnet.hold_(optimizer)
        return optimizer

    def compact(self, model: nn.Module) -> nn.Module:
        """The smaller model: without the channels and heads that nothing reads, with the same outputs.

        What a ticket of ``granularity=channel`` or ``head`` prunes is removed; of single weights only what happens to
        leave a whole channel unread. Dead channels that have to stay are named in a warning. The outputs of both are
        compared in double precision. Save it with `timm_tickets.save_compact`.

        Args:
            model: A model that the ticket was applied to, trained since or not; it stays as it is.

        Returns:
            A model of the same classes with smaller tensors, in the same mode and on the same device.

        Raises:
            SettingError: Its channels cannot be followed, or the smaller one would compute something else.
            TicketError: The model does not have the ticket's zeros.
        """
        inner = _plain(model)
        self._check_masks(inner)
        weights = dict(inner.named_parameters())
        grown = {
            name: int((weights[name].detach()[~mask.to(weights[name].device)] != 0).sum())
            for name, mask in self.masks.items()
        }
        if any(grown.values()):
            names = [name for name, count in grown.items() if count]
            raise TicketError(
                f"{sum(grown.values()):,} of the weights that the ticket prunes are not zero in the model, in "
                f"{len(names)} layers ({', '.join(map(shown, names[:3]))}); apply_ the ticket, and train with attach"
            )
        found = compacted(inner)
        for line in found.told():
            warnings.warn(line, stacklevel=2)
        return found.model

    def _check_names(self, state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        missing = [name for name in values if name not in state]
        extra = [name for name in state if name not in values]
        if missing or extra:
            raise TicketError(
                f"the ticket does not fit this model: {len(missing)} of its tensors are not in the model "
                f"({', '.join(map(shown, missing[:3])) or 'none'}) and {len(extra)} of the model's are not in it "
                f"({', '.join(extra[:3]) or 'none'}); create the architecture the ticket was found on, and apply it "
                "before reparameterize_model"
            )
        self._check_shapes(state, values)

    def _check_masks(self, model: nn.Module) -> None:
        weights = dict(model.named_parameters())
        if wrong := not_weights(self.masks, weights):
            raise TicketError(
                f"the ticket does not fit this model: {len(wrong)} of its {len(self.masks)} masks are over what is not "
                f"a weight of it ({', '.join(map(shown, wrong[:3]))}); create the architecture the ticket was found on"
            )
        self._check_shapes(weights, self.masks)

    @staticmethod
    def _check_shapes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        for name, value in wanted.items():
            if state[name].shape != value.shape:
                raise TicketError(
                    f"{shown(name)} is {list(value.shape)} in the ticket and {list(state[name].shape)} in the model; "
                    "create the model with the ticket's num_classes, in_chans and img_size; or carry the ticket "
                    "over to this model with `ticket.transfer_(model)` (of `wrap` and `timm-tickets run`, the start "
                    "'transfer')"
                )


def load_ticket(path: str | Path, pretrained: Mapping[str, Tensor] | None = None) -> Ticket:
    """Read a ticket: a file, ``hf-hub:user/name`` or ``local-dir:path``, as timm has these prefixes.

    Nothing in it is executed, and every size is checked before memory is taken.

    Memory is at most 8 KiB for each byte of the file and 128 MiB, pretrained weights not counted: a byte may stand for
    up to 256 weights, of which a rebuilt one takes up to 9 bytes, and up to 32 while it is drawn again. Pretrained
    weights are built or fetched only where what the file needs of them has the shapes of timm's architecture, as it is
    for the file's classes and input channels, and where they too are at most 256 for each byte.

    Time grows with the file's size too, by up to 30 microseconds a byte on one core (normal weights, drawn again); the
    outline of a pretrained start's architecture takes up to 2 seconds more.

    Args:
        path: The file, of this or an earlier format.
        pretrained: State dict of the pretrained weights, for a ticket that starts from such; where not given, timm
            loads the weights whose tag the ticket names (a name of timm.list_pretrained(), never an address), from
            the network if they are not stored on this machine.

    Raises:
        FileNotFoundError: There is no such file.
        TicketError: Not a ticket, cut short, changed, or written by a newer version; or its pretrained weights cannot
            be loaded, or are not those it was made from.
    """
    masks, values, metadata, source = reader.read(ticket_at(path), pretrained)
    return Ticket(masks, values, metadata, source)


def _plain(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TicketError(f"model: a {type(model).__name__} is no model; the model comes first, then the optimizer")
    return plain_model(model)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("timm-tickets", "timm", "torch")}
