"""What one reads in a notebook: a line of each object, the length of a search, and the notebooks of docs/ themselves.

Their code is run here in one process without a kernel. So what only IPython does is not seen: how figures come to be
shown, and which of several representations is chosen.
"""

import ast
import contextlib
import io
import json
import operator
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import timm
import torch
from support.every_method import Row, fresh, pruner_of, searched, train_run

import timm_tickets as tt
from timm_tickets.experiments import console as consoles
from timm_tickets.experiments.report import RichProgress

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.ipynb"))}
# What makes a notebook short.
FEWER = ("zip(digits.images, digits.target, strict=True)", "zip(digits.images[:300], digits.target[:300], strict=True)")
SMALLER = {
    "prune_your_model": [FEWER, ("EPOCHS = 6", "EPOCHS = 1")],
    "compare_methods": [FEWER, ("epochs: 6", "epochs: 1"), ("SEEDS = [0, 1, 2]", "SEEDS = [0, 1]")],
}

IMP = Row("imp", {"prune_rate": 0.6})


def test_a_pruner_says_its_method_model_sparsity_and_run():
    pruner = pruner_of(IMP, fresh(), sparsity=0.8)
    assert repr(pruner) == "Pruner(imp, test_resnet, sparsity 0.0000 of 0.8, 0 of 2 runs done)"
    assert not pruner._begun  # to look at it begins nothing
    seen = []
    for run in pruner:
        seen.append(repr(pruner))
        train_run(run, pruner.subnet.model)
    assert seen == [
        "Pruner(imp, test_resnet, sparsity 0.0000 of 0.8, run 1 of 2)",
        "Pruner(imp, test_resnet, sparsity 0.6000 of 0.8, run 2 of 2)",
    ]
    assert repr(pruner) == "Pruner(imp, test_resnet, sparsity 0.8000 of 0.8, 2 of 2 runs done, ended: see its `ticket`)"


def test_a_pruner_that_has_failed_or_does_not_know_its_runs_says_so():
    pruner = pruner_of(Row("colt"), fresh())
    run = next(pruner)
    assert repr(pruner) == "Pruner(colt, test_resnet, sparsity 0.0000 of 0.9, run 1)"
    with torch.no_grad():
        next(run.subnet.model.parameters()).fill_(torch.nan)
    with pytest.raises(tt.TrainingError):
        next(pruner)
    assert repr(pruner) == "Pruner(colt, test_resnet, sparsity 0.0000 of 0.9, stopped at an error in run 1)"


def test_the_length_of_a_search_is_its_runs_where_they_are_known():
    for name, runs in (("imp", 3), ("edge_popup", 1), ("magnitude", 0)):
        pruner = pruner_of(Row(name), fresh(), sparsity=0.4)
        assert (len(pruner), pruner.runs, bool(pruner)) == (runs, runs, True)
    colt = pruner_of(Row("colt"), fresh())
    assert colt
    with pytest.raises(TypeError, match="len: colt does not know beforehand how many runs"):
        len(colt)
    assert operator.length_hint(colt, 7) == 7


def test_iterating_a_search_that_has_ended_says_so():
    for row in (IMP, Row("magnitude")):
        pruner = pruner_of(row, fresh())
        assert pruner.sparsity == (0 if row is IMP else pytest.approx(0.9, abs=1e-5))  # nobody has iterated it
        for run in pruner:
            train_run(run, pruner.subnet.model)
        with pytest.warns(
            UserWarning, match=f"this {row.name} search has ended.*`pruner.ticket` is its ticket"
        ) as told:
            assert list(pruner) == []
        assert told[0].filename == __file__
        assert next(pruner, None) is None


def test_a_second_pruner_says_that_the_model_has_been_pruned(tmp_path):
    model = fresh()
    searched(IMP, model, sparsity=0.5, folder=tmp_path)
    words = "test_resnet has been through a pruner or ticket before: 185,304 of its 370,608 .* in 15 of 15 layers. The"
    with pytest.warns(UserWarning, match=words) as told:
        second = pruner_of(IMP, model, sparsity=0.9)
    assert told[0].filename != tt.create_pruner.__code__.co_filename
    with pytest.warns(UserWarning, match="its search has not begun"):
        ticket = second.ticket
    ticket.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.warns(UserWarning, match="in 15 of 15 layers, and the hooks that hold its masks are still on it"):
        pruner_of(IMP, model)
    pruner_of(IMP, model, sparsity=0.5, folder=tmp_path)  # continued: it begins with the values of then


def test_layers_that_begin_as_zeros_and_dead_filters_are_not_called_pruned():
    model = fresh()
    with torch.no_grad():
        model.layer4[0].conv1.weight.zero_()
        model.layer1[0].conv2.weight[:4] = 0
    pruner_of(IMP, model)


@pytest.mark.parametrize("name", ["imp", "edge_popup"])
def test_a_model_behind_the_gates_of_another_search_is_refused(name):
    model = fresh()
    next(pruner_of(Row("edge_popup"), model))
    with pytest.raises(tt.SettingError, match="an earlier pruner has not ended its search, and its gates are still be"):
        pruner_of(Row(name), model)


@pytest.mark.filterwarnings("ignore:this test_nfnet has been through a pruner")
def test_a_second_search_of_standardised_layers_does_not_train_behind_the_masks_of_the_first():
    model = timm.create_model("test_nfnet", num_classes=4)
    assert tt.create_pruner("magnitude", model, sparsity=0.5).ticket.sparsity == 0.5
    second = tt.create_pruner("imp", model, sparsity=0.5, epochs=1)
    next(second)
    assert second.subnet.sparsity == 0
    assert all(mask.all() for name, mask in model.named_buffers() if name.endswith("prune_mask"))


def test_a_ticket_a_subnet_and_a_run_say_themselves_in_a_line():
    pruner = tt.create_pruner("magnitude", fresh(), sparsity=0.5)
    ticket = pruner.ticket
    count = "185,304 of 370,608 weights kept in 15 layers"
    assert repr(ticket) == f"Ticket(test_resnet, magnitude, sparsity 0.5000, {count})"
    assert repr(pruner.subnet) == "Subnet(test_resnet, 185,304 of 370,608 weights kept)"
    assert repr(tt.Run(classes=[0, 1], rewind="2ep", after_step=print)) == (
        "Run(classes=[0, 1], rewind='2ep', after_step=print)"
    )
    ticket.metadata = {"model": {"architecture": "\x1b[2J" + "x" * 500}, "pruner": ["imp"]}
    assert repr(ticket).isprintable()
    assert len(repr(ticket)) < 200
    assert repr(tt.Ticket({}, {})) == "Ticket(0 of 0 weights kept in 0 layers)"


def code_of(notebook):
    """Each cell of code, and the text that it showed when it was committed."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            texts = [one.get("text") or one["data"]["text/plain"] for one in cell["outputs"] if said(one)]
            yield "".join(cell["source"]), "".join("".join(text) for text in texts)


def said(output):
    return output["output_type"] in ("stream", "execute_result")


def executed(source, names):
    """What a cell prints, and its last expression."""
    tree, shown = ast.parse(source), None
    if isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";"):
        shown = ast.Expression(tree.body.pop().value)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "cell", "exec"), names)
        value = shown and eval(compile(shown, "cell", "eval"), names)
    return printed.getvalue() + ("" if value is None else repr(value))


def words(source, text):
    """Without what a smaller one has otherwise: numbers, widths of columns, and what the seeds support of a ticket."""
    if source.endswith("\nreport"):
        text = re.sub(r"(?m): .*$", ":", text)
    text = " ".join(re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "#", text).split())
    return re.sub(r"# epoch\b", "# epochs", re.sub(r"#( #)+", "#", text))  # short ones have one


@pytest.fixture
def lines(monkeypatch):
    """What a line that changes has shown, in what passes for a notebook."""
    seen = []

    def display(words, raw, display_id):
        assert raw
        assert display_id
        seen.append(words["text/plain"])
        return SimpleNamespace(update=lambda words, raw: seen.append(words["text/plain"]))

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    return seen


@pytest.mark.usefixtures("lines")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_says_what_it_said_when_it_was_committed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    names = {"__name__": "__main__"}
    smaller = dict(SMALLER[name])
    for source, before in code_of(NOTEBOOKS[name]):
        for text in [one for one in smaller if one in source]:
            source = source.replace(text, smaller.pop(text))
        assert words(source, executed(source, names)) == words(source, before), source
    assert not smaller  # each was found
    plt.close("all")
    if name == "prune_your_model":
        ticket = tt.load_ticket("photos.ticket")
        assert ticket.sparsity == pytest.approx(0.98, abs=1e-5)
        assert all(not names["plain"].get_parameter(key)[~mask].any() for key, mask in ticket.masks.items())
    else:
        assert len(list(tmp_path.glob("compared/*/seed_*/result.json"))) == 8
        report = names["report"]
        assert {one.partition(" at ")[0] for one in report.verdicts} == {*names["METHODS"]}
        shown = report._repr_markdown_()
        assert all(one.partition(": ")[2] in shown.replace("\\", "") for one in report.verdicts)
        assert report.figures["accuracy"]._repr_png_().startswith(b"\x89PNG")
        assert "accuracy" in (tmp_path / "report" / "report.html").read_text()


def test_a_report_of_no_folder_says_so(tmp_path):
    with pytest.raises(tt.SettingError, match=r"folders: .*nowhere is no folder"):
        tt.report(tmp_path / "nowhere")


def test_a_search_in_a_notebook_follows_its_epochs_in_one_line_that_goes_away(lines, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # as a kernel's says
    console = consoles.console_here()
    run = SimpleNamespace(name="round_00", sparsity=0.0, schedule_epochs=3)
    for _ in range(2):
        with RichProgress(console, 2) as progress:
            progress.begin(run, 10)
            for epoch in (1, 2):
                progress.epoch({"epoch": epoch, "val_top1": 50.0, "seconds": 1.0})
            progress.say("round_00  a line")
    line = "round_00, sparsity 0.000, epoch {}/3, val 50.00, 1.0 s an epoch"
    assert lines == [line.format(1), line.format(2), ""] * 2
    told = capsys.readouterr().out.splitlines()
    assert [one for one in told if one] == ["round_00  a line"] * 2  # no epochs; rich 13 ends in a blank line


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_small_and_of_no_machine(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert len(text) < 300_000
    cells = NOTEBOOKS[name]["cells"]
    assert sum(cell["cell_type"] == "code" for cell in cells) <= 10
    outputs = [one for cell in cells for one in cell.get("outputs", ())]
    assert {one["output_type"] for one in outputs} <= {"stream", "execute_result", "display_data"}  # no error
    assert all(one.get("name") != "stderr" for one in outputs)  # no warning
    assert not re.search(r"(/(home|root|tmp|usr|opt|mnt|srv)/|site-packages|[A-Z]:\\\\)", text)
    for cell in cells:
        for link in re.findall(r"\]\((?!https?:)([^)#]*)", "".join(cell["source"]) * (cell["cell_type"] == "markdown")):
            assert (FOLDER / link).exists(), link
