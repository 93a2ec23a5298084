"""Controls of a recipe: what each trains beside the ticket, what it shares with it, and which are refused."""

import io
import json

import pytest
import torch
from rich.console import Console

import timm_tickets as tt
from timm_tickets.config.recipe import SEARCHED
from timm_tickets.core.patterns import blocks, parsed
from timm_tickets.experiments import search as experiment
from timm_tickets.experiments.baselines import beside, check_controls
from timm_tickets.experiments.run_folder import check_folder
from timm_tickets.structure.shuffled import random_masks, shuffled_layers
from timm_tickets.structure.units import Pattern, Weights
from timm_tickets.training.build import build_model
from timm_tickets.training.step import Step

SMALL = ["training.epochs=1", "data.classes=[0,1,2,3]", "data.val_fraction=0.7", "training.checkpoint_interval=60"]
SMALL += ["data.img_size=16", "training.batch_size=32"]
IMP = [*SMALL, "pruner.sparsity=0.8", "pruner.prune_rate=0.6"]
IN_PLACE = ["random_mask", "shuffled_layers", "random_reinit"]


def search(folder, *settings):
    text = io.StringIO()
    found = tt.search("digits_imp", [*settings, f"output={folder}"], console=Console(file=text, width=200))
    return found, text.getvalue()


def controls(*names):
    return f"controls=[{','.join(names)}]"


# Masks


MASKS = {
    "a": torch.tensor([[True, False, False, False], [False] * 4]),
    "b": torch.tensor([True, True, False, False]),
    "c": torch.zeros(1000, dtype=torch.bool) | (torch.arange(1000) < 100),
}


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_a_random_mask_keeps_as_many_of_all_and_a_shuffled_one_as_many_of_each_layer():
    drawn, shuffled = (make(Weights(), MASKS, 0) for make in (random_masks, shuffled_layers))
    assert sum(counts(drawn).values()) == 103
    assert counts(drawn) != counts(MASKS)
    assert counts(shuffled) == {"a": 1, "b": 2, "c": 100}
    for make, one in ((random_masks, drawn), (shuffled_layers, shuffled)):
        again, other = (make(Weights(), MASKS, seed) for seed in (0, 1))
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert not torch.equal(one["c"], other["c"])


def test_a_random_mask_takes_every_weight_as_often():
    found = torch.stack(
        [torch.cat([m.flatten() for m in random_masks(Weights(), MASKS, s).values()]) for s in range(99)]
    )
    share = found.float().mean(0)  # 103 of 1012 are kept
    assert (share[:12].mean(), share[12:].mean()) == (pytest.approx(0.1018, abs=0.02), pytest.approx(0.1018, abs=0.001))


@pytest.mark.parametrize("granularity", ["2:4", "block 2x2"])
def test_patterns_move_whole(granularity):
    model = build_model(tt.load_recipe("digits_imp"), 10)
    names = ("layer1.0.conv1.weight", "layer1.0.conv2.weight")
    found = parsed(granularity)
    units = Pattern(found, model, {name: model.get_parameter(name).shape for name in names})
    noise = {name: torch.rand(model.get_parameter(name).shape) for name in names}
    whole = {name: torch.ones_like(one, dtype=torch.bool) for name, one in noise.items()}
    masks = units.cut(whole, noise, sum(one.numel() for one in noise.values()) // 2, "global", "uniform", ())
    for make in (random_masks, shuffled_layers):
        other = make(units, masks, 0)
        assert sum(counts(other).values()) == sum(counts(masks).values())
        assert make is random_masks or counts(other) == counts(masks)
        assert not torch.equal(other[names[0]], masks[names[0]])
        for mask in other.values():
            parts = mask.reshape(-1, 4) if granularity == "2:4" else blocks(mask, 2, 2).reshape(-1, 4)
            assert {*parts.sum(1).tolist()} <= ({2} if granularity == "2:4" else {0, 4})


def test_channels_move_whole():
    pruner = tt.create_pruner(
        "magnitude", build_model(tt.load_recipe("digits_imp"), 10), sparsity=0.5, granularity="channel", scope="global"
    )
    masks, units = pruner.ticket.masks, pruner.method.units
    drawn, shuffled = (make(units, masks, 0) for make in (random_masks, shuffled_layers))
    assert counts(shuffled) == counts(masks)
    assert counts(drawn) != counts(masks)
    assert sum(counts(masks).values()) * 0.97 < sum(counts(drawn).values()) <= sum(counts(masks).values())
    for one in (drawn, shuffled):
        assert any(not torch.equal(mask, masks[name]) for name, mask in one.items())
        assert all(torch.equal(mask, one[name]) for name, mask in units.groups.mask(units.gone(one)).items())


# Searches


class FirstImages:
    """What every training sees first, by its name."""

    def __init__(self, monkeypatch):
        self.of, begin, take = {}, Step.begin_, Step.take

        def begun(step, run, *args):
            self.run = run.name
            begin(step, run, *args)

        def taken(step, images, target, *args):
            self.of.setdefault(self.run, []).append((images.sum().item(), target.tolist()))
            return take(step, images, target, *args)

        monkeypatch.setattr(Step, "begin_", begun)
        monkeypatch.setattr(Step, "take", taken)


def test_controls_differ_from_the_ticket_in_what_their_name_says_alone(tmp_path, monkeypatch):
    seen = FirstImages(monkeypatch)
    result, text = search(tmp_path, *IMP, controls("dense", *IN_PLACE, "equal_epochs"))
    rows = {row["name"]: row for row in result.rows}
    assert [*rows] == [*IN_PLACE, "round_00", "round_01", "round_02"]
    assert "equal_epochs: the ticket's weights are trained for 1 epoch in all, as the dense network is" in text
    ticket, first = (
        tt.load_ticket(tmp_path / "digits_imp.ticket"),
        tt.load_ticket(tmp_path / "round_00/round_00.ticket"),
    )
    loaded = {name: tt.load_ticket(tmp_path / name / f"{name}.ticket") for name in IN_PLACE}
    for name in IN_PLACE:
        assert (rows[name]["epochs"], rows[name]["steps"]) == (1, rows["round_02"]["steps"])
        assert seen.of[name] == seen.of["round_02"] != seen.of["round_00"]
        assert rows[name]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert counts(loaded["shuffled_layers"].masks) == counts(ticket.masks) != counts(loaded["random_mask"].masks)
    for name in ("random_mask", "shuffled_layers"):
        other = loaded[name]
        assert not torch.equal(other.masks["conv1.0.weight"], ticket.masks["conv1.0.weight"])
        for key, mask in other.masks.items():
            assert torch.equal(other.values[key], first.values[key] * mask), key
    reinit = loaded["random_reinit"]
    assert all(torch.equal(mask, ticket.masks[key]) for key, mask in reinit.masks.items())
    assert not torch.equal(reinit.values["conv1.0.weight"], ticket.values["conv1.0.weight"])
    summary = (tmp_path / "summary.csv").read_text()
    assert all(f"\n{name}," in summary and f"{name}  epoch 1/1" in text for name in IN_PLACE)


@pytest.mark.filterwarnings("ignore:rigl", "ignore:continuous")
@pytest.mark.parametrize(
    ("settings", "index"),
    [
        pytest.param(["pruner.name=rigl"], 0, marks=pytest.mark.slow),
        (["pruner.name=continuous_sparsification", "pruner.rounds=1", "pruner.rewind=3it"], 1),
        pytest.param(["pruner.name=colt", "pruner.prune_rate=0.7"], 2, marks=pytest.mark.slow),
        pytest.param(["pruner.name=magnitude"], 0, marks=pytest.mark.slow),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_pruner_that_trains_weights_has_them(tmp_path, monkeypatch, settings, index):
    """Its control begins with the start that the ticket was cut from, at the same place of the schedule."""
    seen = FirstImages(monkeypatch)
    common = [*SMALL, "pruner.sparsity=0.5", *settings]
    result, _ = search(tmp_path, *common, controls(*IN_PLACE))
    rows = {row["name"]: row for row in result.rows}
    assert [*rows][:3] == IN_PLACE
    own = [*rows][-1] if rows[[*rows][-1]]["steps"] else "round_00"  # of one that ends trained, its search's
    assert seen.of["shuffled_layers"] == seen.of[own]
    assert rows["shuffled_layers"]["steps"] == rows["random_mask"]["steps"] == rows[own]["steps"]
    assert result.ticket.metadata["start_epoch"] == pytest.approx(3 / 5 if "rewind" in settings[-1] else 0)
    one, other = (tt.load_ticket(tmp_path / name / f"{name}.ticket") for name in ("shuffled_layers", "random_mask"))
    assert counts(one.masks) == counts(result.ticket.masks)
    if own != "round_00":
        for key, mask in result.ticket.masks.items():
            for each in (one, other):
                both = mask & each.masks[key]
                assert torch.equal(each.values[key][both], result.ticket.values[key][both]), key
    assert json.loads((tmp_path / "random_mask" / "run.json").read_text())["index"] == index


class Killed(Exception):
    """As SIGKILL, between two controls."""


def test_a_search_goes_on_with_the_control_that_is_missing_and_a_finished_one_with_a_new_one(tmp_path, monkeypatch):
    settings = [*SMALL, "pruner.sparsity=0.5", "pruner.name=magnitude"]
    train = experiment.Controls.train

    def killed(self, name, *args, **kwargs):
        if name == "shuffled_layers":
            raise Killed
        train(self, name, *args, **kwargs)

    monkeypatch.setattr(experiment.Controls, "train", killed)
    with pytest.raises(Killed):
        search(tmp_path / "a", *settings, controls("random_mask", "shuffled_layers"))
    monkeypatch.undo()
    assert not (tmp_path / "a" / "result.json").exists()
    _, text = search(tmp_path / "a", *settings, controls("random_mask", "shuffled_layers"))
    assert "random_mask is finished; skipped" in text
    assert "epoch 1/1" in text.replace("random_mask", "")
    _, text = search(tmp_path / "a", *settings, controls("random_mask", "shuffled_layers"))
    assert "is finished; nothing to do" in text

    begun = (tmp_path / "a" / "random_mask" / "run.json").read_bytes()
    result, text = search(tmp_path / "a", *settings, controls("dense", "random_mask", "random_reinit"))
    assert "is finished but for its controls: dense, random_reinit" in text
    assert [row["name"] for row in result.rows] == [
        "dense",
        "random_mask",
        "shuffled_layers",
        "random_reinit",
        "round_00",
    ]
    assert begun == (tmp_path / "a" / "random_mask" / "run.json").read_bytes()
    assert result.ticket.metadata["dense"] == result.rows[0]["metrics"]
    assert "\nrandom_reinit," in (tmp_path / "a" / "summary.csv").read_text()
    assert tt.load_recipe(tmp_path / "a" / "recipe.yaml").controls == ("dense", "random_mask", "random_reinit")


def test_controls_that_are_searches_have_folders_of_their_own_and_go_on_there(tmp_path, monkeypatch):
    settings = [*SMALL, "pruner.name=colt", "pruner.prune_rate=0.5", "pruner.sparsity=0.7", controls(*SEARCHED)]

    whole = experiment.search

    def killed(recipe, *args, **kwargs):
        if getattr(recipe, "folder", None) == tmp_path / "equal_cost":
            raise Killed
        return whole(recipe, *args, **kwargs)

    monkeypatch.setattr(experiment, "search", killed)
    with pytest.raises(Killed):
        search(tmp_path, *settings)
    monkeypatch.undo()
    before = tt.load_ticket(tmp_path / "digits_imp.ticket").fingerprint  # written before the controls are searched
    result, text = search(tmp_path, *settings)
    assert "is finished but for its controls: one_shot, equal_rate_imp, equal_cost" in text
    assert f"{tmp_path / 'one_shot'} is finished; nothing to do" in text
    assert before == result.ticket.fingerprint
    rows = {row["name"]: row for row in result.rows}
    assert [*rows][:3] == [*SEARCHED]
    assert {rows[name]["sparsity"] for name in SEARCHED} == {result.ticket.sparsity}
    pruners = {name: tt.load_recipe(tmp_path / name / "recipe.yaml").pruner for name in SEARCHED}
    found = {name: (one["name"], one["epochs"], one.get("prune_rate")) for name, one in pruners.items()}
    spent = round(sum(row["steps"] for name, row in rows.items() if name not in SEARCHED) / result.rows[-1]["steps"])
    assert found == {
        "one_shot": ("imp", 1, 0.7),
        "equal_rate_imp": ("imp", 1, 0.75),
        "equal_cost": ("gradual", spent, None),
    }
    assert rows["one_shot"] == {**tt.search(tmp_path / "one_shot" / "recipe.yaml").rows[-1], "name": "one_shot"}
    assert "one_shot" not in (tmp_path / "epochs.csv").read_text()
    check_folder(tmp_path, tt.load_recipe("digits_imp", settings), "search", restart=True)
    assert not any((tmp_path / name).exists() for name in SEARCHED)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            ["pruner.name=edge_popup", "controls=random_mask"],
            "controls: random_mask cannot be had: edge_popup trains no weights, only which are kept, and the control "
            "would train them. With pruner.name=edge_popup there are dense, equal_epochs",
        ),
        (["pruner.name=frozen_slt", "controls=shuffled_layers"], "frozen_slt trains no weights"),
        (["controls=equal_rate_imp"], "equal_rate_imp cannot be had: it is imp with these settings"),
        (["pruner.prune_rate=0.95", "controls=one_shot"], "one_shot cannot be had: it is imp with these settings"),
        (["pruner.name=gradual", "controls=equal_cost"], "equal_cost cannot be had: it is gradual with these settings"),
        (["pruner.name=rigl", "controls=equal_rate_imp"], "rigl does not prune at one rate, round by round"),
        (["model.initial_checkpoint=a.pt", "controls=random_reinit"], "the model begins with trained weights"),
        (
            ["pruner.name=tp_magnitude", "pruner.rounds=2", "controls=random_mask"],
            "tp_magnitude prunes while it trains, and its ticket goes on from these weights",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_control_that_compares_something_else_is_refused_before_the_search(settings, why):
    with pytest.raises(tt.SettingError) as error:
        check_controls(tt.load_recipe("digits_imp", [*SMALL, *settings]))
    assert why in str(error.value)


def test_a_refused_control_leaves_no_folder(tmp_path):
    with pytest.raises(tt.SettingError, match="edge_popup trains no weights"):
        search(tmp_path / "a", *SMALL, "pruner.name=edge_popup", "controls=random_mask")
    assert not (tmp_path / "a").exists()


def test_what_a_start_is_not_known_of_is_refused_by_name(tmp_path):
    recipe = tt.load_recipe("digits_imp", [*SMALL, "pruner.name=magnitude"])
    pruner = tt.create_pruner("magnitude", build_model(recipe, 4), sparsity=0.5, folder=tmp_path)
    ticket = pruner.ticket
    with torch.no_grad():
        ticket.values["conv1.0.weight"].mul_(2)
    with pytest.raises(tt.SettingError, match="controls: random_mask cannot be had: magnitude's ticket begins with"):
        beside("random_mask", recipe, None, pruner, ticket)


# Tickets that are given


@pytest.fixture
def given(tmp_path):
    """The path of a ticket of some granularity, cut from the recipe's own start."""

    def make(granularity="weight"):
        model = build_model(tt.load_recipe("digits_imp"), 4)
        pruner = tt.create_pruner("magnitude", model, sparsity=0.5, granularity=granularity)
        pruner.ticket.save(tmp_path / "one.ticket")
        return tmp_path / "one.ticket"

    return make


@pytest.mark.parametrize("how", ["train", pytest.param("transfer", marks=pytest.mark.slow)])
def test_a_given_ticket_has_the_recipes_controls_too_and_gains_them_later(tmp_path, given, monkeypatch, how):
    seen, path, text = FirstImages(monkeypatch), given("2:4"), io.StringIO()
    common = [*SMALL, f"output={tmp_path / 'out'}"]
    run = getattr(tt, how)
    run("digits_imp", path, [*common, "controls=[]"], console=Console(file=text, width=200))
    begun = next((tmp_path / "out").glob("*/run.json")).read_bytes()
    asked = [*common, controls("dense", "random_mask", "shuffled_layers", "random_reinit")]
    rows = run("digits_imp", path, asked, console=Console(file=text, width=200)).rows
    name = {"train": "round_00", "transfer": "ticket"}[how]
    assert [row["name"] for row in rows] == ["dense", *IN_PLACE, name]
    assert begun == (tmp_path / "out" / name / "run.json").read_bytes()
    assert all(seen.of[one] == seen.of[name] for one in ("dense", *IN_PLACE))
    ticket = tt.load_ticket(path)
    fresh = build_model(tt.load_recipe("digits_imp"), 4).state_dict()
    for one in ("random_mask", "shuffled_layers"):
        other = tt.load_ticket(tmp_path / "out" / one / f"{one}.ticket")
        assert counts(other.masks) == counts(ticket.masks)
        for key, mask in other.masks.items():
            assert torch.equal(other.values[key], fresh[key] * mask)
            assert mask.all() or {*mask.reshape(-1, 4).sum(1).tolist()} == {2}
    assert run("digits_imp", path, asked, console=Console(file=text)).rows == rows


@pytest.mark.parametrize(
    ("how", "granularity", "control", "why"),
    [
        (
            "train",
            "channel",
            "shuffled_layers",
            "shuffled_layers cannot be had: the ticket prunes units of kind channel",
        ),
        ("transfer", "weight", "equal_cost", "equal_cost cannot be had: how long the search of this ticket trained is"),
        ("train", None, "random_mask", "random_mask cannot be had: they stand beside a ticket, and the dense network"),
    ],
)
def test_controls_that_a_given_ticket_cannot_have_are_refused(tmp_path, given, how, granularity, control, why):
    ticket = None if granularity is None else given(granularity)
    with pytest.raises(tt.SettingError) as error:
        getattr(tt, how)("digits_imp", ticket, [*SMALL, f"controls={control}", f"output={tmp_path / 'out'}"])
    assert why in str(error.value)
    assert not (tmp_path / "out").exists()
