"""What every pruner promises, whatever its method. A new method is one row in support/every_method.py."""

import functools

import pytest
import torch
from support.every_method import (
    EXPECTED_WARNINGS,
    METHODS,
    OPTIMIZERS,
    SPARSITY,
    every_method,
    found,
    fresh,
    ids,
    loader,
    of_channels,
    pruner_of,
    searched,
    train_run,
)

import timm_tickets as tt
from timm_tickets.structure import units

pytestmark = pytest.mark.filterwarnings(*EXPECTED_WARNINGS)


@pytest.fixture(autouse=True)
def _found_once(monkeypatch):
    """Finding groups is not what is tested here."""
    monkeypatch.setattr(units, "find_groups", found)


@functools.cache
def _whole(name):
    row = next(row for row in METHODS if ids(row) == name)
    model = fresh()
    return model, searched(row, model).ticket


def whole(row):
    """A search of test_resnet from seed 0 that nothing stopped: the model and the ticket, to be looked at."""
    return _whole(ids(row))


def test_every_registered_pruner_is_in_the_table():
    assert {row.name for row in METHODS} == set(tt.list_pruners())


@every_method
def test_reaches_its_sparsity_exactly(row):
    total = sum(mask.numel() for mask in whole(row)[1].masks.values())
    for sparsity in (0.0, 0.5, SPARSITY, 0.987):
        pruner = searched(row, fresh(), sparsity=sparsity)
        pruned = sum(int((~mask).sum()) for mask in pruner.ticket.masks.values())
        assert pruner.sparsity == pruner.ticket.sparsity == pytest.approx(pruned / total)
        if of_channels(row):
            assert round(sparsity * total) <= pruned <= (sparsity + 0.005) * total
        else:
            assert pruned == round(sparsity * total)


@every_method
def test_leaves_the_model_masked_at_the_tickets_start(row):
    model, ticket = whole(row)
    for name, value in model.state_dict().items():
        assert torch.equal(value, ticket.values[name]), name
    for name, mask in ticket.masks.items():
        assert not model.get_parameter(name)[~mask].any()


@every_method
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_weights_are_exactly_zero_after_every_step(row, optimizer):
    model = fresh()
    pruner = pruner_of(row, model)
    learned = row.name == "continuous_sparsification"  # soft while it trains

    def check():
        for name, mask in pruner.subnet.mask.items():
            layer, _, leaf = name.rpartition(".")
            assert learned or not getattr(model.get_submodule(layer), leaf)[~mask].any()

    for run in pruner:
        train_run(run, model, optimizer, check)
    ticket = pruner.ticket
    attached = ticket.attach(model, OPTIMIZERS[optimizer](model.parameters()))
    before = {name: model.get_parameter(name).clone() for name in ticket.masks}
    for images, labels in loader():
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        attached.step()
        attached.zero_grad()
        for name, mask in ticket.masks.items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
    assert any(not torch.equal(before[name], model.get_parameter(name)) for name in before)


@every_method
def test_the_classifier_is_not_pruned_and_trains(row):
    assert not any(name.startswith("fc.") for name in whole(row)[1].masks)
    model = fresh()
    pruner = pruner_of(row, model)
    for run in pruner:
        head = model.fc.weight.detach().clone()
        assert model.fc.weight.requires_grad
        train_run(run, model)
        # What only reads gradients undoes its steps.
        assert torch.equal(head, model.fc.weight) == (run.reads_only)
    assert model.fc.weight.requires_grad


@every_method
def test_same_seed_same_ticket(row):
    assert searched(row, fresh()).ticket.fingerprint == whole(row)[1].fingerprint


@every_method
def test_the_model_stays_a_plain_timm_model(row):
    (model, _), plain = whole(row), fresh()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


@every_method
def test_ticket_goes_through_a_file_bit_for_bit(row, tmp_path):
    model, ticket = whole(row)
    ticket.save(tmp_path / "one.ticket")
    loaded = tt.load_ticket(tmp_path / "one.ticket")
    assert loaded.sparsity == ticket.sparsity
    assert loaded.metadata == ticket.metadata
    assert loaded.metadata["pruner"]["name"] == row.name
    other = fresh(seed=9)
    for _ in range(2):  # twice is once
        loaded.apply_(other)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    model.eval(), other.eval()
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(image), other(image))


@every_method
def test_replay_after_a_stop_gives_the_same_ticket(row, tmp_path):
    expected = whole(row)[1].fingerprint
    counted = searched(row, fresh(), folder=tmp_path / "count")
    runs = counted.runs_done
    assert counted.runs in (None, runs)
    assert counted.ticket.fingerprint == expected
    if runs == 0:
        once = pruner_of(row, fresh(), folder=tmp_path / "once").ticket
        assert pruner_of(row, fresh(seed=77), folder=tmp_path / "once").ticket.fingerprint == once.fingerprint
    for stop in range(runs + 1):  # one life after the other, each killed in the next run; the last one ends
        model = fresh(seed=77 if stop else 0)  # the folder, not the new model, says where the search began
        pruner = pruner_of(row, model, folder=tmp_path / "stopped")
        trained = []
        for run in pruner:
            trained.append(run.index)
            train_run(run, model)
            if run.index == stop:
                break  # this run was trained but not written down
        assert len(pruner.replayed) == max(stop - 1, 0)
        assert trained == [index for index in (stop - 1, stop) if 0 <= index < runs]
    assert pruner.ticket.fingerprint == expected


@every_method
def test_settings_out_of_range_are_refused(row):
    wrong = (*row.refused, {"sparsity": 1}, {"sparsity": -0.1}, {"sparsity": "much"}, {"epochs": 0}, {"unheard": 1})
    for settings in wrong:
        name = next(iter(settings))
        with pytest.raises(tt.SettingError, match=name):
            pruner_of(row, fresh(), **settings)
    with pytest.raises(tt.SettingError, match="sparsity"):
        tt.create_pruner(row.name, fresh())
    with pytest.raises(tt.SettingError, match="would prune all"):
        pruner_of(row, fresh(), sparsity=1 - 1e-9)


@every_method
def test_include_and_exclude_choose_the_layers(row):
    names = tt.prunable_names(fresh())
    ticket = searched(row, fresh(), exclude=(names[0],)).ticket
    assert list(ticket.masks) == names[1:]
    assert ticket.sparsity == pytest.approx(SPARSITY, abs=5e-3 if of_channels(row) else 1e-4)


@every_method
@pytest.mark.filterwarnings("ignore:.*of a schedule of 2", "ignore:.*not at the asked")
def test_a_run_may_end_early_or_late(row):
    model = fresh()
    pruner = pruner_of(row, model, epochs=2)
    for run in pruner:
        train_run(run, model, epochs=1 if run.index % 2 else 3)
    assert pruner.sparsity == pytest.approx(SPARSITY, abs=5e-3 if of_channels(row) else 1e-4)
