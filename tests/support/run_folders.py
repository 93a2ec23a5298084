"""What run folders hold, compared."""

import json

import timm
import torch

import timm_tickets as tt


def leftovers(folder):
    names = (".*", "checkpoint*", "*.tmp")
    return [path for name in names for path in folder.rglob(name)]


def same(folder, other):
    """The same final ticket, trained weights and numbers, bit for bit."""
    (mine,), (theirs,) = (list(one.glob("*.ticket")) for one in (folder, other))
    assert tt.load_ticket(mine).fingerprint == tt.load_ticket(theirs).fingerprint
    rows = [json.loads((one / "result.json").read_text())["rows"] for one in (folder, other)]
    for left, right in zip(*rows, strict=True):
        assert {**left["metrics"], "seconds": 0} == {**right["metrics"], "seconds": 0}
        assert left["steps"] == right["steps"]
        one, two = (timm.models.load_state_dict(f / left["name"] / "model.safetensors") for f in (folder, other))
        assert all(torch.equal(one[name], two[name]) for name in two)
