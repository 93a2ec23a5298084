"""Method: what every pruning method can be told, and what it has to say."""

import copy
from collections.abc import Collection, Generator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator
from pydantic_core import ArgsKwargs
from torch import Tensor
from typing_extensions import Self

from ..core.draws import MAX_SEED
from ..core.errors import SettingError
from ..core.masks import Distribution, Masks, Scope, keep_count
from ..core.patterns import parsed
from ..core.settings import Settings, settings
from ..sparse.subnet import Subnet
from ..structure.units import Of, Weights, units_of
from .run import Run
from .run_end import End

# One will do without a list, as a shell and YAML have it.
Wildcards = Annotated[
    tuple[str, ...],
    BeforeValidator(
        lambda given: (given,) if isinstance(given, str) else given, json_schema_input_type=str | list[str]
    ),
]


def _granularity(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value // 60}:{value % 60}"  # YAML reads 2:4 without quotes as minutes and seconds
    if isinstance(value, str):
        parsed(value)
    return value


Granularity = Annotated[
    str,
    BeforeValidator(_granularity),
    Field(
        description="what is cut as one: weight, channel (rows that make one and columns that read it; heads too), "
        "head, n of m consecutive weights (2:4), blocks ('block 4x4')"
    ),
]
STRUCTURE = {"granularity": "weight", "sparsity_of": "weights", "round_to": 1, "min_channels": 1}


@settings
class Method(metaclass=Settings):
    """What every pruner can be told; a method adds its own settings and its `search`.

    Subclasses are made dataclasses, and their settings checked, by `register_pruner`.

    Attributes:
        name: The registered name.
        ends_trained: Whether the ticket's values are final, found in the search itself: nobody trains it again.
        trains_weights: Whether the ticket's weights are trained; false where they are only chosen among.
        reads_gradients: Whether it takes gradients other than by ``backward``.
        units: What is cut as one; of the pruner's own copy (`on`) that of its model.
    """

    name: ClassVar[str] = ""
    ends_trained: ClassVar[bool] = False
    trains_weights: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = False
    units: ClassVar[Weights] = Weights()

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
    granularity: Granularity = "weight"
    sparsity_of: Annotated[Of, Field(description="of channels and heads: what the sparsity is a fraction of")] = (
        "weights"
    )
    round_to: Annotated[int, Field(ge=1, description="channels that a layer keeps are a multiple of it")] = 1
    min_channels: Annotated[int, Field(ge=1, description="channels that every layer keeps")] = 1

    @model_validator(mode="before")
    @classmethod
    def _layer_by_layer(cls, values: Any) -> Any:
        """Channels are compared within their layer where nobody says otherwise: across layers, some would starve."""
        given = (values.kwargs if isinstance(values, ArgsKwargs) else values) or {}
        fields: Any = getattr(cls, "__dataclass_fields__", {})
        of_weights = "scope" in fields and fields["granularity"].default == "weight"
        if given.get("granularity") in ("channel", "head") and of_weights and "scope" not in given:
            given = {**given, "scope": "layerwise"}
            return ArgsKwargs(values.args, given) if isinstance(values, ArgsKwargs) else given
        return values

    @model_validator(mode="after")
    def _of_channels(self) -> Any:
        kind = parsed(self.granularity).kind
        of_channels = [name for name in STRUCTURE if name != "granularity"]
        wrong = [name for name in of_channels if getattr(self, name) != STRUCTURE[name]]
        if wrong and kind not in ("channel", "head"):
            raise ValueError(f"{wrong[0]}: is of channels; set granularity=channel (or head), or leave it out")
        if kind != "weight" and (single := self.of_weights()):
            raise ValueError(
                f"granularity: {self.granularity!r} cannot be had with {self.name}, which {single}; leave "
                "it out, or take another pruner, such as imp, colt, gradual or magnitude"
            )
        distribution = getattr(self, "distribution", "uniform")
        if kind in ("channel", "head", "n:m") and distribution != "uniform":
            raise ValueError(
                f"distribution: {distribution!r} counts the weights of each layer, and granularity={self.granularity} "
                "takes the same share of all; leave one of both out"
            )
        return self

    def of_weights(self) -> str:
        """What it does that only single weights can be cut for; empty where they may be cut as channels or patterns."""
        return ""

    def on(self, subnet: Subnet) -> Self:
        """This method with the units of a model; its sparsity is one that they can meet.

        Raises:
            SettingError: It is not, or the model has no such units.
        """
        bound = copy.copy(self)
        wanted = (self.include, self.exclude, self.classifier)
        counted = (self.sparsity_of, self.round_to, self.min_channels)
        units = units_of(self.granularity, subnet, wanted, counted)
        object.__setattr__(bound, "units", units)
        units.check(subnet.mask, self.sparsity)
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
            keep: How many of `total` to keep; as many as the asked sparsity keeps where None.
            spare: Layers that keep at least their best weight; all of them where None and ``collapse`` is ``prevent``.

        Returns:
            New masks that keep exactly so many; channels, heads and blocks as near below as they allow.
        """
        keep = keep_count(self.total(masks), self.sparsity) if keep is None else keep
        alone: Scope = "layerwise" if self.granularity in ("channel", "head") else "global"
        scope: Scope = getattr(self, "scope", alone)
        distribution: Distribution = getattr(self, "distribution", "uniform")
        if spare is None:
            spare = masks if self.collapse == "prevent" else ()
        return self.units.cut(masks, scores, keep, scope, distribution, spare)

    def total(self, masks: Mapping[str, Tensor]) -> int:
        """What the sparsity is a fraction of: the weights under the masks, or the units that were asked for."""
        return self.units.total(masks)

    def kept(self, masks: Mapping[str, Tensor]) -> int:
        """How many of `total` the masks keep."""
        return self.units.kept(masks)

    def told(self, masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """What a ticket notes of its units, in JSON types: nothing where they are single weights."""
        if self.granularity == "weight":
            return []
        reached = 1 - self.kept(masks) / self.total(masks)
        facts = {"granularity": self.granularity, "sparsity_of": self.sparsity_of, "asked": self.sparsity}
        return [{**facts, "reached": reached, **self.units.told(masks)}]

    def described(self) -> dict[str, Any]:
        """The registered name and every setting, as JSON types; of single weights nothing of channels."""
        found = TypeAdapter(type(self)).dump_python(self, mode="json")
        of_weights = self.granularity == "weight"  # as before there was anything else: folders and recipes go on
        return {"name": self.name} | {n: v for n, v in found.items() if not (of_weights and n in STRUCTURE)}

    def runs(self, subnet: Subnet) -> int | None:
        """How many runs the search will ask for, where that is known beforehand."""
        return None

    def round_rate(self) -> float | None:
        """Fraction of the remaining weights that a round prunes, where it is the same in all: IMP at this rate is its
        control."""
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
