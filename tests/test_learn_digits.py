"""That learned masks learn: on real digits each beats the same network with its scores shuffled within layers."""

import statistics

import pytest
import timm
import torch
from torch import nn

import timm_tickets as tt

BATCH, SPARSITY = 64, 0.8
SETTINGS = {
    "edge_popup": {"scale": "dynamic"},
    "frozen_slt": {"frozen": 0.5, "scale": "dynamic"},
    "jackpot": {},
    "continuous_sparsification": {"rounds": 1, "rewind": "0ep", "penalty": 1e-6},
}


def loop(
    model, optimizer, digits, epochs, seed, loss=lambda criterion, output, target: criterion(output, target), run=None
):
    images, labels, _, _ = digits
    steps = len(images) // BATCH
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, optimizer.param_groups[0]["lr"], total_steps=steps * epochs
    )
    if run is not None:
        run.batches_per_epoch = steps
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator)[: steps * BATCH].view(steps, BATCH):
            loss(nn.functional.cross_entropy, model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def fitted(model, digits):
    """Cross-entropy on the training images with batch statistics: what the subnetwork itself can do."""
    images, labels, _, _ = digits
    model.train()
    return nn.functional.cross_entropy(model(images), labels).item()


def fresh(seed):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=10)


@pytest.mark.filterwarnings("ignore:jackpot")  # these weights are the test's own, not timm's
@pytest.mark.filterwarnings("ignore:.*have a score above zero")
@pytest.mark.parametrize(("seeds", "epochs"), [(1, 3), pytest.param(3, 6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SETTINGS)
def test_scores_beat_the_same_scores_shuffled(digits, name, seeds, epochs, capsys):
    found, shuffled = [], []
    for seed in range(seeds):
        model = fresh(seed)
        if name == "jackpot":  # pretrained: on the same images, briefly
            loop(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), digits, epochs, seed)
        start = {key: value.clone() for key, value in model.state_dict().items()}
        pruner = tt.create_pruner(name, model, sparsity=SPARSITY, epochs=epochs, seed=seed, **SETTINGS[name])
        for run in pruner:
            optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
            loop(model, optimizer, digits, epochs, seed, run.loss, run)
        ticket = pruner.ticket
        if name == "continuous_sparsification":  # a ticket to train, from its start: the first weights times c
            model.load_state_dict(start | {layer: start[layer] * 2 for layer in ticket.masks})  # c = 1 / sigmoid(0)
            for layer, mask in ticket.masks.items():
                assert torch.allclose(ticket.values[layer], (start[layer] * 2) * mask)
            tickets = [ticket, tt.Ticket.of(model, tt.shuffled_masks(ticket.masks, seed))]
        else:  # its values are final: shuffle which of the frozen weights are kept, layer by layer
            frozen = pruner.subnet.model
            with torch.no_grad():
                values = dict(ticket.values)
                for layer in ticket.masks:
                    values[layer] = full_weight(name, pruner, layer, start)
            frozen.load_state_dict(values)
            tickets = [ticket, tt.Ticket.of(frozen, tt.shuffled_masks(ticket.masks, seed))]
        for one, results in zip(tickets, (found, shuffled), strict=True):
            model = one.apply_(fresh(seed))
            optimizer = one.attach(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
            if name == "continuous_sparsification":
                loop(model, optimizer, digits, epochs, seed)
            results.append(fitted(model, digits))
    with capsys.disabled():
        print(f"\n  {name}: train loss {found}, shuffled {shuffled}")
    assert statistics.mean(found) < statistics.mean(shuffled)
    if name != "continuous_sparsification":
        assert max(found) < min(shuffled)


def full_weight(name, pruner, layer, start):
    """The frozen weights of a layer before they were pruned: drawn again from the seed, or the pretrained ones."""
    if name == "jackpot":
        return start[layer]
    from timm_tickets.core.draws import draw

    number = pruner.subnet.names.index(layer)
    mask = pruner.ticket.masks[layer]
    drawn = torch.from_numpy(draw(pruner.method.weights, start[layer].shape, pruner.method.seed, number))
    scale = (pruner.ticket.values[layer][mask] / drawn[mask]).mean()
    return drawn * scale
