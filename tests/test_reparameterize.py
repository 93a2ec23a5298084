"""Blocks that train with several branches and are fused into one kernel: the ticket survives the fusion."""

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import timm_tickets as tt


def used_for_a_while(name):
    """A model whose normalisation has statistics and scales of its own, so that fusing has something to fold in."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return model.eval()


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repghostnet_050"])
def test_the_fused_model_computes_what_the_masked_one_does(name):
    model = used_for_a_while(name)
    ticket = tt.create_pruner("random", model, sparsity=0.6).ticket
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        masked = model(images)
        dense = used_for_a_while(name)(images)
        fused = reparameterize_model(model)
        torch.testing.assert_close(fused(images), masked, rtol=1e-3, atol=1e-3 * masked.abs().max().item())
    assert (dense - masked).abs().max() > 1e-2 * masked.abs().max()
    assert len(list(fused.modules())) < len(list(model.modules()))
    with pytest.raises(tt.TicketError, match="before reparameterize_model"):
        ticket.apply_(fused)


def test_a_fused_kernel_is_pruned_where_all_its_branches_are():
    """So fusing lowers the sparsity: what counts is the union of the branches, with an identity's diagonal."""
    model = used_for_a_while("repvgg_a0")
    masks = tt.create_pruner("random", model, sparsity=0.9).ticket.masks
    fused = reparameterize_model(model)
    block = "stages.0.1"  # with an identity branch
    kept = masks[f"{block}.conv_kxk.conv.weight"].clone()
    kept[:, :, 1, 1] |= masks[f"{block}.conv_1x1.conv.weight"][:, :, 0, 0] | torch.eye(kept.shape[0], dtype=torch.bool)
    weight = fused.get_parameter(f"{block}.reparam_conv.weight")
    assert torch.equal(weight != 0, kept)
    assert kept.float().mean() > 0.1
