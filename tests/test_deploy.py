import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import load, load_file, save_file
from support.commands import call

import timm_tickets as tt
from timm_tickets import export, load_2_4, load_csr
from timm_tickets.deploy import onnx_file, speed
from timm_tickets.deploy.runners import Kind, onnxruntime_run, openvino_run, run_of
from timm_tickets.deploy.source import Built, load_source, zeros
from timm_tickets.deploy.sparse_file import fits_2_4, write_sparse
from timm_tickets.deploy.speed import Row, Speed, measure
from timm_tickets.deploy.speed_report import conditions, table, verdict

DIGITS = [
    "training.epochs=1",
    "data.val_fraction=0.8",
    "pruner.sparsity=0.9",
    "data.workers=0",
    "training.batch_size=16",
]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of a small search: a ticket before training, its trained weights, a trained dense network."""
    folder = tmp_path_factory.mktemp("searches") / "digits"
    tt.search("digits_magnitude", [*DIGITS, f"output={folder}"])
    return folder


@pytest.fixture
def ticket(tmp_path):
    """A function that makes a ticket's file for an architecture, pruned by magnitude in every layer."""

    def make(arch="test_resnet", granularity="weight", sparsity=None):
        torch.manual_seed(0)
        sparsity = sparsity or {"weight": 0.9}.get(granularity, 0.5)
        settings = {"granularity": granularity, "sparsity": sparsity, "scope": "layerwise"}
        path = tmp_path / f"{arch}.ticket"
        tt.create_pruner("magnitude", timm.create_model(arch, num_classes=10), **settings).ticket.save(path)
        return path

    return make


def outputs(model, images):
    with torch.no_grad():
        return model.eval()(images)


def test_a_folder_is_exported_trained_and_a_ticket_says_that_it_is_not(searched, tmp_path):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trained = timm.create_model(f"local-dir:{searched}", pretrained=True)
    first = tt.load_ticket(searched / "digits_magnitude.ticket")
    for place, said, wanted in (
        (searched, "as trained", trained.state_dict()),
        (searched / "round_00", "as trained", trained.state_dict()),
        (searched / "digits_magnitude.ticket", "NOT TRAINED: the weights that the ticket starts from", first.state()),
    ):
        file = tmp_path / "out.safetensors"
        out = call("export", place, "--to", "timm", "--output", file, "--overwrite")
        assert out.exit_code == 0, out.output
        assert said in out.output
        mine = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(file))
        assert all(torch.equal(mine.state_dict()[name], value) for name, value in wanted.items())
    assert f"the trained ones are {searched}" in out.output
    assert {name: int(mask.sum()) for name, mask in zeros(mine).items()} == {
        name: int(mask.sum()) for name, mask in first.masks.items()
    }
    assert load_source(searched).images.input_size == (3, 32, 32)
    assert outputs(trained, images).shape == (2, 10)


def test_weights_trained_under_a_ticket_are_taken_from_timms_checkpoints_and_no_others(ticket, tmp_path):
    path = ticket()
    model = tt.load_ticket(path).apply_(timm.create_model("test_resnet", num_classes=10))
    with torch.no_grad():
        for name, mask in tt.load_ticket(path).masks.items():
            model.get_parameter(name).add_(mask * 0.1)  # what a training does
    state = model.state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": wrapped, "args": Namespace(lr=1)}, good := tmp_path / "good.pth")
    source = load_source(path, good)
    assert source.trained
    assert all(torch.equal(source.model.state_dict()[key], value) for key, value in state.items())
    name = next(iter(tt.load_ticket(path).masks))
    save_file({**state, name: torch.ones_like(state[name])}, grown := tmp_path / "grown.safetensors")
    torch.save({"state_dict": state, "code": print}, code := tmp_path / "code.pth")
    save_file({name: state[name]}, part := tmp_path / "part.safetensors")
    for file, words in (
        (grown, "was not trained under this ticket: "),
        (code, "no checkpoint"),
        (part, "does not fit"),
    ):
        with pytest.raises(tt.TicketError, match=words):
            load_source(path, file)


def opened_elsewhere(file, images, tmp_path):
    """What onnxruntime makes of a file, in a process that knows nothing of this package or torch."""
    np.save(tmp_path / "images.npy", images.numpy())
    code = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "numpy.save(sys.argv[3], session.run(None, {'images': numpy.load(sys.argv[2])})[0])\n"
        "assert not {'torch', 'timm_tickets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, file, tmp_path / "images.npy", tmp_path / "out.npy"], check=True)
    return torch.from_numpy(np.load(tmp_path / "out.npy"))


FAMILIES = [
    *("test_vit", "test_efficientnet", "test_nfnet", "test_byobnet", "test_convnext", "mobilenetv3_small_050"),
    *("regnetx_002", "xcit_nano_12_p16_224", "pvt_v2_b0", "mobilevit_xxs", "repvit_m0_9"),
]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("arch", ["test_resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_onnx_equals_torch_in_another_process(arch, compact, ticket, tmp_path):
    file = ticket(arch, "channel" if compact else "weight", 0.5)
    if Version(torch.__version__) < Version("2.7"):  # its exporter cannot translate batch norm by today's onnxscript
        with pytest.raises(tt.TicketError, match=r"torch 2\.6.* cannot export this model: .*; a later torch may"):
            export(file, "onnx", tmp_path / "model.onnx", compact=compact)
        assert not (tmp_path / "model.onnx").exists()
        return
    done = export(file, "onnx", tmp_path / "model.onnx", compact=compact)
    whole = timm.create_model(arch, num_classes=10)
    smaller = sum(one.numel() for one in done.source.model.parameters()) < sum(p.numel() for p in whole.parameters())
    assert smaller == compact
    assert zeros(done.source.model) or compact
    for count in (1, 5):  # any number of images
        images = torch.randn(count, *done.source.images.input_size, generator=torch.Generator().manual_seed(1))
        wanted = outputs(done.source.model, images)
        assert wanted.abs().max() > 1e-3
        assert (opened_elsewhere(done.path, images, tmp_path) - wanted).abs().max() < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {f"{arch}.ticket", "model.onnx", "images.npy", "out.npy"}


def test_an_onnx_file_that_computes_otherwise_is_not_put_in_place(ticket, tmp_path, monkeypatch):
    (file := tmp_path / "model.onnx").write_text("before")
    program = SimpleNamespace(model=SimpleNamespace(metadata_props={}), save=lambda path, **_: open(path, "w").close())
    monkeypatch.setattr(onnx_file, "exported", lambda *args: program)
    monkeypatch.setattr(
        onnx_file, "onnxruntime_run", lambda path: lambda images: np.zeros((len(images), 10), np.float32)
    )
    with pytest.raises(tt.TicketError, match="computes otherwise than torch"):
        export(ticket(), "onnx", file, overwrite=True)
    assert file.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "test_resnet.ticket"]


def test_onnxruntimes_threads_do_not_wait_on_a_core_for_the_next_call(monkeypatch, tmp_path):
    """Else what `speed` times after it shares its cores with them: the same network seemed to take twice the time."""
    seen = []
    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="images")])
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda path, options, **_: seen.append(options) or session)
    onnxruntime_run(tmp_path / "model.onnx", 2)
    assert seen[0].get_session_config_entry("session.force_spinning_stop") == "1"
    assert seen[0].intra_op_num_threads == 2


def test_a_model_that_puts_out_no_numbers_equals_none(source):
    with torch.no_grad():
        source.model.fc.bias.fill_(torch.nan)
    with pytest.raises(tt.TicketError, match="the model puts out NaN or infinity"):
        onnx_file.difference(source.model, lambda images: np.zeros((len(images), 10), np.float32), (3, 32, 32))


def test_a_compact_model_is_exported_and_exported_again(ticket, tmp_path):
    done = export(path := ticket(granularity="channel"), "compact", file := tmp_path / "small.safetensors")
    images = torch.randn(2, *done.source.images.input_size)
    small = tt.load_compact(file)
    torch.testing.assert_close(outputs(small, images), outputs(load_source(path).model, images), rtol=1e-4, atol=1e-5)
    left = sum(one.numel() for one in small.parameters())
    assert f"{left:,} of 373,658 parameters are left" in done.told[-1]
    assert left < 0.6 * 373_658
    again = load_source(file)
    assert again.compact
    assert again.trained is False  # said of a compact file too
    assert torch.equal(outputs(again.model, images), outputs(small, images))
    for to, words in (("timm", "is smaller than what timm builds"), ("csr", "is smaller than what timm builds")):
        with pytest.raises(tt.SettingError, match=words):
            export(file, to, tmp_path / "out")
    with pytest.raises(tt.SettingError, match="compact: is for onnx and openvino"):
        export(path, "timm", tmp_path / "out", compact=True)
    for forged in ("no JSON", "[1]", '{"input_size": 3}'):
        rewritten(file, "timm_tickets_compact", lambda header, images=forged: header["told"].update(images=images))
        with pytest.raises(tt.TicketError, match=r"small.safetensors is damaged: of its images: "):
            load_source(file)


def test_the_compact_command_writes_what_export_does(ticket, tmp_path):
    path, files = ticket(granularity="channel"), [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for command, file in zip((["compact"], ["export", "--to", "compact"]), files, strict=True):
        done = call(command[0], str(path), *command[1:], "--output", str(file))
        assert done.exit_code == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "NOT TRAINED" in done.stderr


@pytest.mark.slow  # and with OpenVINO, which the test extra does not bring
def test_openvino_with_zeros_equals_torch(ticket, tmp_path):
    done = export(ticket("test_vit"), "openvino", tmp_path / "model.xml")
    images = torch.randn(3, *done.source.images.input_size)
    out = torch.from_numpy(openvino_run(done.path)(images.numpy()))
    assert (out - outputs(done.source.model, images)).abs().max() < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"test_vit.ticket", "model.xml", "model.bin"}


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit"])
def test_csr_computes_the_same_with_its_linear_layers_as_csr(arch, ticket, tmp_path):
    done = export(path := ticket(arch), "csr", tmp_path / "model.safetensors")
    model = load_csr(done.path)
    images = torch.randn(3, *done.source.images.input_size)
    torch.testing.assert_close(outputs(model, images), outputs(done.source.model, images), rtol=1e-4, atol=1e-5)
    linear = {name for name, one in model.named_parameters() if one.layout == torch.sparse_csr}
    assert linear == ({*tt.load_ticket(path).masks} - {"patch_embed.proj.weight"} if arch == "test_vit" else set())
    ran = run_of(Kind(engine="torch", variant="csr", file=done.path))(images.numpy())
    torch.testing.assert_close(torch.from_numpy(ran), outputs(model, images))
    dense = sum(value.nbytes for value in done.source.model.state_dict().values())
    assert done.path.stat().st_size < 0.4 * dense


def rewritten(file, key, change):
    """A file of ours with another header."""
    data = file.read_bytes()
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][key])
    change(header)
    save_file(load(data), file, {key: json.dumps(header)})


@pytest.mark.parametrize(("to", "read"), [("csr", load_csr), ("2:4", lambda file: load_2_4(file, "cpu"))])
def test_a_strangers_sparse_file_builds_its_own_architecture_and_reads_no_other_file(to, read, ticket, tmp_path):
    done = export(ticket("test_vit", "2:4"), to, tmp_path / "model.safetensors")
    (planted := tmp_path / "planted.pth").write_bytes(b"PK")
    forged = {"checkpoint_path": str(planted), "pretrained": True, "pretrained_cfg_overlay": {"file": str(planted)}}
    rewritten(done.path, "timm_tickets_sparse", lambda header: header["built"]["arguments"].update(forged))
    with pytest.raises(tt.TicketError, match="given checkpoint_path, pretrained, pretrained_cfg_overlay, which no"):
        read(done.path)
    source = replace(done.source, built=Built(architecture="test_vit", arguments=forged))
    with pytest.raises(tt.SettingError, match="a file cannot say checkpoint_path, pretrained, pretrained_cfg_overlay"):
        write_sparse(done.path, "csr", source.model, [], source.built, {})


def test_validate_py_is_given_all_that_the_model_was_built_with(tmp_path):
    model = timm.create_model("test_vit", num_classes=10, img_size=64)
    tt.create_pruner("magnitude", model, sparsity=0.5).ticket.save(path := tmp_path / "small.ticket")
    done = export(path, "timm", tmp_path / "out.safetensors", arguments={"img_size": 64})
    assert done.told[1].endswith("--num-classes 10 --in-chans 3 --model-kwargs img_size=64 --input-size 3 64 64")


def test_2_4_is_packed_and_gives_the_same_model(ticket, tmp_path):
    done = export(path := ticket("test_vit", "2:4"), "2:4", tmp_path / "model.safetensors")
    model = load_2_4(done.path, "cpu", torch.float32)
    wanted = done.source.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    fits, left = fits_2_4(done.source.model)
    assert {*fits} == {name for name in tt.load_ticket(path).masks if name.startswith("blocks")}
    assert "linear layers only" in left["patch_embed.proj.weight"]
    assert "10 x 64 is not a multiple of 32 x 64" in left["head.weight"]
    assert "stays dense: head.weight (10 x 64" in " ".join(done.told)
    stored = load_file(done.path)
    halved = wanted[fits[0]]
    assert stored[f"{fits[0]}.values"].numel() == halved.numel() // 2
    assert stored[f"{fits[0]}.index"].nbytes == halved.numel() // 8
    with pytest.raises(tt.SettingError, match=r"need an NVIDIA card of compute capability 8\.0"):
        load_2_4(done.path)


def test_2_4_names_the_layers_that_do_not_fit(ticket, tmp_path):
    with pytest.raises(tt.TicketError, match=r"blocks\.0\.attn\.qkv\.weight, .*keeps [34] of some four weights"):
        export(ticket("test_vit"), "2:4", tmp_path / "model.safetensors")
    with pytest.raises(
        tt.TicketError, match=r"layer1\.0\.conv1\.weight.* \(Conv2d: torch has 2:4 for linear layers only\)"
    ):
        export(ticket("test_resnet", "2:4"), "2:4", tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_damaged_sparse_files_are_refused(ticket, tmp_path):
    path = export(ticket("test_vit"), "csr", tmp_path / "model.safetensors").path
    data = path.read_bytes()
    tensors = load(data)  # in memory: the file is written over
    told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    name = "blocks.0.mlp.fc1.weight"

    def changed(part, value):
        save_file({**tensors, f"{name}.{part}": value}, path, told)

    def cut():
        path.write_bytes(data[: len(data) // 2])

    columns = tensors[f"{name}.col"]
    cases = [
        (cut, "is damaged, or is no such file"),
        (lambda: changed("col", torch.full_like(columns, 9_999)), f"is damaged: {name}"),
        (lambda: changed("col", columns[1:].clone()), f"is damaged: {name}"),
        (lambda: save_file(tensors, path), "it does not say so"),
        (
            lambda: save_file({k: v for k, v in tensors.items() if k != "norm.weight"}, path, told),
            "lacks 1 .norm.weight",
        ),
    ]
    for damage, words in cases:
        damage()
        with pytest.raises(tt.TicketError, match=words):
            load_csr(path)
    path.write_bytes(data)
    with pytest.raises(tt.TicketError, match="was exported --to csr"):
        load_2_4(path, "cpu")


def test_what_cannot_be_exported_is_said(searched, ticket, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ticket").write_text("no ticket")
    save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors")
    (there := tmp_path / "there.onnx").write_text("something")
    resnet, vit = ticket(), ticket("test_vit")
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.chdir(tmp_path)
    for args, words in (
        ([resnet, "--to", "onxx"], "to: 'onxx' is unknown; did you mean 'onnx'? Valid: 2:4, compact, csr, onnx"),
        ([resnet, "--to", "onnx"], "--to onnx needs onnxscript, which is not installed: pip install 'timm-tickets[exp"),
        ([resnet, "--to", "openvino"], "needs openvino and onnxscript, which are not installed"),
        ([tmp_path / "text.ticket", "--to", "timm"], "text.ticket is not a ticket, or is damaged"),
        ([tmp_path / "none.ticket", "--to", "timm"], "there is no ticket at"),
        ([tmp_path / "empty", "--to", "timm"], "is a folder and no ticket"),
        ([tmp_path / "plain.safetensors", "--to", "timm"], "is a safetensors file but not a ticket"),
        ([searched, "--to", "timm", "--weights", resnet], "has its own; name the ticket"),
        ([resnet, "--to", "csr", "--output", there], "there.onnx exists; give another --output, or --overwrite"),
        ([resnet, "--to", "csr", "--output", tmp_path / "empty"], "empty is a folder; name a file in it"),
        ([resnet, "--to", "csr", "--batch", "2"], "batch: csr takes any number of images"),
        ([vit, "--to", "timm", "--image-size", "100"], "image-size: images of 3 x 100 x 100 do not go through"),
        ([vit, "--to", "timm", "--model-kwargs", "img_size=64"], "in another shape 1 (pos_embed)"),
    ):
        out = call("export", *args)
        assert (out.exit_code, words in out.output) == (2, True), out.output
    assert there.read_text() == "something"


def test_a_strangers_ticket_builds_its_own_architecture_and_nothing_else(ticket, tmp_path):
    given = tt.load_ticket(ticket())
    (tmp_path / "planted.pth").write_bytes(b"PK")
    for told, words in (
        ({"num_classes": 10**9}, "in another shape"),
        ({"architecture": "hf-hub:user/name"}, "which this timm"),
        ({"architecture": None}, "does not say its architecture"),
    ):
        metadata = {**given.metadata, "model": {**given.metadata["model"], **told}}
        replace(given, metadata=metadata).save(tmp_path / "forged.ticket")
        with pytest.raises((tt.TicketError, tt.SettingError), match=words):
            load_source(tmp_path / "forged.ticket")
    kwargs = {
        "checkpoint_path": str(tmp_path / "planted.pth"),
        "pretrained_cfg_overlay": {"file": "x"},
        "drop_rate": 0.1,
    }
    metadata = {**given.metadata, "model": {**given.metadata["model"], "kwargs": kwargs}}
    replace(given, metadata=metadata).save(tmp_path / "forged.ticket")
    assert load_source(tmp_path / "forged.ticket").built.arguments == {
        "num_classes": 10,
        "in_chans": 3,
        "drop_rate": 0.1,
    }


def row(engine, variant, latency, batch, **more):
    return Row(engine, variant, [latency, latency * 1.01, latency * 0.99], [batch, batch * 1.02, batch * 0.98], **more)


@pytest.fixture
def source(ticket):
    return load_source(ticket())


def test_a_speed_report_says_that_nothing_got_faster_where_nothing_did(source):
    rows = [
        row("torch", "dense", 0.010, 0.100),
        row("torch", "zeros", 0.0098, 0.099),
        row("onnxruntime", "dense", 0.004, 0.040),
        row("onnxruntime", "zeros", 0.008, 0.040),
    ]
    told = verdict(Speed(source, rows, 32, 2, 0.9, "random weights"))
    assert told == [
        "torch: zeros 1.02 times as fast as dense with 1 image, 1.01 with 32 images (not faster).",
        "onnxruntime: zeros 0.50 times as fast as dense with 1 image, 1.00 with 32 images (slower).",
        "NOTHING GOT FASTER: zeros are multiplied by like any other weight. What makes a ticket faster is taking "
        "channels out: search with pruner.granularity=channel, then compact (docs/faster.md).",
        "The fastest with 32 images is onnxruntime dense: 2.50 times torch's dense.",
    ]


def test_who_has_taken_channels_out_already_is_not_told_to(source):
    rows = [row("torch", "dense", 0.010, 0.100), row("torch", "compacted", 0.0098, 0.099)]
    told = verdict(done := Speed(source, rows, 32, 2, 0.0, "random weights"))
    assert told[1].startswith("NOTHING GOT FASTER, even without the channels that are taken out: ")
    assert "granularity=channel" not in " ".join(told)
    assert conditions(done)[0] == "test_resnet, images of 3 x 160 x 160, float32, 2 threads."


def test_a_speed_report_says_what_got_faster(source):
    noisy = Row("torch", "zeros", [0.002, 0.02, 0.03], [0.02, 0.2, 0.3])  # once by chance
    rows = [row("torch", "dense", 0.010, 0.100), noisy, row("torch", "compacted", 0.005, 0.040)]
    told = verdict(Speed(source, rows, 32, 2, 0.9, "random weights"))
    assert told == [
        "torch: zeros 0.51 times as fast as dense with 1 image, 0.51 with 32 images (not faster); "
        "compacted 2.00 times as fast as dense with 1 image, 2.50 with 32 images (faster).",
        "The fastest with 32 images is torch compacted: 2.50 times torch's dense.",
    ]


def test_a_speed_table_fits_80_columns(source, monkeypatch):
    from rich.console import Console

    facts = {"memory": 1234.5, "file": 1_020_300_400, "parameters": 255_030_000, "macs": 41_300_500_000, "top1": 78.125}
    rows = [row(engine, "compacted", 1.2345, 22.2, **facts) for engine in ("torch", "onnxruntime", "openvino")]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(done := Speed(source, rows, 128, 2, 0.9, "random weights")))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "compacted 1,234 ±1%" in lines[3].strip()
    assert lines[3].split()[-5:] == ["1,234", "1,020", "255", "41,300", "78.12"]
    assert "90.0% of the weights in layers with zeros are zero" in conditions(done)[0]


def test_speed_measures_all_models_in_turn_and_scores_them(searched, monkeypatch):
    order = []
    monkeypatch.setattr(speed, "memory_of", lambda kind, size, batch: 1.0)
    monkeypatch.setattr(speed, "sample", lambda run, images: order.append((run, len(images))) or float(len(order)))
    done = measure(searched, engines=["torch"], rounds=3, batch=8)
    assert [(one.engine, one.variant) for one in done.rows] == [("torch", "dense"), ("torch", "zeros")]
    (dense, _), (zeroed, _) = order[0], order[4]
    assert order[8:] == 3 * [(dense, 1), (dense, 8), (zeroed, 1), (zeroed, 8)]
    assert done.rows[0].latency == [9.0, 13.0, 17.0]
    result = json.loads((searched / "result.json").read_text())["rows"]
    assert [one.top1 for one in done.rows] == [one["metrics"]["test_top1"] for one in (result[0], result[-1])]
    assert all(one.parameters == result_size(searched) for one in done.rows)
    assert done.rows[0].macs == done.rows[1].macs == macs_by_hand(load_source(searched))
    assert done.sparsity == pytest.approx(0.9, abs=0.01)


def macs_by_hand(source):
    """Of each convolution and linear layer: its outputs, times the inputs that each of them sums."""
    count = 0

    def see(module, inputs, output):
        nonlocal count
        count += output.numel() * module.weight[0].numel()

    layers = [one for one in source.model.modules() if isinstance(one, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [one.register_forward_hook(see) for one in layers]
    outputs(source.model, torch.zeros(1, *source.images.input_size))
    for hook in hooks:
        hook.remove()
    return count


def result_size(folder):
    return sum(one.numel() for one in timm.create_model(f"local-dir:{folder}", pretrained=True).parameters())


def test_of_an_untrained_ticket_nothing_is_scored(searched, monkeypatch):
    monkeypatch.setattr(speed, "memory_of", lambda *args: None)
    monkeypatch.setattr(speed, "sample", lambda *args: 1.0)
    done = measure(searched / "digits_magnitude.ticket", engines=["torch"], rounds=2, batch=2)
    assert [one.top1 for one in done.rows] == [None, None]
    assert "NOT TRAINED" in " ".join(conditions(done))
    with pytest.raises(tt.SettingError, match="engine: 'tensorrt' is unknown"):
        measure(searched, engines=["tensorrt"])


def test_speed_has_a_row_of_the_compacted_model_where_there_is_one(ticket, monkeypatch):
    monkeypatch.setattr(speed, "memory_of", lambda *args: None)
    monkeypatch.setattr(speed, "sample", lambda *args: 1.0)
    done = measure(ticket(granularity="channel"), engines=["torch"], rounds=2, batch=2)
    dense, zeroed, compacted = done.rows
    assert [one.variant for one in done.rows] == ["dense", "zeros", "compacted"]
    assert compacted.macs < zeroed.macs == dense.macs
    assert compacted.parameters < zeroed.parameters
    assert "channels and heads are taken out" in " ".join(done.notes)
    done = measure(ticket("test_vit"), engines=["torch"], rounds=2, batch=2)
    assert [one.variant for one in done.rows] == ["dense", "zeros", "csr"]
    assert "so none is removed" in " ".join(done.notes)


def test_speed_leaves_out_what_no_file_can_say_and_says_so(ticket, monkeypatch):
    monkeypatch.setattr(speed, "memory_of", lambda *args: None)
    monkeypatch.setattr(speed, "sample", lambda *args: 1.0)
    monkeypatch.setattr(speed, "compacted", lambda model: SimpleNamespace(model=model, removed=1, groups=2, told=list))
    given = {"dynamic_img_size": True}
    done = measure(ticket("test_vit"), engines=["torch"], rounds=2, batch=2, arguments=given)
    assert [one.variant for one in done.rows] == ["dense", "zeros"]
    assert "torch csr is left out: its file cannot say dynamic_img_size" in done.notes
    assert any(one.startswith("torch compacted is left out: model: it is not a compact one") for one in done.notes)


@pytest.mark.slow
def test_speed_by_the_command_in_every_engine(searched, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = call("speed", searched, "--rounds", "3", "--batch", "8", "--threads", "1")
    assert out.exit_code == 0, out.output
    for words in ("torch", "onnxruntime", "openvino", "1 image", "8 images", "test_resnet, images of 3 x 32 x 32"):
        assert words in out.output


def test_what_a_measurement_cannot_have_is_said(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "sample", lambda *args: 1.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    recipe = (searched / "recipe.yaml").read_text()
    try:
        (searched / "recipe.yaml").write_text(
            recipe.replace("dataset: digits", "dataset: folder").replace("data_dir: null", "data_dir: gone")
        )
        done = measure(searched, engines=["torch"], rounds=2, batch=2)
        with pytest.raises(tt.SettingError, match=r"data\.data_dir: 'gone' is not a folder"):
            measure(searched, engines=["torch"], data=searched / "recipe.yaml")
    finally:
        (searched / "recipe.yaml").write_text(recipe)
    assert [(one.top1, one.memory) for one in done.rows] == [(None, None), (None, None)]
    told = " ".join(done.notes)
    assert "top-1 is left out, for the images of the search cannot be had: data.data_dir: 'gone'" in told
    assert "the process that measures the memory of torch zeros failed (1)" in told


@pytest.mark.slow
def test_weights_too_large_for_one_onnx_file_lie_beside_it(ticket, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_ONE_FILE", 0)
    done = export(ticket(), "onnx", tmp_path / "model.onnx")
    images = torch.randn(2, *done.source.images.input_size)
    wanted = outputs(done.source.model, images)
    assert (opened_elsewhere(done.path, images, tmp_path) - wanted).abs().max() < 1e-4
    assert (tmp_path / "model.onnx.data").stat().st_size > 1_000_000 > done.path.stat().st_size
