import os

import pytest
import timm
import torch
from sklearn.datasets import load_digits


def pytest_configure(config):
    # Workers of pytest-xdist: with all cores each, they would wait for one another.
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
        torch.set_num_threads(1)


# With several workers a long file that comes last is waited for alone.
LONG = (
    *("test_parallel", "test_faults", "test_sharded", "test_experiment", "test_groups", "test_contract", "test_imp"),
    *("test_learn_digits", "test_replicates", "test_tweaks", "test_processes", "test_outcome", "test_ticket"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a card: torch.cuda.is_available() is false"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10)


@pytest.fixture(scope="session")
def digits():
    """(train images, train labels, test images, test labels): 3 x 32 x 32, normalised; real data for plain loops."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
    images = torch.nn.functional.interpolate((images - 0.3) / 0.38, size=32, mode="bilinear")
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return images[train], labels[train], images[test], labels[test]


@pytest.fixture
def unregister():
    """Forget the pruners and tweaks that a test registers."""
    from timm_tickets.pruning.registry import _pruners
    from timm_tickets.tweaks.registry import _tweaks

    kinds = (_pruners, _tweaks)
    before = [dict(kind.load()) for kind in kinds]  # loading happens only once: not to restore nothing
    yield
    for kind, classes in zip(kinds, before, strict=True):
        kind.classes = classes


collect_ignore_glob = ["scripts/*"]  # scripts run when imported; tests/test_scripts.py runs them
