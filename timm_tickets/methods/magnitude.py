"""One-shot magnitude pruning of the weights as they are.

Source: Han et al. 2015, 1506.02626, without its retraining.
"""

from collections.abc import Generator

from ..end import End
from ..method import OneShot
from ..registry import register_pruner
from ..run import Run
from ..scores import magnitude
from ..subnet import Subnet


@register_pruner("magnitude")
class Magnitude(OneShot):
    """Prune the smallest weights as given, once; no training.

    Use: give it a trained or pretrained model, then train the ticket (fine-tuning). On a random start it is a
    baseline; to train first and rewind afterwards, use ``imp`` with prune_rate equal to sparsity.
    Cost: no training.
    """

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        self.prune_(subnet, magnitude(subnet.weights_on_cpu()))
        yield from ()
