import json
import subprocess
import sys

import pytest
import timm
import typer
import yaml
from support.commands import call

import timm_tickets as tt
from timm_tickets.cli import answers
from timm_tickets.cli.app import errors
from timm_tickets.config.files import OF_EVERY_PRUNER


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where answers are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "timm-tickets"


WITHOUT_TORCH = [
    (["--help"], 0, "search"),
    (["--version"], 0, "timm-tickets"),
    (["search", "--help"], 0, "--dry-run"),
    (["recipe", "--list"], 0, "digits_imp: the package"),
    (["recipe", "digit_imp"], 2, "did you mean 'digits_imp'"),
    (["search", "digit_imp"], 2, "did you mean 'digits_imp'"),
    (["train", "digit_imp"], 2, "did you mean 'digits_imp'"),
    (["transfer", "a.ticket", "digit_imp"], 2, "did you mean 'digits_imp'"),
    (["search", "digits_imp", "--set", "sparsity"], 2, "write key=value"),
]


def test_what_needs_no_torch_does_not_wait_for_it(tmp_path):
    """torch and timm take seconds to import; nor are recipes and their schema asked of them a second time."""
    for args in (
        ["recipe", "digits_colt", "--set", "pruner.sparsity=0.7"],
        ["recipe", "--schema", tmp_path / "a.json"],
    ):
        assert call(*args).exit_code == 0
    again = [
        (["recipe", "digits_colt", "--set", "pruner.sparsity=0.7"], 0, "name: colt"),
        (["recipe", "--schema", str(tmp_path / "b.json")], 0, ""),
    ]
    script = (
        "import sys; from typer.testing import CliRunner; from timm_tickets.cli import app\n"
        f"for args, code, words in {[*WITHOUT_TORCH, *again]!r}:\n"
        "    out = CliRunner().invoke(app, args)\n"
        "    assert (out.exit_code, words in out.output) == (code, True), (args, out.output)\n"
        "    assert not {'torch', 'timm', 'numpy', 'matplotlib'} & set(sys.modules), args\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_kept_answer_holds_only_for_what_it_was_found_from(tmp_path, cache, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nmodel: {model: test_resnet}\npruner: {name: imp, sparsity: 0.5}\n")

    def sparsity(*more):
        return yaml.safe_load(call("recipe", recipe, *more).output)["pruner"]["sparsity"]

    assert (sparsity(), sparsity(), len([*cache.iterdir()])) == (0.5, 0.5, 1)
    assert sparsity("--set", "pruner.sparsity=0.6") == 0.6
    recipe.write_text(recipe.read_text().replace("0.5", "0.7"))
    assert sparsity() == 0.7
    assert len([*cache.iterdir()]) == 3
    for path in cache.iterdir():
        path.write_text(path.read_text().replace("0.7", "0.8"))  # damaged
    assert sparsity() == 0.7
    monkeypatch.setattr(answers, "_installed", lambda: "another version")
    assert sparsity() == 0.7
    assert len([*cache.iterdir()]) == 4
    out = call("recipe", recipe, "--set", "pruner.sparsity=2")
    assert (out.exit_code, len([*cache.iterdir()])) == (2, 4)
    monkeypatch.setattr(answers, "entry_points", lambda group: [group])  # another package's pruners
    assert sparsity("--set", "pruner.sparsity=0.9") == 0.9
    assert len([*cache.iterdir()]) == 4


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


def test_list_shows_every_pruner_with_its_line_and_settings():
    out = call("list").output
    for name in tt.list_pruners():
        assert name in out
    assert "prune_rate=0.2" in out.replace("\n", "")
    assert "random" not in call("list", "im*").output


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
