import errno
import functools
import json
import os
import random as python_random
import resource
import zlib
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file
from support import hostile_files, started

import timm_tickets as tt
from timm_tickets.tickets.mask_coding import bound


@pytest.fixture
def ticket(model):
    return tt.create_pruner("random", model, sparsity=0.9, seed=1).ticket


@pytest.fixture
def file(ticket, tmp_path):
    path = tmp_path / "one.ticket"
    ticket.save(path)
    return path


def rewritten(data, change):
    """The file with its ticket header changed by a function: a lie told with correct syntax."""
    return hostile_files.with_header(data, change)


def test_only_what_must_be_is_stored(ticket, file):
    """Coded masks, kept weights and what is neither regenerated nor constant; the rest is names and a few numbers."""
    kept = sum(4 * int(mask.sum()) for mask in ticket.masks.values())
    others = {name: value for name, value in ticket.values.items() if name not in ticket.masks}
    varying = sum(value.nbytes for value in others.values() if value.unique().numel() > 1)
    masks = sum(bound(mask.numel(), int(mask.sum())) for mask in ticket.masks.values()) / 8
    assert kept + varying + masks <= file.stat().st_size <= kept + varying + 1.005 * masks + 3000


def test_metadata_says_where_it_comes_from(file):
    metadata = tt.load_ticket(file).metadata
    assert metadata["model"] == {"architecture": "test_resnet", "num_classes": 10, "in_chans": 3}
    assert metadata["pruner"] == {
        **{"name": "random", "sparsity": 0.9, "epochs": 20, "seed": 1, "scope": "global"},
        **{"include": ["*"], "exclude": [], "classifier": False, "distribution": "uniform", "collapse": "warn"},
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


def test_learned_masks_do_not_hide_the_stem(tmp_path):
    grey = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    assert tt.create_pruner("edge_popup", grey, sparsity=0.5).metadata["model"]["in_chans"] == 1


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
    envelope = {"format": 3, "writer": "7.1", "something_new": 1}
    save_file({"new": torch.zeros(3)}, file, {"timm_tickets": json.dumps(envelope)})
    with pytest.raises(tt.TicketError, match=r"format 3; .* reads up to 2: upgrade it to 7\.1 or newer"):
        tt.load_ticket(file)


KNOWN = Path(__file__).parent / "data" / "format_2_seed.ticket"
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
    "metadata that is a list": lambda h: h.update(metadata=[]),
    "another fingerprint": lambda h: h.update(fingerprint="0" * 64),
}


LIES |= {
    "a start of another kind": lambda h: h.update(start={"kind": "download", "url": "x"}),
    "a start with more": lambda h: h["start"].update(url="x"),
    "a seeded start with values": lambda h: h.update(
        start={"kind": "seed", "seed": 1, "weights": "signed_constant", "scale": "none"}
    ),
    "a pretrained start that was none": lambda h: h.update(
        start={"kind": "pretrained", "tag": "no_such.tag", "sha256": "0"}
    ),
    "a repository for a tag": lambda h: h.update(
        start={"kind": "pretrained", "tag": "hf-hub:someone/something", "sha256": "0"}
    ),
    "a folder for a tag": lambda h: h.update(start={"kind": "pretrained", "tag": "local-dir:/", "sha256": "0"}),
    "a pretrained tensor without a start": lambda h: h["rest"][0].__setitem__(3, "pretrained"),
    "values from nowhere": lambda h: h["rest"][0].__setitem__(3, "somewhere"),
    "a repeated value of the wrong size": lambda h: h["rest"][0].__setitem__(3, "00"),
    "more frozen than there is": lambda h: h.update(frozen={"seed": 0, "counts": [[10**6, 0]] * len(h["layers"])}),
    "more frozen as kept than is kept": lambda h: h.update(
        frozen={"seed": 0, "counts": [[0, layer[3] + 1] for layer in h["layers"]]}
    ),
    "frozen weights that are not": lambda h: h.update(frozen={"seed": 0, "counts": [[2, 1]] * len(h["layers"])}),
    "frozen in some layers": lambda h: h.update(frozen={"seed": 0, "counts": [[0, 0]]}),
    "a seed below 0": lambda h: h.update(frozen={"seed": -1, "counts": [[0, 0]] * len(h["layers"])}),
    "halves that are not": lambda h: h.update(stored_as="float16"),
    "another width": lambda h: h.update(stored_as="float8"),
    "a start epoch that is text": lambda h: h["metadata"].update(start_epoch="soon"),
    "a tensor of huge constants": lambda h: h["rest"].append(["huge", [2**40], "float32", "00000000"]),
    "a huge layer that keeps nothing": lambda h: h["layers"].append(["huge", [2**40], "float32", 0]),
    "very many dimensions": lambda h: h["rest"].append(["deep", [2**40] * 5000, "float32", "00000000"]),
    "a name that is not printable": lambda h: h["rest"][0].__setitem__(0, "a\x1b[31m"),
    "a shape with fractions": lambda h: h["layers"][0][1].__setitem__(0, 1.5),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(file, lie):
    file.write_bytes(rewritten(file.read_bytes(), LIES[lie]))
    with pytest.raises(tt.TicketError):
        tt.load_ticket(file)


@pytest.mark.parametrize("format", [1, 0, "two"])
def test_a_format_that_no_release_wrote_is_refused(file, format):
    save_file(load(file.read_bytes()), file, {"timm_tickets": json.dumps({"format": format, "writer": "0"})})
    with pytest.raises(tt.TicketError, match="format"):
        tt.load_ticket(file)


def test_a_header_that_unpacks_to_more_than_a_header_may_is_refused(file):
    """A zlib bomb: 64 MB of spaces in 64 kB; a megabyte and 32 times the compressed size is what is unpacked."""
    tensors = load(file.read_bytes())
    packed = zlib.compress(b" " * 2**26, 9)
    tensors["header"] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    save_file(tensors, file, {"timm_tickets": json.dumps({"format": 2, "writer": "0"})})
    with pytest.raises(tt.TicketError, match="cut short or too long"):
        tt.load_ticket(file)


def test_a_known_file_of_format_2_is_regenerated_bit_for_bit():
    """frozen_slt, normal weights, dynamic scale, seed 11: coded mask, freezing and weights all have to agree."""
    ticket = tt.load_ticket(KNOWN)
    assert ticket.fingerprint == "bfacae9e36ff2248f2c4f7ce980dc13a5a5ce8a601151406e7c512b3eb57920b"
    assert ticket.metadata["origin"]["weights"] == "kaiming_normal"


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
        assert loaded.fingerprint == whole
        assert loaded.metadata == ticket.metadata


@pytest.fixture
def three_starts(tmp_path):
    """A ticket of each kind of start, and the pretrained state that the third needs."""
    torch.manual_seed(0)
    state = timm.create_model("test_efficientnet", num_classes=3).state_dict()
    build = functools.partial(timm.create_model, "test_efficientnet", num_classes=3)
    values = tt.create_pruner("random", build(), sparsity=0.9, seed=1).ticket
    model = build()
    model.load_state_dict(state)
    seeded = tt.create_pruner("frozen_slt", build(), sparsity=0.8, frozen=0.6, scale="dynamic", seed=2**63 + 1)
    next(seeded)
    with pytest.warns(UserWarning, match="without an optimizer step"):
        next(seeded, None)
    pretrained = tt.create_pruner("magnitude", model, sparsity=0.7).ticket
    pretrained.values["classifier.bias"] = torch.arange(3.0)
    pretrained.pretrained = tt.Pretrained("test_efficientnet.r160_in1k", state)
    tickets = {"values": values, "seed": seeded.ticket, "pretrained": pretrained}
    for kind, ticket in tickets.items():
        ticket.save(tmp_path / f"{kind}.ticket")
    save_file(state, tmp_path / "state.safetensors")
    return tickets


@pytest.mark.parametrize("tensor", ["masks", "header", "values.float32"])
def test_one_changed_bit_is_caught(file, tensor):
    """Or it says nothing: a stream of zlib, as some versions end it, has bits of filling that nobody reads."""
    whole = tt.load_ticket(file)
    tensors, generator = load(file.read_bytes()), python_random.Random(0)
    data, caught = tensors[tensor].view(torch.uint8), 0
    for _ in range(60):
        place, bit = generator.randrange(len(data)), 1 << generator.randrange(8)
        data[place] ^= bit
        save_file(tensors, file, {"timm_tickets": json.dumps({"format": 2})})
        try:
            loaded = tt.load_ticket(file)
        except tt.TicketError:
            caught += 1
        else:
            assert tensor == "header"
            assert (loaded.fingerprint, loaded.metadata) == (whole.fingerprint, whole.metadata)
        data[place] ^= bit
    assert caught >= 58
    save_file(tensors, file, {"timm_tickets": json.dumps({"format": 2})})
    tt.load_ticket(file)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.randoms(use_true_random=False))
def test_whatever_hypothesis_does_to_a_file(tmp_path, generator):
    seeded = KNOWN
    bad, _ = hostile_files.damaged(seeded.read_bytes(), generator)
    path = tmp_path / "bad.ticket"
    path.write_bytes(bad)
    try:
        loaded = tt.load_ticket(path)
    except tt.TicketError:
        return
    assert loaded.fingerprint == "bfacae9e36ff2248f2c4f7ce980dc13a5a5ce8a601151406e7c512b3eb57920b"


@pytest.mark.parametrize("each", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_hostile_files_load_exactly_or_are_refused(three_starts, tmp_path, each):
    """And take no more memory than stated: 8 KiB for each byte of the file and 128 MiB."""
    (tmp_path / "known.ticket").write_bytes(KNOWN.read_bytes())
    out = started.run(hostile_files.__file__, tmp_path, each)
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    assert result["files"] == 4 * each
    assert result["exact"] + result["refused"] == 4 * each
    assert result["refused"] > 3 * each
    assert result["memory"] <= 8192 * result["largest"] + 128 * 2**20
    assert result["slowest"] < 5


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
    header = torch.frombuffer(bytearray(zlib.compress(json.dumps(value).encode())), dtype=torch.uint8)
    tensors = {"masks": torch.zeros(4, dtype=torch.uint8), "header": header}
    save_file(tensors, path, {"timm_tickets": json.dumps({"format": 2, "writer": "0"})})
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
    out = started.run("-c", script, tmp_path / "big.ticket")
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
    out = started.run("-c", script)
    assert out.stdout.startswith("refused: "), out.stderr
    assert "cannot write" in out.stdout
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["one.ticket"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_attach_refuses_a_model_without_the_layers(ticket):
    other = timm.create_model("test_vit", num_classes=10)
    with pytest.raises(tt.TicketError, match="does not fit"):
        ticket.attach(other, torch.optim.SGD(other.parameters(), 0.1))


MEMORY = """
import os, sys, timm_tickets as tt
from support.hostile_files import peak
tt.load_ticket
before = peak(reset=True)
ticket = tt.load_ticket(sys.argv[1])
print(peak() - before, os.path.getsize(sys.argv[1]))
"""


def taken_by(path):
    out = started.run("-c", MEMORY, path)
    assert out.returncode == 0, out.stderr
    return map(int, out.stdout.split())


def test_the_costliest_ticket_that_loads_takes_no_more_memory_than_stated(tmp_path):
    """Eight million weights of float64, all pruned, and nothing else: the most a byte of file can become."""
    shape = (2**23,)
    masks, values = {"w": torch.zeros(shape, dtype=torch.bool)}, {"w": torch.zeros(shape, dtype=torch.float64)}
    path = tmp_path / "wide.ticket"
    tt.Ticket(masks, values, {}).save(path)
    taken, size = taken_by(path)
    assert size < 40_000  # the padding: an element a 256th of a byte
    assert taken <= 8192 * size + 128 * 2**20


def test_the_costliest_seeded_ticket_takes_no_more_memory_than_stated(tmp_path):
    shape = (2**23, 1)
    origin = {"start": "seed", "seed": 1, "weights": "kaiming_normal", "scale": "none", "frozen": [[2**23, 0]]}
    masks, values = {"w": torch.zeros(shape, dtype=torch.bool)}, {"w": torch.zeros(shape)}
    path = tmp_path / "wide.ticket"
    tt.Ticket(masks, values, {"origin": origin}).save(path)
    assert tt.weigh(path).origin.startswith("kaiming_normal weights drawn from seed 1")
    taken, size = taken_by(path)
    assert taken <= 8192 * size + 128 * 2**20


def test_every_start_loads_in_another_process_bit_for_bit(three_starts, tmp_path):
    script = """
import sys, pathlib, timm, timm_tickets as tt
from safetensors.torch import load_file, save_file
folder = pathlib.Path(sys.argv[1])
for kind in ("values", "seed", "pretrained"):
    state = load_file(folder / "state.safetensors") if kind == "pretrained" else None
    model = timm.create_model("test_efficientnet", num_classes=3)
    tt.load_ticket(folder / f"{kind}.ticket", pretrained=state).apply_(model)
    save_file(model.state_dict(), folder / f"{kind}.safetensors")
"""
    done = started.run("-c", script, tmp_path)
    assert done.returncode == 0, done.stderr
    for kind, ticket in three_starts.items():
        assert tt.weigh(tmp_path / f"{kind}.ticket").origin.startswith(
            {"values": "values of", "seed": "signed_constant weights drawn from", "pretrained": "pretrained weights"}[
                kind
            ]
        )
        loaded = load_file(tmp_path / f"{kind}.safetensors")
        assert set(loaded) == set(ticket.values)
        for name, value in ticket.state().items():
            assert torch.equal(loaded[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), (kind, name)


@pytest.mark.parametrize("weights", ["signed_constant", "kaiming_uniform", "kaiming_normal"])
@pytest.mark.parametrize("scale", ["none", "static", "dynamic"])
def test_a_seeded_ticket_stores_no_weights_and_only_the_free_mask(model, tmp_path, weights, scale):
    settings = {"weights": weights, "scale": scale, "seed": 3}
    pruner = tt.create_pruner("frozen_slt", model, sparsity=0.6, frozen=0.7, **settings)
    next(pruner)
    with pytest.warns(UserWarning, match="without an optimizer step"):
        next(pruner, None)
    ticket, path = pruner.ticket, tmp_path / "seed.ticket"
    ticket.save(path)
    size, total = tt.weigh(path), sum(mask.numel() for mask in ticket.masks.values())
    assert size.start == 0
    assert sum(layer.free for layer in size.layers) == total - round(0.42 * total) - round(0.28 * total)
    assert size.bound <= size.masks <= 1.005 * size.bound + 4
    loaded = tt.load_ticket(path)
    assert loaded.fingerprint == ticket.fingerprint
    loaded.save(path)  # and again from the file
    assert tt.weigh(path) == size


def test_a_seeded_ticket_with_one_changed_weight_is_stored_as_values(three_starts, tmp_path):
    ticket = three_starts["seed"]
    name, mask = next(iter(ticket.masks.items()))
    place = mask.nonzero()[0].tolist()
    ticket.values[name][tuple(place)] *= 1 + 2**-23
    ticket.save(tmp_path / "one.ticket")
    assert tt.weigh(tmp_path / "one.ticket").origin == "values of the kept weights"
    assert tt.load_ticket(tmp_path / "one.ticket").fingerprint == ticket.fingerprint


def test_masks_that_do_not_follow_the_freezing_pattern_are_stored_whole(three_starts, tmp_path):
    ticket = three_starts["seed"]
    name = list(ticket.masks)[-1]
    ticket.masks[name] = ~ticket.masks[name]
    ticket.save(tmp_path / "one.ticket")
    size = tt.weigh(tmp_path / "one.ticket")
    assert all(layer.free == ticket.masks[layer.name].numel() for layer in size.layers)
    assert tt.load_ticket(tmp_path / "one.ticket").fingerprint == ticket.fingerprint


@pytest.mark.parametrize(
    "origin",
    [
        *(3, "seed", {"start": "seed"}, {"start": "seed", "seed": -1}, {"frozen": [[1]]}),
        {"start": "seed", "seed": 1, "weights": "signed_constant", "frozen": [[10**9, 10**9]] * 17},
    ],
)
def test_a_claim_that_is_not_so_changes_nothing(three_starts, tmp_path, origin):
    ticket = three_starts["values"]
    ticket.metadata["origin"] = origin
    ticket.save(tmp_path / "one.ticket")
    assert tt.weigh(tmp_path / "one.ticket").origin == "values of the kept weights"
    loaded = tt.load_ticket(tmp_path / "one.ticket")
    assert loaded.fingerprint == ticket.fingerprint
    assert loaded.metadata == ticket.metadata


def test_a_pretrained_ticket_stores_what_differs_and_needs_the_very_weights(three_starts, tmp_path):
    path, ticket = tmp_path / "pretrained.ticket", three_starts["pretrained"]
    size = tt.weigh(path)
    assert (size.start, size.statistics, size.rest) == (0, 0, 3 * 4)  # the one changed bias
    state = load_file(tmp_path / "state.safetensors")
    loaded = tt.load_ticket(path, pretrained=state)
    assert loaded.fingerprint == ticket.fingerprint
    loaded.save(tmp_path / "again.ticket")
    assert tt.weigh(tmp_path / "again.ticket") == size
    name = next(iter(ticket.masks))
    pruned = (~ticket.masks[name]).nonzero()[0].tolist()  # even where nothing is kept
    changed = {**state, name: state[name].clone()}
    changed[name].view(torch.int32)[tuple(pruned)] ^= 1
    with pytest.raises(tt.TicketError, match="needs other pretrained weights than these"):
        tt.load_ticket(path, pretrained=changed)
    with pytest.raises(tt.TicketError, match=r"blocks\.0\.0\.conv\.weight as .* those here have none"):
        tt.load_ticket(path, pretrained={})
    with pytest.raises(tt.TicketError, match=r"those here have \[1\]"):
        tt.load_ticket(path, pretrained={**state, name: torch.zeros(1)})


def test_a_ticket_that_is_not_of_the_pretrained_weights_is_stored_as_values(three_starts, tmp_path):
    ticket = three_starts["pretrained"]
    state = {name: value.clone() for name, value in ticket.pretrained.state.items()}
    name, mask = next(iter(ticket.masks.items()))
    state[name][tuple(mask.nonzero()[0].tolist())] += 1
    ticket.pretrained = tt.Pretrained("test_efficientnet.r160_in1k", state)
    ticket.save(tmp_path / "one.ticket")
    assert tt.weigh(tmp_path / "one.ticket").origin == "values of the kept weights"
    assert tt.load_ticket(tmp_path / "one.ticket").fingerprint == ticket.fingerprint


def test_pretrained_weights_come_from_timm_when_none_are_given(three_starts, tmp_path, monkeypatch):
    """timm's own loading, from a file in the place of its download."""
    state = load_file(tmp_path / "state.safetensors")
    build, asked = timm.create_model, []

    def create_model(name, pretrained=False, **more):
        if not pretrained:  # its outline, on the meta device
            return build(name.partition(".")[0], **more)
        asked.append((name, pretrained, more))
        model = build(name.partition(".")[0], **more)
        model.load_state_dict(state)
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    loaded = tt.load_ticket(tmp_path / "pretrained.ticket")
    assert asked == [("test_efficientnet.r160_in1k", True, {"num_classes": 3, "in_chans": 3})]
    assert loaded.fingerprint == three_starts["pretrained"].fingerprint

    def offline(name, pretrained=False, **more):
        if not pretrained:
            return build(name.partition(".")[0], **more)
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(tt.TicketError, match=r"timm cannot load here \(no network\).*pretrained=state"):
        tt.load_ticket(tmp_path / "pretrained.ticket")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_say_what_they_lose(three_starts, tmp_path, dtype):
    ticket, path = three_starts["values"], tmp_path / "half.ticket"
    lost = ticket.save(path, dtype=dtype)
    loaded = tt.load_ticket(path)
    assert loaded.metadata["rounding"] == lost
    assert lost["dtype"] == dtype
    assert 0 < lost["max_relative_error"] <= (2**-8 if dtype == "bfloat16" else 1)
    errors = []
    for name, value in ticket.state().items():
        half = getattr(torch, dtype)
        expected = value.to(half).to(value.dtype) if value.is_floating_point() else value
        assert torch.equal(loaded.values[name], expected), name
        errors.append((expected - value).abs().max().item())
    assert lost["max_absolute_error"] == pytest.approx(max(errors))
    size, whole = tt.weigh(path), tt.weigh(tmp_path / "values.ticket")
    assert 2 * size.values == whole.values
    loaded.apply_(timm.create_model("test_efficientnet", num_classes=3))


def test_halves_by_hand_and_refused_where_too_large(tmp_path):
    # float16 has 10 bits of fraction: 1 + 2^-11 rounds to 1 (to even), an error of 2^-11.
    masks = {"w": torch.tensor([True, False, True])}
    ticket = tt.Ticket(masks, {"w": torch.tensor([1 + 2**-11, 5.0, 2.0]), "n": torch.tensor([7, 8])})
    lost = ticket.save(tmp_path / "a.ticket", dtype="float16")
    assert lost == {"dtype": "float16", "max_absolute_error": 2**-11, "max_relative_error": 2**-11 / (1 + 2**-11)}
    assert tt.load_ticket(tmp_path / "a.ticket").values["w"].tolist() == [1.0, 0.0, 2.0]
    assert tt.load_ticket(tmp_path / "a.ticket").values["n"].tolist() == [7, 8]
    ticket.values["w"][2] = 1e6
    with pytest.raises(tt.TicketError, match="w holds values too large for float16; save it as bfloat16"):
        ticket.save(tmp_path / "b.ticket", dtype="float16")
    with pytest.raises(tt.SettingError, match="dtype: 'float8' is not valid"):
        ticket.save(tmp_path / "b.ticket", dtype="float8")
    assert not (tmp_path / "b.ticket").exists()


def test_a_value_that_repeats_is_kept_to_the_bit(tmp_path):
    nan = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)  # a NaN with a payload
    values = {"a": torch.full((3,), -0.0), "b": nan.repeat(4), "c": torch.tensor([True, True]), "d": torch.zeros(0, 3)}
    values |= {"e": torch.tensor(12, dtype=torch.int64), "f": torch.full((2, 2), 0.1, dtype=torch.bfloat16)}
    ticket = tt.Ticket({"w": torch.tensor([True, False])}, {"w": torch.tensor([2.0, 0.0]), **values})
    ticket.save(tmp_path / "one.ticket")
    loaded = tt.load_ticket(tmp_path / "one.ticket")
    assert loaded.fingerprint == ticket.fingerprint
    assert tt.weigh(tmp_path / "one.ticket").values == 4


def test_a_single_value_that_was_expanded_is_kept_and_hashed(tmp_path):
    """A parameter of one value has whatever stride it was made with; 0 cannot be viewed as bytes."""
    ticket = tt.Ticket(
        {"w": torch.tensor([True, False])},
        {"w": torch.tensor([1.0, 0.0]), "gate": torch.tensor(2.0).expand(1), "constant": torch.zeros(1)},
    )
    ticket.save(tmp_path / "one.ticket")
    loaded = tt.load_ticket(tmp_path / "one.ticket")
    assert loaded.fingerprint == ticket.fingerprint
    assert loaded.values["gate"].tolist() == [2.0]
    assert loaded.values["gate"].stride() == (1,)
