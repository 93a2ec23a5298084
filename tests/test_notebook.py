"""What one reads in a notebook: a line of each object, the length of a search, and what a second pruner finds."""

import operator

import pytest
import timm
import torch
from support.every_method import Row, fresh, pruner_of, searched, train_run

import timm_tickets as tt

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
