"""Learned masks: the gates' forward and gradient, CS's reset, freezing, swaps, all by hand; and that they learn."""

import copy
import math
import warnings

import pytest
import timm
import torch
from torch import nn

import timm_tickets as tt
from timm_tickets.core.masks import swap
from timm_tickets.sparse.gates import Gate, SigmoidGate
from timm_tickets.sparse.random_start import frozen_patterns


def through(gate, weight, upstream):
    """The gate's output, and the gradients of sum(upstream * output) to weight and score."""
    weight = weight.clone().requires_grad_(True)
    output = gate(weight)
    (output * upstream).sum().backward()
    return output.detach(), weight.grad, gate.score.grad


def test_edge_popup_gradient_by_hand():
    # w = (2, -3, 4), s = (-0.5, 0.1, 0.7), keep the two largest |s|: mask 1 0 1. scale 2, upstream g = (1, 10, 100).
    # out = w * 2 * m = (4, 0, 8); dL/ds = sign(s) * w * scale * g = (-4, -60, 800): the pruned weight has one too.
    gate = Gate(torch.tensor([-0.5, 0.1, 0.7]), torch.tensor([True, False, True]), by_magnitude=True)
    gate.scale.fill_(2)
    out, to_weight, to_score = through(gate, torch.tensor([2.0, -3.0, 4.0]), torch.tensor([1.0, 10.0, 100.0]))
    assert out.tolist() == [4.0, 0.0, 8.0]
    assert to_score.tolist() == [-4.0, -60.0, 800.0]
    assert to_weight.tolist() == [2.0, 0.0, 200.0]


def test_jackpot_gradient_by_hand():
    # dL/ds = w * g, whatever the sign of s.
    gate = Gate(torch.tensor([-0.5, 0.1, 0.7]), torch.tensor([True, False, True]), by_magnitude=False)
    _, _, to_score = through(gate, torch.tensor([2.0, -3.0, 4.0]), torch.tensor([1.0, 10.0, 100.0]))
    assert to_score.tolist() == [2.0, -30.0, 400.0]


def test_frozen_weights_have_no_score_and_no_gradient():
    free = torch.tensor([[True, False], [False, True]])
    gate = Gate(torch.tensor([0.3, -0.4]), torch.tensor([[True, True], [False, False]]), by_magnitude=True, free=free)
    out, _, to_score = through(
        gate, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    )
    assert out.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert to_score.tolist() == [1.0, -4000.0]  # only the two free ones: sign(s) * w * g
    assert gate.full_score().tolist() == [[pytest.approx(0.3), 0.0], [0.0, pytest.approx(-0.4)]]


def test_sigmoid_gate_and_its_gradient_by_hand():
    # s = ln 3, beta = 1: sigmoid = 3/4, c = 2. out = w * c * 3/4; ds = w * c * beta * (3/4)(1/4) * g.
    gate = SigmoidGate(torch.tensor([math.log(3)]), torch.tensor([True]))
    gate.scale.fill_(2)
    out, to_weight, to_score = through(gate, torch.tensor([4.0]), torch.tensor([1.0]))
    assert out.item() == pytest.approx(6)
    assert to_weight.item() == pytest.approx(1.5)
    assert to_score.item() == pytest.approx(4 * 2 * 3 / 16)
    gate.beta.fill_(200)
    assert gate(torch.tensor([4.0])).item() == pytest.approx(8)
    gate.mask.fill_(False)
    gate.eval()  # the release validates the soft network
    assert gate(torch.tensor([4.0])).item() == pytest.approx(8)
    gate.soft = False
    assert gate(torch.tensor([4.0])).item() == 0


def test_cs_starts_as_the_network_itself_and_hardens_to_two_hundred(model):
    plain = copy.deepcopy(model)
    pruner = tt.create_pruner("continuous_sparsification", model, sparsity=0.5, s0=0.1, rounds=1, epochs=1)
    run = next(pruner)
    image = torch.randn(2, 3, 32, 32)
    model.train(), plain.train()
    assert torch.allclose(model(image), plain(image), atol=1e-5)
    gate = next(iter(pruner.subnet.gates.values()))
    assert gate.beta.item() == 1
    assert gate.scale.item() == pytest.approx(1 + math.exp(-0.1))
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.01))
    run.batches_per_epoch = 4
    betas = []
    for _ in range(4):
        run.loss(nn.functional.cross_entropy, model(image), torch.tensor([0, 1])).backward()
        optimizer.step()
        betas.append(gate.beta.item())
    assert betas == pytest.approx([200**0.25, 200**0.5, 200**0.75, 200], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["edge_popup", "frozen_slt", "jackpot", "continuous_sparsification"])
@pytest.mark.filterwarnings("ignore:jackpot:UserWarning")
def test_gates_train_weights_of_any_precision(name, dtype):
    """Scores are at least single precision; what passes the gate has the weight's."""
    model = timm.create_model("test_vit", num_classes=4, img_size=32).to(dtype)
    more = {"rewind": "0ep"} if name == "continuous_sparsification" else {}
    pruner = tt.create_pruner(name, model, sparsity=0.5, epochs=1, **more)
    run = next(pruner)
    optimizer, run.batches_per_epoch = run.attach(torch.optim.SGD(model.parameters(), 0.1)), 1
    before = pruner.subnet.scores()
    assert all(score.dtype == torch.promote_types(dtype, torch.float32) for score in before.values())
    output = model(torch.randn(4, 3, 32, 32, dtype=dtype))
    assert output.dtype == dtype
    run.loss(torch.nn.functional.cross_entropy, output, torch.arange(4)).backward()
    optimizer.step()
    assert any(not torch.equal(before[key], score) for key, score in pruner.subnet.scores().items())


def test_cs_penalty_is_lambda_times_the_sum_of_the_soft_mask(model):
    pruner = tt.create_pruner("continuous_sparsification", model, sparsity=0.5, penalty=0.001, rounds=1)
    run = next(pruner)
    count = sum(mask.numel() for mask in pruner.subnet.mask.values())
    loss = run.loss(lambda output, target: torch.tensor(1.0), None, None)
    assert loss.item() == pytest.approx(1 + 0.001 * count / 2, rel=1e-5)  # sigmoid(0) = 1/2
    with torch.no_grad():  # scoring a validation batch adds nothing
        assert run.loss(lambda output, target: torch.tensor(1.0), None, None).item() == 1


def test_cs_reset_keeps_the_suppressed_suppressed():
    """The released code resets beta first: min(s, s0) brings nearly everything back. Here it is min(200 s, s0)."""
    method = tt.get_method("continuous_sparsification")(sparsity=0.5, s0=0.05)
    score = torch.tensor([0.3, 0.01, -0.001, -0.1])
    assert method.restarted({"w": score})["w"].tolist() == pytest.approx([0.05, 0.05, -0.2, -20.0])
    soft = torch.sigmoid(method.restarted({"w": score})["w"])
    assert soft[3] < 1e-8
    released = torch.sigmoid(score.clamp(max=0.05))
    assert released[3] > 0.47  # the bug: as good as undecided


def test_cs_left_to_its_penalty_keeps_scores_above_zero(model):
    pruner = tt.create_pruner("continuous_sparsification", model, sparsity=0.5, meet="penalty", rounds=1, rewind="0ep")
    run = next(pruner)
    run.attach(torch.optim.SGD(model.parameters(), 0.1))
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(mask.shape, generator=generator) for name, mask in pruner.subnet.mask.items()}
    pruner.subnet.load_scores_(scores)
    with pytest.warns(UserWarning, match="without an optimizer step"):
        assert next(pruner, None) is None
    assert all(torch.equal(mask, scores[name] > 0) for name, mask in pruner.ticket.masks.items())


def test_first_scores_by_hand(model):
    # A 3x3 convolution of 16 channels has fan_in 144: uniform in +-1/12, or normal of deviation sqrt(2/144).
    def first(name, **settings):
        pruner = tt.create_pruner(name, copy.deepcopy(model), sparsity=0.5, **settings)
        next(pruner)
        scores = pruner.subnet.scores()
        return next(s for s in scores.values() if s[0].numel() == 144).flatten()

    uniform = first("edge_popup")
    assert uniform.abs().max() < 1 / 12
    assert uniform.std().item() == pytest.approx(1 / 12 / 3**0.5, rel=0.05)
    for normal in (first("edge_popup", first_scores="normal"), first("frozen_slt", frozen=0.0)):
        assert normal.std().item() == pytest.approx((2 / 144) ** 0.5, rel=0.1)
        assert normal.abs().max() > 0.25


def test_edge_popup_keeps_the_largest_magnitudes_exactly_with_ties(model):
    pruner = tt.create_pruner("edge_popup", model, sparsity=0.75, scope="layerwise")
    next(pruner)
    name = pruner.subnet.names[0]
    subnet, scores = pruner.subnet, pruner.subnet.scores()
    subnet.load_scores_({n: torch.full_like(s, -0.5) for n, s in scores.items()})
    pruner.method.settle_(subnet)
    count = sum(mask.numel() for mask in subnet.mask.values())
    assert sum(int(mask.sum()) for mask in subnet.mask.values()) == count - round(0.75 * count)
    for layer, mask in subnet.mask.items():
        assert abs(int(mask.sum()) - 0.25 * mask.numel()) <= 1, layer
    flat = subnet.mask[name].flatten()
    assert flat[: int(flat.sum())].all()  # of equals the first


def test_dynamic_scale_makes_up_for_each_layers_density(model):
    pruner = tt.create_pruner("edge_popup", model, sparsity=0.75, scope="layerwise", scale="dynamic")
    next(pruner)
    for name, gate in pruner.subnet.gates.items():
        density = pruner.subnet.mask[name].float().mean().item()
        assert gate.scale.item() == pytest.approx(density**-0.5, rel=1e-5)
    static = tt.create_pruner("edge_popup", timm.create_model("test_resnet"), sparsity=0.75, scale="static")
    next(static)
    assert {round(g.scale.item(), 3) for g in static.subnet.gates.values()} == {2.0}


def test_signed_constants_by_hand(model):
    pruner = tt.create_pruner("edge_popup", model, sparsity=0.5)
    next(pruner)
    for weight in pruner.subnet.weights().values():
        assert weight.abs().unique().tolist() == pytest.approx([math.sqrt(2 / weight[0].numel())])
        assert -0.7 < weight.sign().mean() < 0.7


def test_feasible_ratios_by_hand():
    def ratios(**settings):
        return tt.get_method("frozen_slt")(**settings).ratios()

    assert ratios(sparsity=0.8, frozen=0.5) == pytest.approx((0.4, 0.1))  # the rule: p = k F, r = (1 - k) F
    assert ratios(sparsity=0.8, pruned=0.6, locked=0.1) == (0.6, 0.1)
    with pytest.raises(tt.SettingError, match=r"between 0\.6 and 0\.75"):
        ratios(sparsity=0.8, pruned=0.6, locked=0.25)
    with pytest.raises(tt.SettingError, match=r"between 0\.85 and 0\.9"):
        ratios(sparsity=0.8, pruned=0.85, locked=0.1)
    with pytest.raises(tt.SettingError, match="give both"):
        ratios(sparsity=0.8, pruned=0.85)
    with pytest.raises(tt.SettingError, match=r"pruner\.frozen: is the sum of pruned and locked"):
        ratios(sparsity=0.8, pruned=0.6, locked=0.1, frozen=0.7)


def test_the_released_split_of_what_is_frozen_by_hand():
    # Layers of 8 and 64 weights, 36 pruned and 12 locked. epl leaves 24 free, 8 and 16, so 0 and 48 are frozen. Of the
    # 36 that are left at density 1/2, epl gives 8 and 28: as released 0 and 36 are pruned, 0 and 12 locked.
    # With erk (shares 4 + 2 and 8 + 8 of 22) 36 left are 8 and 28 too, 24 free are 7 and 17, so 1 and 47 are frozen:
    # the small layer's one is locked as released; in equal shares, three of four are pruned.
    layers = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(8, 8, bias=False))
    half, sixth = 0.5, 1 / 6
    for freezing, split, expected in (
        ("epl", "shares", [(0, 0), (36, 12)]),
        ("epl", "released", [(0, 0), (36, 12)]),
        ("erk", "shares", [(1, 0), (35, 12)]),
        ("erk", "released", [(0, 1), (36, 11)]),
        ("uniform", "released", [(4, 1), (32, 11)]),
    ):
        settings = {"pruned": half, "locked": sixth, "freezing": freezing, "split": split}
        pruner = tt.create_pruner("frozen_slt", copy.deepcopy(layers), sparsity=0.6, **settings)
        assert list(pruner.method.frozen_counts(pruner.subnet).values()) == expected, (freezing, split)


@pytest.mark.parametrize(
    "settings",
    [
        {"frozen": 0.6},
        {"pruned": 0.3, "locked": 0.05},
        {"frozen": 0.6, "freezing": "uniform"},
        {"frozen": 0.6, "freezing": "erk", "split": "released"},
    ],
)
def test_frozen_counts_are_exact_and_frozen_weights_keep_their_fate(model, settings):
    pruner = tt.create_pruner("frozen_slt", model, sparsity=0.7, seed=5, **settings)
    pattern = frozen_patterns(pruner.subnet, pruner.method.frozen_counts(pruner.subnet), 5)
    count = sum(mask.numel() for mask in pruner.subnet.mask.values())
    p, r = pruner.method.ratios()
    assert sum(int(pruned.sum()) for pruned, _ in pattern.values()) == round(p * count)
    assert sum(int(locked.sum()) for _, locked in pattern.values()) == round(r * count)
    run = next(pruner)
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 5.0, momentum=0.9))
    assert sum(g.score.numel() for g in pruner.subnet.gates.values()) == count - round(p * count) - round(r * count)
    for _ in range(3):
        run.loss(nn.functional.cross_entropy, model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, (pruned, locked) in pattern.items():
            mask = pruner.subnet.mask[name]
            assert not (mask & pruned).any()
            assert mask[locked].all()
    assert next(pruner, None) is None
    assert sum(int((~mask).sum()) for mask in pruner.ticket.masks.values()) == round(0.7 * count)


def test_swaps_by_hand():
    mask = torch.tensor([True, True, True, False, False, False])
    score = torch.tensor([0.1, 0.2, 0.9, 0.8, 0.15, 0.05])
    # Pruned falling .8 .15 .05, kept rising .1 .2 .9: only the first pair is inverted (.15 < .2).
    assert swap(mask, score, 1.0).tolist() == [False, True, True, True, False, False]
    score = torch.tensor([0.1, 0.2, 0.3, 0.8, 0.7, 0.6])
    assert swap(mask, score, 1.0).tolist() == [False, False, False, True, True, True]
    assert swap(mask, score, 0.5).tolist() == [False, False, True, True, True, False]  # ceil(0.5 * 3) = 2 pairs
    assert swap(mask, score, 0.0).tolist() == mask.tolist()
    assert swap(mask, torch.ones(6), 1.0).tolist() == mask.tolist()  # ties change nothing


def test_the_short_restriction_really_falls():
    def rates(fall):
        method = tt.get_method("jackpot")(sparsity=0.5, fall=fall)
        return [method.scheduled(p) for p in (0, 0.5, 1)]

    assert rates("cosine") == pytest.approx([1, 0.5, 0])
    assert rates("quartic") == pytest.approx([1, 0.0625, 0])
    assert rates("none") == [1, 1, 1]


@pytest.fixture
def trained(model):
    """A model that does not look untrained."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            nn.init.normal_(module.weight)
    return model


def test_a_jackpot_keeps_layer_densities_and_pretrained_values(trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    with pytest.warns(UserWarning, match=r"not the weights of timm's test_resnet\.r160_in1k as stored"):
        pruner = tt.create_pruner("jackpot", trained, sparsity=0.9, epochs=1)
    run = next(pruner)
    first = pruner.subnet.mask
    by_magnitude = tt.create_pruner(
        "magnitude", copy.deepcopy(timm.create_model("test_resnet", num_classes=10)), sparsity=0.9
    )
    by_magnitude.subnet.load_(before)
    assert all(torch.equal(first[n], mask) for n, mask in by_magnitude.ticket.masks.items())
    optimizer = run.attach(torch.optim.SGD(trained.parameters(), 10.0, momentum=0.9))
    run.batches_per_epoch = 5
    for _ in range(5):
        run.loss(nn.functional.cross_entropy, trained(torch.randn(8, 3, 32, 32)), torch.randint(0, 10, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, mask in pruner.subnet.mask.items():
            assert int(mask.sum()) == int(first[name].sum())
    assert next(pruner, None) is None
    ticket = pruner.ticket
    assert any(not torch.equal(mask, first[name]) for name, mask in ticket.masks.items())
    for name, mask in ticket.masks.items():
        assert torch.equal(ticket.values[name][mask], before[name][mask])
    for name, value in ticket.values.items():
        if (
            name not in ticket.masks
            and "running" not in name
            and "num_batches" not in name
            and not name.startswith("fc.")
        ):
            assert torch.equal(value, before[name]), name  # affine and biases are frozen
    assert not torch.equal(ticket.values["fc.weight"], before["fc.weight"])


@pytest.mark.filterwarnings("ignore:jackpot")
@pytest.mark.parametrize("train_classifier", [True, False])
def test_a_jackpots_classifier_trains_where_it_is_new(trained, train_classifier):
    pruner = tt.create_pruner("jackpot", trained, sparsity=0.9, train_classifier=train_classifier)
    before = trained.fc.weight.detach().clone()
    run = next(pruner)
    optimizer = run.attach(torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], 0.1))
    run.batches_per_epoch = 1
    run.loss(nn.functional.cross_entropy, trained(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    optimizer.step()
    assert torch.equal(trained.fc.weight, before) != train_classifier


def test_a_jackpot_on_an_untrained_model_warns(model):
    with pytest.warns(UserWarning, match="never been trained"):
        tt.create_pruner("jackpot", model, sparsity=0.5)


def test_scores_have_their_own_weight_decay_and_one_group(model):
    pruner = tt.create_pruner("edge_popup", model, sparsity=0.5, weight_decay=0.003)
    run = next(pruner)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    for _ in range(2):
        run.attach(optimizer)
    scores = {id(gate.score) for gate in pruner.subnet.gates.values()}
    mine = [group for group in optimizer.param_groups if any(id(p) in scores for p in group["params"])]
    assert len(mine) == 1
    assert {id(p) for p in mine[0]["params"]} == scores
    assert mine[0]["weight_decay"] == 0.003
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


LEARNED = ("edge_popup", "frozen_slt", "jackpot", "continuous_sparsification")


def few_steps(pruner, count=3):
    """The first run, trained for so many steps, and what was warned of."""
    run, model = next(pruner), pruner.subnet.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, run.batches_per_epoch = run.attach(torch.optim.SGD(trainable, 0.1)), count
    for _ in range(count):
        run.loss(nn.functional.cross_entropy, model(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return run


class Behind(nn.Module):
    """Behind a scale of zero that does not train, no gradient reaches the first layer."""

    def __init__(self):
        super().__init__()
        self.num_classes = 10
        self.shut, self.open = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 10, 3, bias=False)

    def forward(self, x):
        return (0 * self.shut(x).mean(1, keepdim=True) + self.open(x)).mean((2, 3))


@pytest.mark.filterwarnings("ignore:jackpot")
@pytest.mark.parametrize("name", LEARNED)
def test_layers_whose_scores_get_no_gradient_are_named_after_the_first_steps(name):
    """Whatever adds to the gradient without telling weights apart, such as a penalty, does not hide it."""
    pruner = tt.create_pruner(name, Behind(), sparsity=0.5, epochs=1)
    with pytest.warns(UserWarning, match=r"round_00: no gradient reaches 1 of 2 layers \(shut\.weight\)") as told:
        few_steps(pruner)
    assert len(told) == 1


@pytest.mark.parametrize("norm_affine", [True, False])
def test_train_rest_false_alone_shuts_no_branch(model, norm_affine):
    """timm begins the last scale of each branch at zero; frozen there, 9 of 15 layers would never learn."""
    assert not model.layer1[0].bn2.weight.any()
    pruner = tt.create_pruner("edge_popup", model, sparsity=0.5, epochs=1, train_rest=False, norm_affine=norm_affine)
    few_steps(pruner)  # no warning
    assert (model.layer1[0].bn2.weight == 1).all()


def test_cs_is_validated_as_the_soft_network_in_anyones_loop(model):
    """The hard mask of a search that has just begun keeps all, or a stale half: it says nothing of the network."""
    pruner = tt.create_pruner("continuous_sparsification", model, sparsity=0.9, rounds=1, rewind="0ep", epochs=1)
    run = few_steps(pruner)
    image = torch.randn(4, 3, 32, 32)
    gates = pruner.subnet.gates.values()
    model.eval()
    soft = model(image)
    for gate in gates:  # by hand: what the layers are given is w c sigmoid(beta s)
        gate.mask.fill_(False)
    assert torch.equal(model(image), soft)
    run.settle_()
    with pruner.subnet.hard():
        hard = model(image)
    assert not torch.allclose(hard, soft, atol=1e-3)
    assert torch.equal(model(image), soft)
    kept = sum(int(gate.mask.sum()) for gate in gates) / sum(gate.mask.numel() for gate in gates)
    assert kept == pytest.approx(0.1, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*without an optimizer step")
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_cs_notes_both_densities_and_says_where_it_filled_up(model, sparsity):
    pruner = tt.create_pruner("continuous_sparsification", model, sparsity=sparsity, rounds=1, rewind="0ep")
    run = next(pruner)
    run.attach(torch.optim.SGD(model.parameters(), 0.1))
    scores = pruner.subnet.scores()
    pruner.subnet.load_scores_({name: torch.linspace(-4, 1, s.numel()).view(s.shape) for name, s in scores.items()})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert next(pruner, None) is None
    filled = [str(one.message) for one in told if "score above zero" in str(one.message)]
    assert len(filled) == (sparsity == 0.5)  # a fifth of the scores is above zero
    if filled:
        assert filled[0].startswith("continuous_sparsification: 0.2 of the weights have a score above zero, 0.5 stay")
    (note,) = pruner.ticket.metadata["notes"]
    assert note == {
        "density_of_scores_above_zero": pytest.approx(0.2, abs=1e-3),
        "density": pytest.approx(1 - sparsity, abs=1e-4),
    }


@pytest.mark.filterwarnings("ignore:.*without an optimizer step", "ignore:.*score above zero", "ignore:.*to nothing")
@pytest.mark.parametrize("bake_scale", [True, False])
def test_c_is_in_the_tickets_weights_or_not(model, bake_scale):
    before = copy.deepcopy(model.state_dict())
    settings = {"s0": -0.1, "rounds": 1, "rewind": "0ep", "bake_scale": bake_scale}
    pruner = tt.create_pruner("continuous_sparsification", model, sparsity=0.5, **settings)
    next(pruner).attach(torch.optim.SGD(model.parameters(), 0.1))
    assert next(pruner, None) is None
    c = 1 + math.exp(0.1) if bake_scale else 1.0
    for name, mask in pruner.ticket.masks.items():
        assert torch.allclose(model.get_parameter(name)[mask], c * before[name][mask], rtol=1e-6)


def test_the_penalty_counts_c_where_asked(model):
    def loss(**settings):
        pruner = tt.create_pruner(
            "continuous_sparsification", copy.deepcopy(model), sparsity=0.5, s0=-0.1, penalty=1e-3, **settings
        )
        return next(pruner).loss(lambda output, target: torch.tensor(0.0), None, None).item()

    assert loss(penalise_scale=True) == pytest.approx((1 + math.exp(0.1)) * loss(), rel=1e-5)


def test_train_rest_false_leaves_only_scores_to_train(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = tt.create_pruner(
        "frozen_slt", model, sparsity=0.5, train_rest=False, norm_affine=False, classifier=True, weights="given"
    )
    run = next(pruner)
    assert all(name.endswith(".score") for name, p in model.named_parameters() if p.requires_grad)
    optimizer = run.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0))
    run.loss(nn.functional.cross_entropy, model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    assert next(pruner, None) is None
    assert "fc.weight" in pruner.ticket.masks
    for name, value in pruner.ticket.state().items():
        if name in pruner.ticket.masks:
            mask = pruner.ticket.masks[name]
            assert torch.equal(value[mask], before[name][mask])  # a frozen SLT never changes a weight
        elif name == "fc.bias":
            assert torch.equal(value, before[name])
    assert all(p.requires_grad for p in model.parameters())  # thawed


def test_baking_leaves_parameters_in_their_order():
    vit = timm.create_model("test_vit", num_classes=4, img_size=32)
    order = [name for name, _ in vit.named_parameters()]
    pruner = tt.create_pruner("edge_popup", vit, sparsity=0.5)
    next(pruner)
    assert [name for name, _ in vit.named_parameters()] != order
    with pytest.warns(UserWarning, match="without an optimizer step"):
        next(pruner, None)
    assert [name for name, _ in vit.named_parameters()] == order


def test_scores_leave_every_group_they_are_in(model):
    """Layer-wise learning rates: each score keeps its layer's, with the method's weight decay."""
    from timm.optim import create_optimizer_v2

    pruner = tt.create_pruner("edge_popup", model, sparsity=0.5, weight_decay=0.003)
    run = next(pruner)
    optimizer = create_optimizer_v2(model, "momentum", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    before = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for _ in range(2):
        run.attach(optimizer)
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        assert all(decays[id(gate.score)] == 0.003 for gate in pruner.subnet.gates.values())
        assert scales == before
        assert decays[id(model.fc.weight)] == 0.1


@pytest.mark.filterwarnings("ignore:.*trained up to epoch 1 of a schedule of 3", "ignore:.*score above zero")
def test_cs_rounds_carry_weights_on_and_begin_their_schedule_anew(model):
    pruner = tt.create_pruner("continuous_sparsification", model, sparsity=0.5, rounds=2, epochs=3, rewind="1it")
    starts = []
    for run in pruner:
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.05))
        run.batches_per_epoch = 2
        gate = next(iter(pruner.subnet.gates.values()))
        starts.append((run.start_epoch, gate.beta.item()))
        for _ in range(2):
            run.loss(
                nn.functional.cross_entropy, model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert starts == [(0.0, 1.0), (0.0, 1.0)]
    assert pruner.ticket.metadata["start_epoch"] == 0.5


def test_erk_budgets_hold_while_gradual_prunes(model):
    """A layer's rounded share can be smaller of a larger count: it is capped by what the layer still keeps."""
    from timm_tickets.core.masks import cut, full_masks, kept, total

    masks = full_masks(tt.Subnet(model, tt.prunable_names(model)).weights())
    scores = {name: torch.rand(mask.shape) for name, mask in masks.items()}
    for keep in range(4000, 3900, -1):
        masks = cut(masks, scores, keep, "layerwise", "erk")
        assert kept(masks) == keep
    assert total(masks) > keep
