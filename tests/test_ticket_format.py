"""The page about the ticket's file is enough to read one: its reader knows numpy, safetensors and json alone."""

import ast
import hashlib
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open

import timm_tickets as tt

PAGE = (Path(__file__).parents[1] / "docs" / "ticket_format.md").read_text()
(READER,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def read_masks():
    """The page's function, without the call that it ends with."""
    names = {}
    exec(READER.rpartition("\n\nmasks = ")[0], names)
    return names["read_masks"]


def tickets():
    """One of each kind of code: some kept, none, all, half precision; and masks of which a part follows from a seed."""
    model = timm.create_model("test_resnet", num_classes=10)
    yield tt.create_pruner("magnitude", model, sparsity=0.9, exclude="*.conv2*").ticket
    first, second, third, *_ = tt.prunable_names(model)
    masks = {name: torch.rand_like(model.get_parameter(name)) < 0.3 for name in (first, second, third)}
    masks[second][:], masks[third][:] = False, True
    yield tt.Ticket.of(model.half(), {name: masks[name] for name in (third, first, second)})
    pruner = tt.create_pruner("frozen_slt", timm.create_model("test_resnet", num_classes=10), sparsity=0.6, frozen=0.5)
    for run in pruner:
        run.attach(torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.1))
    yield pruner.ticket


def test_the_reader_knows_nothing_of_this_package():
    modules = {getattr(node, "module", None) or node.names[0].name for node in ast.parse(READER).body[:5]}
    assert modules == {"json", "math", "zlib", "numpy", "safetensors"}


@pytest.mark.filterwarnings("ignore")  # of layers pruned to nothing, on purpose
def test_the_page_is_enough_to_read_a_ticket(read_masks, tmp_path):
    frozen = []
    for ticket in tickets():
        ticket.save(tmp_path / "one.ticket")
        found = read_masks(tmp_path / "one.ticket")
        assert list(found) == list(ticket.masks)
        assert all((found[name] == mask.numpy()).all() for name, mask in ticket.masks.items())
        header, values = packed(tmp_path / "one.ticket")
        frozen.append(header["frozen"] is not None)
        assert header["fingerprint"] == by_the_page(found, ticket.values)
        if header["start"] == {"kind": "values"}:
            stored = [ticket.values[name].numpy()[mask] for name, mask in found.items()]
            stored += [ticket.values[name].numpy().ravel() for name, *_, where in header["rest"] if where == "stored"]
            flat = [part for part in stored if part.dtype == values.dtype]
            assert (np.concatenate(flat) == values).all()
    assert frozen == [False, False, True]


def packed(path):
    """The header, and the values of the floating-point dtype that most are of."""
    with safe_open(path, framework="np") as file:
        header = json.loads(zlib.decompress(file.get_tensor("header").tobytes()))
        kinds = [name for name in sorted(file.keys()) if name.startswith("values.float")]
        return header, file.get_tensor(kinds[0]) if kinds else None


def by_the_page(masks, state):
    """The fingerprint in the page's words."""
    sha = hashlib.sha256()
    for name in sorted(masks):
        sha.update(f"mask {name} torch.bool {list(masks[name].shape)}\n".encode() + masks[name].tobytes())
    for name in sorted(state):
        value = state[name].numpy()
        sha.update(f"value {name} torch.{value.dtype} {list(value.shape)}\n".encode())
        sha.update((np.where(masks[name], value, value.dtype.type(0)) if name in masks else value).tobytes())
    return sha.hexdigest()


def test_a_changed_code_is_refused_by_the_page_too(read_masks, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = timm.create_model("test_resnet", num_classes=10)
    tt.create_pruner("magnitude", model, sparsity=0.9).ticket.save(tmp_path / "one.ticket")
    parts = load_file(tmp_path / "one.ticket")
    parts["masks"][40] ^= 1
    save_file(parts, tmp_path / "other.ticket", {"timm_tickets": '{"format": 2}'})
    with pytest.raises(ValueError, match=r"keeps|goes on"):
        read_masks(tmp_path / "other.ticket")
