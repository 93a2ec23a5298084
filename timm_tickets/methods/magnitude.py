"""One-shot magnitude pruning of the weights as they are.

Source: Han et al. 2015, 1506.02626, without its retraining.
"""

from collections.abc import Generator

from ..core.scores import magnitude
from ..pruning.method import OneShot
from ..pruning.registry import register_pruner
from ..pruning.run import Run
from ..pruning.run_end import End
from ..sparse.subnet import Subnet


@register_pruner("magnitude")
class Magnitude(OneShot):
    """Prune the smallest weights as given, once; no training.

    Use: give it a trained or pretrained model, then train the ticket (fine-tuning). On a random start it is a
    baseline; to train first and rewind afterwards, use ``imp`` with prune_rate equal to sparsity.
    Cost: no training.
    """

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        subnet.set_mask_(self.cut(subnet.device_mask(), magnitude(subnet.device_weights())))
        yield from ()
