"""Method: what every pruning method can be told, and what it has to say."""

from collections.abc import Generator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from .draws import MAX_SEED
from .end import End
from .masks import Distribution, Masks, Scope, all_kept, keep_count, kept, prune, total
from .run import Run
from .settings import SettingError
from .subnet import Subnet


@settings(frozen=True, kw_only=True, config={"extra": "forbid"})
class Method:
    """What every pruner can be told; a method adds its own settings and its `search`.

    Subclasses are made dataclasses, and their settings checked, by `register_pruner`.

    Attributes:
        name: The registered name.
        ends_trained: Whether the ticket's values are final, found in the search itself: nobody trains it again.
        reads_gradients: Whether it takes gradients other than by ``backward``.
    """

    name: ClassVar[str] = ""
    ends_trained: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = False

    sparsity: Annotated[float, Field(ge=0, lt=1, description="fraction of the prunable weights to prune")]
    epochs: Annotated[int, Field(ge=1, description="epochs of one training run")] = 20
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="seed of everything random in the method")] = 0
    include: Annotated[tuple[str, ...], Field(description="wildcards of the weights that may be pruned")] = ("*",)
    exclude: Annotated[tuple[str, ...], Field(description="wildcards of the weights that are left alone")] = ()
    classifier: Annotated[bool, Field(description="prune the classifier too")] = False

    collapse: Annotated[
        Literal["warn", "prevent", "error"],
        Field(description="a layer pruned to nothing: report it, keep its best weight, or refuse it"),
    ] = "warn"

    def prepare_(self, subnet: Subnet) -> None:
        """Called once, when the pruner is created: refuse a model that does not suit, attach gates, freeze.

        Raises:
            SettingError: The model does not suit.
        """

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        """Yield rounds, receive their ends; leave the subnet rewound and masked.

        On entry the subnet's mask keeps everything and its rewind point is the model as it was given; a method that
        `ends_trained` has none. A round's ends come in a list that is the method's own: it is held until the next
        round is asked for, so ``end = (yield [run]).pop()`` is what lets ``del end`` free it before.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it searches")

    def best(self, subnet: Subnet, scores: Mapping[str, Tensor], scope: Scope = "global") -> Masks:
        """Of all weights the best, as many as the asked sparsity keeps, whatever is pruned now."""
        count = total(subnet.mask)
        return self.pruned_masks(all_kept(subnet.mask), scores, count - keep_count(count, self.sparsity), scope)

    def pruned_masks(
        self,
        masks: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        count: int,
        scope: Scope = "global",
        distribution: Distribution = "uniform",
    ) -> Masks:
        """`masks.prune` as this method's `collapse` says: every cut goes through here, where the scores are at hand.

        That a layer is empty is told by the pruner at the end of a round: learned masks come and go within one.
        """
        return prune(masks, scores, count, scope, distribution, masks if self.collapse == "prevent" else ())

    def described(self) -> dict[str, Any]:
        """The registered name and every setting, as JSON types."""
        return {"name": self.name, **TypeAdapter(type(self)).dump_python(self, mode="json")}

    def runs(self, subnet: Subnet) -> int | None:
        """How many runs the search will ask for, where that is known beforehand."""
        return None


@settings(frozen=True, kw_only=True, config={"extra": "forbid"})
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

    def prune_(self, subnet: Subnet, scores: Mapping[str, Tensor]) -> None:
        """Prune the lowest scores among what is kept, to the asked sparsity exactly."""
        cut = kept(subnet.mask) - keep_count(total(subnet.mask), self.sparsity)
        self.cut_(subnet, scores, cut)

    def cut_(self, subnet: Subnet, scores: Mapping[str, Tensor], count: int) -> None:
        """Prune this many more, the lowest scores among what is kept."""
        subnet.set_mask_(self.pruned_masks(subnet.mask, scores, count, self.scope, self.distribution))

    def runs(self, subnet: Subnet) -> int:
        return 0
