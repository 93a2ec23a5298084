"""A run's own promises: subsets, sliced losses, rewind points, counting."""

import copy
import os

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import timm_tickets as tt
from timm_tickets.core.states import not_finite
from timm_tickets.data.datasets import loader_of
from timm_tickets.data.subset import Shuffled, labels_of


def run_of(**fields):
    return tt.Training(tt.Run(**{"epochs": 2, **fields}), None)


class Plain(Dataset):
    """No targets, no samples: its labels are found by reading it."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.reads += 1
        return torch.full((1,), float(index)), index % 3


class Targets(Plain):
    targets = (0, 1, 2, 0, 1, 2)


class Samples(Plain):
    samples = (("a", 0), ("b", 1), ("c", 2), ("d", 0), ("e", 1), ("f", 2))


class Shifted(Targets):
    @staticmethod
    def target_transform(target):
        return target + 10


@pytest.mark.parametrize("dataset", [Targets(), Samples(), Plain(), TensorDataset(torch.zeros(6), torch.arange(6) % 3)])
def test_labels_are_found_and_subset_keeps_them(dataset):
    part = run_of(classes=(1, 2)).subset(dataset)
    assert [int(part[i][1]) for i in range(len(part))] == [1, 2, 1, 2]


def test_known_labels_are_not_read_and_unknown_ones_only_once():
    known, plain = Targets(), Plain()
    for dataset in (known, plain):
        for _ in range(3):
            run_of(classes=(0,)).subset(dataset)
    assert (known.reads, plain.reads) == (0, 6)


def test_labels_through_subsets_concatenations_and_transforms():
    assert labels_of(Subset(ConcatDataset([Targets(), Plain()]), [1, 2, 6, 11])).tolist() == [1, 2, 0, 2]
    assert labels_of(Shifted()).tolist() == [10, 11, 12, 10, 11, 12]


def test_everything_is_the_very_same_object():
    loader = DataLoader(Targets(), batch_size=2)
    run = run_of()
    assert run.subset(loader) is loader
    assert run.batches_per_epoch == 3


def test_the_length_of_an_epoch_is_the_first_loaders_and_streams_have_none():
    run = run_of()
    run.subset(Targets())
    assert run.batches_per_epoch is None  # a data set does not say how long an epoch is
    run.subset(DataLoader(Targets(), batch_size=2))
    run.subset(DataLoader(Targets(), batch_size=6))  # such as the validation loader
    assert run.batches_per_epoch == 3

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    stream = DataLoader(Stream())
    run = run_of()
    assert run.subset(stream) is stream
    with pytest.raises(RuntimeError, match=r"run\.batches_per_epoch"):
        run.progress  # noqa: B018


def test_prepared_and_prefetching_loaders_are_cut_too():
    class Prefetch:
        """As timm's PrefetchLoader, which needs a GPU: a loader inside, the rest handed through."""

        def __init__(self, loader):
            self.loader = loader

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            return iter(self.loader)

    plain = DataLoader(Targets(), batch_size=2)
    for loader in (Accelerator(cpu=True).prepare(plain), Prefetch(plain)):
        run = run_of(classes=(0, 1))
        part = run.subset(loader)
        assert type(part) is type(loader)
        assert [label for _, labels in part for label in labels.tolist()] == [0, 1, 0, 1]
        assert run.batches_per_epoch == 2


def test_cut_loaders_keep_draws_epochs_and_batch_size():
    draws = RandomSampler(Targets(), replacement=True, num_samples=60)
    part = run_of(classes=(0, 1)).subset(DataLoader(Targets(), batch_size=4, sampler=draws))
    assert len(part.sampler) == 40
    sampler = DistributedSampler(Targets(), num_replicas=2, rank=1, seed=5)
    sampler.set_epoch(7)
    part = run_of(classes=(0,)).subset(DataLoader(Targets(), batch_size=4, sampler=sampler, drop_last=True))
    assert (part.sampler.rank, part.sampler.seed, part.sampler.epoch) == (1, 5, 7)
    assert len(part) == 0 or part.batch_size <= len(part.dataset)


def test_targets_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match="outside this run's"):
        run_of(classes=(1, 2)).loss(nn.CrossEntropyLoss(), torch.zeros(3, 4), torch.tensor([1, 3, 2]))


def test_an_optimizer_of_another_model_is_refused(model):
    run = next(tt.create_pruner("imp", model, sparsity=0.5))
    with pytest.raises(ValueError, match="none of this model's parameters"):
        run.attach(torch.optim.SGD(copy.deepcopy(model).parameters(), 0.1))


def test_a_run_that_nobody_attached_warns(model):
    pruner = tt.create_pruner("imp", model, sparsity=0.5, prune_rate=0.5)
    next(pruner)
    with pytest.warns(UserWarning, match="round_00 ended without an optimizer step"):
        next(pruner, None)


def test_infinities_that_a_model_holds_from_the_start_are_its_own():
    bounds = torch.tensor([-torch.inf, torch.inf, 0.0])
    assert not_finite({"w": bounds}, {"w": bounds.clone()}) is None
    assert not_finite({"w": bounds}, {}) == "w"
    assert not_finite({"w": bounds.neg()}, {"w": bounds}) == "w"
    assert not_finite({"w": bounds * torch.nan}, {"w": bounds}) == "w"


def test_weights_that_are_not_finite_stop_the_search_and_are_not_written(model, tmp_path):
    pruner = tt.create_pruner("imp", model, sparsity=0.5, prune_rate=0.5, folder=tmp_path)
    next(pruner)
    with torch.no_grad():
        model.fc.bias[0] = torch.nan
    with pytest.raises(tt.TrainingError, match=r"fc\.bias"):
        next(pruner)
    assert not (tmp_path / "round_00").exists()
    for again in (lambda: next(pruner), lambda: pruner.ticket):  # not mistaken for the end of the search
        with pytest.raises(RuntimeError, match="stopped at an error"):
            again()


def test_a_write_that_fails_is_not_mistaken_for_the_end(model, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    pruner = tt.create_pruner("magnitude", model, sparsity=0.5, folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            next(pruner)
    with pytest.raises(RuntimeError, match="stopped at an error"):
        pruner.sparsity  # noqa: B018


def test_a_folder_is_for_one_search(model, tmp_path):
    first = tt.create_pruner("random", model, sparsity=0.5, folder=tmp_path).ticket
    assert tt.create_pruner("random", model, sparsity=0.5, folder=tmp_path).ticket.fingerprint == first.fingerprint
    with pytest.raises(tt.SettingError, match=r"sparsity: 0\.5 there, 0\.6 now"):
        tt.create_pruner("random", model, sparsity=0.6, folder=tmp_path).ticket  # noqa: B018
    other = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(tt.SettingError, match="tensors differ"):
        tt.create_pruner("random", other, sparsity=0.5, folder=tmp_path).ticket  # noqa: B018


@pytest.mark.filterwarnings("ignore:.*without an optimizer step")
def test_metrics_may_be_tensors(model, tmp_path):
    for run in tt.create_pruner("imp", model, sparsity=0.5, prune_rate=0.5, folder=tmp_path):
        run.metrics["accuracy"] = torch.tensor(0.5)
    assert tt.load_ticket(tmp_path / "round_00" / "round_00.ticket").metadata["metrics"] == {"accuracy": 0.5}


@pytest.mark.filterwarnings("ignore:.*without an optimizer step")
def test_replay_leaves_the_model_where_the_run_left_it(model, tmp_path, unregister):
    @tt.register_pruner("goes_on")
    class GoesOn(tt.Method):
        """Three runs, each from where the last ended."""

        def search(self, subnet):
            for _ in range(3):
                (end,) = yield [tt.Run()]
            subnet.set_start_(end.state)
            subnet.rewind_()

    def whole(folder, stop=None):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=10)
        pruner = tt.create_pruner("goes_on", model, sparsity=0, folder=folder)
        for run in pruner:
            if run.index == stop:
                return None
            with torch.no_grad():
                model.fc.bias += 1 + run.index
        return pruner.ticket.fingerprint

    expected = whole(tmp_path / "a")
    whole(tmp_path / "b", stop=2)
    assert whole(tmp_path / "b") == expected


def test_a_rewind_point_at_the_very_end_would_leave_nothing_to_train(model):
    pruner, _, states = rewinding(model, "1ep", steps=3, epochs=1, per_epoch=3)
    with pytest.warns(UserWarning, match="without passing its rewind point '1ep'"):
        assert_rewound_to(pruner, states[-1])
    assert pruner.ticket.metadata["start_epoch"] == 0


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_is_pruned_as_the_plain_one(model, wrap):
    plain = tt.create_pruner("magnitude", copy.deepcopy(model), sparsity=0.5).ticket
    assert tt.create_pruner("magnitude", wrap(model), sparsity=0.5).ticket.fingerprint == plain.fingerprint


def test_lookahead_rewinds_to_the_model_after_its_slow_step(model):
    pruner = tt.create_pruner("imp", model, sparsity=0.5, prune_rate=0.5, rewind="12it")
    run = next(pruner)
    optimizer = run.attach(create_optimizer_v2(model, "lookahead_momentum", lr=0.1))
    for _ in range(12):  # the second slow step, the first that moves the weights
        nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.randint(0, 10, (4,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = copy.deepcopy(model.state_dict())
    assert_rewound_to(pruner, after)
    assert not {"step", "update_slow"} & set(optimizer.__dict__)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_is_cut_to_its_classes(shuffle):
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Targets(), batch_size=3, shuffle=shuffle, generator=generator)
    run = run_of(classes=(0, 2))
    part = run.subset(loader)
    assert isinstance(part.sampler, RandomSampler if shuffle else SequentialSampler)
    assert sorted(int(label) for _, labels in part for label in labels) == [0, 0, 2, 2]
    assert run.batches_per_epoch == len(part) == 2


def test_our_loader_is_cut_and_its_order_follows_the_seed():
    loader = loader_of(TensorDataset(torch.arange(60.0), torch.arange(60) % 3), 4, 0, shuffle=True)
    part = run_of(classes=(1,)).subset(loader)
    assert isinstance(part.sampler, Shuffled)
    orders = []
    for seed in (1, 1, 2):
        part.sampler.seed = seed
        orders.append(torch.cat([values for values, _ in part]).tolist())
    assert orders[0] == orders[1] != orders[2]
    assert set(orders[0]) == set(range(1, 60, 3))


def test_a_sampler_that_cannot_be_cut_is_refused():
    loader = DataLoader(Targets(), sampler=WeightedRandomSampler([1.0] * 6, 6))
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        run_of(classes=(0,)).subset(loader)


def test_loss_slices_logits_and_shifts_labels():
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 4.0, 5.0, 6.0]])
    loss = run_of(classes=(3, 1)).loss(nn.CrossEntropyLoss(), logits, torch.tensor([1, 3]))
    # By hand: columns (3, 1) are (3, 1) and (6, 4), targets are columns 1 and 0.
    expected = nn.functional.cross_entropy(torch.tensor([[3.0, 1.0], [6.0, 4.0]]), torch.tensor([1, 0]))
    assert torch.equal(loss, expected)


def test_loss_slices_soft_targets_to_a_distribution():
    mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=4)
    _, soft = mixup(torch.zeros(2, 3, 4, 4), torch.tensor([1, 2]))
    seen = {}

    def criterion(output, target):
        seen["target"] = target
        return SoftTargetCrossEntropy()(output, target)

    loss = run_of(classes=(1, 2)).loss(criterion, torch.zeros(2, 4), soft)
    assert torch.allclose(seen["target"].sum(1), torch.ones(2))
    assert torch.allclose(seen["target"], soft[:, 1:3] / soft[:, 1:3].sum(1, keepdim=True))
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)


def test_slicing_trains_the_same_function_as_a_smaller_head():
    torch.manual_seed(0)
    big = timm.create_model("test_resnet", num_classes=6)
    small = copy.deepcopy(big)
    small.reset_classifier(2)
    with torch.no_grad():
        small.fc.weight.copy_(big.fc.weight[[4, 5]])
        small.fc.bias.copy_(big.fc.bias[[4, 5]])
    images, labels = torch.randn(8, 3, 32, 32), torch.tensor([4, 5, 4, 5, 5, 5, 4, 4])
    run = run_of(classes=(4, 5))
    other_rows = big.fc.weight[:4].clone()
    for model, loss in (
        (big, lambda out: run.loss(nn.CrossEntropyLoss(), out, labels)),
        (small, lambda out: nn.functional.cross_entropy(out, labels - 4)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            loss(model(images)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in small.state_dict().items():
        got = big.state_dict()[name]
        assert torch.allclose(got[[4, 5]] if name.startswith("fc.") else got, value, atol=1e-6), name
    assert torch.equal(big.fc.weight[:4], other_rows)


def test_a_penalty_is_added():
    subnet = object()
    run = run_of(on_loss=lambda run, loss: loss + (7.0 if run.subnet is subnet else 0.0))
    run.subnet = subnet
    assert run.loss(lambda output, target: output.sum(), torch.ones(2), torch.zeros(2)).item() == 9.0


def rewinding(model, rewind, steps, epochs=1, per_epoch=None, accumulate=1):
    """Train IMP's first run by hand; give back the states after each step and the pruner."""
    pruner = tt.create_pruner("imp", model, sparsity=0.5, prune_rate=0.5, epochs=epochs, rewind=rewind)
    run = next(pruner)
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    if per_epoch:
        run.batches_per_epoch = per_epoch
    states = [copy.deepcopy(model.state_dict())]
    for _ in range(steps):
        for _ in range(accumulate):
            loss = run.loss(nn.CrossEntropyLoss(), model(torch.randn(4, 3, 32, 32)), torch.randint(0, 10, (4,)))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(copy.deepcopy(model.state_dict()))
    return pruner, run, states


def assert_rewound_to(pruner, state):
    assert next(pruner, None) is None
    ticket = pruner.ticket
    for name, value in state.items():
        expected = value.masked_fill(~ticket.masks[name], 0) if name in ticket.masks else value
        assert torch.equal(pruner.subnet.model.state_dict()[name], expected), name
        assert torch.equal(ticket.values[name], expected), name


@pytest.mark.parametrize(("rewind", "step"), [("0ep", 0), ("0it", 0), ("2it", 2), ("1ep", 3), ("2ep", 6)])
def test_weights_and_buffers_return_to_the_rewind_point(model, rewind, step):
    pruner, _, states = rewinding(model, rewind, steps=7, epochs=3, per_epoch=3)
    assert_rewound_to(pruner, states[step])
    assert pruner.ticket.metadata["start_epoch"] == step / 3


def test_epochs_are_counted_in_batches_under_accumulation(model):
    pruner, run, states = rewinding(model, "1ep", steps=4, epochs=2, per_epoch=4, accumulate=2)
    assert (run.step, run.batches, run.progress) == (4, 8, 1.0)
    assert_rewound_to(pruner, states[2])


def test_a_rewind_point_never_reached_becomes_the_last_state_with_a_warning(model):
    pruner, _, states = rewinding(model, "500it", steps=2)
    with pytest.warns(UserWarning, match="round_00 ended after 2 steps without passing its rewind point '500it'"):
        assert_rewound_to(pruner, states[-1])


def test_epochs_cannot_be_counted_without_subset_and_the_warning_says_so(model):
    pruner, _, states = rewinding(model, "1ep", steps=2)
    with pytest.warns(UserWarning, match=r"run\.subset\(loader\)"):
        assert_rewound_to(pruner, states[-1])


@pytest.mark.filterwarnings("ignore:round_01 trained up to epoch 1.25 of a schedule of 20")
def test_late_rewinding_tells_later_runs_where_to_go_on(model):
    pruner = tt.create_pruner("imp", model, sparsity=0.7, prune_rate=0.5, rewind="2it")
    starts = []
    for run in pruner:
        starts.append(run.start_epoch)
        run.batches_per_epoch = 4
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
        for _ in range(3):
            run.loss(nn.CrossEntropyLoss(), model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
            optimizer.step()
    assert starts == [0, 0.5]


class Batches:
    """A loader of so many batches of noise."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))] * self.count)


def readme_loop(pruner, loader, epochs=None, stop=True):
    """The README's loop; the positions in the schedule where each run began and ended."""
    model, found = pruner.subnet.model, []
    for run in pruner:
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
        for _ in range(run.epochs if run.index == 0 else epochs or run.epochs):
            for images, labels in run.subset(loader):
                if stop and run.complete:
                    break
                run.loss(nn.CrossEntropyLoss(), model(images), labels).backward()
                optimizer.step()
        found.append((run.start_epoch, run.epochs, run.position))
    return found


@pytest.mark.parametrize(
    ("rewind", "expected"),
    [
        ("2ep", [(0, 5, 5), (2, 3, 5)]),  # the second run begins at epoch 2: three are left
        ("6it", [(0, 5, 5), (1.5, 4, 5)]),  # three and a half are left, and `complete` ends the fourth
    ],
)
def test_a_loop_over_the_runs_epochs_trains_what_is_left_of_the_schedule(model, rewind, expected):
    pruner = tt.create_pruner("imp", model, sparsity=0.7, prune_rate=0.5, epochs=5, rewind=rewind)
    assert readme_loop(pruner, Batches(4)) == expected


@pytest.mark.parametrize(("epochs", "reached"), [(1, "3"), (5, "7")])
def test_a_schedule_that_is_not_kept_is_told_at_the_users_line(model, epochs, reached):
    pruner = tt.create_pruner("imp", model, sparsity=0.7, prune_rate=0.5, epochs=5, rewind="2ep")
    told = rf"round_01 trained up to epoch {reached} of a schedule of 5"
    with pytest.warns(UserWarning, match=told) as warned:
        readme_loop(pruner, Batches(4), epochs, stop=False)
    assert {one.filename for one in warned} == {__file__}


@pytest.mark.filterwarnings("ignore:.*layers are pruned to nothing")
def test_imp_without_late_rewinding_may_train_as_long_as_it_likes(model):
    readme_loop(tt.create_pruner("imp", model, sparsity=0.7, prune_rate=0.5, epochs=5), Batches(2), 1, stop=False)


def untrained_jackpot(model):
    tt.create_pruner("jackpot", model, sparsity=0.5)


def emptied_layer(model):
    tt.create_pruner("magnitude", model, sparsity=0.9999).ticket  # noqa: B018


def no_step(model):
    list(tt.create_pruner("imp", model, sparsity=0.1))


@pytest.mark.parametrize("warns", [untrained_jackpot, emptied_layer, no_step])
def test_warnings_point_at_the_users_line(model, warns):
    with pytest.warns(UserWarning, match=r"jackpot|pruned to nothing|without an optimizer step") as told:
        warns(model)
    assert {one.filename for one in told} == {__file__}
    assert {one.lineno for one in told} == {warns.__code__.co_firstlineno + 1}


def test_a_run_is_complete_though_its_last_step_was_left_out(model):
    _, run, _ = rewinding(model, "0ep", steps=3, epochs=1, per_epoch=4)
    assert not run.complete
    run.loss(nn.CrossEntropyLoss(), model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]))  # infinite gradients
    assert (run.batches, run.complete) == (3, True)


def test_progress_is_clipped_to_one(model):
    _, run, _ = rewinding(model, "0ep", steps=9, epochs=1, per_epoch=4)
    assert run.progress == 1.0


@pytest.mark.filterwarnings("ignore:.*without an optimizer step")
def test_a_pruner_goes_on_where_iteration_stopped(model):
    pruner = tt.create_pruner("imp", model, sparsity=0.9, prune_rate=0.5)
    seen = []
    for run in pruner:
        seen.append(run.index)
        if run.index == 1:
            break
    seen += [run.index for run in pruner]
    assert seen == [0, 1, 2, 3]
    with pytest.warns(UserWarning, match="this imp search has ended"):
        assert list(pruner) == []


@pytest.mark.filterwarnings("ignore:.*without an optimizer step", "ignore:.*been through a pruner")
def test_a_ticket_asked_for_before_iterating(model):
    assert tt.create_pruner("magnitude", model, sparsity=0.5).ticket.sparsity == pytest.approx(0.5, abs=1e-5)
    pruner = tt.create_pruner("imp", model, sparsity=0.5, prune_rate=0.5)
    with pytest.warns(UserWarning, match="imp: its search has not begun, so this is not its ticket"):
        assert pruner.ticket.sparsity == 0
    assert [run.index for run in pruner] == [0]


def test_a_ticket_in_the_middle_of_a_run_starts_where_its_values_are(model):
    pruner = tt.create_pruner("imp", model, sparsity=0.5, prune_rate=0.5, epochs=3, rewind="1ep")
    run = next(pruner)
    run.batches_per_epoch = 2
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
    epochs = []
    for _ in range(4):
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        epochs.append(pruner.ticket.metadata["start_epoch"])
    assert epochs == [0.0, 1.0, 1.0, 1.0]


def test_only_the_process_that_writes_needs_the_folder(model, monkeypatch, tmp_path):
    for module in ("pruner", "run_files"):
        monkeypatch.setattr(f"timm_tickets.pruning.{module}.is_writer", lambda: False)
    # What a search begins with is written by whoever decides for all, which no test with one process can play twice.
    monkeypatch.setattr("timm_tickets.pruning.history.begun", lambda folder, identity, state, recipe: (state, None))
    monkeypatch.setattr("timm_tickets.pruning.history.replayed", lambda folder, follows: None)
    pruner = tt.create_pruner("gradual", model, sparsity=0.5, epochs=1, interval=1, folder=tmp_path)
    run = next(pruner)
    run.batches_per_epoch = 1
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert next(pruner, None) is None
    assert pruner.ticket.sparsity == pytest.approx(0.5, abs=1e-4)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unregister")
@pytest.mark.parametrize("change", ["rewind_", "set_mask_", "load_"])
def test_what_a_run_ended_with_cannot_be_read_once_the_model_has_changed(model, change):
    """It would be another model's: a search that is continued, whose ends are copies, would find another ticket."""

    @tt.register_pruner("reads_late")
    class ReadsLate(tt.Method):
        def search(self, subnet):
            (end,) = yield [tt.Run()]
            assert end.weights[subnet.names[0]].equal(subnet.weights()[subnet.names[0]])
            arguments = {"rewind_": (), "set_mask_": (subnet.mask,), "load_": (subnet.start,)}
            getattr(subnet, change)(*arguments[change])
            subnet.set_mask_(self.cut(subnet.mask, end.weights))

    pruner = tt.create_pruner("reads_late", model, sparsity=0.5, epochs=1)
    run = next(pruner)
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"the model has changed since this run ended.*before `set_mask_`"):
        next(pruner)


@pytest.mark.usefixtures("unregister")
def test_what_a_third_party_method_gets_wrong_is_said(model):
    @tt.register_pruner("no_values")
    class NoValues(tt.OneShot):
        ends_trained = True

        def search(self, subnet):
            subnet.set_mask_(self.cut(subnet.mask, subnet.weights_on_cpu()))
            yield from ()

    pruner = tt.create_pruner("no_values", model, sparsity=0.5)
    with pytest.raises(RuntimeError, match=r"call `subnet.restart_\(\)`"):
        pruner.ticket  # noqa: B018

    @tt.register_pruner("own_tensors")
    class OwnTensors(tt.OneShot):
        ends_trained = True

        def search(self, subnet):
            subnet.set_mask_(self.cut(subnet.mask, subnet.weights_on_cpu()))
            subnet.set_start_(dict(subnet.model.state_dict()))
            yield from ()

    model = timm.create_model("test_resnet")
    ticket = tt.create_pruner("own_tensors", model, sparsity=0.5).ticket
    before = ticket.fingerprint
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert ticket.fingerprint == before
