"""COLT: partitions, intersection, the arithmetic of its rates, the last round."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import timm_tickets as tt
from timm_tickets.core.masks import cut, intersect, kept


def colt(**settings):
    return tt.get_method("colt")(**{"sparsity": 0.5, **settings})


def test_no_class_is_dropped(model):
    for partitions in (2, 3, 4, 10):
        runs = colt(partitions=partitions).round(tt.Subnet(model, ()))
        classes = [one for run in runs for one in run.classes]
        assert classes == list(range(10))  # contiguous, each once
        assert max(len(run.classes) for run in runs) - min(len(run.classes) for run in runs) <= 1


def test_more_parts_than_classes_are_refused(model):
    with pytest.raises(tt.SettingError, match="11 parts cannot be made of the model's 10 classes"):
        tt.create_pruner("colt", model, sparsity=0.5, partitions=11)


def test_parts_of_the_images_are_disjoint_and_whole(model):
    images = TensorDataset(torch.arange(23), torch.zeros(23))
    runs = colt(split="samples", partitions=3).round(tt.Subnet(model, ()))
    runs = [tt.Training(run, tt.Subnet(model, ())) for run in runs]
    parts = [sorted(int(x) for x, _ in run.subset(images)) for run in runs]
    assert sorted(one for part in parts for one in part) == list(range(23))
    assert sorted(map(len, parts)) == [7, 8, 8]


def test_masks_at_chance_keep_the_rate_to_the_number_of_parts():
    """0.85^n: methods that find unrelated masks prune at this effective rate."""
    generator = torch.Generator().manual_seed(0)
    full = {"w": torch.ones(200_000, dtype=torch.bool)}
    keep = round(0.85 * 200_000)
    for partitions, expected in ((2, 0.7225), (3, 0.614125)):
        masks = [cut(full, {"w": torch.rand(200_000, generator=generator)}, keep) for _ in range(partitions)]
        assert kept(intersect(*masks)) / 200_000 == pytest.approx(expected, abs=0.003)


def test_the_last_round_bisects_the_common_cut_and_drops_the_smallest_sums():
    # By hand. Cut 2 keeps {0..3} and {2..5}: 2 in common, too few for 3. Cut 1 keeps {0..4} and {1..5}: {1, 2, 3, 4}.
    # One of these goes, the smallest sum: 5 + 2, 4 + 3, 3.5 + 4, 2 + 5 are 7, 7, 7.5, 7; of equals the last.
    mask = {"w": torch.ones(6, dtype=torch.bool)}
    scores = [{"w": torch.tensor([6.0, 5.0, 4.0, 3.5, 2.0, 1.0])}, {"w": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])}]
    method = colt()
    assert method.overlap(mask, scores, 2)["w"].tolist() == [False, False, True, True, False, False]
    found = method.exactly(mask, scores, 2, 3)
    assert found["w"].tolist() == [False, True, True, True, False, False]


class Three(nn.Module):
    num_classes = 4
    pretrained_cfg = {"classifier": "head"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(10, 1, bias=False), nn.Linear(1, 4)
        with torch.no_grad():
            self.a.weight.copy_(torch.arange(1.0, 11.0)[None])


@pytest.mark.filterwarnings("ignore:.*without an optimizer step")
def test_rounds_start_from_the_same_init_intersect_and_note_the_overlap():
    model = Three()
    pruner = tt.create_pruner("colt", model, sparsity=0.4, prune_rate=0.2)
    starts = []
    for run in pruner:
        starts.append((run.round, run.part, tuple(run.classes), model.a.weight.flatten().tolist()))
        with torch.no_grad():  # part 0 shrinks the first weight to nothing, part 1 the last
            model.a.weight[0, 0 if run.part == 0 else 9] = 0
    ones = list(map(float, range(1, 11)))
    # Round 0: part 0 prunes 1 (now 0) and 2, part 1 prunes 10 (now 0) and 1. These three are gone, 7 kept by all.
    after = [0.0, 0.0, *ones[2:9], 0.0]
    # Round 1: the goal of 6 is one away; 0.2 * 7 = 1 each, the same weight (3): exactly 6.
    assert starts == [(0, 0, (0, 1), ones), (0, 1, (2, 3), ones), (1, 0, (0, 1), after), (1, 1, (2, 3), after)]
    assert model.a.weight.flatten().tolist() == [0.0, 0.0, 0.0, *ones[3:9], 0.0]
    notes = pruner.ticket.metadata["notes"]
    assert notes[0] == {"kept_by_all": 0.7, "by_chance": pytest.approx(0.64), "pruned_by_each": 0.2}
    assert notes[1]["kept_by_all"] == pytest.approx(6 / 7)
