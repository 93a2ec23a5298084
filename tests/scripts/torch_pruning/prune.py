"""torch-pruning 1.6 used as its documentation has it, with a ticket's importance and pruner in place of its own.

Nothing but its public interface; the lines that end with ``# +`` are ours. Called with an architecture, and the path of
a ticket that was found on `build(arch)`.
"""

import sys

import timm
import torch
import torch_pruning as tp
from timm.models.swin_transformer import PatchMerging

import timm_tickets  # +

SIZES = {
    "resnet18": {"channels": (16, 32, 48, 64), "zero_init_last": False},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    "vit_tiny_patch16_224": {"depth": 2, "num_heads": 4, "img_size": 64},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 32, "img_size": 56},
}


def build(arch):
    torch.manual_seed(0)
    return timm.create_model(arch, num_classes=10, **SIZES[arch])


class PatchMergingPruner(tp.BasePruningFunc):
    """For Swin: torch-pruning's graph does not see that four positions of C channels become one of 4 C."""

    def prune_out_channels(self, layer, idxs):
        tp.prune_linear_out_channels(layer.reduction, idxs)
        return layer

    def prune_in_channels(self, layer, idxs):
        all_four = [index + part * layer.dim for part in range(4) for index in idxs]
        tp.prune_linear_in_channels(layer.reduction, all_four)
        tp.prune_layernorm_out_channels(layer.norm, all_four)
        layer.dim -= len(idxs)
        return layer

    def get_out_channels(self, layer):
        return layer.reduction.out_features

    def get_in_channels(self, layer):
        return layer.dim


def halved(arch, images, importance, **settings):
    """A model of half the channels, by any importance, whose attention goes on as torch-pruning's examples have it."""
    model = build(arch)
    attentions = [module for module in model.modules() if hasattr(module, "qkv")]
    tables = [getattr(one, "relative_position_bias_table", None) for one in attentions]
    pruner = tp.pruner.BasePruner(
        model,
        images,
        importance,
        pruning_ratio=0.5,
        ignored_layers=[model.get_classifier(), *(one for one in tables if one is not None)],
        num_heads={one.qkv: one.num_heads for one in attentions},
        customized_pruners={PatchMerging: PatchMergingPruner()},
        **settings,
    )
    for _ in range(pruner.iterative_steps):
        pruner.step()
        for one in attentions:
            one.num_heads = pruner.num_heads[one.qkv]
            one.head_dim = one.qkv.out_features // (3 * one.num_heads)
            one.attn_dim = one.num_heads * one.head_dim
    return model


if __name__ == "__main__":
    arch, path = sys.argv[1:]
    side = SIZES[arch].get("img_size", 64)
    images = torch.randn(1, 3, side, side)
    importances = {
        "magnitude": lambda: tp.importance.MagnitudeImportance(),
        "ticket": lambda: timm_tickets.TicketImportance(path),  # +
        "synflow": lambda: timm_tickets.TicketImportance("synflow", normalize=True),  # +
    }
    found = {"whole": build(arch)}
    for name, make in importances.items():
        found[name] = halved(arch, images, make())
        found[f"{name}, in two steps"] = halved(arch, images, make(), iterative_steps=2, global_pruning=True)
    ticket = timm_tickets.load_ticket(path)  # +
    model = ticket.apply_(build(arch)).eval()  # +
    before = model(images)
    pruner = timm_tickets.TicketPruner(model, images, ticket)  # +
    for group in pruner.step(interactive=True):
        group.prune()
    difference = (model(images) - before).abs().max().item()
    found["what the ticket says"] = model
    for name, one in found.items():
        macs, parameters = tp.utils.count_ops_and_params(one, images)
        print(f"{name}: {macs:,.0f} multiplications, {parameters:,} parameters")
    print(f"outputs of the last: {difference:.1g} from those before; kept: {pruner.kept}")
