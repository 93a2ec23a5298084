"""Searches whose model FSDP2 has split over gloo processes, or one process holds whole; prints what each ticket is.

    torchrun --nproc_per_node N split_searches.py '[{"pruner": "imp", "settings": {...}, "file": "imp.ticket"}]'

Every process takes its part of the same batches, in double precision and without batch normalisation, so that only the
order of sums can tell several processes from one.
"""

import json
import os
import sys
import warnings
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import timm_tickets as tt
from timm_tickets.core.states import digest
from timm_tickets.distributed.fsdp2 import reshard_

PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
generator = torch.Generator().manual_seed(1)
IMAGES = torch.randn(48, 3, 32, 32, generator=generator, dtype=torch.float64)
DATA = torch.utils.data.TensorDataset(IMAGES, torch.arange(48) % 4)


def new_model(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, **({"img_size": 32} if "vit" in name else {})).double()


def split_(model: Any) -> None:
    if PROCESSES == 1:
        return
    for part in [*getattr(model, "blocks", ())][1:]:  # in groups of their own, beside the root's
        fully_shard(part)
    fully_shard(model)


def trained(run: Any, model: Any, optimizer: Any) -> None:
    for _ in range(run.epochs):
        model.train()
        for images, labels in run.subset(torch.utils.data.DataLoader(DATA, batch_size=12)):
            mine = slice(RANK, None, PROCESSES)
            loss = run.loss(torch.nn.functional.cross_entropy, model(images[mine]), labels[mine])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        run.settle_()
        model.eval()
        with torch.no_grad():
            model(IMAGES[:2])  # leaves the root's parameters whole until they are asked for


def search(pruner: str, settings: dict[str, Any], file: str, model: str = "test_vit") -> dict[str, Any]:
    network = new_model(model)
    found = tt.create_pruner(pruner, network, epochs=2, **settings)
    split_(network)
    told: dict[str, Any] = {"pruner": pruner, "zeros": True, "runs": 0}
    for run in found:
        sgd = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        trained(run, network, run.attach(sgd))
        state = found.subnet.baked_state()
        told["zeros"] &= not any(state[name][~mask].any() for name, mask in found.subnet.mask.items())
        told["runs"] += 1
    ticket = found.ticket
    if RANK == 0:
        ticket.save(file)
    told |= {"digest": digest(ticket.masks), "sparsity": ticket.sparsity}

    # The ticket on a model that is split before it is applied, trained on and scored as the others will.
    fresh = new_model(model)
    split_(fresh)
    ticket.apply_(fresh)
    whole = ticket.apply_(new_model(model)).eval()
    with torch.no_grad():
        told["logits"] = (fresh.eval()(IMAGES[:4]) - whole(IMAGES[:4])).abs().max().item()
        told["left"] = (network.eval()(IMAGES[:4]) - whole(IMAGES[:4])).abs().max().item()
    try:  # as it is after a forward pass alone, where FSDP2 leaves whole copies
        ticket.attach(fresh, torch.optim.SGD(fresh.parameters(), 0.05))
        told["stale"] = ""
    except ValueError as error:
        told["stale"] = str(error)
    reshard_(fresh)
    try:
        tt.create_tweaks(fresh, ["label_smoothing"]).remove_()
        told["tweaks"] = ""
    except tt.SettingError as error:
        told["tweaks"] = str(error)
    sgd = ticket.attach(fresh, torch.optim.SGD(fresh.parameters(), 0.05, momentum=0.9, weight_decay=1e-3))
    trained(tt.Training(tt.Run(1), tt.Subnet(fresh, tuple(ticket.masks))), fresh, sgd)
    state = tt.Subnet(fresh, tuple(ticket.masks)).state()
    told["kept_zero"] = not any(state[name][~mask].any() for name, mask in ticket.masks.items())
    return told


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if PROCESSES > 1:
        dist.init_process_group("gloo")
    for order in json.loads(sys.argv[1]):
        try:
            print(json.dumps(search(**order)), flush=True)
        except tt.SettingError as error:
            print(json.dumps({"pruner": order["pruner"], "refused": str(error)}), flush=True)
    if PROCESSES > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
