"""Optimizers: what lies inside Accelerate's and Lookahead's wrappers, calls after a step, state put back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..core.errors import SettingError
from ..core.private import inside_lookahead
from ..distributed.fsdp2 import local, shard_of


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that changes the weights, inside Accelerate's and Lookahead's wrappers.

    Hooks registered on the wrappers would never fire: Accelerate's has no registry, Lookahead's ``step`` ignores its.
    """
    if not hasattr(optimizer, "param_groups"):
        raise SettingError(
            f"optimizer: a {type(optimizer).__name__} is no optimizer; give the one that you step, built from the "
            "parameters of the model that is pruned"
        )
    while True:
        inner = inside_lookahead(optimizer) or getattr(optimizer, "optimizer", None)
        if inner is None:
            return optimizer
        optimizer = inner


def after_step(optimizer: Any, call: Callable[[], None]) -> Any:
    """Call a function after each step of an optimizer, whatever wraps it; the handle's ``remove`` ends that.

    Lookahead moves the weights after the step of the optimizer inside it; there the call comes after that too.
    """
    optimizer = _unaccelerated(optimizer)
    if inside_lookahead(optimizer) is not None:
        return _After(optimizer, "step", call)
    return optimizer.register_step_post_hook(lambda *_: call())


def after_slow(optimizer: Any, call: Callable[[], None]) -> list[Any]:
    """Call a function each time timm's Lookahead has moved the weights to its slow ones; handles, none for others.

    That happens after the step of the optimizer inside it, and in ``sync_lookahead`` without any step.
    """
    optimizer = _unaccelerated(optimizer)
    return [_After(optimizer, "update_slow", call)] if hasattr(optimizer, "update_slow") else []


def _unaccelerated(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper; Lookahead's stays."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


class _After:
    """Calls a function after a method of one object that has no hooks of its own, until removed."""

    def __init__(self, target: Any, method: str, call: Callable[[], None]):
        self._target, self._method, self._call = target, method, call
        calls = getattr(target.__dict__.get(method), "calls", None)
        if calls is not None:
            calls.append(call)
            return
        calls = [call]
        original = getattr(type(target), method)

        def followed(*args: Any, **kwargs: Any) -> Any:
            out = original(target, *args, **kwargs)
            for one in list(calls):  # a call may remove itself
                one()
            return out

        followed.calls = calls  # pyright: ignore[reportFunctionMemberAccess]
        setattr(target, method, followed)

    def remove(self) -> None:
        calls = getattr(self._target.__dict__.get(self._method), "calls", [])
        if self._call in calls:
            calls.remove(self._call)
        if not calls:
            self._target.__dict__.pop(self._method, None)


# State that an optimizer's constructor made: there to be made again.
_made: WeakKeyDictionary[Optimizer, dict[Tensor, dict[str, Any]]] = WeakKeyDictionary()


def reset_(optimizer: Optimizer) -> None:
    """Clear an optimizer's state, as if it had never stepped.

    A state that begins as zeros is zeroed in place: what a compiled or captured step uses stays where it is.
    Hyper-parameters stay as they are, but for a learning rate that a schedule has moved: it returns to where the
    schedule began, or torch's next cosine would anneal the last one's zero. State that a constructor makes (Adagrad,
    Adahessian) is put back, not only dropped, and step counters that live in the parameter groups (Lamb, Lookahead)
    return to their beginning.
    """
    if optimizer not in _made:
        counters = [[v for k, v in state.items() if str(k).endswith("step")] for state in optimizer.state.values()]
        unused = all(found and not any(found) for found in counters)
        _made[optimizer] = {p: _copy(state) for p, state in optimizer.state.items()} if unused else {}
    if begins_at_zero(optimizer):
        for state in optimizer.state.values():
            for name in [name for name in state if name not in _FROM_ZERO]:  # Lookahead's slow weights
                del state[name]
            for value in state.values():
                if value is not None:
                    local(value).zero_()
    else:
        optimizer.state.clear()
    for parameter, state in _made[optimizer].items():
        optimizer.state[parameter] = _copy(state)
    for group in optimizer.param_groups:
        if "initial_lr" in group:
            group["lr"] = group["initial_lr"]
        for key in [key for key in group if str(key).endswith("step")]:
            if key in optimizer.defaults:
                group[key] = optimizer.defaults[key]
            else:
                del group[key]


_FROM_ZERO = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def begins_at_zero(optimizer: Optimizer) -> bool:
    """Whether a state of zeros is what an optimizer begins with, to the bit: torch's SGD, Adam and AdamW.

    SGD's first momentum is the gradient itself, which zeros give too, but for dampening.
    """
    if type(optimizer) is SGD:
        return not any(group["dampening"] for group in optimizer.param_groups)
    return type(optimizer) in (Adam, AdamW)


def forget_(optimizer: Optimizer, parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Zero, in place, what an optimizer remembers of these weights.

    Args:
        optimizer: The optimizer.
        parameters: Its parameters, by name.
        weights: Bool, True for those to forget, by the same names.
    """
    for name, parameter in parameters.items():
        gone = shard_of(weights[name], parameter)
        for value in optimizer.state[parameter].values():
            if getattr(value, "shape", None) == parameter.shape:
                local(value).masked_fill_(gone, 0)


def separate_(optimizer: Optimizer, parameters: Sequence[Tensor], weight_decay: float) -> None:
    """Move parameters to groups of their own, with this weight decay and otherwise their old groups' settings."""
    wanted = {id(parameter): parameter for parameter in parameters}
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if wanted.pop(id(p), None) is not None]
        if mine and len(mine) == len(group["params"]):  # separated in an earlier run
            group["weight_decay"] = weight_decay
        elif mine:
            group["params"] = [p for p in group["params"] if not any(p is one for one in mine)]
            settings = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group(settings | {"params": mine, "weight_decay": weight_decay})
    if wanted:  # the optimizer was built before they were there
        settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        optimizer.add_param_group(settings | {"params": list(wanted.values()), "weight_decay": weight_decay})


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
