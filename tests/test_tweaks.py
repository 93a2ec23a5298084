"""Retraining tweaks: their formulas, what they leave of a model (nothing), and trainings with them."""

import io
import math
from typing import Annotated

import pytest
import timm
import torch
from pydantic import Field
from rich.console import Console
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional

import timm_tickets as tt
from timm_tickets.sparse.prunable import norms
from timm_tickets.training import trainer as trainer_module
from timm_tickets.tweaks.label_smoothing import smoothed_cross_entropy
from timm_tickets.tweaks.rescaled_init import RescaledInit, scaled
from timm_tickets.tweaks.skip_injection import keeps_shape

# What is put on a model and annealed, with settings; and the others.
ANNEALED = {
    "smooth_activation": {"function": "mish"},
    "skip_injection": {"until": 1.0},
}
OTHERS = {"label_smoothing": {}, "rescaled_init": {"iterations": 2}}
EVERY = ANNEALED | OTHERS
MODELS = ("test_resnet", "test_vit", "test_convnext", "test_byobnet")
IMAGES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def build(name, **kwargs):
    """A model all of whose branches do something: timm starts the last scale of a residual branch at zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    for norm in norms(model):
        nn.init.constant_(norm.weight, 0.7)
    return model.eval()


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_every_registered_tweak_is_in_the_table():
    assert set(EVERY) == set(tt.list_tweaks())
    assert tt.list_tweaks("s*") == ["skip_injection", "smooth_activation"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ANNEALED)
def test_an_annealed_tweak_changes_the_function_and_leaves_nothing(name, model):
    model = build(model)
    before, plain, modules = bits(model), model(IMAGES), [str(m) for m in model.modules()]
    tweaks = tt.create_tweaks(model, {name: ANNEALED[name]})
    assert list(model.state_dict()) == list(before)  # a checkpoint in the middle is the plain model's too
    assert not torch.equal(model(IMAGES), plain)
    until = tweaks.tweaks[0].until
    tweaks.at_(0.9 * until)
    assert not torch.equal(model(IMAGES), plain)
    if until < 1:  # the share is zero, the hooks are still there: exactly gone all the same
        tweaks.at_(until)
        assert hooks(model)
        assert torch.equal(model(IMAGES), plain)
    tweaks.at_(1)
    assert not hooks(model)
    assert torch.equal(model(IMAGES), plain)
    assert [str(m) for m in model.modules()] == modules  # inplace activations are inplace again
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shares_fall_linearly_to_zero():
    tweak = tt.get_tweak("skip_injection")(until=0.5)
    assert [tweak.share(p) for p in (0, 0.125, 0.25, 0.5, 0.75, 1)] == [1, 0.75, 0.5, 0, 0, 0]


def test_the_blend_by_hand():
    """At share 1/4 of swish over ReLU, x = 2: 2 sigmoid(2) / 4 + 3/4 * 2; x = -1: -sigmoid(-1) / 4."""
    model = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))
    x = torch.tensor([[2.0, -1.0]])
    for settings, beta in (({"function": "swish"}, 1.0), ({"function": "sigmoid", "beta": 3.0}, 3.0)):
        tweaks = tt.create_tweaks(model, {"smooth_activation": {**settings, "until": 1}})
        tweaks.at_(0.75)
        sigmoid = [1 / (1 + math.exp(-beta * value)) for value in (2, -1)]
        expected = [0.75 * 2 + 0.25 * 2 * sigmoid[0], 0.25 * -1 * sigmoid[1]]
        assert model(x.clone()).tolist()[0] == pytest.approx(expected, rel=1e-6)
        tweaks.remove_()
    tweaks = tt.create_tweaks(model, {"smooth_activation": {"function": "mish"}})  # x tanh(ln(1 + e^x))
    expected = [value * math.tanh(math.log1p(math.exp(value))) for value in (2, -1)]
    assert model(x.clone()).tolist()[0] == pytest.approx(expected, rel=1e-6)
    tweaks.remove_()
    assert model(x.clone()).tolist() == [[2, 0]]


def test_the_injected_skip_by_hand():
    """At share 1/2 a layer that doubles its input gives 2x + x / 2; one that changes the shape gets none."""
    model = nn.Sequential(
        nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 3, bias=False)
    )
    for layer, weight in zip(model, (2.0, 1.0, 0.0), strict=True):
        nn.init.constant_(layer.weight, weight)
    assert [keeps_shape(layer) for layer in model] == [True, False, True]
    tweaks = tt.create_tweaks(model, {"skip_injection": {"until": 1}})
    tweaks.at_(0.5)
    assert model[:2](torch.full((1, 1, 4, 4), 3.0))[0, :, 0, 0].tolist() == [7.5, 7.5]
    assert not model(torch.full((1, 1, 4, 4), 3.0)).any()  # the last one shrinks its image: no skip


@pytest.mark.parametrize(("over", "target", "other"), [("others", 0.9, 0.1 / 3), ("all", 0.925, 0.025)])
def test_label_smoothing_by_hand(over, target, other):
    """Four classes, amount 0.1: 1 - a on the target and a / 3 on each other; torch's gives the target a / 4 back."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]])
    log_p = logits.log_softmax(1)[0].tolist()
    expected = -(target * log_p[0] + other * sum(log_p[1:]))
    found = smoothed_cross_entropy(logits, torch.tensor([0]), 0.1, over)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert smoothed_cross_entropy(logits, torch.tensor([0]), 0.0, over) == functional.cross_entropy(
        logits, torch.tensor([0])
    )


def test_timms_smoothing_is_ours_over_all():
    logits, target = torch.randn(8, 5), torch.arange(8) % 5
    theirs = timm.loss.LabelSmoothingCrossEntropy(0.2)(logits, target)
    assert smoothed_cross_entropy(logits, target, 0.2, "all").item() == pytest.approx(theirs.item(), rel=1e-6)


class Twice(nn.Module):
    """b * (w . x): two layers, w of two weights of which the second is pruned."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 1, bias=False)
        self.second = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[3.0, 0.0]]))
            self.second.weight.fill_(2)

    def forward(self, x):
        return self.second(self.first(x))


MASKS = {"first.weight": torch.tensor([[True, False]]), "second.weight": torch.tensor([[True]])}
BATCH = (torch.tensor([[1.0, 1.0]]), torch.tensor([0]))


def objective(gamma):
    model, tweak = Twice(), RescaledInit(gamma=gamma, eta=0.1)

    def loss_at(values, batch):
        return torch.func.functional_call(model, values, (batch[0],)).sum()

    weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    return tweak.objective(loss_at, weights, list(weights), MASKS, BATCH, BATCH).item()


def test_the_look_ahead_by_hand():
    """Loss b w x with w = (3, 0), b = 2, x = (1, 1): gradient (b, 0 by the mask; w x) = (2, 0; 3), length sqrt 13.

    A dense look-ahead would have (2, 2; 3), length sqrt 17, and would move the pruned weight.
    """
    length = math.sqrt(13)
    assert objective(gamma=1) == pytest.approx(length, rel=1e-6)
    ahead = (2 - 0.1 * 3 / length) * (3 - 0.1 * 2 / length)
    assert objective(gamma=4) == pytest.approx(ahead, rel=1e-6)


def test_rescaling_by_hand_keeps_the_density():
    """Over gamma the length sqrt(4 b^2 + 9 a^2) falls with both factors: Adam's first step takes 0.01 off each."""
    model = Twice()
    RescaledInit(iterations=1).rescale_(model, MASKS, [BATCH, BATCH], lambda output, _: output.sum())
    assert model.first.weight.tolist() == [[pytest.approx(2.97), 0.0]]
    assert model.second.weight.item() == pytest.approx(1.98)
    RescaledInit(iterations=400, lr=0.1, floor=0.25).rescale_(
        model, MASKS, [BATCH] * 800, lambda output, _: output.sum()
    )
    assert model.second.weight.item() == pytest.approx(1.98 / 4)  # the least factor
    assert model.first.weight[0, 1].item() == 0


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_rescaling_a_ticket_keeps_its_zeros_and_statistics_and_helps_the_first_step(name, digits):
    images, labels, _, _ = digits
    kwargs = {"img_size": 32} if name == "test_vit" else {}
    model = build(name, **kwargs)
    ticket = tt.create_pruner("random", model, sparsity=0.9).ticket
    batches = [(images[i * 64 : i * 64 + 64], labels[i * 64 : i * 64 + 64]) for i in range(12)]
    before = bits(model)

    def after_one_step(state):
        """The loss after a step of length 0.1 along the masked gradient, in training mode."""
        other = timm.create_model(name, num_classes=10, **kwargs)
        other.load_state_dict(state)
        loss = functional.cross_entropy(other(batches[0][0]), batches[0][1])
        found = torch.autograd.grad(loss, list(other.parameters()))
        gradients = [g * ticket.masks.get(n, 1) for (n, _), g in zip(other.named_parameters(), found, strict=True)]
        length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        with torch.no_grad():
            for parameter, gradient in zip(other.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient / length
        return functional.cross_entropy(other(batches[1][0]), batches[1][1]).item()

    tweaks = tt.create_tweaks(model, {"rescaled_init": {"iterations": 25, "gamma": 100}})
    tweaks.rescale_(ticket.masks, batches, functional.cross_entropy)
    after = bits(model)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == set(scaled(model))
    for key in changed:
        ratio = (after[key] / before[key])[before[key] != 0]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)
        assert ratio[0] > 0
    for key, mask in ticket.masks.items():
        assert not after[key][~mask].any()
    assert after_one_step(after) < after_one_step(before)


@pytest.mark.parametrize(
    ("tweaks", "words"),
    [
        (["smooth_activations"], ["'smooth_activations' is unknown", "did you mean 'smooth_activation'"]),
        ({"label_smoothing": {"amount": 1}}, ["tweaks.label_smoothing.amount", "less than 1"]),
        ({"skip_injection": {"untill": 1}}, ["tweaks.skip_injection", "did you mean 'until'"]),
        ("skip_injection", ["give a list of names"]),
    ],
)
def test_a_wrong_tweak_is_refused(model, tweaks, words):
    with pytest.raises(tt.SettingError) as error:
        tt.create_tweaks(model, tweaks)
    for word in words:
        assert word in str(error.value)


def test_a_model_without_a_place_is_refused_and_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())
    with pytest.raises(tt.SettingError, match="none of the 1 convolutions and linear layers of Sequential keeps its"):
        tt.create_tweaks(model, ["smooth_activation", "skip_injection"])
    assert not hooks(model)
    with pytest.raises(tt.SettingError, match="Sequential has no activation module to blend with swish"):
        tt.create_tweaks(nn.Sequential(nn.Linear(2, 2), nn.SiLU()), ["smooth_activation"])


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(label_smoothing=0.1), timm.loss.BinaryCrossEntropy()])
def test_smoothing_another_criterion_is_refused(model, criterion):
    with pytest.raises(tt.SettingError, match=r"tweaks\.label_smoothing: it smooths plain cross-entropy"):
        tt.create_tweaks(model, ["label_smoothing"]).criterion(criterion)


def test_in_a_users_loop(model, digits):
    """All four beside a ticket's masks; after the last step the model is plain and its zeros are exact."""
    images, labels, _, _ = digits
    ticket = tt.create_pruner("random", model, sparsity=0.9).ticket
    plain = str(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    tweaks = tt.create_tweaks(model, EVERY)
    tweaks.attach(ticket.attach(model, optimizer), steps=8)
    criterion = tweaks.criterion(nn.CrossEntropyLoss())
    tweaks.rescale_(ticket.masks, [(images[:32], labels[:32])], nn.CrossEntropyLoss())
    for step in range(8):
        batch = slice(32 * step, 32 * step + 32)
        assert len(hooks(model)) == 18
        optimizer.zero_grad()
        criterion(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    assert not hooks(model)
    assert str(model) == plain
    for name, mask in ticket.masks.items():
        assert not model.get_parameter(name)[~mask].any()
    assert not optimizer._optimizer_step_post_hooks or len(optimizer._optimizer_step_post_hooks) == 1  # the masks'


def test_a_compiled_model_sees_a_tweak_that_comes_later(model):
    compiled = torch.compile(model.eval(), backend="eager")
    x = torch.randn(2, 3, 32, 32)
    plain = compiled(x)
    tweaks = tt.create_tweaks(compiled, ["skip_injection"])  # a hook and nothing else that a graph could notice
    assert not torch.equal(compiled(x), plain)
    tweaks.remove_()
    assert torch.equal(compiled(x), plain)


@pytest.mark.usefixtures("unregister")
def test_what_a_tweak_adds_is_counted_while_it_is_there(model):
    @tt.register_tweak("extra_layer")
    class Extra(tt.Tweak):
        """Ten parameters more, for a while."""

        size: Annotated[int, Field(ge=1)] = 10

        def inject_(self, model, share):
            model.extra = nn.Parameter(torch.zeros(self.size))

            class Handle:
                def remove(self):
                    del model.extra

            return [Handle()]

    masks = {"w": torch.tensor([True] * 2 + [False] * 8)}
    tweaks = tt.create_tweaks(model, {"extra_layer": {}})
    assert tweaks.sparsity(masks) == pytest.approx(1 - 12 / 20)  # 2 kept and 10 added, of 10 and 10
    tweaks.remove_()
    assert not hasattr(model, "extra")
    assert tt.create_tweaks(model, ANNEALED).sparsity(masks) == pytest.approx(0.8)


SEARCH = ["training.epochs=2", "pruner.sparsity=0.8", "pruner.prune_rate=0.8", "training.checkpoint_interval=0"]
SEARCH += ["controls=[]"]  # else the dense network is trained for three epochs too
# Rescaling takes 24 batches here, the loader has 20.
RETRAIN = EVERY | {"rescaled_init": {"iterations": 12}}
SEARCH += ["retrain.epochs=3", *(f"retrain.tweaks.{name}={settings}" for name, settings in RETRAIN.items())]


def search(folder, *more):
    return tt.search("digits_imp", [*SEARCH, f"output={folder}", *more], console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def retrained(tmp_path_factory):
    return search(tmp_path_factory.mktemp("retrained"))


def test_a_recipe_retrains_with_tweaks(retrained):
    assert [row["steps"] for row in retrained.rows] == [40, 60]
    assert "tweaks" not in retrained.rows[0]["metrics"]  # the search's own runs have none
    metrics = retrained.rows[1]["metrics"]
    assert metrics["tweaks"] == list(EVERY)
    assert metrics["sparsity_tweaked"] == pytest.approx(0.8, abs=1e-5)
    file = retrained.folder / "round_01" / "model.safetensors"
    trained = timm.create_model("test_resnet", num_classes=10, checkpoint_path=file)
    for name, mask in retrained.ticket.masks.items():
        assert not trained.get_parameter(name)[~mask].any()
    # The ticket starts where the search's rewound, not where the tweaks took it.
    start = tt.load_ticket(retrained.folder / "round_00" / "round_00.ticket")
    for name, mask in retrained.ticket.masks.items():
        assert torch.equal(retrained.ticket.values[name][mask], start.values[name][mask])


class Stop(Exception):
    pass


@pytest.mark.slow  # test_faults has one within an epoch
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_retraining_that_is_stopped_continues_to_the_same_weights(retrained, tmp_path, monkeypatch, epochs):
    original = trainer_module.Trainer.evaluate
    seen = 0

    def counted(self, loader, run, ema=None):
        nonlocal seen
        seen += run.tweaks is not None
        if seen == epochs + 1:  # so many of the retraining's epochs were saved
            raise Stop
        return original(self, loader, run, ema)

    monkeypatch.setattr(trainer_module.Trainer, "evaluate", counted)
    with pytest.raises(Stop):
        search(tmp_path)
    monkeypatch.undo()
    # A process that has done other things before, as a new one has.
    search(tmp_path / "other", "training.epochs=1", "retrain.epochs=1", "seed=3")
    again = search(tmp_path)
    file = "round_01/model.safetensors"
    assert (tmp_path / file).read_bytes() == (retrained.folder / file).read_bytes()
    assert again.rows[1]["metrics"]["test_loss"] == retrained.rows[1]["metrics"]["test_loss"]


def test_a_ticket_that_its_search_has_trained_is_not_retrained(tmp_path):
    with pytest.raises(tt.SettingError, match=r"retrain: edge_popup ends with a trained ticket"):
        tt.search("digits_edge_popup", ["retrain.tweaks=[skip_injection]", f"output={tmp_path}"])


def test_a_recipes_tweaks_are_checked_and_resolved():
    recipe = tt.load_recipe("digits_imp", ["retrain.tweaks.label_smoothing.amount=0.2"])
    assert recipe.retrain.tweaks == {"label_smoothing": {"amount": 0.2, "over": "others"}}
    assert tt.load_recipe("digits_imp", ["retrain.tweaks=[skip_injection]"]).retrain.tweaks == {
        "skip_injection": {"until": 0.5}
    }
    with pytest.raises(tt.SettingError, match="did you mean 'label_smoothing'"):
        tt.load_recipe("digits_imp", ["retrain.tweaks=[label_smothing]"])
    assert tt.load_recipe(recipe) == recipe


def test_a_list_of_tweaks_replaces_those_of_the_recipe():
    recipe = tt.load_recipe("tweaks_cifar100_resnet18", ["retrain.tweaks=[skip_injection]"])
    assert list(recipe.retrain.tweaks) == ["skip_injection"]
    assert tt.load_recipe("tweaks_cifar100_resnet18", ["retrain.tweaks=[]"]).retrain.tweaks == {}
    assert len(tt.load_recipe("tweaks_cifar100_resnet18").retrain.tweaks) == 4


@pytest.mark.parametrize("value", ["5", "[1]", "{label_smoothing: 5}", "[{label_smoothing: {amount: 0.1}}]"])
def test_tweaks_of_another_form_are_refused_in_words(value):
    with pytest.raises(tt.SettingError, match="tweak"):
        tt.load_recipe("digits_imp", [f"retrain.tweaks={value}"])


def test_a_criterion_that_does_not_go_is_told_before_the_search(tmp_path):
    with pytest.raises(tt.SettingError, match="smooths plain cross-entropy"):
        search(tmp_path / "run", "training.smoothing=0.1")
    assert not (tmp_path / "run").exists()


def test_the_average_begins_with_the_rescaled_weights(tmp_path):
    """At a decay of nearly 1 the average of one epoch is where training started."""
    settings = ["training.model_ema=true", "training.model_ema_decay=0.999999", "training.epochs=1", "controls=[]"]
    settings += ["pruner.sparsity=0.8", "pruner.prune_rate=0.8", "retrain.tweaks.rescaled_init.iterations=15"]
    result = tt.search("digits_imp", [*settings, f"output={tmp_path}"], console=Console(file=io.StringIO()))
    average = load_file(tmp_path / "round_01" / "model_ema.safetensors")
    start = result.ticket.values
    ratios = [(average[name][mask] / start[name][mask]).median().item() for name, mask in result.ticket.masks.items()]
    assert max(abs(ratio - 1) for ratio in ratios) > 0.05  # 15 iterations have moved them


def test_beside_a_runs_own_call_on_lookahead(digits):
    """Both are called after a step, whichever was put there first; removing one leaves the other."""
    images, labels, _, _ = digits
    model = build("test_resnet")
    pruner = tt.create_pruner("gradual", model, sparsity=0.5, epochs=1, interval=1)
    run = next(pruner)
    run.batches_per_epoch = 4
    optimizer = run.attach(create_optimizer_v2(model, "lookahead_momentum", lr=0.05))
    tweaks = tt.create_tweaks(model, ["skip_injection"])
    tweaks.attach(optimizer, steps=2)
    for step in range(4):
        optimizer.zero_grad()
        run.loss(functional.cross_entropy, model.train()(images[:16]), labels[:16]).backward()
        optimizer.step()
        assert bool(hooks(model)) == (step == 0)
    assert run.step == 4
    assert run.sparsity == pytest.approx(0.5, abs=1e-4)


def test_a_training_that_goes_on_anneals_from_where_it_was(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tweaks = tt.create_tweaks(model, {"skip_injection": {"until": 1.0}})
    tweaks.attach(optimizer, steps=10, done=8)
    assert tweaks._shares[0].item() == pytest.approx(0.2)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    for left in (0.1, 0):
        optimizer.step()
        assert tweaks._shares[0].item() == pytest.approx(left)
    assert not hooks(model)


def test_rescaling_needs_something_that_is_trained(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    batch = (torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    with pytest.raises(tt.SettingError, match="nothing to rescale"):
        tt.create_tweaks(model, ["rescaled_init"]).rescale_({}, [batch], functional.cross_entropy)
    model.fc.weight.requires_grad_(True)
    before = bits(model)
    tt.create_tweaks(model, OTHERS).rescale_({}, [batch], functional.cross_entropy)
    assert {name for name, value in bits(model).items() if not torch.equal(value, before[name])} == {"fc.weight"}
