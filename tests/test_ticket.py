import errno
import json
import os
import random as python_random
import resource
import struct
import subprocess
import sys

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import timm_tickets as tt


@pytest.fixture
def ticket(model):
    return tt.create_pruner("random", model, sparsity=0.9, seed=1).ticket


@pytest.fixture
def file(ticket, tmp_path):
    path = tmp_path / "one.ticket"
    ticket.save(path)
    return path


def header_of(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewritten(data, change):
    """The file with its ticket header changed by a function: a lie told with correct safetensors syntax."""
    outer, tensors = header_of(data)
    inner = json.loads(outer["__metadata__"]["timm_tickets"])
    change(inner)
    outer["__metadata__"]["timm_tickets"] = json.dumps(inner)
    text = json.dumps(outer).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def test_only_kept_weights_are_stored(ticket, file):
    dense = sum(value.nbytes for value in ticket.values.values())
    kept = sum(4 * int(mask.sum()) for mask in ticket.masks.values())
    rest = sum(value.nbytes for name, value in ticket.values.items() if name not in ticket.masks)
    bits = sum(mask.numel() for mask in ticket.masks.values()) // 8
    assert kept + rest + bits <= file.stat().st_size <= kept + rest + bits + 12_000 < dense / 5


def test_metadata_says_where_it_comes_from(file):
    metadata = tt.load_ticket(file).metadata
    assert metadata["model"] == {"architecture": "test_resnet", "num_classes": 10, "in_chans": 3}
    assert metadata["pruner"] == {
        **{"name": "random", "sparsity": 0.9, "epochs": 20, "seed": 1, "scope": "global"},
        **{"include": ["*"], "exclude": [], "classifier": False, "distribution": "uniform"},
    }
    assert set(metadata["versions"]) == {"timm-tickets", "timm", "torch"}
    assert sum(metadata["kept"].values()) == round(0.1 * sum(m.numel() for m in tt.load_ticket(file).masks.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_values_that_are_hard_to_keep(model, tmp_path, dtype):
    model.to(dtype)
    with torch.no_grad():
        next(model.parameters()).flatten()[:4] = torch.tensor([-0.0, torch.inf, torch.nan, 1e-8], dtype=dtype)
    masks = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in tt.prunable_names(model)}
    ticket = tt.Ticket.of(model, masks)
    ticket.save(tmp_path / "one.ticket")
    assert tt.load_ticket(tmp_path / "one.ticket").fingerprint == ticket.fingerprint


def test_a_ticket_for_another_architecture_is_refused_and_changes_nothing(ticket):
    other = timm.create_model("test_vit", num_classes=10)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(tt.TicketError, match="this ticket is for 'test_resnet', the model is 'test_vit'"):
        ticket.apply_(other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_another_head_is_refused_by_name_and_shape(ticket):
    with pytest.raises(tt.TicketError, match=r"fc\.weight is \[10, \d+\] in the ticket and \[7, \d+\] in the model"):
        ticket.apply_(timm.create_model("test_resnet", num_classes=7))


def test_a_ticket_fits_a_wrapped_model(ticket, model):
    other = timm.create_model("test_resnet", num_classes=10)
    ticket.apply_(torch.nn.DataParallel(torch.compile(other, backend="eager")))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_not_a_ticket(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="no ticket at"):
        tt.load_ticket(tmp_path / "missing.ticket")
    for content in (b"", b"hello", b"\x80\x04K\x01.", os.urandom(4096)):
        (tmp_path / "bad.ticket").write_bytes(content)
        with pytest.raises(tt.TicketError, match="not a ticket"):
            tt.load_ticket(tmp_path / "bad.ticket")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(tt.TicketError, match="not a ticket"):
        tt.load_ticket(tmp_path / "model.safetensors")


def test_a_newer_format_is_refused_as_newer(file):
    file.write_bytes(rewritten(file.read_bytes(), lambda header: header.update(format=2, something_new=1)))
    with pytest.raises(tt.TicketError, match=r"format 2.*upgrade"):
        tt.load_ticket(file)


LIES = {
    "a count above the layer's size": lambda h: h["layers"][0].__setitem__(3, 10**9),
    "a count one too low": lambda h: h["layers"][0].__setitem__(3, h["layers"][0][3] - 1),
    "a larger shape": lambda h: h["layers"][0][1].__setitem__(0, 4096),
    "a huge shape": lambda h: h["layers"][0].__setitem__(1, [2**62, 2**62]),
    "an empty huge shape": lambda h: h["rest"][0].__setitem__(1, [0, 2**70]),
    "a negative shape": lambda h: h["layers"][0][1].__setitem__(0, -1),
    "a transposed shape": lambda h: h["layers"][0][1].reverse(),
    "an unknown dtype": lambda h: h["layers"][0].__setitem__(2, "object"),
    "another dtype": lambda h: h["rest"][0].__setitem__(2, "float64"),
    "one name twice": lambda h: h["rest"][1].__setitem__(0, h["rest"][0][0]),
    "another name": lambda h: h["rest"][1].__setitem__(0, "other"),
    "layers missing": lambda h: h.pop("layers"),
    "no layers": lambda h: h.update(layers=[]),
    "a layer that is a number": lambda h: h["layers"].append(3),
    "a shape of strings": lambda h: h["layers"][0].__setitem__(1, ["3"]),
    "an unknown key": lambda h: h.update(extra=1),
    "a format that is text": lambda h: h.update(format="1"),
    "format 0": lambda h: h.update(format=0),
    "metadata that is a list": lambda h: h.update(metadata=[]),
    "another fingerprint": lambda h: h.update(fingerprint="0" * 64),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(file, lie):
    file.write_bytes(rewritten(file.read_bytes(), LIES[lie]))
    with pytest.raises(tt.TicketError):
        tt.load_ticket(file)


def test_a_truncated_or_changed_file_loads_exactly_or_is_refused(ticket, file):
    data, whole = file.read_bytes(), ticket.fingerprint
    generator = python_random.Random(0)
    for trial in range(300):
        damaged = bytearray(data)
        if trial % 3 == 0:
            damaged = damaged[: generator.randrange(len(data))]
        else:  # half of the flips in the header, where they do more harm
            limit = 8000 if trial % 3 == 1 else len(data)
            damaged[generator.randrange(limit)] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        try:
            loaded = tt.load_ticket(file)
        except tt.TicketError:
            continue
        assert loaded.fingerprint == whole  # a flip in the free metadata


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_any_json_as_header_is_refused(tmp_path, value):
    path = tmp_path / "any.ticket"
    save_file({"masks": torch.zeros(1, dtype=torch.uint8)}, path, {"timm_tickets": json.dumps(value)})
    with pytest.raises(tt.TicketError):
        tt.load_ticket(path)


def test_loading_takes_no_more_memory_than_stated(tmp_path):
    """A 1 MB file that claims 2^40 weights is refused before memory for them is taken."""
    script = """
import resource, sys, torch, timm_tickets as tt
tt.load_ticket  # imported before the limit is set
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20 + 2**28, resource.RLIM_INFINITY))
try:
    tt.load_ticket(sys.argv[1])
except tt.TicketError as error:
    print("refused:", error)
"""
    header = {
        "format": 1,
        "layers": [["w", [2**20, 2**20], "float32", 3]],
        "rest": [],
        "fingerprint": "",
        "metadata": {},
    }
    tensors = {"masks": torch.zeros(2**20, dtype=torch.uint8), "values.float32": torch.zeros(3)}
    save_file(tensors, tmp_path / "big.ticket", {"timm_tickets": json.dumps(header)})
    out = subprocess.run([sys.executable, "-c", script, tmp_path / "big.ticket"], capture_output=True, text=True)
    assert out.stdout.startswith("refused:"), out.stderr


def test_a_full_disk_leaves_the_old_ticket_and_no_temporary_file(ticket, file, monkeypatch):
    before = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*one\.ticket: No space left on device"):
        ticket.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["one.ticket"]


def test_a_file_size_limit_leaves_the_old_ticket(ticket, file):
    """A real failure of the operating system, in the middle of the write."""
    before = file.read_bytes()
    script = f"""
import resource, signal, timm_tickets as tt
ticket = tt.load_ticket({str(file)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    ticket.save({str(file)!r})
except OSError as error:
    print("refused:", error)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.stdout.startswith("refused: "), out.stderr
    assert "cannot write" in out.stdout
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["one.ticket"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_attach_refuses_a_model_without_the_layers(ticket):
    other = timm.create_model("test_vit", num_classes=10)
    with pytest.raises(tt.TicketError, match="does not fit"):
        ticket.attach(other, torch.optim.SGD(other.parameters(), 0.1))


def test_the_costliest_ticket_that_loads_takes_no_more_memory_than_stated(tmp_path):
    """A million bytes of mask, all pruned, in float64: the most a byte of file can become."""
    shape = (2**23,)
    masks, values = {"w": torch.zeros(shape, dtype=torch.bool)}, {"w": torch.zeros(shape, dtype=torch.float64)}
    path = tmp_path / "wide.ticket"
    tt.Ticket(masks, values, {}).save(path)
    script = """
import os, resource, sys, timm_tickets as tt
tt.load_ticket
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ticket = tt.load_ticket(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, os.path.getsize(sys.argv[1]))
"""
    out = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    taken, size = map(int, out.stdout.split())
    assert taken <= 160 * size + 64 * 2**20
