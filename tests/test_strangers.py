"""Tickets from strangers: what they claim is bounded, what they say is only shown, and what does not fit is refused."""

import ast
import json
import os
import re
import zlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from support import forged_files, started
from support.commands import call
from support.hostile_files import ESC, tensors_of, with_header

import timm_tickets as tt
from timm_tickets.sparse import pretrained as pretrained_weights
from timm_tickets.tickets import publish as hub
from timm_tickets.tickets import reader as ticket_reader

OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
KNOWN = Path(__file__).parent / "data" / "format_2_seed.ticket"


def write(path, layers, rest=(), start=None, padding=0, values=None, **more):
    """A file with this header, and nothing in its masks."""
    header = {"layers": layers, "rest": list(rest), "start": start or {"kind": "values"}, "frozen": None}
    header |= {"stored_as": None, "fingerprint": "0" * 64, "metadata": {}, **more}
    packed = bytearray(zlib.compress(json.dumps(header).encode(), 9))
    tensors = {"header": torch.frombuffer(packed, dtype=torch.uint8), "masks": torch.zeros(0, dtype=torch.uint8)}
    tensors |= values or {}
    if padding:
        tensors["padding"] = torch.zeros(padding, dtype=torch.uint8)
    save_file(tensors, path, {"timm_tickets": json.dumps({"format": 2, "writer": "0"})})


def pretrained(tag="resnet18.a1_in1k"):
    return {"kind": "pretrained", "tag": tag, "sha256": "0" * 64}


LAYER = ["layer1.0.conv1.weight", [64, 64, 3, 3], "float32", 0]
REST = {
    "classes beside a zero": (["fc.weight", [1_500_000, 0], "float32", "pretrained"], 0),
    "channels beside a zero": (["conv1.weight", [1, 300_000, 0], "float32", "pretrained"], 0),
    "a vector of classes": (["fc.weight", [2_000_000], "float32", "00000000"], 7400),
    "a vector of classes, stored": (["fc.weight", [90_000], "float32", "00000000"], 7400),
    "no classes": (["fc.weight", [0, 512], "float32", "pretrained"], 0),
    "no channels": (["conv1.weight", [64, 0, 7, 7], "float32", "00000000"], 0),
    "classes as the file's size has them": (["fc.weight", [1000, 512], "float32", "pretrained"], 7400),
    "another width": (["fc.weight", [10, 513], "float32", "pretrained"], 7400),
    "channels that a width allows": (["conv1.weight", [64, 100, 7, 7], "float32", "pretrained"], 7400),
    "another dimension of the stem": (["conv1.weight", [64, 3, 7, 8], "float32", "pretrained"], 7400),
    "a buffer of another size": (["bn1.running_mean", [65], "float32", "pretrained"], 7400),
    "the whole model": (["bn1.running_mean", [64], "float32", "pretrained"], 7400),
    "what the model does not have": (["bn9.running_mean", [64], "float32", "pretrained"], 7400),
    "another dtype": (["bn1.running_mean", [64], "float64", "pretrained"], 7400),
}


@pytest.mark.parametrize("rest", REST)
def test_a_pretrained_model_is_not_built_for_what_the_architecture_is_not(tmp_path, monkeypatch, rest):
    entry, padding = REST[rest]
    write(tmp_path / "a.ticket", [LAYER], [entry], pretrained(), padding)
    monkeypatch.setattr(ticket_reader, "fetch_pretrained", lambda *_: pytest.fail("it was built, or fetched"))
    with pytest.raises(tt.TicketError, match=r"claims|needs the pretrained weights|which gives|more than the \d"):
        tt.load_ticket(tmp_path / "a.ticket")


@pytest.mark.parametrize("tag", ["resnet18", "hf-hub:a/b", "x" * 10**6, "vit_7b_patch16_dinov3.lvd1689m", ESC])
def test_other_tags_are_not_fetched(tmp_path, monkeypatch, tag):
    write(tmp_path / "a.ticket", [["norm.weight", [4096], "float32", 0]], (), pretrained(tag), 100)
    monkeypatch.setattr(timm, "create_model", only_outlines(timm.create_model))
    with pytest.raises(tt.TicketError, match=r"does not have|more than the \d|needs the pretrained") as error:
        tt.load_ticket(tmp_path / "a.ticket")
    forged_files.check_message(str(error.value))


def only_outlines(build):
    def create_model(name, pretrained=False, **more):
        assert not pretrained
        assert torch.empty(0).device.type == "meta"
        return build(name, **more)

    return create_model


def test_the_sizes_of_a_pretrained_model_are_its_classifiers_and_its_stems():
    shapes = {"fc.weight": [10, 512], "conv1.weight": [64, 1, 7, 7]}
    assert pretrained_weights.sizes_of("resnet18.a1_in1k", shapes) == {"num_classes": 10, "in_chans": 1}
    assert pretrained_weights.sizes_of("resnet18.a1_in1k", {}) == {}
    linear = {"embeds.proj.weight": [768, 768]}  # a patch's pixels, which are no channels
    assert pretrained_weights.sizes_of("naflexvit_base_patch16_gap.e300_s576_in1k", linear) == {}
    outline = pretrained_weights.outline("resnet18.a1_in1k", {"num_classes": 10, "in_chans": 1})
    assert {tuple(outline[name].shape) for name in shapes} == {(10, 512), (64, 1, 7, 7)}
    assert all(value.device.type == "meta" for value in outline.values())


MEMORY = """
import sys, timm, timm_tickets as tt
from support.hostile_files import peak
timm.create_model("test_resnet"), tt.load_ticket
for path in sys.argv[1:]:
    before = peak(reset=True)
    try:
        tt.load_ticket(path)
    except tt.TicketError:
        pass
    print(peak() - before)
"""


def test_shapes_with_a_zero_take_no_more_memory_than_stated(tmp_path):
    """Files of 400 bytes that took 3 GB: the sizes of a model to build stood beside a zero, in no number of weights."""
    paths = [tmp_path / f"{number}.ticket" for number in range(3)]
    for path, (entry, padding) in zip(paths, list(REST.values())[:3], strict=True):
        write(path, [["w", [1], "float32", 0]], [entry], pretrained(), padding)
    out = started.run("-c", MEMORY, *paths, env=OFFLINE)
    assert out.returncode == 0, out.stderr
    for path, taken in zip(paths, map(int, out.stdout.split()), strict=True):
        assert taken <= 8192 * path.stat().st_size + 128 * 2**20


@pytest.mark.parametrize("state", [{}, {"w": torch.zeros(2**18), "pos_embed": torch.zeros(2**20)}])
def test_a_written_file_is_in_proportion_to_what_is_built_to_read_it(tmp_path, state):
    """To a tensor that has a dimension of 0, and to pretrained weights that are larger than what is needed of them."""
    ticket = tt.Ticket({"w": torch.zeros(2**18, dtype=torch.bool)}, {"w": torch.zeros(2**18)}, {})
    ticket.values["empty"] = torch.zeros(0, 2**20)
    if state:
        ticket.pretrained = tt.Pretrained("resnet18.a1_in1k", state)
    ticket.save(tmp_path / "a.ticket")
    assert 256 * (tmp_path / "a.ticket").stat().st_size >= 2**18 + 2**20
    assert tt.weigh(tmp_path / "a.ticket").pretrained == ("resnet18.a1_in1k" if state else None)
    assert tt.load_ticket(tmp_path / "a.ticket", pretrained=state or None).fingerprint == ticket.fingerprint


def test_very_many_tensors_are_refused_by_name(tmp_path, monkeypatch):
    names = [[f"layer.{i}.weight", [1], "float32", 0] for i in range(10_001)]
    write(tmp_path / "a.ticket", names)
    with pytest.raises(tt.TicketError, match=r"layers: List should have at most 10000 items .* not 10001"):
        tt.load_ticket(tmp_path / "a.ticket")
    rest = [[f"layer.{i}.bias", [1], "float32", "00000000"] for i in range(5001)]
    write(tmp_path / "b.ticket", names[:5000], rest)
    with pytest.raises(tt.TicketError, match="names 10,001 tensors, more than the 10,000 of a ticket"):
        tt.load_ticket(tmp_path / "b.ticket")
    values = {name: torch.zeros(1) for name, *_ in names}
    with pytest.raises(tt.TicketError, match="a ticket of 10,001 tensors cannot be saved"):
        tt.Ticket({names[0][0]: torch.ones(1, dtype=torch.bool)}, values, {}).save(tmp_path / "c.ticket")
    save_file({str(i): torch.zeros(0) for i in range(20)}, tmp_path / "d.ticket", {"timm_tickets": '{"format": 2}'})
    with pytest.raises(tt.TicketError, match="it holds 20 tensors"):
        tt.load_ticket(tmp_path / "d.ticket")


def test_a_header_of_very_much_json_is_refused(tmp_path):
    text = json.dumps({"format": 1, "x": "y" * 2**24})
    save_file({"masks": torch.zeros(1)}, tmp_path / "a.ticket", {"timm_tickets": text})
    with pytest.raises(tt.TicketError, match="more than 16,777,216"):
        tt.load_ticket(tmp_path / "a.ticket")
    write(tmp_path / "b.ticket", [["w", [1], "float32", 0]], metadata={"x": list(range(3 * 10**6))})
    with pytest.raises(tt.TicketError, match="its header is cut short or too long"):
        tt.load_ticket(tmp_path / "b.ticket")


def test_info_and_compare_show_a_thousand_layers_and_say_how_many_more(tmp_path):
    masks = {f"layer.{i}.weight": torch.tensor([True, False]) for i in range(1200)}
    path = tmp_path / "a.ticket"
    tt.Ticket(masks, {name: torch.tensor([1.0, 0.0]) for name in masks}, {}).save(path)
    for command in (["info", path], ["compare", path, path]):
        out = call(*command, COLUMNS="200")
        assert out.exit_code == 0, out.output
        assert len(re.findall(r"layer\.\d+\.weight", out.output)) == 1000
        assert "and 200 more layers" in out.output


def test_info_of_a_ticket_that_needs_no_byte(tmp_path):
    """Everything pruned: neither masks nor values, and nothing to divide by."""
    tt.Ticket({"w": torch.zeros(4, dtype=torch.bool)}, {"w": torch.zeros(4)}, {}).save(tmp_path / "a.ticket")
    out = call("info", tmp_path / "a.ticket")
    assert out.exit_code == 0, out.output


def masked(name, values):
    """A ticket of the digits' network whose one mask is over this."""
    mask = {name: torch.zeros_like(values.get(name, torch.zeros(1)), dtype=torch.bool)}
    return tt.Ticket(mask, values, {"model": {"architecture": "test_resnet"}})


@pytest.mark.parametrize("name", ["bn1.running_mean", "bn1.num_batches_tracked", "nothing.weight", "layer1.0.conv1"])
@pytest.mark.parametrize("action", ["apply_", "attach", "transfer_"])
def test_a_mask_over_what_is_no_weight_is_refused_before_anything_changes(model, name, action):
    ticket = masked(name, timm.create_model("test_resnet", num_classes=10).state_dict())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    more = [torch.optim.SGD(model.parameters(), 0.1)] if action == "attach" else []
    with pytest.raises(tt.TicketError, match=f"{name}.*|not a weight of"):
        getattr(ticket, action)(model, *more)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["bn1.num_batches_tracked", "nothing.weight"])
def test_a_mask_over_what_is_no_weight_is_not_saved(model, tmp_path, name):
    with pytest.raises(tt.TicketError, match=f"a mask over {name}"):
        masked(name, model.state_dict()).save(tmp_path / "a.ticket")


def test_a_mask_over_integers_is_not_loaded(tmp_path):
    values = {"values.int64": torch.zeros(1, dtype=torch.int64)}
    write(tmp_path / "a.ticket", [["bn1.num_batches_tracked", [1], "int64", 1]], values=values)
    with pytest.raises(tt.TicketError, match="has a mask, but int64 is not a dtype of weights"):
        tt.load_ticket(tmp_path / "a.ticket")


def test_a_ticket_that_masks_only_the_classifier_cannot_go_to_another_one(model):
    ticket = masked("fc.weight", model.state_dict())
    other = timm.create_model("test_resnet", num_classes=5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(tt.TicketError, match=r"all that it masks \(fc\.weight\) is in the classifier"):
        ticket.transfer_(other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    same = ticket.transfer_(model)  # to the same classes it goes whole
    assert list(same.masks) == ["fc.weight"]
    assert not model.get_classifier().weight.any()


def test_a_head_of_another_size_takes_the_masks_over_its_buffers_away(model):
    """They are not of the new head's weights, and are not there to be refused."""
    ticket = tt.create_pruner("random", model, sparsity=0.5, classifier=True).ticket
    moved = ticket.transfer_(timm.create_model("test_resnet", num_classes=5))
    assert "fc.weight" not in moved.masks
    assert len(moved.masks) == len(ticket.masks) - 1


@pytest.mark.parametrize("epoch", ["0.5", True, None, [], -1, 1e7, float("nan")])
def test_a_start_epoch_is_a_number(tmp_path, model, epoch):
    ticket = tt.create_pruner("random", model, sparsity=0.5).ticket
    ticket.save(tmp_path / "a.ticket")
    path = tmp_path / "b.ticket"
    path.write_bytes(
        with_header((tmp_path / "a.ticket").read_bytes(), lambda h: h["metadata"].update(start_epoch=epoch))
    )
    with pytest.raises(tt.TicketError, match="start_epoch: Input should be"):
        tt.load_ticket(path)


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_is_regenerated(tmp_path, seed):
    model = timm.create_model("test_resnet", num_classes=10)
    pruner = tt.create_pruner("frozen_slt", model, sparsity=0.6, frozen=0.7, seed=seed)
    next(pruner)
    with pytest.warns(UserWarning, match="without an optimizer step"):
        next(pruner, None)
    path = tmp_path / "a.ticket"
    pruner.ticket.save(path)
    assert tt.weigh(path).origin.endswith(f"from seed {seed}, scaled {pruner.ticket.metadata['origin']['scale']}") or (
        f"seed {seed}" in tt.weigh(path).origin
    )
    assert tt.weigh(path).start == 0
    assert tt.load_ticket(path).fingerprint == pruner.ticket.fingerprint


@pytest.mark.parametrize("place", ["seed", "frozen", "count", "shape", "metadata"])
def test_numbers_of_very_many_digits_are_refused(tmp_path, place):
    data = KNOWN.read_bytes()

    def change(header):
        if place in ("seed", "frozen"):
            (header["start"] if place == "seed" else header["frozen"])["seed"] = 10**4299
        elif place == "metadata":
            header["metadata"]["start_epoch"] = 10**4299
        else:
            header["layers"][0][3 if place == "count" else 1] = 10**4299 if place == "count" else [10**4299]

    path = tmp_path / "a.ticket"
    path.write_bytes(with_header(data, change))
    with pytest.raises(tt.TicketError) as error:
        tt.load_ticket(path)
    forged_files.check_message(str(error.value))
    header = json.loads(zlib.decompress(tensors_of(data)["header"].numpy().tobytes()))
    text = json.dumps(header).replace('"metadata": {', '"metadata": {"x": ' + "9" * 5000 + ", ", 1)
    tensors = tensors_of(data) | {
        "header": torch.frombuffer(bytearray(zlib.compress(text.encode())), dtype=torch.uint8)
    }
    save_file(tensors, path, {"timm_tickets": '{"format": 2}'})
    with pytest.raises(tt.TicketError, match="number out of range"):
        tt.load_ticket(path)


HOSTILE = [ESC, "a\nb", "\u202egnp.exe", "\x9b2J", "x" * 2_000_000, ESC * 100_000, "\U000e0001" * 3000]
PLACES = {
    "name": lambda h, s: h["layers"][0].__setitem__(0, s),
    "dtype": lambda h, s: h["layers"][0].__setitem__(2, s),
    "where": lambda h, s: h["rest"][0].__setitem__(3, s),
    "key": lambda h, s: h.update({s: 1}),
    "kind": lambda h, s: h.update(start={"kind": s}),
    "tag": lambda h, s: h.update(start=pretrained(s)),
    "stored as": lambda h, s: h.update(stored_as=s),
    "weights": lambda h, s: h.update(start={"kind": "seed", "seed": 1, "weights": s, "scale": "none"}),
    "fingerprint": lambda h, s: h.update(fingerprint=s),
    "start epoch": lambda h, s: h["metadata"].update(start_epoch=s),
    "architecture": lambda h, s: h["metadata"].update(model={"architecture": s}),
    "metadata": lambda h, s: h["metadata"].update(
        {s: s, "pruner": s, "model": {s: s, "kwargs": {s: s}}, "metrics": {s: s}}
    ),
}


def plain(text):
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("place", PLACES)
def test_a_strangers_words_reach_no_terminal_as_they_are(tmp_path, model, place, text):
    path = tmp_path / "a.ticket"
    tt.Ticket.of(
        model, {"conv1.0.weight": torch.ones_like(model.get_parameter("conv1.0.weight"), dtype=torch.bool)}
    ).save(path)
    path.write_bytes(with_header(path.read_bytes(), lambda header: PLACES[place](header, text)))
    try:
        ticket = tt.load_ticket(path)
    except tt.TicketError as error:
        forged_files.check_message(str(error))
    else:
        with pytest.raises(tt.TicketError) as error:
            ticket.apply_(timm.create_model("test_vit"))
        forged_files.check_message(str(error.value))
    for command in (["info", path], ["compare", path, path], ["push", path, f"local-dir:{tmp_path / 'out'}"]):
        out = call(*command, COLUMNS="200")
        assert out.exit_code in (0, 2), out.exception
        assert plain(out.output)
        assert len(out.stderr) <= 2048
        assert len(out.output) < 20_000


def test_the_writer_of_a_newer_format_is_shown_cut(tmp_path):
    for text in HOSTILE:
        save_file(
            {"x": torch.zeros(1)}, tmp_path / "a.ticket", {"timm_tickets": json.dumps({"format": 9, "writer": text})}
        )
        with pytest.raises(tt.TicketError, match="has ticket format 9") as error:
            tt.load_ticket(tmp_path / "a.ticket")
        forged_files.check_message(str(error.value))


LINKS = ["[x](http://evil.example)", "<http://evil.example>", "http://evil.example", "![x](http://evil.example/a.png)"]
LINKS += [
    "www.evil.example",
    "a@evil.example",
    "`` `x` ``",
    "x|y\n# T",
    "<img src=x>",
    "&lt;b&gt;",
    "[x]: http://evil.example",
]


@pytest.mark.parametrize("text", LINKS)
def test_nothing_in_a_card_is_a_link(model, text):
    """Outside code nothing of it stays; within a code span nothing is markup."""
    mask = {"conv1.0.weight": torch.ones_like(model.get_parameter("conv1.0.weight"), dtype=torch.bool)}
    facts = {
        "model": {"architecture": text, "kwargs": {text: text, "global_pool": text}},
        "pruner": {"name": text, text: text},
    }
    facts |= {"recipe": {"dataset": text}, "metrics": {text: text}, "dense": {text: text}}
    card = hub.card(tt.Ticket.of(model, mask, facts), "local-dir:x")
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", card, flags=re.DOTALL))
    assert "evil" not in outside
    assert not re.search(r"[<>&@]|\]\(|!\[|\n# T", outside)
    lines = [line for line in card.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {3, 4}  # no cell more than its table has


KWARGS = {
    **{
        "checkpoint_path": "/tmp/x",
        "pretrained_cfg": {"url": "http://x"},
        "pretrained_cfg_overlay": {"url": "http://x"},
    },
    **{"cache_dir": "/tmp", "pretrained": True, "features_only": True, "scriptable": True, "norm_layer": "a(b)"},
    **{
        "num_classes": 10**9,
        "global_pool": "x" * 100,
        "drop_rate": float("inf"),
        "img_size": [[1]],
        "depths": [1] * 99,
    },
    **{"in_chans": "os.system", "exec": "1", "embed_dim": 10**400},
}


def test_a_cards_code_has_only_arguments_that_are_known_to_be_harmless(model):
    fine = {"width": 2, "drop_rate": 0.5, "shortcut": "pad", "bias": False, "img_size": [32, 32], "depths": [1, 2]}
    mask = {"conv1.0.weight": torch.ones_like(model.get_parameter("conv1.0.weight"), dtype=torch.bool)}
    for kwargs in (KWARGS, fine):
        facts = {"model": {"architecture": "test_resnet", "kwargs": kwargs}}
        card = hub.card(tt.Ticket.of(model, mask, facts), "local-dir:x")
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        call = ast.parse(code).body[1].value
        assert {one.arg: ast.literal_eval(one.value) for one in call.keywords} == ({} if kwargs is KWARGS else fine)
        for key in KWARGS if kwargs is KWARGS else ():
            assert f"| `model: {key}, not in the code above` |" in card


@pytest.mark.parametrize("each", [20, pytest.param(70, marks=pytest.mark.slow)])
def test_many_forged_files_are_refused_or_hold_what_they_say(tmp_path, each):
    """Sizes, masks and fingerprints agree with the lies; what is then done with them works, or changes nothing."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ticket = tt.create_pruner("magnitude", model, sparsity=0.7).ticket
    ticket.save(tmp_path / "values.ticket")
    ticket.pretrained = tt.Pretrained("test_efficientnet.r160_in1k", state)
    ticket.save(tmp_path / "pretrained.ticket")
    save_file(state, tmp_path / "state.safetensors")
    (tmp_path / KNOWN.name).write_bytes(KNOWN.read_bytes())
    out = started.run(forged_files.__file__, tmp_path, each, env=OFFLINE)
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    assert result["loaded"] + result["refused"] == result["files"] == 3 * each
    assert result["loaded"] > 30 / 70 * each
    assert result["refused"] > 100 / 70 * each
    assert len(result["kinds"]) == len(set(forged_files.LIES))
    assert result["beyond"] <= 128 * 2**20  # of 8 KiB a byte
