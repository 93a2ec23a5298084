"""Weight-standardised layers: plain timm computes the sparse network from the parameters, whoever found or saved it."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.layers import StdConv2d
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from timm.utils import CheckpointSaver
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn import functional

import timm_tickets as tt
from timm_tickets.pruning.checks import EmptyLayers, warn_of_thin_layers
from timm_tickets.sparse.gates import _Product
from timm_tickets.sparse.standardised import centred, check_channels, prune_

KINDS = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def build(name, classes=4):
    torch.manual_seed(0)
    if name == "resnetv2":
        return ResNetV2(layers=(1, 1, 1, 1), channels=(128, 128, 128, 128), num_classes=classes).eval()
    if name == "grouped":
        layers = [nn.Sequential(kind(8, 8, 3, groups=2), nn.ReLU()) for kind in KINDS]
        return nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1)).eval()
    return timm.create_model(name, num_classes=classes).eval()


def weight_of(layer):
    """The weight that the convolution really uses."""
    seen = {}
    original = functional.conv2d

    def spy(x, weight, *rest):
        seen["weight"] = weight.detach()
        return original(x, weight, *rest)

    functional.conv2d = spy
    try:
        layer(torch.zeros(1, layer.in_channels, 7, 7))
    finally:
        functional.conv2d = original
    return seen["weight"]


def standardised(model):
    return {f"{name}.weight": module for name, module in model.named_modules() if type(module) in KINDS}


def plain(name, state, classes=4):
    """timm's own model with this state, nothing of ours about it."""
    model = build(name, classes)
    model.load_state_dict(state)
    return model.eval()


def check_sparse(name, state, masks, images):
    """Of a state dict: pruned weights are exactly zero in it, and in plain timm's kernels but for rounding."""
    model = plain(name, state)
    for key, layer in standardised(model).items():
        used, pruned = weight_of(layer), ~masks[key]
        assert not state[key][pruned].any()
        assert not (used[pruned].abs() > 1e-5 * used.abs().max()).any()
    return model(images)


def mask_of(rows):
    return torch.tensor(rows, dtype=torch.bool).view(len(rows), -1, 1, 1)


def test_the_kernel_by_hand():
    layer = StdConv2d(4, 3, 1, eps=1e-12)
    given = torch.tensor([[3.0, 1.0, -1.0, 5.0], [3.0, 1.0, -1.0, 5.0], [3.0, 1.0, -1.0, 5.0]]).view(3, 4, 1, 1)
    with torch.no_grad():
        layer.weight.copy_(given)
    before = weight_of(layer)
    model = nn.Sequential(layer)
    subnet = tt.Subnet(model, ("0.weight",))
    subnet.set_mask_({"0.weight": mask_of([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0]])})
    # Kept are 3, 1 and 5, less their mean 0, -2 and 2; stretched from a length of 8 ** 0.5 to the 35 ** 0.5 before.
    stretched = 2 * (35 / 8) ** 0.5
    assert layer.weight[0].flatten().tolist() == pytest.approx([0, -stretched, 0, stretched])
    assert weight_of(layer)[0].flatten().tolist() == pytest.approx([0, -(2**0.5), 0, 2**0.5], abs=1e-6)
    # The second, of which nothing is pruned, stays bit for bit; the third keeps one weight, which mean zero makes 0.
    assert torch.equal(layer.weight[1], given[1])
    assert torch.equal(weight_of(layer)[1], before[1])
    assert not weight_of(layer)[2].any()
    assert type(layer) is StdConv2d


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 0.1, 30.0])
def test_a_weight_that_is_centred_stays_bit_for_bit(dtype, offset):
    """Or else no search would go on from a checkpoint as it would have without."""
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(64, 16, 3, 3, generator=generator) + offset).to(dtype)
    weight[0] = weight[0, 0, 0, 0]  # all alike: nothing is left of them
    mask = torch.rand(64, 16, 3, 3, generator=generator) < torch.linspace(0, 1, 64).view(-1, 1, 1, 1)
    mask[0, 0], mask[0, 1:5, 0], mask[-1] = True, True, True
    given = weight.clone()
    prune_(weight, mask, True)
    once = weight.clone()
    prune_(weight, mask, True)
    assert torch.equal(weight, once)
    assert not once[~mask].any()
    assert not once[0].any()
    assert torch.equal(once[-1], given[-1])
    rows = once[:-1].double().flatten(1)
    rounding = (16 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps
    assert (rows.sum(1).abs() <= rounding * rows.abs().sum(1)).all()


def test_the_gradients_of_a_soft_mask_before_the_standardisation():
    generator = torch.Generator().manual_seed(0)
    weight, value = (torch.rand(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(1.5, dtype=torch.float64)
    inputs = (weight.requires_grad_(), scale, value.requires_grad_(), True)
    apart = 1.5 * weight - (1.5 * weight * value).sum((1, 2, 3), True) / value.sum((1, 2, 3), True)
    stretch = (
        (1.5 * weight * value).square().sum((1, 2, 3), True) / (apart * value).square().sum((1, 2, 3), True)
    ) ** 0.5
    by_hand, out = value * apart * stretch.detach(), _Product.apply(*inputs)
    torch.testing.assert_close(out, by_hand)
    upstream = torch.rand(out.shape, generator=generator, dtype=out.dtype)
    found, expected = (torch.autograd.grad(one, (weight, value), upstream) for one in (out, by_hand))
    torch.testing.assert_close(found, expected)
    assert torch.equal(centred(weight, torch.ones_like(value))[0], weight)


@pytest.mark.filterwarnings("ignore:.*layers are pruned to nothing", "ignore:.*keep a single weight")
@pytest.mark.parametrize("name", ["test_nfnet", "resnetv2", "grouped"])
def test_plain_timm_computes_what_is_left_by_a_cut_and_by_a_ticket(name):
    model, images = build(name), torch.randn(2, 3, 64, 64)
    before = model(images)
    pruner = tt.create_pruner("magnitude", model, sparsity=0.7, exclude=())
    assert torch.equal(model(images), before)  # nothing is pruned yet: the same function, bit for bit
    ticket = pruner.ticket
    assert {type(layer) for layer in standardised(model).values()} <= {*KINDS}
    after = check_sparse(name, model.state_dict(), ticket.masks, images)
    assert torch.equal(after, model(images))
    assert not torch.allclose(after, before)
    again = ticket.apply_(ticket.apply_(build(name)))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.filterwarnings(
    "ignore:jackpot",
    "ignore:.*without passing its rewind point",
    "ignore:.*layers are pruned to nothing",
    "ignore:.*has not moved its mask",
    "ignore:.*have a score above zero",
    "ignore:.*keep a single weight",
)
@pytest.mark.parametrize(
    "method",
    ["imp", "gradual", "rigl", "edge_popup", "frozen_slt", "continuous_sparsification", "jackpot"],
)
def test_plain_timm_reads_what_every_kind_of_search_and_training_leaves(method, tmp_path):
    images = torch.randn(2, 3, 64, 64)
    model = build("test_nfnet").train()
    more = {"continuous_sparsification": {"rounds": 1}, "rigl": {"interval": 1}}.get(method, {})
    pruner = tt.create_pruner(method, model, sparsity=0.6, epochs=1, **more)
    written = []

    def step(optimizer, loss=lambda criterion, output, target: criterion(output, target)):
        batch, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
        loss(nn.functional.cross_entropy, model.train()(batch), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()

    for run in pruner:
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-3))
        run.batches_per_epoch = 2
        for _ in range(2):
            step(optimizer, run.loss)
        run.settle_()
        state = dict(pruner.subnet.baked_state())  # what is written as model.safetensors
        with pruner.subnet.hard():
            written.append((model(images), check_sparse("test_nfnet", state, pruner.subnet.mask, images)))
    assert written
    assert all(torch.equal(one, other) for one, other in written)
    ticket = pruner.ticket
    ticket.save(tmp_path / "a.ticket")
    given = build("test_nfnet").state_dict() if method == "jackpot" else None
    loaded = tt.load_ticket(tmp_path / "a.ticket", pretrained=given)
    assert torch.equal(loaded.apply_(build("test_nfnet"))(images), model.eval()(images))
    optimizer = ticket.attach(model, torch.optim.Adam(model.parameters(), 0.01, weight_decay=1e-3))
    for _ in range(2):
        step(optimizer)
        assert torch.equal(check_sparse("test_nfnet", model.state_dict(), ticket.masks, images), model(images))
    assert ticket.sparsity == pytest.approx(0.6, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*has not moved its mask", "ignore:.*keep a single weight")
def test_what_a_seed_gives_again_is_left_out_here_too(tmp_path):
    """Values are centred when the ticket is applied, not in it."""
    sizes = {}
    for weights in ("signed_constant", "given"):
        model = build("test_nfnet")
        pruner = tt.create_pruner("edge_popup", model, sparsity=0.5, epochs=1, weights=weights)
        for run in pruner:
            optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
            run.loss(nn.functional.cross_entropy, model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
            optimizer.step()
        pruner.ticket.save(tmp_path / "a.ticket")
        sizes[weights] = (tmp_path / "a.ticket").stat().st_size
    kept = sum(int(mask.sum()) for mask in pruner.ticket.masks.values())
    assert sizes["given"] - sizes["signed_constant"] > 0.95 * 4 * kept


def test_growing_reads_the_gradients_of_pruned_weights():
    model = build("test_nfnet").train()
    pruner = tt.create_pruner("rigl", model, sparsity=0.6, epochs=1, interval=2)
    run = next(pruner)
    run.batches_per_epoch = 4
    run.attach(torch.optim.SGD(model.parameters(), 0.01))
    pruner.subnet.tap_(True)
    mask = pruner.subnet.mask
    run.loss(nn.functional.cross_entropy, model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
    dense = pruner.subnet.dense_gradients()
    reached = [key for key in standardised(model) if dense[key].any()]  # not within branches that begin shut
    assert reached
    assert all(dense[key][~mask[key]].any() for key in reached if not mask[key].all())


def test_gradients_are_those_of_the_weights_that_may_move():
    """As behind a parametrization that centres: what standardising takes is not in a clipped norm or a moment."""
    model = nn.Sequential(StdConv2d(6, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    subnet = tt.Subnet(model, ("0.weight",))
    mask = torch.rand(5, 6, 3, 3, generator=torch.Generator().manual_seed(3)) < 0.4
    subnet.set_mask_({"0.weight": mask})
    start = model[0].weight.detach().clone()
    images, labels = torch.randn(8, 6, 9, 9), torch.arange(8) % 5
    subnet.hold_(torch.optim.SGD(model.parameters(), 0.1))
    nn.functional.cross_entropy(model(images), labels).backward()
    free = start.clone().requires_grad_()
    twin = mask * (free - (mask * free).sum((1, 2, 3), True) / mask.sum((1, 2, 3)).view(-1, 1, 1, 1))
    out = torch.func.functional_call(model, {"0.weight": twin}, (images,))
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(out, labels), free)
    torch.testing.assert_close(model[0].weight.grad, expected)


def lonely(*layers):
    """A subnet of the grouped model, two channels in these of its layers, all in the first, keeping one weight."""
    subnet = tt.Subnet(build("grouped"), [f"{layer}.0.weight" for layer in range(1, 5)])
    masks = subnet.mask
    for layer in layers:
        mask = masks[f"{layer}.0.weight"]
        mask[slice(None) if layer == 1 else slice(2)] = False
        mask[slice(None) if layer == 1 else slice(2), 0, 0, 0] = True
    subnet.set_mask_(masks)
    return subnet


def test_channels_that_keep_a_single_weight_are_counted():
    told = r"imp: 4 of 32 output .* single weight \(2\.0\.weight 2, 4\.0\.weight 2\), which standardising makes zero"
    with pytest.warns(UserWarning, match=told):
        warn_of_thin_layers(SimpleNamespace(name="imp"), lonely(2, 4))


@pytest.mark.parametrize("collapse", ["warn", "error"])
def test_a_layer_of_single_weights_counts_as_pruned_to_nothing(collapse):
    told = "1 of 4 layers are pruned to nothing: 1.0.weight"
    caught = pytest.warns(UserWarning, match=told) if collapse == "warn" else pytest.raises(tt.SettingError, match=told)
    with caught:
        EmptyLayers(SimpleNamespace(name="imp", collapse=collapse)).check(lonely(1, 2))


@pytest.mark.filterwarnings("ignore:.*keep a single weight")
@pytest.mark.parametrize("more", [{}, {"scope": "layerwise"}, {"sparsity": 0.97, "collapse": "prevent"}])
def test_a_cut_keeps_two_weights_of_a_channel_or_none(more):
    """But for one at the threshold: of two that rank alike, the last of all that are kept."""
    settings = {"sparsity": 0.9, **more}
    model = build("test_nfnet")
    ticket = tt.create_pruner("magnitude", model, **settings).ticket
    rows = {key: ticket.masks[key].flatten(1).sum(1) for key in standardised(model)}
    alone = [int((row == 1).sum()) for row in rows.values()]
    assert max(alone) <= 1
    assert "scope" in more or sum(alone) <= 1
    assert ticket.sparsity == pytest.approx(settings["sparsity"], abs=1e-5)
    assert "collapse" not in more or all(row.max() > 1 for row in rows.values())


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # says torch 2.6
def test_channels_that_are_split_are_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        check_channels("a.weight", distribute_tensor(torch.randn(4, 4, 1, 1), mesh, [Shard(0)]))
        with pytest.raises(tt.SettingError, match=r"a\.weight is standardised by output channels.*shard_placement_fn"):
            check_channels("a.weight", distribute_tensor(torch.randn(4, 4, 1, 1), mesh, [Shard(1)]))
    finally:
        torch.distributed.destroy_process_group()


def test_at_sparsity_zero_training_is_stock_bit_for_bit():
    losses = []
    for pruned in (False, True):
        model = build("test_nfnet").train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        if pruned:
            tt.create_pruner("magnitude", model, sparsity=0).ticket.attach(model, optimizer)
        torch.manual_seed(5)
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]


@pytest.mark.filterwarnings("ignore:.*keep a single weight")
@pytest.mark.parametrize("searched", [False, True])
def test_timms_own_checkpoints_of_a_task_and_its_average(searched, tmp_path):
    model, images = build("test_nfnet"), torch.randn(2, 3, 32, 32)
    if searched:
        pruner = tt.create_pruner("gradual", model, sparsity=0.7, epochs=2, interval=1)
        task = tt.TicketTask(model, pruner=pruner, verbose=False)
    else:
        ticket = tt.create_pruner("random", build("test_nfnet"), sparsity=0.7).ticket
        task = tt.TicketTask(model, ticket=ticket, verbose=False)
    task.setup_ema(decay=0.7)
    data = torch.utils.data.TensorDataset(torch.randn(24, 3, 32, 32), torch.arange(24) % 4)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    optimizer, loader = task.attach(optimizer, torch.utils.data.DataLoader(data, batch_size=8))
    for epoch in range(2):
        for batch, labels in loader:
            task.train()(batch, labels)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(epoch)
    assert task.sparsity == pytest.approx(0.7, abs=1e-4)
    args = argparse.Namespace(model="test_nfnet")
    CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(tmp_path), task=task).save_checkpoint(1, 0.5)
    for average in (False, True):
        state = timm.models.load_state_dict(str(tmp_path / "last.pth.tar"), use_ema=average)
        mine = task.get_eval_model(ema=average).eval()
        assert torch.equal(check_sparse("test_nfnet", state, task.subnet.mask, images), mine(images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bright and dark images in class folders."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 12), ("test", 12)):
        for number, name in enumerate(("dark", "mid", "bright")):
            (root / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = generator.integers(0, 90, (32, 32, 3)) + 80 * number
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{split}{image}.png")
    return root


@pytest.mark.filterwarnings(
    "ignore:.*has not moved its mask",
    "ignore:.*have a score above zero",
    "ignore:.*keep a single weight",
    "ignore:.*layers are pruned to nothing",
)
@pytest.mark.parametrize("method", ["imp", "gradual", "continuous_sparsification", "edge_popup"])
def test_timms_loader_and_plain_model_score_the_files_of_a_search_as_it_did(method, folder, tmp_path):
    more = {
        "imp": ["pruner.prune_rate=0.8"],
        "gradual": ["training.model_ema=true", "training.model_ema_decay=0.5"],
        "continuous_sparsification": ["pruner.rounds=1", "pruner.rewind=0ep"],
    }.get(method, [])
    overrides = [
        *("model.model=test_nfnet", "data.dataset=folder", f"data.data_dir={folder}", "data.workers=0", "controls=[]"),
        *("data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "data.crop_pct=1.0", "data.interpolation=bicubic"),
        *(
            "training.epochs=2",
            "training.batch_size=12",
            "training.clip_grad=1.0",
            "pruner.sparsity=0.8",
            f"output={tmp_path / 'out'}",
        ),
    ]
    tt.search(f"digits_{method}", [*overrides, *more])
    files = sorted((tmp_path / "out").glob("round_*/model*.safetensors"))
    averaged = {file.parent for file in files if file.name == "model_ema.safetensors"}
    assert len(files) == 2 + len(averaged)
    assert bool(averaged) == (method == "gradual")
    for file in files:
        if file.parent in averaged and file.name == "model.safetensors":
            continue  # the metrics are the average's
        metrics = json.loads((file.parent / "run.json").read_text())["metrics"]
        model = timm.create_model("test_nfnet", num_classes=3, checkpoint_path=str(file)).eval()
        config = resolve_data_config({"img_size": 32, "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3})
        loader = create_loader(
            create_dataset("", str(folder), split="test"),
            **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")},
            batch_size=12,
            use_prefetcher=False,
            num_workers=0,
            persistent_workers=False,  # timm 1.0.27 leaves that to the caller
        )
        with torch.no_grad():
            outputs = [(model(images), target) for images, target in loader]
        logits, target = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        assert nn.functional.cross_entropy(logits, target).item() == pytest.approx(metrics["test_loss"], rel=1e-4)
        assert 100 * (logits.argmax(1) == target).double().mean().item() == pytest.approx(metrics["test_top1"])
