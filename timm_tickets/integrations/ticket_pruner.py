"""Tickets inside torch-pruning: a pruner of its kind that removes what a ticket has pruned whole, and nothing else."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..core.errors import SettingError, TicketError, shown
from ..core.optional import torch_pruning
from ..core.warn import warn
from ..structure.dependencies import axis_of
from ..structure.find import PATIENCE, find_groups
from ..structure.groups import Dim, Family, Groups
from ..structure.trace import plainly
from ..structure.verify import EQUAL, randomised
from ..tickets.ticket import Ticket, load_ticket
from ..tickets.transfer import not_weights
from .torch_pruning import MATRICES, TicketImportance, made_by

_SETTINGS = ("customized_pruners", "forward_fn", "ignored_layers", "num_heads", "output_transform")
_SETTINGS += ("root_module_types", "unwrapped_parameters")


def _base() -> Any:
    try:
        return torch_pruning("TicketPruner").pruner.BasePruner
    except SettingError:
        return object  # it can be named without torch-pruning, and says what is missing when it is made


BasePruner: Any = _base()


class TicketPruner(BasePruner):
    """Removes the channels and heads that nothing in a ticket reads, through torch-pruning's graph; nothing else.

    What goes is found, and tried, as ``granularity=channel`` does it: a channel whose readers' columns are all pruned.
    Where torch-pruning's graph would take something else along, or outputs would change on a copy with random values,
    or something alive still reads a channel that the ticket has pruned, it is kept, and named in `kept`.

    Args:
        model: The model with the ticket's zeros in it (``ticket.apply_(model)``, or trained with ``ticket.attach``).
        example_inputs: As torch-pruning wants them.
        ticket: The ticket, or its path.
        **settings: Of ``torch_pruning.pruner.BasePruner`` those that shape its graph: ``ignored_layers``,
            ``customized_pruners``, ``unwrapped_parameters``, ``num_heads``, ``root_module_types``, ``forward_fn``,
            ``output_transform``.

    Attributes:
        kept: What was kept though the ticket has pruned it: the layers, how many channels, why.
        removed: How many channels and heads are gone.

    Raises:
        SettingError: torch-pruning is missing, or cannot follow the model; or another setting.
        TicketError: The ticket is for another architecture, or its zeros are not in the model.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, ticket: Ticket | str | Path, **settings: Any):
        torch_pruning("TicketPruner")
        if strange := settings.keys() - _SETTINGS:
            raise SettingError(
                f"{min(strange)}: is no setting of TicketPruner, whose ticket says what goes; leave it out. It has "
                + ", ".join(_SETTINGS)
            )
        self.ticket = ticket if isinstance(ticket, Ticket) else load_ticket(ticket)
        _check(self.ticket, model)
        self.groups = find_groups(model, classifier=True, seconds=PATIENCE)
        self._ids = dict(self.groups.of)  # the group of each index that is still there
        self._dead = _unread(self.ticket, self.groups)
        self._left = torch.ones(len(self.groups), dtype=torch.bool)
        self.kept: list[tuple[str, int, str]] = []
        # Its own defaults are dictionaries that all its pruners share.
        fresh: dict[str, Any] = {name: {} for name in ("in_channel_groups", "out_channel_groups", "num_heads")}
        modes = {module: module.training for module in model.modules()}  # its graph is traced in evaluation mode
        try:
            # First, as a forward pass that fails under torch-pruning leaves its hooks in the model.
            self._twin = _Twin(model, self.groups, self._dead, example_inputs, settings.get("forward_fn"))
            with torch.enable_grad():  # its graph is made of what autograd has seen
                super().__init__(model, example_inputs, TicketImportance(self.ticket), **(fresh | settings))
        except (SettingError, TicketError):
            raise
        except Exception as error:  # whatever its graph raises on a model that it cannot follow
            raise SettingError(
                f"torch-pruning cannot follow this {type(model).__name__}: {type(error).__name__}: "
                f"{shown(str(error))}; give it ignored_layers or unwrapped_parameters, or compact the ticket instead"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Remove all of it; or, interactively, give a group at a time, to be removed by its ``prune()`` or left.

        Args:
            interactive: As of ``torch_pruning.pruner.BasePruner.step``.
        """
        self.current_step += 1
        if interactive:
            return self._removals()
        for group in self._removals():
            group.prune()
        return None

    @property
    def removed(self) -> int:
        """How many channels and heads are gone."""
        return int((~self._left).sum())

    def _removals(self) -> Iterator[Any]:
        """The groups of torch-pruning's to remove, each as the model then is; in between the caller removes them."""
        self.kept = _alive(self.ticket, self.groups, self._dead, self.model)
        for number, family in enumerate(self.groups.families):
            there = (self.groups.family == number) & self._left
            mine = there & self._dead
            if torch.equal(mine, there) and mine.any():
                mine[mine.nonzero()[0]] = False
                self.kept.append((family.name, 1, "a layer has to keep one"))
            if not (count := int(mine.sum())):
                continue
            new = self._numbers(family, int(there.sum()), mine)
            found = self._found(family, mine, new)
            if isinstance(found, str):
                self.kept.append((family.name, count, found))
                continue
            root = found[0].dep.layer
            before = tuple(root.weight.shape)
            yield found
            if tuple(root.weight.shape) != before:
                for (path, name), value in new.items():
                    setattr(self.model.get_submodule(path), name, value)
                self._twin.follow_()
                self._ids = {dim: ids[~_within(ids, mine)] for dim, ids in self._ids.items()}
                self._left &= ~mine
        if self.kept:
            told = "; ".join(f"{count} of {name} ({why})" for name, count, why in self.kept[:5])
            told += f"; and {len(self.kept) - 5} more, in its `kept`" if len(self.kept) > 5 else ""
            warn(f"TicketPruner: channels that the ticket has pruned were kept: {told}")

    def _found(self, family: Family, gone: Tensor, new: "dict[tuple[str, str], int]") -> Any:
        """The group of torch-pruning's that removes these groups and nothing else; or why there is none."""
        wanted = {dim: _within(ids, gone).nonzero().flatten().tolist() for dim, ids in self._ids.items()}
        wanted = {dim: set(index) for dim, index in wanted.items() if index}
        modules, whys = dict(self.model.named_modules()), []
        for dims, makes in ((family.makes, True), (family.reads, False)):
            for name, dim in dims:
                layer: Any = modules.get(name.removesuffix(".weight"))
                grouped = dim == 1 and getattr(layer, "groups", 1) > 1  # its indices are not those of channels
                if not isinstance(layer, MATRICES) or axis_of(layer, makes) != dim or grouped:
                    continue
                pruner = self.DG.get_pruner_of_module(layer)
                prune = pruner.prune_out_channels if makes else pruner.prune_in_channels
                try:
                    group = self.DG.get_pruning_group(layer, prune, sorted(wanted[name, dim]))
                    if not (why := self._against(group, wanted, new)):
                        return group
                except Exception as error:  # whatever its graph raises where it cannot follow
                    why = f"torch-pruning's graph fails: {type(error).__name__}: {shown(str(error))}"
                whys.append(why)
        return whys[0] if whys else "no convolution or linear layer of torch-pruning's makes or reads them"

    def _against(self, group: Any, wanted: dict[Dim, set[int]], new: "dict[tuple[str, str], int]") -> str:
        """What speaks against removing a group; empty where nothing does."""
        names = {one: name for name, one in self.model.named_modules()}
        names |= {one: name for name, one in self.model.named_parameters()}
        touched: dict[Dim, set[int]] = {}
        for dep, idxs in group:
            makes = made_by(dep)
            if makes is not None:
                layer, axis = dep.layer, axis_of(dep.layer, makes)
                each = layer.weight.shape[1] if axis == 1 else len(layer.weight)
                touched.setdefault((f"{names[layer]}.weight", axis), set()).update(index % each for index in idxs)
            if self.DG.is_out_channel_pruning_fn(dep.handler) and any(dep.layer is one for one in self.ignored_layers):
                return f"{names.get(dep.layer, dep.target.name)} is in ignored_layers"
        for dim in {**touched, **wanted}:
            more, fewer = (
                (touched.get(dim, set()) - wanted.get(dim, set())),
                wanted.get(dim, set()) - touched.get(dim, set()),
            )
            if more or fewer:
                told = "would remove" if more else "would not remove"
                side = "rows" if dim[1] == 0 else "columns"
                return f"torch-pruning's graph {told} {len(more or fewer)} {side} of {dim[0]} as well"
        for dep, idxs in group:
            count = (
                self.DG.get_out_channels if self.DG.is_out_channel_pruning_fn(dep.handler) else self.DG.get_in_channels
            )
            if (there := count(dep.target)) is not None and there <= len(idxs):
                return f"torch-pruning's graph would remove all of {names.get(dep.layer, dep.target.name)}"
        return self._twin.against(group, names, new)

    def _numbers(self, family: Family, count: int, gone: Tensor) -> "dict[tuple[str, str], int]":
        """What modules that count heads are told, by module and attribute: torch-pruning leaves that to its user."""
        if family.kind != "head":
            return {}
        left, out = count - int(gone.sum()), {}
        widths = {len(ids): int((~_within(ids, gone)).sum()) for ids in (self._ids[dim] for dim in family.reads)}
        for path in dict.fromkeys(name.rsplit(".", 2)[0] for name, _ in (*family.makes, *family.reads)):
            for name, value in vars(self.model.get_submodule(path)).items():
                if type(value) is int and "head" in name and "dim" not in name and value == count:
                    out[path, name] = left
                elif type(value) is int and "dim" in name and value in widths:
                    out[path, name] = widths[value]
        return out


class _Twin:
    """A copy of the model with random values, in double precision, on which each removal is tried first.

    Args:
        model: The model.
        groups: Its groups.
        dead: Those that nothing reads: bool, a group each.
        inputs: As torch-pruning is given them.
        forward: Given a model and inputs, runs it; the model itself where None.
    """

    def __init__(self, model: nn.Module, groups: Groups, dead: Tensor, inputs: Any, forward: Any):
        def there(one: Any) -> Any:
            return one.cpu().double() if isinstance(one, Tensor) and one.is_floating_point() else one

        self.inputs, self.forward = tree_map(there, inputs), forward
        self.model = self.next = randomised(copy.deepcopy(model).cpu().double().eval())
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, dim in {dim for one in groups.families for dim in one.reads}:
                weights[name].movedim(dim, 0)[_within(groups.of[name, dim], dead)] = 0
        self.before = self._outputs(self.model)

    @torch.no_grad()
    def against(self, group: Any, names: dict[Any, str], new: "dict[tuple[str, str], int]") -> str:
        """Try to remove a group of torch-pruning's; what speaks against that, empty where nothing does."""
        work = copy.deepcopy(self.model)
        for dep, idxs in group:
            path, handler = names.get(dep.layer), dep.handler
            if path is None:
                continue  # an operation between layers
            handler.__self__.pruning_dim = dep.target.pruning_dim
            if isinstance(dep.layer, nn.Parameter):
                owner, _, leaf = path.rpartition(".")
                setattr(work.get_submodule(owner), leaf, handler(work.get_parameter(path), idxs))
            else:
                handler(work.get_submodule(path), idxs)
        for (path, name), value in new.items():
            setattr(work.get_submodule(path), name, value)
        try:
            after = self._outputs(work)
        except Exception as error:  # whatever the model's own code raises
            return f"the module's code needs them: {type(error).__name__}: {shown(str(error))}"
        difference = torch.inf
        if after.shape == self.before.shape:
            difference = float((after - self.before).abs().max() / self.before.abs().max())
        self.next = work
        return "" if difference <= EQUAL else f"outputs would change by {difference:.1g} of the largest"

    def follow_(self) -> None:
        """What was tried last has been removed from the model."""
        self.model = self.next

    def _outputs(self, model: nn.Module) -> Tensor:
        with plainly():
            if self.forward is not None:
                out = self.forward(model, self.inputs)
            elif isinstance(self.inputs, dict):
                out = model(**self.inputs)
            else:
                out = model(self.inputs) if isinstance(self.inputs, Tensor) else model(*self.inputs)
        return torch.cat([one.flatten() for one in tree_leaves(out) if isinstance(one, Tensor)])


def _within(ids: Tensor, chosen: Tensor) -> Tensor:
    """Which of these indices are of chosen groups."""
    return (ids >= 0) & chosen[ids.clamp(min=0)]


def _check(ticket: Ticket, model: nn.Module) -> None:
    ticket.check_architecture(model)
    weights = dict(model.named_parameters())
    wrong = not_weights(ticket.masks, weights)
    wrong = wrong or [name for name, mask in ticket.masks.items() if weights[name].shape != mask.shape]
    if wrong:
        raise TicketError(
            f"the ticket does not fit this model: {len(wrong)} of its {len(ticket.masks)} masks, such as "
            f"{shown(wrong[0])}, are over no weight of it of their shape; create the architecture that the ticket was "
            "found on, with its arguments"
        )
    alive = sum(int((weights[name].detach().cpu()[~mask] != 0).sum()) for name, mask in ticket.masks.items())
    if alive:
        raise TicketError(
            f"{alive:,} weights that the ticket has pruned are not zero in this model, and removing them would change "
            "its outputs; call ticket.apply_(model), or ticket.mask_(model) to keep the model's own weights"
        )


def _unread(ticket: Ticket, groups: Groups) -> Tensor:
    """The groups that nothing reads, as the ticket has pruned all columns that do: bool, a group each."""
    alive = torch.zeros(len(groups), dtype=torch.bool)
    for number, family in enumerate(groups.families):
        for name, dim in family.reads:
            ids = groups.of[name, dim]
            mask = ticket.masks.get(name, torch.ones(groups.shapes[name], dtype=torch.bool))
            read = mask.movedim(dim, 0).flatten(1).any(1)
            alive[ids[read & _within(ids, groups.family == number)]] = True
    return ~alive


def _alive(ticket: Ticket, groups: Groups, dead: Tensor, model: nn.Module) -> list[tuple[str, int, str]]:
    """Channels that the ticket makes no longer, and something reads: what a normalisation or a bias leaves of them."""
    modules, left, out = dict(model.named_modules()), dict(groups.left), []
    for name, mask in ticket.masks.items():
        layer = modules.get(name.removesuffix(".weight"))
        if not isinstance(layer, MATRICES):
            continue
        axis = axis_of(layer, True)
        unmade = ~mask.movedim(axis, 0).flatten(1).any(1)
        ids = groups.of.get((name, axis), torch.full((len(unmade),), -1))
        if read := int((unmade & _within(ids, ~dead)).sum()):
            out.append((name, read, "something alive still reads them"))
        if stay := int((unmade & (ids < 0)).sum()):
            out.append((name, stay, left.get((name, axis), "in no group")))
    return out
