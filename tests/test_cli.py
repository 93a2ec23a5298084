import json
import subprocess
import sys

import pytest
import timm
import typer
import yaml
from support.commands import call

import timm_tickets as tt
from timm_tickets.cli.app import errors
from timm_tickets.config.files import OF_EVERY_PRUNER
from timm_tickets.core.settings import about

WITHOUT_TORCH = [
    (["--help"], 0, "search"),
    (["--version"], 0, "timm-tickets"),
    (["search", "--help"], 0, "--dry-run"),
    (["list"], 0, "edge_popup"),
    (["recipe", "--list"], 0, "digits_imp: the package"),
    (["recipe", "digit_imp"], 2, "did you mean 'digits_imp'"),
    (["search", "digit_imp"], 2, "did you mean 'digits_imp'"),
    (["train", "digit_imp"], 2, "did you mean 'digits_imp'"),
    (["transfer", "a.ticket", "digit_imp"], 2, "did you mean 'digits_imp'"),
    (["search", "digits_imp", "--set", "sparsity"], 2, "write key=value"),
    (["report", "nowhere"], 2, "nowhere is no folder"),
    (["export", "a.ticket", "--to", "onxx"], 2, "did you mean 'onnx'"),
]


def test_what_needs_no_torch_does_not_wait_for_it():
    """torch and timm take seconds to import."""
    script = (
        "import sys; from typer.testing import CliRunner; from timm_tickets.cli import app\n"
        f"for args, code, words in {WITHOUT_TORCH!r}:\n"
        "    out = CliRunner().invoke(app, args)\n"
        "    assert (out.exit_code, words in out.output) == (code, True), (args, out.output)\n"
        "    assert not {'torch', 'timm', 'numpy', 'matplotlib'} & set(sys.modules), args\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_pruners_settings_are_known_without_torch():
    from dataclasses import fields

    assert [field.name for field in fields(tt.Method)] == list(OF_EVERY_PRUNER)


def test_a_search_says_at_once_that_it_loads_and_a_dry_run_writes_nothing(tmp_path):
    args = ["search", "digits_imp", "--set", f"output={tmp_path / 'run'}", "--set", "training.epochs=1"]
    first, *_ = (out := call(*args, "--set", "pruner.prune_rate=0.9", "--dry-run")).output.splitlines()
    assert first == "digits_imp: loading torch and timm"
    assert out.exit_code == 0, out.output
    assert "runs    3" in out.output
    assert not (tmp_path / "run").exists()


def test_a_message_on_a_terminal_breaks_between_words(monkeypatch, capsys):
    path = "/a/" + "very-long-" * 12 + "name.yaml"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(typer.Exit), errors():
        raise tt.SettingError(f"{path} was not written by timm-tickets; choose another output=")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error:", path, "was not written by timm-tickets; choose", "another output="]


def test_the_module_is_the_command():
    out = subprocess.run([sys.executable, "-m", "timm_tickets", "--help"], capture_output=True, text=True, check=True)
    assert "search" in out.stdout
    assert "Usage: timm-tickets " in out.stdout


def test_list_shows_every_pruner_and_tweak_in_a_line_of_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = call("list").output
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for cls in (*map(tt.get_method, tt.list_pruners()), *map(tt.get_tweak, tt.list_tweaks())):
        assert f"{cls.name} {about(cls)[:40]}" in words
    assert "jackpot" not in call("list", "s*").output


@pytest.mark.parametrize("name", [*tt.list_pruners(), *tt.list_tweaks(), "sy*"])
def test_list_of_one_explains_it_and_each_of_its_settings(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = call("list", name)
    assert max(map(len, out.output.splitlines())) <= 80
    words = " ".join(out.output.split())
    name = "synflow" if name == "sy*" else name
    cls = tt.get_tweak(name) if name in tt.list_tweaks() else tt.get_method(name)
    for label in ("Use: ", "Suggested: ", "Suggested (the paper's): ", "Cost: ", "Departures: "):
        assert (label in words) == (label in cls.__doc__)
    assert "Source: " in words
    for key, field in cls.__pydantic_fields__.items():
        assert f" {key}: " in words
        assert " ".join(field.description.split()) in words


def test_list_of_one_has_ranges_choices_and_defaults():
    words = " ".join(call("list", "imp").output.split())
    assert "prune_rate: number in (0, 1); default 0.2 fraction of the remaining weights" in words
    assert "scope: global | layerwise; default global compare" in words
    assert "sparsity: number in [0, 1); required" in words


def test_list_of_what_is_not_there_names_the_closest():
    out = call("list", "impp")
    assert out.exit_code == 2
    assert out.stderr.startswith("error: pruner or tweak: 'impp' is unknown; did you mean 'imp'")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.lr", "training.lr: number > 0; default 0.1 learning rate"),
        ("lr", "training.lr: number > 0; default 0.1 learning rate"),
        ("data", "data.hflip: number in [0, 1]; default 0.5 probability of a horizontal flip"),
        ("*.clip_*", "training.clip_mode: norm | value | agc; default norm what clip_grad bounds"),
        ("pruner.prune_rate", "pruner.prune_rate: number in (0, 1); default 0.15 colt: fraction of the remaining"),
        ("name", "name: text names the run folder"),  # not required: a file has one
        ("pruner.seed", "default 0 seed of everything random in the method"),  # of all of them
        ("retrain", "retrain.tweaks.label_smoothing.amount: number in [0, 1); default 0.1 weight taken"),
    ],
)
def test_a_key_of_recipes_is_explained(key, words):
    out = call("recipe", "--explain", key)
    assert words in " ".join(out.output.split())


def test_a_key_that_recipes_do_not_have_is_refused_with_the_closest():
    out = call("recipe", "--explain", "trianing.lr")
    assert out.exit_code == 2
    assert "did you mean 'training.lr'" in out.stderr


def test_recipe_prints_resolved_yaml_lists_and_writes_a_schema(tmp_path):
    out = call("recipe", "digits_imp", "--set", "pruner.sparsity=0.5")
    assert yaml.safe_load(out.output)["pruner"]["sparsity"] == 0.5
    assert "digits_imp: " in call("recipe", "--list").output
    call("recipe", "--schema", tmp_path / "schema.json")
    assert json.loads((tmp_path / "schema.json").read_text())["properties"]["pruner"]


def test_search_then_info_then_train(tmp_path):
    short = ["--set", "training.epochs=1", "--set", "pruner.sparsity=0.5", "--set", "pruner.prune_rate=0.5"]
    out = call("search", "digits_imp", *short, "--set", f"output={tmp_path / 'a'}")
    assert out.exit_code == 0, out.output
    assert "round_01" in out.output
    ticket = tmp_path / "a" / "digits_imp.ticket"
    out = call("info", ticket)
    assert out.exit_code == 0, out.output
    assert "…" not in out.output  # no layer's name or shape is cut in 80 columns
    parts = ("masks", "start", "batch-norm statistics", "header", "mask bits", "bound", "fp32 checkpoint")
    for words in (*parts, "test_resnet", "0.500000", "test_top1", '"name": "imp"', f"{ticket.stat().st_size:,} bytes"):
        assert words in out.output
    out = call("train", "digits_imp", "--ticket", ticket, *short, "--set", f"output={tmp_path / 'b'}")
    assert out.exit_code == 0, out.output
    assert (tmp_path / "b" / "round_00" / "model.safetensors").exists()
    assert "finished" in call("search", "digits_imp", *short, "--set", f"output={tmp_path / 'a'}").output


def test_info_does_not_fetch_the_weights_of_a_pretrained_start(tmp_path):
    model = timm.create_model("test_resnet", num_classes=10)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ticket = tt.create_pruner("magnitude", model, sparsity=0.5).ticket
    ticket.pretrained = tt.Pretrained("test_resnet.r160_in1k", state)
    ticket.save(tmp_path / "one.ticket")
    out = call("info", tmp_path / "one.ticket")
    assert out.exit_code == 0, out.output
    assert "start: pretrained weights test_resnet.r160_in1k" in out.output
    assert "not checked" in out.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["search", "digit_imp"], "did you mean 'digits_imp'"),
        (["search", "digits_imp", "--set", "pruner.name=impp"], "did you mean 'imp'"),
        (["search", "digits_imp", "--set", "pruner.sparsity=1"], "pruner.sparsity"),
        (["search", "digits_imp", "--set", "pruner.exclude=[layr*]"], "matches none"),
        (["search", "digits_imp", "--set", "model.model_kwargs.widht=3"], "model: 'test_resnet' cannot be built"),
        (["search", "digits_imp", "--set", "training.sched=wsd"], "training.sched cannot be built"),
        (["search", "digits_imp", "--set", "training.opt_args.nope=3"], "training cannot be built"),
        (["search", "digits_imp", "--set", "training.torchcompile=nope"], "training cannot be built"),
        (["search", "digits_imp", "--set", "training.amp=true"], "float16 needs a GPU"),
        (["search", "digits_imp", "--set", "data.num_classes=3"], "data.num_classes: 3 is too few"),
        (["search", "digits_imp", "--set", "data.val_fraction=0.001"], "data.val_fraction: 0.001"),
        (["search", "digits_imp", "--set", "data.aa=nonsense"], "data cannot be built"),
        (["search", "digits_imp", "--set", "data.train_split=val"], "Valid: test, train"),
        (["train", "digits_imp", "--ticket", "nowhere.ticket"], "no ticket at"),
        (["info", __file__], "not a ticket"),
    ],
)
def test_what_a_user_can_mend_is_one_message_without_a_traceback(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = call(*args)
    assert out.exit_code == 2
    assert out.stderr.startswith("error: ")
    assert words in out.stderr
    assert "Traceback" not in out.output


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch):
    from timm_tickets.training import trainer

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "fit", interrupted)
    out = call("search", "digits_imp", "--set", f"output={tmp_path}")
    assert out.exit_code == 130
    assert "the same command continues" in out.stderr
