"""Trying groups: with their consumers' columns zero, whatever their producers make must not matter."""

import copy
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..core.private import forget_biases_
from ..sparse.subnet import Subnet
from .groups import Groups, halves
from .removal import Remover
from .trace import OutOfTime, plainly

_FAILS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, ZeroDivisionError)
EQUAL = 1e-9  # of the largest output; in double precision rounding makes 1e-13


def tried(model: nn.Module, images: Tensor, groups: Groups, deadline: float) -> Groups:
    """The groups that stand the test; the families that do not are named among what is left alone.

    Half of each family is tried at once, then the other half; where outputs change, family by family.

    Args:
        model: A plain copy of the model, in evaluation mode; it is given random values.
        images: What it is tried on.
        groups: The groups.
        deadline: `time.thread_time` at which it gives up.

    Raises:
        OutOfTime: It has.
    """
    if not len(groups):
        return groups
    model = randomised(copy.deepcopy(model).double())
    images = images.double()
    difference = _largest(model, images, groups, deadline)
    if difference <= EQUAL:
        groups.difference = difference
        return groups
    good, worst = torch.zeros(len(groups.families), dtype=torch.bool), 0.0
    for number, family in enumerate(groups.families):
        only = torch.zeros_like(good)
        only[number] = True
        found = _largest(model, images, groups.only(only), deadline)
        good[number] = found <= EQUAL
        if good[number]:
            worst = max(worst, found)
        else:
            groups.left += [(dim, f"when it was tried, outputs changed by {found:.1g}") for dim in family.makes]
    groups = groups.only(good)
    groups.difference = worst
    return groups


def keep_removable(model: nn.Module, images: Tensor, groups: Groups, deadline: float) -> Groups:
    """The groups that can be taken out of the module; the families that cannot are named among what is left alone.

    Half of each family is taken out of a copy, which has to compute what it did.

    Args:
        model: A plain copy of the model, in evaluation mode.
        images: What it is tried on.
        groups: The groups, with vectors.
        deadline: `time.thread_time` at which it gives up.

    Raises:
        OutOfTime: It has.
    """
    gone = next(halves(groups))
    wrong, remover = removing(model, images, groups, gone)
    good = torch.ones(len(groups.families), dtype=torch.bool)
    for number, family in enumerate(groups.families):
        if time.thread_time() > deadline:
            raise OutOfTime
        if why := remover.remove_(number, gone & (groups.family == number), wrong):
            good[number] = False
            groups.left += [(dim, f"cannot be taken out: {why}") for dim in family.makes]
    return groups.only(good)


def removing(model: nn.Module, images: Tensor, groups: Groups, gone: Tensor) -> tuple[Callable[[], str], Remover]:
    """A remover on a copy with random values, in double precision, and what tells why it computes something else.

    Args:
        model: The plain model.
        images: What it is tried on.
        groups: The groups, with vectors.
        gone: Bool, a group each: what is going to be removed; nothing reads it in the copy.
    """
    trial, images = randomised(copy.deepcopy(model).cpu().double().eval()), images.double()
    Subnet(trial, tuple(groups.shapes)).set_mask_(groups.mask(gone, reads_only=True))
    before = outputs(trial, images)

    def wrong() -> str:
        try:
            found = outputs(trial, images)
        except _FAILS as error:
            return f"the module's code needs them: {(str(error) or type(error).__name__).splitlines()[0]}"
        if found.shape != before.shape:
            return "without them outputs would have another size"
        difference = float((found - before).abs().max() / before.abs().max())
        return "" if difference <= EQUAL else f"without them outputs would change by {difference:.1g} of the largest"

    return wrong, Remover(trial, groups)


def _largest(model: nn.Module, images: Tensor, groups: Groups, deadline: float) -> float:
    """The largest change of an output over both halves, of the largest output."""
    worst = 0.0
    for gone in halves(groups):
        if time.thread_time() > deadline:
            raise OutOfTime
        work = copy.deepcopy(model)
        subnet = Subnet(work, tuple(groups.shapes))
        subnet.set_mask_(groups.mask(gone, reads_only=True))
        before = outputs(work, images)
        perturb_(subnet.parameters(), groups, gone)
        subnet.apply_()
        change = (outputs(work, images) - before).abs().max() / before.abs().max()
        worst = max(worst, float(change.nan_to_num(torch.inf, torch.inf)))
    return worst


def perturb_(weights: Mapping[str, Tensor], groups: Groups, gone: Tensor) -> None:
    """Change at random the rows that make these groups."""
    makes = {dim for one in groups.families for dim in one.makes}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for (name, dim), ids in groups.of.items():
            if (name, dim) in makes:
                hit = (ids >= 0) & gone[ids.clamp(min=0)]
                rows = weights[name].movedim(dim, 0)
                noise = torch.randn(rows[hit].shape, generator=generator, dtype=rows.dtype)
                rows[hit] += noise * rows.std()


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """The model with random values, in place: zeros and ones that a constructor leaves would hide what is read."""
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.copy_(noise(parameter) / max(fan_in, 1) ** 0.5)
        else:
            parameter.add_(0.2 * noise(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.2 * noise(buffer))
        elif name.endswith("running_var"):
            buffer.copy_(1 + 0.2 * noise(buffer).abs())
    return model


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """All that a model puts out, as one vector."""
    forget_biases_(model)
    with plainly():
        return torch.cat([one.flatten() for one in tree_leaves(model(images)) if isinstance(one, Tensor)])
