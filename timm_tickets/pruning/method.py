"""Method: what every pruning method can be told, and what it has to say."""

import copy
from collections.abc import Collection, Generator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, TypeAdapter
from torch import Tensor
from typing_extensions import Self

from ..core.draws import MAX_SEED
from ..core.errors import SettingError
from ..core.masks import Distribution, Masks, Scope, cut, keep_count, total
from ..core.settings import Settings, settings
from ..sparse.subnet import Subnet
from .run import Run
from .run_end import End

# One will do without a list, as a shell and YAML have it.
Wildcards = Annotated[
    tuple[str, ...],
    BeforeValidator(
        lambda given: (given,) if isinstance(given, str) else given, json_schema_input_type=str | list[str]
    ),
]


@settings
class Method(metaclass=Settings):
    """What every pruner can be told; a method adds its own settings and its `search`.

    Subclasses are made dataclasses, and their settings checked, by `register_pruner`.

    Attributes:
        name: The registered name.
        ends_trained: Whether the ticket's values are final, found in the search itself: nobody trains it again.
        reads_gradients: Whether it takes gradients other than by ``backward``.
        pairs: Names of the weights that the model standardises, of which a channel keeps two or none; from its pruner.
    """

    name: ClassVar[str] = ""
    ends_trained: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = False
    pairs: ClassVar[Collection[str]] = ()

    sparsity: Annotated[float, Field(ge=0, lt=1, description="fraction of the prunable weights to prune")]
    epochs: Annotated[int, Field(ge=1, description="epochs of one training run")] = 20
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="seed of everything random in the method")] = 0
    include: Annotated[Wildcards, Field(description="wildcards of the weights that may be pruned")] = ("*",)
    exclude: Annotated[Wildcards, Field(description="wildcards of the weights that are left alone")] = ()
    classifier: Annotated[bool, Field(description="prune the classifier too")] = False

    collapse: Annotated[
        Literal["warn", "prevent", "error"],
        Field(description="a layer pruned to nothing: report it, keep its best weight, or refuse it"),
    ] = "warn"

    def on(self, subnet: Subnet) -> Self:
        """This method as the pruner of a model has it: told which weights that standardises."""
        bound = copy.copy(self)
        object.__setattr__(bound, "pairs", subnet.standardised)  # frozen are its settings only
        return bound

    def prepare_(self, subnet: Subnet) -> None:
        """Called once, when the pruner is created: refuse a model that does not suit, attach gates, freeze.

        Raises:
            SettingError: The model does not suit.
        """

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        """Yield rounds, receive their ends; leave the subnet rewound and masked.

        On entry the subnet's mask keeps everything and its rewind point is the model as it was given; a method that
        `ends_trained` has none. What a round ended with is there until the next one is asked for, then the pruner lets
        go of it. Of a round's only run it is a view of the model, to be read before the method changes that.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it searches")

    def cut(
        self,
        masks: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        keep: int | None = None,
        spare: Collection[str] | None = None,
    ) -> Masks:
        """Of what masks keep, the weights of the highest scores: every method's mask is cut here.

        The method's own settings hold: ``collapse``, and ``scope`` and ``distribution`` where it has them. That a layer
        is empty is told by the pruner at the end of a round: learned masks come and go within one.

        Args:
            masks: Bool, by parameter name; what they prune stays pruned. ``all_kept(subnet.mask)`` begins anew.
            scores: Float, same names and shapes, on any device; higher means keep.
            keep: How many weights to keep; as many as the asked sparsity keeps where None.
            spare: Layers that keep at least their best weight; all of them where None and ``collapse`` is ``prevent``.

        Returns:
            New masks that keep exactly so many.
        """
        keep = keep_count(total(masks), self.sparsity) if keep is None else keep
        scope: Scope = getattr(self, "scope", "global")
        distribution: Distribution = getattr(self, "distribution", "uniform")
        if spare is None:
            spare = masks if self.collapse == "prevent" else ()
        # Scores of another shape are a method's own rows of them.
        pairs = [name for name in masks if name in self.pairs and masks[name].ndim > 1]
        return cut(masks, scores, keep, scope, distribution, spare, pairs)

    def described(self) -> dict[str, Any]:
        """The registered name and every setting, as JSON types."""
        return {"name": self.name, **TypeAdapter(type(self)).dump_python(self, mode="json")}

    def runs(self, subnet: Subnet) -> int | None:
        """How many runs the search will ask for, where that is known beforehand."""
        return None


@settings
class OneShot(Method):
    """A method that cuts its mask once, from one set of scores."""

    scope: Annotated[Scope, Field(description="compare scores across all layers, or within each")] = "global"
    distribution: Annotated[Distribution, Field(description="layerwise, the density of each layer")] = "uniform"

    def prepare_(self, subnet: Subnet) -> None:
        if self.scope == "global" and self.distribution != "uniform":
            raise SettingError(
                f"pruner.distribution: {self.distribution!r} says what each layer keeps, and scope=global lets the "
                "scores decide that; set scope=layerwise, or leave distribution out"
            )

    def runs(self, subnet: Subnet) -> int:
        return 0
