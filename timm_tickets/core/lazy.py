"""Lazy: tensors by name that are made when they are read."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor


class Lazy(Mapping[str, Tensor]):
    """Tensors that are made when they are read.

    A cut reads a layer at a time; all of them at once would take as much memory as the model.

    Args:
        names: Their names.
        make: Given a name, makes the tensor; of a live view, as the model then is.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Tensor]]]:
        # A copy, or what is pickled, is a dictionary of the tensors as they are now.
        return dict, (dict(self),)
