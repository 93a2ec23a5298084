"""Compact models: what nothing reads is gone, and nothing else is changed."""

import copy
import json
import warnings

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import timm_tickets as tt
from timm_tickets.structure.compact import compacted
from timm_tickets.structure.find import find_groups
from timm_tickets.structure.groups import halves


def pruned(name, **arguments):
    """A model, its ticket with half of every family of channels pruned, and the ticket applied."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments)
    groups = find_groups(model, classifier=True)
    ticket = tt.Ticket.of(model, groups.mask(next(halves(groups))))
    return ticket.apply_(model), ticket


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def untouched(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Three(nn.Module):
    """Three channels, a normalisation, a depthwise convolution, two readers."""

    def __init__(self):
        super().__init__()
        self.make = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.one, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, bias=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.depthwise(self.norm(self.make(x)).relu())
        return self.head((self.one(x) + self.other(x)).mean((2, 3)))


def test_what_is_removed_by_hand():
    model = Three().eval()
    with torch.no_grad():
        model.one.weight[:, 1] = 0
        model.other.weight[:, 1] = 0
    before = copy.deepcopy(model.state_dict())
    small = compacted(model).model
    left = torch.tensor([0, 2])
    for name in ("make.weight", "make.bias", "norm.weight", "norm.bias", "norm.running_mean", "depthwise.weight"):
        assert torch.equal(small.state_dict()[name], before[name][left]), name
    for name in ("one.weight", "other.weight"):
        assert torch.equal(small.state_dict()[name], before[name][:, left]), name
    assert (small.depthwise.groups, small.norm.num_features, small.one.in_channels) == (2, 2, 2)
    assert untouched(model, before)
    assert model.depthwise.groups == 3


def test_a_channel_that_something_alive_reads_is_kept():
    model = Three().eval()
    with torch.no_grad():
        model.one.weight[:, 1] = 0
        model.other.weight[1:, 1] = 0  # one weight of it is left
        model.make.weight[1] = 0  # what makes it does not count: norm and bias make a constant of it
    found = compacted(model)
    assert (found.dead, found.removed, size(found.model)) == (0, 0, size(model))
    assert "something reads every one" in found.told()[0]


def test_of_a_layer_that_nothing_reads_one_channel_stays():
    model = Three().eval()
    with torch.no_grad():
        model.one.weight.zero_()
        model.other.weight.zero_()
    found = compacted(model)
    assert (found.dead, found.removed, found.model.make.out_channels) == (3, 2, 1)
    assert "a layer has to have one" in found.told()[0]


class Even(nn.Module):
    """Two layers with an even number of channels between them."""

    def __init__(self):
        super().__init__()
        self.make, self.read = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.make(x)
        if x.shape[1] % 2:
            raise ValueError("an even number of channels")
        return self.read(x)


def test_what_one_layer_cannot_lose_another_like_it_may_lose_more_of():
    model = nn.Sequential(Even(), Even(), Even()).eval()
    with torch.no_grad():
        for each, count in zip(model, (1, 2, 1), strict=True):
            each.read.weight[:, :count] = 0
    found = compacted(model)
    assert [each.make.out_channels for each in found.model] == [4, 2, 4]
    assert [(name.partition(".")[0], count) for name, count, _ in found.stayed] == [("0", 1), ("2", 1)]


def test_classes_are_no_channels_however_many_there_are():
    """timm's ResNets say `num_classes` and nothing in their forward pass reads it: any number there looks right."""
    model = Three().eval()
    model.num_classes, model.width = 3, 3
    with torch.no_grad():
        model.one.weight[:, 1] = 0
        model.other.weight[:, 1] = 0
    small = compacted(model).model
    assert (small.num_classes, small.width) == (3, 2)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_byobnet", "test_efficientnet", "test_nfnet"])
def test_a_channel_ticket_made_small(name):
    model, ticket = pruned(name)
    model.train()
    with torch.no_grad():  # statistics and scales that hide nothing
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model(torch.randn(8, 3, 64, 64))
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = ticket.compact(model)
    assert untouched(model, before)
    assert size(small) < 0.75 * size(model)
    images, dropless = torch.randn(4, 3, 64, 64), [model.eval(), small.eval()]
    one, other = (each(images) for each in dropless)
    assert (one - other).abs().max() <= 1e-5 * one.abs().max()
    one, other = (copy.deepcopy(each).double()(images.double()) for each in dropless)
    # A standardised weight's mean of zero is one in float32.
    assert (one - other).abs().max() <= (1e-6 if name == "test_nfnet" else 1e-12) * one.abs().max()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_nfnet"])
def test_it_trains_as_the_masked_model_does(name, digits):
    model, ticket = pruned(name, **({"img_size": 32} if name == "test_vit" else {}))
    small = ticket.compact(model)
    images, labels = digits[0][:128].split(32), digits[1][:128].split(32)
    losses = []
    for each in (model, small):
        each.double().train()
        optimizer = torch.optim.SGD(each.parameters(), 0.05, 0.9)
        if each is model:
            ticket.attach(model, optimizer)
        losses.append([])
        for x, y in zip(images, labels, strict=True):
            loss = nn.functional.cross_entropy(each(x.double()), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(set(losses[0])) == 4


def test_single_weights_leave_nothing_to_remove_and_it_is_said():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    names = tt.prunable_names(model)
    masks = {name: torch.rand(dict(model.named_parameters())[name].shape) > 0.5 for name in names}
    ticket = tt.Ticket.of(model, masks)
    ticket.apply_(model)
    with pytest.warns(UserWarning, match="zeros here and there make no tensor smaller"):
        assert size(ticket.compact(model)) == size(model)


def test_a_model_without_the_zeros_is_refused():
    model, ticket = pruned("test_resnet")
    with torch.no_grad():
        model.conv1[0].weight.add_(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tt.TicketError, match=r"the ticket prunes are not zero .*conv1.0.weight.* train with attach"):
        ticket.compact(model)
    assert untouched(model, before)


def test_heads_that_the_code_needs_stay_and_are_named():
    """davit's attention reshapes by the number of channels of its input."""
    model, ticket = pruned("davit_tiny", depths=(1, 1), embed_dims=(32, 64), num_heads=(2, 2))
    with pytest.warns(UserWarning, match=r"channels and heads that nothing reads stay: .*attn.qkv.*code needs them"):
        small = ticket.compact(model)
    assert size(small) < size(model)
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(small.eval()(images), model.eval()(images), atol=1e-6)


def test_a_search_prunes_no_channels_that_cannot_be_taken_out():
    model = timm.create_model("davit_tiny", depths=(1, 1), embed_dims=(32, 64), num_heads=(2, 2), num_classes=10)
    pruner = tt.create_pruner("magnitude", model, granularity="channel", sparsity=0.3)
    ticket = pruner.ticket
    assert all(mask.all() == ("attn" in name) for name, mask in ticket.masks.items() if "attn" in name or "mlp" in name)
    told = dict(pruner.method.units.groups.left)
    assert told["stages.0.blocks.0.0.attn.qkv.weight", 0].startswith("cannot be taken out: the module's code needs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert size(ticket.compact(ticket.apply_(model))) < size(model)


def test_as_long_as_a_search_may_look_for_channels_a_ticket_of_it_may(monkeypatch):
    asked = []

    def looked(*args, seconds=0.0, **settings):
        asked.append(seconds)
        raise tt.SettingError("enough")

    ticket = tt.Ticket.of(model := timm.create_model("test_resnet", num_classes=10), {})
    settings = {"sparsity": 0.5, "granularity": "channel"}
    for name in ("compact", "units"):
        monkeypatch.setattr(f"timm_tickets.structure.{name}.find_groups", looked)
    for call in (lambda: ticket.compact(model), lambda: tt.create_pruner("magnitude", model, **settings)):
        with pytest.raises(tt.SettingError, match="enough"):
            call()
    assert asked == [600, 600]


def test_what_is_no_number_is_compared_with_nothing():
    model = Three().eval()
    with torch.no_grad():
        model.one.bias.fill_(torch.nan)
    with pytest.raises(tt.SettingError, match="the model puts out NaN or infinity on a random image"):
        compacted(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, ticket = pruned("test_vit", img_size=64)
    path = tmp_path_factory.mktemp("compact") / "small.safetensors"
    small = ticket.compact(model).eval()
    tt.save_compact(small, path, {"img_size": 64})
    return path, small


def test_a_file_gives_the_model_again(saved):
    path, small = saved
    again = tt.load_compact(path)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), small(images))
    assert path.stat().st_size < 4.2 * size(small) + 20_000
    compiled = torch.compile(again.train(), backend="eager")
    compiled(images).sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    tt.save_compact(compiled, path.parent / "again.safetensors", {"img_size": 64})
    assert tt.load_compact(path.parent / "again.safetensors").blocks[0].attn.num_heads == small.blocks[0].attn.num_heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_saved_as_it_is_and_comes_back_in_float32(saved, dtype, tmp_path):
    path, small = tmp_path / "small.safetensors", copy.deepcopy(saved[1]).to(dtype)
    tt.save_compact(small, path, {"img_size": 64})
    assert load_file(path)["norm.weight"].dtype == dtype
    assert untouched(tt.load_compact(path), small.float().state_dict())


def test_it_goes_through_ddp(saved):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(tt.load_compact(saved[0]))
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        tt.save_compact(model, saved[0].parent / "ddp.safetensors", {"img_size": 64})
    finally:
        torch.distributed.destroy_process_group()
    assert untouched(tt.load_compact(saved[0].parent / "ddp.safetensors"), saved[1].state_dict())


def test_what_is_saved_has_to_come_back(saved):
    path, small = saved
    with pytest.raises(tt.SettingError, match=r"give what timm.create_model was given"):
        tt.save_compact(small, path.parent / "wrong.safetensors")  # of images of 64 pixels
    with pytest.raises(tt.SettingError, match="it is not a compact one"):
        tt.save_compact(nn.Linear(2, 2), path.parent / "wrong.safetensors")
    with pytest.raises(tt.SettingError, match="cannot say checkpoint_path"):
        tt.save_compact(small, path.parent / "wrong.safetensors", {"checkpoint_path": "/x"})
    assert not (path.parent / "wrong.safetensors").exists()


FORGED = {
    "another architecture": (
        lambda h: h | {"architecture": "test_resnet", "arguments": {}},
        "does not fit test_resnet",
    ),
    "no architecture": (lambda h: h | {"architecture": "nonsense"}, "which this timm .* does not have"),
    "a module that is not there": (lambda h: h | {"attributes": [["blocks.9.attn", "num_heads", 1]]}, "blocks.9.attn"),
    "an attribute that is not there": (lambda h: h | {"attributes": [["blocks.0.attn", "x", 1]]}, "blocks.0.attn.x"),
    "a private one": (lambda h: h | {"attributes": [["", "_modules", 1]]}, "_modules"),
    "not a number": (lambda h: h | {"attributes": [["", "training", "yes"]]}, "damaged, or is no such file"),
    "a truth": (lambda h: h | {"attributes": [["blocks.0.attn", "fused_attn", 1]]}, "fused_attn"),
    "too many heads": (lambda h: h | {"attributes": [["blocks.0.attn", "num_heads", 10**9]]}, "num_heads"),
    "more": (lambda h: h | {"code": "x"}, "damaged, or is no such file"),
    "format": (lambda h: h | {"format": 2}, "damaged, or is no such file"),
    "nothing is smaller": (lambda h: h | {"shrunk": []}, "blocks.0"),
    "an index": (lambda h: h | {"kept": [["pos_embed", 1, [0]]]}, "pos_embed"),
}


@pytest.mark.parametrize(("forge", "match"), FORGED.values(), ids=FORGED)
def test_forged_files_are_refused(saved, tmp_path, forge, match):
    with safe_open(saved[0], "pt") as file:
        header = json.loads(file.metadata()["timm_tickets_compact"])
    save_file(load_file(saved[0]), tmp_path / "x.safetensors", {"timm_tickets_compact": json.dumps(forge(header))})
    with pytest.raises((tt.TicketError, tt.SettingError), match=match):
        tt.load_compact(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: {name: value for name, value in s.items() if name != "norm.weight"}, "norm.weight"),
        (lambda s: s | {"more": torch.zeros(1)}, "more"),
        (lambda s: s | {"norm.weight": torch.zeros(10_000)}, "norm.weight"),
        (lambda s: s | {"norm.weight": torch.zeros(64, dtype=torch.int8)}, "norm.weight"),
        (lambda s: s | {"norm.weight": torch.zeros(8, 8)}, "norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, tmp_path, change, match):
    with safe_open(saved[0], "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(saved[0])), tmp_path / "x.safetensors", metadata)
    with pytest.raises(tt.TicketError, match=match):
        tt.load_compact(tmp_path / "x.safetensors")


def test_what_is_no_compact_file(saved, tmp_path):
    with pytest.raises(FileNotFoundError):
        tt.load_compact(tmp_path / "none")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(tt.TicketError, match="is no compact model"):
        tt.load_compact(tmp_path / "plain.safetensors")
    data = saved[0].read_bytes()
    for length in (0, 4, 100, len(data) - 10):
        (tmp_path / "short").write_bytes(data[:length])
        with pytest.raises(tt.TicketError, match="is damaged"):
            tt.load_compact(tmp_path / "short")
    # A file of a few bytes that names a large model is refused before that is built.
    header = {
        "format": 1,
        "architecture": "vit_giant_patch14_224",
        "arguments": {},
        "attributes": [],
        "shrunk": [],
        "kept": [],
    }
    save_file({"a": torch.zeros(1)}, tmp_path / "tiny", {"timm_tickets_compact": json.dumps(header)})
    with pytest.raises(tt.TicketError, match="does not fit"):
        tt.load_compact(tmp_path / "tiny")
