"""Tickets on other tasks: what corresponds, what starts afresh, what is refused; and the whole thing on digits."""

import io

import pytest
import timm
import torch
from rich.console import Console
from typer.testing import CliRunner

import timm_tickets as tt
from timm_tickets import cli
from timm_tickets.adapt import adapted_stem, adapted_stem_mask, recompute_batch_norm_


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
    moved = ticket.transfer_(model)
    assert torch.isfinite(model.eval()(torch.randn(2, 3, size, size))).all()
    for key, mask in moved.masks.items():
        assert torch.equal(mask, ticket.masks[key])
        assert torch.equal(model.get_parameter(key), ticket.state()[key])


def test_positions_of_the_same_size_and_prefix_tokens_are_kept_exactly():
    ticket = ticket_of("test_vit")
    prefix = build("test_vit", num_classes=10, img_size=64)
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
    from timm_tickets.data import Data

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
    assert set(rows) == {"ticket", "random", "dense", "native"}
    assert rows["ticket"]["sparsity"] == rows["random"]["sparsity"] == pytest.approx(0.8, abs=1e-5)
    assert rows["dense"]["sparsity"] == 0
    assert "tweaks" in rows["ticket"]["metrics"]
    source = tt.load_ticket(found)
    assert all(torch.equal(mask, source.masks[name]) for name, mask in result.ticket.masks.items())
    other = tt.load_ticket(tmp_path / "moved" / "random" / "random.ticket")
    for name, mask in other.masks.items():
        assert int(mask.sum()) == int(source.masks[name].sum())
    assert any(not torch.equal(mask, source.masks[name]) for name, mask in other.masks.items())
    # The statistics are the target's, the weights the source's.
    assert not torch.equal(result.ticket.values["bn1.running_mean"], source.values["bn1.running_mean"])
    again = tt.transfer("digits_imp", found, settings, recompute_batch_norm=True, console=Console(file=text))
    assert again.rows == result.rows
    with pytest.raises(tt.SettingError, match="another experiment's results"):
        tt.transfer("digits_imp", found, settings, console=Console(file=text))


def test_from_the_command_line(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = [part for setting in (*SHORT, HIGH) for part in ("--set", setting)]
    out = CliRunner().invoke(cli.app, ["transfer", str(found), "digits_imp", *sets, "--control", "random"])
    assert out.exit_code == 0, out.output
    assert "ticket" in out.output
    assert "random" in out.output
    assert "dense" not in out.output
    assert (tmp_path / "output" / "digits_imp_transfer_digits_imp" / "digits_imp.ticket").exists()
    out = CliRunner().invoke(cli.app, ["transfer", str(found), "digits_imp", *sets, "--control", "randm"])
    assert out.exit_code == 2
    assert "did you mean 'random'" in out.output
