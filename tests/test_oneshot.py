"""SNIP, GraSP and SynFlow on two-layer networks worked out by hand."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

import timm_tickets as tt
from timm_tickets.core import scores


class TwoLayers(nn.Module):
    """y = B (A x), no bias; both layers prunable."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Linear(1, len(a), bias=False), nn.Linear(len(a), 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor(a)[:, None])
            self.b.weight.copy_(torch.tensor(b)[None])

    def forward(self, x):
        return self.b(self.a(x.flatten(1)))


def read(pruner, model, inputs):
    """The short run, as a user's loop: an optimizer that moves the weights, a batch after the other."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(inputs), torch.zeros(len(inputs), 1)), batch_size=1
    )
    for run in pruner:
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
        for _ in range(run.epochs):
            for x, y in run.subset(loader):
                run.loss(lambda output, target: (output - target).square().sum() / 2, model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()


def test_snip_by_hand():
    # y = 3 * 2 - 0.5 * 1 = 5.5 and L = y^2 / 2. dL/dA = 5.5 * (3, 0.5), dL/dB = 5.5 * (2, -1).
    # |w g|: A 33, 2.75; B 33, 2.75.
    model = TwoLayers([2.0, -1.0], [3.0, 0.5])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {"a.weight": torch.tensor([[16.5], [2.75]]), "b.weight": torch.tensor([[11.0, -5.5]])}
    found = scores.snip(model.state_dict(), gradients)
    assert found["a.weight"].flatten().tolist() == [33.0, 2.75]
    assert found["b.weight"].flatten().tolist() == [33.0, 2.75]
    pruner = tt.create_pruner("snip", model, sparsity=0.5)
    read(pruner, model, [[1.0]])
    assert pruner.ticket.masks["a.weight"].flatten().tolist() == [True, False]
    assert pruner.ticket.masks["b.weight"].flatten().tolist() == [True, False]
    assert model.a.weight.flatten().tolist() == [2.0, 0.0]  # restored, then pruned
    assert torch.equal(before["b.weight"] * pruner.ticket.masks["b.weight"], model.b.weight)


def test_gradients_of_several_batches_are_added_at_the_same_weights():
    # For input x, y = 5.5 x and the gradients are x^2 times those of x = 1: for 1 and 2 together 5 times.
    model = TwoLayers([2.0, -1.0], [3.0, 0.5])
    pruner = tt.create_pruner("snip", model, sparsity=0.5, batches=2)
    read(pruner, model, [[1.0], [2.0]])
    run = tt.create_pruner("snip", TwoLayers([2.0, -1.0], [3.0, 0.5]), sparsity=0.5, batches=2)
    ends = []
    first = next(run)
    optimizer = first.attach(torch.optim.SGD(run.subnet.model.parameters(), 0.1))
    for x in (1.0, 2.0):
        output = run.subnet.model(torch.tensor([[x]]))
        first.loss(lambda output, _: output.square().sum() / 2, output, None).backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append(first.scores["a.weight"].flatten().tolist())
    assert ends == [[16.5, 2.75], [5 * 16.5, 5 * 2.75]]


def test_grasp_by_hand():
    # L = (ab)^2 / 2, g = (a b^2, a^2 b), H = [[b^2, 2ab], [2ab, a^2]]. At a = 2, b = 3: g = (18, 12),
    # Hg = (9 * 18 + 12 * 12, 12 * 18 + 4 * 12) = (306, 264), w Hg = (612, 792): a goes first.
    model = TwoLayers([2.0], [3.0])
    products = {"a.weight": torch.tensor([[306.0]]), "b.weight": torch.tensor([[264.0]])}
    found = scores.grasp(model.state_dict(), products)
    assert (found["a.weight"].item(), found["b.weight"].item()) == (612.0, 792.0)
    assert products_of(TwoLayers([2.0], [3.0]), [[1.0]]) == pytest.approx({"a.weight": 306, "b.weight": 264})


def products_of(model, inputs, autocast=False, **settings):
    """GraSP's H g after its two runs, a batch an input, at temperature 1 unless told."""
    pruner = tt.create_pruner("grasp", model, **{"sparsity": 0.5, "batches": len(inputs), "temperature": 1} | settings)
    for run in pruner:
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
        for x in inputs:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = run.loss(lambda output, _: output.square().sum() / 2, model(torch.tensor([x])), None)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if run.index == 1:
            return {name: run.scores[name].item() for name in pruner.subnet.names}
    raise AssertionError("no second run")


def test_grasp_takes_the_gradient_of_all_batches_first():
    # For input x, g and H are x^2 times those of 1: of 1 and 2 together g = 5 g1, H g = 5 H1 5 g1 = 25 * (306, 264).
    # A sum of each batch's own H g would be (1 + 16) times that.
    found = products_of(TwoLayers([2.0], [3.0]), [[1.0], [2.0]])
    assert found == pytest.approx({"a.weight": 25 * 306, "b.weight": 25 * 264})


@pytest.mark.filterwarnings("ignore:.*layers are pruned to nothing")
def test_the_classifier_is_in_grasps_gradient():
    # Only a is pruned, but its H g has b's part: 9 * 18 + 12 * 12 = 306; without the classifier it would be 162.
    model = TwoLayers([2.0, 1.0], [3.0, 0.0])
    model.pretrained_cfg = {"classifier": "b"}
    pruner = tt.create_pruner("grasp", model, sparsity=0.5, batches=1, temperature=1)
    read(pruner, model, [[1.0]])
    assert list(pruner.ticket.masks) == ["a.weight"]
    model = TwoLayers([2.0], [3.0])
    assert products_of(model, [[1.0]], exclude=("b*",), sparsity=0.0) == pytest.approx({"a.weight": 306})


def test_grasp_divides_the_logits_by_its_temperature():
    # L = (ab / 2)^2 / 2: g is a quarter, H g a sixteenth.
    found = products_of(TwoLayers([2.0], [3.0]), [[1.0]], temperature=2)
    assert found == pytest.approx({"a.weight": 306 / 16, "b.weight": 264 / 16})
    assert tt.get_method("grasp")(sparsity=0.5).temperature == 200  # the released code's


def test_gradients_are_read_in_full_precision_whatever_the_autocast():
    """1.00390625 is 1 + 2^-8, which bfloat16 rounds to 1."""
    model, x = TwoLayers([1.00390625], [3.0]), [[1.00390625]]
    assert products_of(copy.deepcopy(model), x, autocast=True) == products_of(copy.deepcopy(model), x)
    for autocast in (False, True):
        pruner = tt.create_pruner("snip", copy.deepcopy(model), sparsity=0.5)
        run = next(pruner)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = pruner.subnet.model(torch.tensor(x))
            run.loss(lambda output, _: output.sum(), output, None)
        assert run.scores["b.weight"].item() == 1.00390625**2  # in bfloat16 it would be 1


def test_a_second_derivative_is_read_through_attention():
    """The loop's own forward pass may use a fused kernel that has none; and its graph is not used."""
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=4, img_size=32)
    pruner = tt.create_pruner("grasp", vit, sparsity=0.5, batches=1)
    for run in pruner:
        optimizer = run.attach(torch.optim.SGD(vit.parameters(), 0.1))
        run.loss(nn.functional.cross_entropy, vit(torch.randn(8, 3, 32, 32)), torch.arange(8) % 4).backward()
        optimizer.step()
    assert pruner.ticket.sparsity == pytest.approx(0.5, abs=1e-5)
    assert not vit._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.*no gradient reaches", "ignore:.*layers are pruned to nothing")
@pytest.mark.parametrize("batch_size", [4, 64])  # of 17 images: the last of batches of four would be one image
def test_as_many_images_of_each_class_are_read_and_the_same_ones_twice(model, batch_size):
    labels = torch.tensor([0] * 50 + [1] * 7 + [2] * 2 + [3] * 20)
    images = torch.randn(len(labels), 3, 32, 32)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels), batch_size=batch_size, shuffle=True, drop_last=True
    )
    pruner, seen = tt.create_pruner("grasp", model, sparsity=0.5, images_per_class=5), []
    for run in pruner:
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
        batches = list(run.subset(loader))
        assert max(len(y) for _, y in batches) - min(len(y) for _, y in batches) <= len(batches)
        seen.append(torch.cat([x for x, _ in batches]).sum(0))
        assert torch.cat([y for _, y in batches]).bincount().tolist() == [5, 5, 2, 5]  # all of a class with fewer
        for x, y in batches:
            run.loss(nn.functional.cross_entropy, model(x), y).backward()
            optimizer.step()
    assert torch.allclose(*seen, atol=1e-5)


def test_images_without_a_class_are_refused():
    model = TwoLayers([2.0], [3.0])
    pruner = tt.create_pruner("grasp", model, sparsity=0.5)
    with pytest.raises(ValueError, match=r"no single class.*`batches`"):
        read(pruner, model, [[1.0]])


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_random_masks_do_not_follow_weights_drawn_under_the_same_seed(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, bias=False) for _ in range(4)))
    masks = tt.create_pruner("random", copy.deepcopy(model), sparsity=0.5, seed=seed).ticket.masks
    for kept in (masks, tt.shuffled_masks(masks, seed)):
        for name, weight in model.named_parameters():
            # The mean of 1152 uniform weights: under 5 standard errors from zero.
            assert abs(weight[kept[name]].mean()) < 5 * weight.std() / kept[name].sum() ** 0.5


@pytest.mark.filterwarnings("ignore:.*layers are pruned to nothing")
def test_grasp_removes_what_the_paper_removes():
    """The highest -w * Hg: of -612 and -792 that is the first."""
    model = TwoLayers([2.0], [3.0])
    pruner = tt.create_pruner("grasp", model, sparsity=0.5, batches=1)
    read(pruner, model, [[1.0]])
    assert not pruner.ticket.masks["a.weight"].item()
    assert pruner.ticket.masks["b.weight"].item()


def test_synflow_by_hand():
    # R = 3 * 2 + 0.5 * 1 = 6.5 with absolute values; |w| dR/d|w|: A 6, 0.5; B 6, 0.5. Without data: the sign of A's
    # second weight does not matter.
    model = TwoLayers([2.0, -1.0], [3.0, 0.5])
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = scores.synflow(model, masks, (1, 1, 1))
    assert found["a.weight"].flatten().tolist() == [6.0, 0.5]
    assert found["b.weight"].flatten().tolist() == [6.0, 0.5]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    masks["b.weight"][0, 0] = False  # what is pruned carries nothing, and so neither does what leads to it
    found = scores.synflow(model, masks, (1, 1, 1))
    assert found["a.weight"].flatten().tolist() == [0.0, 0.5]


def test_synflow_conserves_flow_through_each_layer():
    """The sum of scores is the same for every layer of a chain without branches (Tanaka et al., theorem 1)."""
    chain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False), nn.Flatten())
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in chain.state_dict().items()}
    sums = [score.sum().item() for score in scores.synflow(chain, masks, (3, 6, 6)).values()]
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*layers are pruned to nothing")
def test_synflow_cuts_no_layer_off_where_magnitude_does():
    """A chain with one wide layer of small weights (Tanaka et al., section 3: layer collapse)."""
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 3))
    with torch.no_grad():
        chain[2].weight.mul_(0.01)
    kept = {}
    for name, more in (("magnitude", {}), ("synflow", {"input_size": (3, 8, 8)})):
        ticket = tt.create_pruner(name, copy.deepcopy(chain), sparsity=0.99, **more).ticket
        kept[name] = [int(mask.sum()) for mask in ticket.masks.values()]
        assert sum(kept[name]) == 108
    assert min(kept["magnitude"]) == 0
    assert min(kept["synflow"]) > 0


@pytest.mark.parametrize("name", ["snip", "grasp"])
@pytest.mark.parametrize("zero_init_last", [True, False])
def test_layers_that_no_gradient_reaches_are_told(name, zero_init_last):
    """timm starts the last scale of a residual branch at zero: the convolutions before it would all be cut first."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, zero_init_last=zero_init_last)
    pruner = tt.create_pruner(name, model, sparsity=0.5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for run in pruner:
            optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
            run.loss(nn.functional.cross_entropy, model(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
            optimizer.step()
    blind = [str(one.message) for one in told if "no gradient reaches" in str(one.message)]
    assert len(blind) == zero_init_last
    if blind:
        assert "reaches 9 of 15 layers (layer1.0.conv1.weight, layer1.0.conv2.weight" in blind[0]


@pytest.mark.parametrize("zero_init_last", [True, False])
def test_layers_without_flow_are_told(zero_init_last):
    model = timm.create_model("test_resnet", num_classes=10, zero_init_last=zero_init_last)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert tt.create_pruner("synflow", model, sparsity=0.1, iterations=2).ticket
    blind = [str(one.message) for one in told]
    assert len(blind) == zero_init_last
    assert not blind or blind[0].startswith("synflow: no gradient reaches 9 of 15 layers")


def test_synflow_conserves_flow_where_batch_norm_has_been_trained():
    """Running means would add to the flow, as biases would: they count as nothing, not as their absolute values."""
    chain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False))
    with torch.no_grad():
        chain[1].running_mean.normal_()
        chain[1].running_var.uniform_(0.5, 2)
        chain[1].bias.normal_()
    masks = {name: torch.ones_like(chain.state_dict()[name], dtype=torch.bool) for name in ("0.weight", "3.weight")}
    sums = [score.sum().item() for score in scores.synflow(chain, masks, (3, 6, 6)).values()]
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)
