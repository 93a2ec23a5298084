"""Tickets on other tasks: what corresponds, what starts afresh, what is refused; and the whole thing on digits."""

import io
import warnings

import pytest
import timm
import torch
from rich.console import Console
from support.commands import call
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

import timm_tickets as tt
from timm_tickets.tickets.transfer import adapted_stem, adapted_stem_mask, recompute_batch_norm_
from timm_tickets.training.build import build_model


def build(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs)


def ticket_of(name, sparsity=0.8, **kwargs):
    kwargs = {"num_classes": 10} | kwargs
    settings = {"classifier": kwargs.pop("classifier", False)}
    return tt.create_pruner("magnitude", build(name, **kwargs), sparsity=sparsity, **settings).ticket


def test_other_classes_get_a_fresh_head_and_everything_else():
    ticket, model = ticket_of("test_resnet"), build("test_resnet", seed=1, num_classes=7)
    head = model.fc.weight.detach().clone()
    moved = ticket.transfer_(model)
    assert torch.equal(model.fc.weight, head)
    for name, value in ticket.state().items():
        if not name.startswith("fc."):
            assert torch.equal(model.state_dict()[name], value), name
    assert moved.masks.keys() == ticket.masks.keys()
    assert all(torch.equal(mask, ticket.masks[name]) for name, mask in moved.masks.items())
    assert moved.metadata["model"]["num_classes"] == 7
    assert moved.metadata["transferred_from"] == ticket.fingerprint


def test_a_pruned_head_of_another_size_starts_dense_and_one_of_the_same_size_stays():
    ticket = ticket_of("test_resnet", classifier=True)
    assert "fc.weight" in ticket.masks
    assert "fc.weight" not in ticket.transfer_(build("test_resnet", seed=1, num_classes=7)).masks
    same = build("test_resnet", seed=1, num_classes=10)
    assert torch.equal(ticket.transfer_(same).masks["fc.weight"], ticket.masks["fc.weight"])
    assert torch.equal(same.fc.bias, ticket.values["fc.bias"])


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_by_timms_rule(channels):
    """The model of timm's own `in_chans` for pretrained weights; zeros stay zeros where every source is one."""
    ticket, model = ticket_of("test_resnet"), build("test_resnet", seed=1, num_classes=10, in_chans=channels)
    moved = ticket.transfer_(model)
    old, mask = ticket.state()["conv1.0.weight"], ticket.masks["conv1.0.weight"]
    new = model.conv1[0].weight
    if channels == 1:
        assert torch.equal(new, old.sum(1, keepdim=True))
        assert torch.equal(moved.masks["conv1.0.weight"], mask.any(1, keepdim=True))
    else:
        torch.testing.assert_close(new, torch.cat([old, old[:, :1]], 1) * 3 / 4)
        assert torch.equal(moved.masks["conv1.0.weight"][:, 3], mask[:, 0])
    assert not new[~moved.masks["conv1.0.weight"]].any()


def test_the_adapted_stem_by_hand():
    weight = torch.tensor([[[[1.0]], [[0.0]], [[2.0]]]])
    mask = torch.tensor([[[[True]], [[False]], [[True]]]])
    assert adapted_stem(weight, 6).flatten().tolist() == [0.5, 0, 1, 0.5, 0, 1]  # each twice, half as strong
    assert adapted_stem_mask(mask, 6).flatten().tolist() == [True, False, True, True, False, True]
    assert adapted_stem(weight[:, :1], 3).flatten().tolist() == [pytest.approx(1 / 3)] * 3


@pytest.mark.parametrize(
    ("name", "size"), [("test_vit", 64), ("test_vit2", 96), ("swin_tiny_patch4_window7_224", 112)], ids=str
)
def test_other_image_sizes_resample_positions(name, size):
    kwargs = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)} if name.startswith("swin") else {}
    ticket = ticket_of(name, **kwargs)
    model = build(name, seed=1, num_classes=10, img_size=size, **kwargs)
    if name.startswith("swin"):
        model = build(name, seed=1, num_classes=10, img_size=size, window_size=4, **kwargs)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    moved = ticket.transfer_(model)
    assert torch.isfinite(model.eval()(torch.randn(2, 3, size, size))).all()
    if name.startswith("swin"):
        key = "layers.0.blocks.0.attn.relative_position_bias_table"
        with warnings.catch_warnings():  # torch's, of what timm's interpolation does
            warnings.simplefilter("ignore")
            expected = resize_rel_pos_bias_table(ticket.values[key], (4, 4), tuple(own[key].shape))
    else:
        key, prefix = "pos_embed", own["pos_embed"].shape[1] - (size // 16) ** 2
        expected = resample_abs_pos_embed(ticket.values[key], [size // 16] * 2, [10, 10], num_prefix_tokens=prefix)
    assert own[key].shape != ticket.values[key].shape
    torch.testing.assert_close(model.state_dict()[key], expected, rtol=0, atol=0)
    assert not torch.equal(own[key], expected)
    for key, mask in moved.masks.items():
        assert torch.equal(mask, ticket.masks[key])
        assert torch.equal(model.get_parameter(key), ticket.state()[key])


def test_positions_of_the_same_size_and_prefix_tokens_are_kept_exactly():
    ticket = ticket_of("test_vit")
    prefix = build("test_vit", seed=1, num_classes=10, img_size=64)
    assert not torch.equal(prefix.pos_embed[:, :1], ticket.values["pos_embed"][:, :1])
    ticket.transfer_(prefix)
    assert torch.equal(prefix.pos_embed[:, :1], ticket.values["pos_embed"][:, :1])  # the class token's
    same = build("test_vit", seed=2, num_classes=3)
    ticket.transfer_(same)
    assert torch.equal(same.pos_embed, ticket.values["pos_embed"])


def test_what_does_not_correspond_is_named_and_nothing_is_changed():
    ticket = ticket_of("test_resnet")
    with pytest.raises(tt.TicketError, match="'test_resnet', the model is 'test_vit'"):
        ticket.transfer_(build("test_vit"))
    wider = build("test_resnet", seed=1, num_classes=10, channels=(32, 48, 48, 128))
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(tt.TicketError, match=r"layer4\.0\.conv1\.weight is .* in the ticket and .* in the model"):
        ticket.transfer_(wider)
    assert all(torch.equal(value, before[name]) for name, value in wider.state_dict().items())


def test_batch_norm_is_the_mean_over_the_given_batches():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1, momentum=0.1)).eval()
    model[0].running_mean.fill_(9)
    recompute_batch_norm_(model, [torch.full((2, 1, 2, 2), 1.0), torch.full((2, 1, 2, 2), 4.0)])
    assert model[0].running_mean.item() == 2.5
    assert model[0].running_var.item() == 0
    assert model[0].momentum == 0.1
    assert not model.training
    with pytest.raises(ValueError, match="there are no batches"):
        recompute_batch_norm_(model, [])


LOW, HIGH = "data.classes=[0,1,2,3,4]", "data.classes=[5,6,7,8,9]"
SHORT = ["training.epochs=3", "pruner.sparsity=0.8", "pruner.prune_rate=0.8"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    tt.search("digits_imp", [*SHORT, LOW, f"output={folder}"], console=Console(file=io.StringIO()))
    return folder / "digits_imp.ticket"


def test_a_task_of_some_classes(found):
    from timm_tickets.data.datasets import Data

    data = Data(tt.load_recipe("digits_imp", [HIGH]).data)
    assert data.num_classes == 5
    assert sorted(set(data._test.targets)) == [0, 1, 2, 3, 4]
    assert tt.load_ticket(found).metadata["model"]["num_classes"] == 5
    with pytest.raises(tt.SettingError, match=r"data\.classes: \[3, 11\] is not valid"):
        Data(tt.load_recipe("digits_imp", ["data.classes=[3,11]"]).data)


def test_a_ticket_is_transferred_with_its_controls(found, tmp_path):
    settings = [*SHORT, HIGH, f"output={tmp_path / 'moved'}", "retrain.tweaks=[label_smoothing]"]
    text = io.StringIO()
    result = tt.transfer("digits_imp", found, settings, recompute_batch_norm=True, console=Console(file=text))
    rows = {row["name"]: row for row in result.rows}
    assert set(rows) == {"ticket", "shuffled_layers", "dense", "native"}
    assert rows["ticket"]["sparsity"] == rows["shuffled_layers"]["sparsity"] == pytest.approx(0.8, abs=1e-5)
    assert rows["dense"]["sparsity"] == 0
    assert "tweaks" in rows["ticket"]["metrics"]
    assert "tweaks" in rows["shuffled_layers"]["metrics"]
    assert "tweaks" not in rows["dense"]["metrics"]
    fresh = build_model(tt.load_recipe("digits_imp", settings), 5).state_dict()
    for control in ("shuffled_layers", "dense"):  # from the recipe's seed, not from the ticket's values
        start = tt.load_ticket(tmp_path / "moved" / control / f"{control}.ticket")
        for name, mask in start.masks.items():
            assert torch.equal(start.values[name][mask], fresh[name][mask]), name
    saved = tt.load_ticket(tmp_path / "moved" / "digits_imp.ticket").metadata
    assert saved["dense"] == rows["dense"]["metrics"]
    assert saved["metrics"] == rows["ticket"]["metrics"]
    assert "start_epoch" not in saved
    source = tt.load_ticket(found)
    assert all(torch.equal(mask, source.masks[name]) for name, mask in result.ticket.masks.items())
    other = tt.load_ticket(tmp_path / "moved" / "shuffled_layers" / "shuffled_layers.ticket")
    for name, mask in other.masks.items():
        assert int(mask.sum()) == int(source.masks[name].sum())
    assert any(not torch.equal(mask, source.masks[name]) for name, mask in other.masks.items())
    # The statistics are the target's, the weights the source's.
    assert not torch.equal(result.ticket.values["bn1.running_mean"], source.values["bn1.running_mean"])
    again = tt.transfer("digits_imp", found, settings, recompute_batch_norm=True, console=Console(file=text))
    assert again.rows == result.rows
    with pytest.raises(tt.SettingError, match="another experiment's results"):
        tt.transfer("digits_imp", found, settings, console=Console(file=text))


def test_the_dense_control_of_a_transfer_is_trained_as_long_as_the_ticket(found, tmp_path):
    settings = ["training.epochs=1", "retrain.epochs=2", "pruner.epochs=3", "pruner.sparsity=0.8", HIGH]
    text = io.StringIO()
    settings += ["pruner.name=gradual", f"output={tmp_path}"]  # ends trained: what it finds is not trained again
    result = tt.transfer("digits_imp", found, settings, console=Console(file=text, width=80))
    assert {row["name"]: row["epochs"] for row in result.rows} == {
        "ticket": 2,
        "shuffled_layers": 2,
        "dense": 2,
        "native": 3,
    }
    assert len({row["steps"] for row in result.rows if row["name"] != "native"}) == 1
    assert result.ticket.metadata["dense"] == next(row["metrics"] for row in result.rows if row["name"] == "dense")
    assert " epochs " in text.getvalue()


def test_from_the_command_line(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = [part for setting in (*SHORT, HIGH) for part in ("--set", setting)]
    out = call("transfer", found, "digits_imp", *sets, "--control", "shuffled_layers")
    assert out.exit_code == 0, out.output
    assert "ticket" in out.output
    assert "shuffled_layers" in out.output
    assert "dense" not in out.output
    assert (tmp_path / "output" / "digits_imp_transfer_digits_imp" / "digits_imp.ticket").exists()
    out = call("transfer", found, "digits_imp", *sets, "--control", "shufled")
    assert out.exit_code == 2
    assert "did you mean 'shuffled_layers'" in out.output


def test_a_transferred_ticket_says_nothing_of_its_source(found):
    source = tt.load_ticket(found)
    assert source.metadata["dense"]
    assert source.metadata["metrics"]
    moved = source.transfer_(build("test_resnet", num_classes=5, in_chans=1))
    assert not {"dense", "metrics", "start_epoch", "kept"} & moved.metadata.keys()
    pruned = sum(int((~mask).sum()) for mask in moved.masks.values())
    total = sum(mask.numel() for mask in moved.masks.values())
    assert moved.metadata["sparsity"] == pytest.approx(pruned / total)


def test_seed_and_pretrained_starts_travel(tmp_path):
    """The file of a transferred ticket still leaves out what a seed or pretrained weights give."""
    pruner = tt.create_pruner("edge_popup", build("test_resnet", num_classes=10), sparsity=0.5, epochs=1)
    with pytest.warns(UserWarning, match="without an optimizer step"):
        list(pruner)
    pruner.ticket.transfer_(build("test_resnet", num_classes=3)).save(tmp_path / "seed.ticket")
    assert tt.weigh(tmp_path / "seed.ticket").start == 0
    model = build("test_resnet", num_classes=10)
    ticket = tt.create_pruner("magnitude", model, sparsity=0.5).ticket
    ticket.pretrained = tt.Pretrained("test_resnet.r160_in1k", build("test_resnet", num_classes=10).state_dict())
    ticket.transfer_(build("test_resnet", num_classes=3)).save(tmp_path / "pretrained.ticket")
    size = tt.weigh(tmp_path / "pretrained.ticket")
    assert (size.pretrained, size.start) == ("test_resnet.r160_in1k", 0)


def test_one_channel_needs_one_setting(tmp_path):
    recipe = tt.load_recipe("digits_imp", ["model.in_chans=1"])
    assert (recipe.data.in_chans, recipe.data.input_img_mode) == (1, "L")
    settings = [*SHORT, "model.in_chans=1", "training.epochs=1", f"output={tmp_path}"]
    result = tt.train("digits_imp", None, settings, console=Console(file=io.StringIO()))
    assert result.ticket.values["conv1.0.weight"].shape[1] == 1


def test_what_a_control_cannot_do_is_known_before_the_first_training(found, tmp_path):
    """edge_popup ends trained: its native control is not retrained, and nothing fails at the end."""
    settings = [HIGH, f"output={tmp_path}", "training.epochs=1", "pruner.name=edge_popup", "pruner.sparsity=0.8"]
    settings += ["retrain.tweaks=[label_smoothing]"]
    result = tt.transfer("digits_imp", found, settings, controls=["native"], console=Console(file=io.StringIO()))
    assert [row["name"] for row in result.rows] == ["ticket", "native"]
    wrong = [HIGH, f"output={tmp_path / 'wrong'}", "training.smoothing=0.1", "retrain.tweaks=[label_smoothing]"]
    with pytest.raises(tt.SettingError, match="smooths plain cross-entropy"):
        tt.transfer("digits_imp", found, wrong, console=Console(file=io.StringIO()))
    assert not (tmp_path / "wrong").exists()


def test_restarting_clears_the_native_search_too(found, tmp_path, monkeypatch):
    common = [HIGH, "training.epochs=1", "pruner.sparsity=0.8", "pruner.prune_rate=0.8", f"output={tmp_path}"]
    quiet = Console(file=io.StringIO())
    tt.transfer("digits_imp", found, common, controls=["native"], console=quiet)
    changed = [*common, "training.lr=0.04"]

    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("timm_tickets.training.trainer.Trainer.fit", stop)
        with pytest.raises(Stop):
            tt.transfer("digits_imp", found, changed, controls=["native"], restart=True, console=quiet)
    result = tt.transfer("digits_imp", found, changed, controls=["native"], console=quiet)
    assert [row["name"] for row in result.rows] == ["ticket", "native"]
