"""The report: its statistics by hand and against scipy, its sentences, and what it says of folders of every state."""

import fcntl
import json
import math
import os
import re
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest
import timm
import torch
from scipy import stats
from support.commands import call

import timm_tickets as tt
from timm_tickets.config.recipe import load_recipe
from timm_tickets.experiments.run_folder import claim_folder, experiment_of, write_result
from timm_tickets.experiments.search import search as searched
from timm_tickets.reports import figures, masks, page
from timm_tickets.reports.masks import overlaps
from timm_tickets.reports.page import composed, markdown, report
from timm_tickets.reports.read import read_all
from timm_tickets.reports.statistics import difference, holm, interval, paired, percent
from timm_tickets.reports.tasks import tasks
from timm_tickets.reports.verdicts import sentence, verdicts
from timm_tickets.storage.files import write_record
from timm_tickets.storage.lock import held

IMAGES = {"train": {"": [1437, "a"]}, "test": {"": [360, "b"]}}
LOG = "run,epoch,epochs,train_loss,val_top1,val_loss,lr,sparsity,seconds,time\n"


# Statistics


def test_a_paired_interval_is_that_of_the_book_and_of_scipy():
    ones, others = {0: 91.0, 1: 93.0, 2: 94.0, 3: 92.5, 4: 93.5}, {0: 90.0, 1: 91.0, 2: 91.0, 3: 91.0, 4: 91.0}
    found, missing = paired(ones, others)
    assert (found, missing) == ([1.0, 2.0, 3.0, 1.5, 2.5], [])
    told = difference(found, margin=0.5)
    half = 2.776445 * math.sqrt(0.625) / math.sqrt(5)  # t(0.975, 4), the variance 0.625 by hand
    assert (told.mean, told.low, told.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-6)
    scipy = stats.ttest_rel([*ones.values()], [*others.values()])
    assert told.p == pytest.approx(scipy.pvalue)
    assert (told.low, told.high) == pytest.approx(tuple(scipy.confidence_interval(0.95)))
    assert told.permuted == 2 / 2**5  # of 32 ways to exchange, all as they are and all exchanged are as far from 0
    assert told.not_worse == pytest.approx(stats.ttest_1samp(found, -0.5, alternative="greater").pvalue)


@pytest.mark.parametrize(
    ("differences", "mean"),
    [([1.5], 1.5), ([0.0, 0.0], 0.0), ([1.4, 1.4, 98.6 - 97.2], 1.4)],
    ids=["one seed", "two equal seeds", "ties up to rounding"],
)
def test_what_has_no_spread_has_no_interval(differences, mean):
    told = difference(differences, 0.5)
    assert told.mean == pytest.approx(mean)
    assert (told.low, told.high, told.p, told.permuted, told.not_worse) == (None,) * 5
    assert told.count == len(differences)


def test_ties_among_differences_are_counted_by_the_exact_permutations():
    told = difference([0.0, 0.0, 1.0, 1.0], 0.5)  # sums of +-1 +-1: 2 or -2 in half of all ways
    assert told.permuted == 0.5


def test_a_missing_and_a_failed_run_are_no_pairs():
    assert paired({0: 90.0, 1: None, 2: 91.0, 3: float("nan")}, {0: 89.0, 1: 88.0, 3: 90.0}) == ([1.0], [1, 2, 3])


def test_holm_multiplies_the_least_by_all_and_never_falls():
    assert holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_interval_of_percents_stays_within_them():
    assert interval([90.0, 99.0]).high > 100
    assert percent([90.0, 99.0]).high == 100


def told(values, control="shuffled_layers", tests=1):
    found = difference(values, 0.5)
    correct = [None if p is None else min(1.0, tests * p) for p in (found.p, found.not_worse)]
    return sentence(control, found, *correct, 0.5, tests)


@pytest.mark.parametrize(
    ("values", "control", "tests", "said"),
    [
        (
            [1.0, 2.0, 3.0, 1.5, 2.5],
            "shuffled_layers",
            1,
            "better than a random mask with the same layer counts by 2.0 points (95 % interval 1.0 to 3.0, 5 seeds)",
        ),
        (
            [-1.0, -2.0, -3.0, -1.5, -2.5],
            "dense",
            1,
            "worse than the dense network by 2.0 points (95 % interval 1.0 to 3.0, 5 seeds)",
        ),
        ([0.1, -0.1, 0.05, -0.05], "dense", 1, "dense: 0.0 points above it (95 % interval 0.1 below to 0.1 above"),
        ([1.0, -1.0, 0.5], "dense", 1, "0.2 points above it (95 % interval 2.4 below to 2.8 above, 3 seeds)"),
        ([-1.0, -2.0, -3.0, -1.5, -2.5], "dense", 12, "below it (95 % interval 1.0 to 3.0 below, 5 seeds), once"),
        (
            [1.0, 2.0, 3.0, 1.5, 2.5],
            "shuffled_layers",
            12,
            "(95 % interval 1.0 to 3.0 above, 5 seeds), once corrected for the 12 tickets",
        ),
        ([1.0], "dense", 1, "1.0 points above the dense network with one seed, which gives no interval"),
        ([0.0, 0.0], "dense", 1, "0.0 points above the dense network with each of 2 seeds, which gives no interval"),
        (
            [-9.0] * 3,
            "dense",
            1,
            "9.0 points below the dense network with each of 3 seeds, which gives no interval and",
        ),
        ([0.04, 0.05, 0.044], "random", 1, "counts by 0.04 points (95 % interval 0.03 to 0.06, 3 seeds)"),
    ],
)
def test_a_verdict_is_what_the_interval_supports(values, control, tests, said):
    assert said in told(values, control, tests)


def test_what_merely_is_no_worse_than_a_random_mask_does_not_match_it():
    assert told([0.1, -0.1, 0.05, -0.05]).startswith("not distinguishable")


# Folders


@dataclass
class Run:
    """A training to write down."""

    name: str
    top1: float
    sparsity: float = 0.0
    epochs: int = 1
    round: int = 0
    penalised: bool = False

    def record(self, follows):
        more = {"index": 0, "part": 0, "classes": None, "layer_min": 0.0, "layer_max": 0.9, "steps": 20 * self.epochs}
        flags = {"all_images": True, "scored": True, "scores": False, "gated": False, "rewind": False}
        metrics = {"test_top1": self.top1, "val_top1": self.top1, "seconds": 2.0}
        whole = {"follows": follows, "mask": "", "files": {}}
        return {**vars(self), **more, **flags, "rewind_epoch": 0.0, "metrics": metrics, "whole": whole}


MODEL = timm.create_model("test_resnet", num_classes=10)


def ticket_of(seed, sparsity=0.5):
    weights = dict(MODEL.named_parameters())
    names = ["conv1.0.weight", "layer1.0.conv1.weight"]
    draw = torch.Generator().manual_seed(seed)
    order = {name: torch.randperm(weights[name].numel(), generator=draw).reshape(weights[name].shape) for name in names}
    return tt.Ticket.of(MODEL, {name: ranks >= sparsity * ranks.numel() for name, ranks in order.items()})


def write(folder, runs, seed=0, done=True, kind="search", images=IMAGES, ticket=None, logs=(), overrides=()):
    """What a search leaves: by the functions that write it, without training."""
    ours = ["training.epochs=1", "pruner.sparsity=0.5", f"seed={seed}", f"output={folder}", *overrides]
    recipe = load_recipe("digits_imp", ours)
    folder.mkdir(parents=True)
    claim_folder(folder, recipe, kind)
    write_record(folder / "images.json", images)
    records = [run.record(experiment_of(folder)) for run in runs]
    for record in records:
        write_record(folder / record["name"] / "run.json", record)
    for name in logs:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "epochs.csv").write_text(f"{LOG}{name},1,1,0.5,62.5,0.5,0.1,0,1.0,2026-01-01T00:00:00+00:00\n")
    if done:
        ticket = ticket or ticket_of(seed)
        where = "ticket/ticket" if kind.startswith("transfer") else recipe.name
        (folder / where).parent.mkdir(exist_ok=True)
        ticket.save(folder / f"{where}.ticket")
        write_result(folder, records, ticket.fingerprint, {})
    return folder


def search(folder, seed, top1, dense, **more):
    return write(folder, [Run("round_00", dense), Run("round_01", top1, 0.5, round=1)], seed, **more)


def said(*folders, margin=0.5):
    """Verdicts by series and control, of folders that are one task."""
    found, left = read_all(folders)
    assert left == []
    (task,) = tasks(found)
    return {(one.series.label, one.control): one.text for one in verdicts(task, margin)}


def test_several_seeds_are_compared_pair_by_pair_and_a_missing_one_is_named(tmp_path):
    for seed, (ticket, dense) in enumerate([(91.0, 90.0), (93.0, 91.0), (94.0, 91.0), (92.5, 91.0), (93.5, 91.0)]):
        search(tmp_path / f"seed_{seed}", seed, ticket, dense)
    write(tmp_path / "seed_5", [Run("round_00", 99.0)], 5, done=False)
    text = said(tmp_path)["imp", "dense"]
    assert text == (
        "better than the dense network by 2.0 points (95 % interval 1.0 to 3.0, 5 seeds); seed 5 is stopped"
    )


def test_one_seed_gives_no_interval_and_an_absent_control_is_said_with_its_command(tmp_path):
    folder = search(tmp_path / "one", 0, 91.0, 90.0)
    found = said(folder)
    assert "1.0 points above the dense network with one seed" in found["imp", "dense"]
    assert "no random mask with the same layer counts was trained" in found["imp", "shuffled_layers"]
    command = f"timm-tickets search {folder}/recipe.yaml --set output={folder} --set 'controls=[dense,shuffled_layers]'"
    assert f"add it with `{command}`, for every seed" in found["imp", "shuffled_layers"]


def test_the_same_seed_twice_is_one_seed(tmp_path):
    for name, top1 in (("a", 91.0), ("b", 93.0)):
        search(tmp_path / name, 0, top1, 90.0)
    text = said(tmp_path)["imp", "dense"]
    assert text.startswith("2.0 points above the dense network with one seed")
    assert "seed 0 stands in several folders and counts once" in text


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_random_mask_is_paired_within_its_transfer(tmp_path, seeds):
    for seed in range(seeds):
        ticket = ticket_of(seed)
        search(tmp_path / f"search_{seed}", seed, 95.0, 90.0, ticket=ticket)
        runs = [Run("shuffled_layers", 90.0 + seed, 0.5), Run("ticket", 92.0 + 1.5 * seed, 0.5), Run("dense", 93.0)]
        kind = f"transfer of ticket {ticket.fingerprint}"
        write(tmp_path / f"transfer_{seed}", runs, seed, kind=kind, ticket=ticket)
    text = said(tmp_path)["imp", "shuffled_layers"]
    if seeds == 1:
        assert text.startswith("2.0 points above a random mask with the same layer counts with one seed")
    else:  # differences 2, 2.5 and 3
        assert text.startswith("better than a random mask with the same layer counts by 2.5 points (95 % interval 1.3")


def test_a_ticket_of_the_pruner_random_counts_as_the_same_layer_counts_only_if_they_are(tmp_path):
    search(tmp_path / "imp", 0, 95.0, 90.0, ticket=ticket_of(0))
    switched = ["pruner.name=random"]
    write(tmp_path / "same", [Run("dense", 90.0), Run("round_00", 91.0, 0.5)], ticket=ticket_of(1), overrides=switched)
    found = said(tmp_path)
    assert found["imp", "shuffled_layers"].startswith("4.0 points above a random mask")
    assert ("imp", "random") not in found
    (tmp_path / "same" / "digits_imp.ticket").unlink()
    other = ticket_of(1)
    name = next(iter(other.masks))
    other.masks[name] = torch.ones_like(other.masks[name])
    other.save(tmp_path / "same" / "digits_imp.ticket")
    rows = json.loads((tmp_path / "same" / "result.json").read_text())["rows"]
    write_result(tmp_path / "same", rows, other.fingerprint, {})
    found = said(tmp_path)
    assert "no random mask with the same layer counts was trained" in found["imp", "shuffled_layers"]
    assert "whose layers keep other counts" in found["imp", "random"]


def test_folders_of_one_seed_count_once_wherever_their_scores_stand(tmp_path, monkeypatch):
    for name, seed, top1 in (("a", 0, 91.0), ("b", 0, 93.0), ("c", 1, 95.0)):
        search(tmp_path / name, seed, top1, 90.0)
    (task,) = tasks(read_all([tmp_path])[0])
    drawn = figures.trainings(task, "one")
    assert drawn is not None
    assert "imp at sparsity 0.5: 93.50 % (95 % interval 74.44 to 100.00, 2 seeds) for 2 epochs" in drawn.alt
    monkeypatch.setattr(figures, "drawn", lambda *args, **kwargs: None)
    (section,), *_ = composed([tmp_path], 0.5)
    assert section.tickets.rows[0][1:3] == ["2", "93.50"]


def test_whole_networks_that_begin_with_trained_weights_are_no_dense_network_of_the_others(tmp_path):
    """As of an entry of a leaderboard with `start: dense` whose search trains the whole network first."""
    for seed in range(2):
        dense = write(tmp_path / f"dense/seed_{seed}", [Run("round_00", 90.0)], seed, kind="training of dense")
        (dense / "round_00/model.safetensors").write_bytes(b"")
        more = [f"model.initial_checkpoint={dense}/round_00/model.safetensors"]
        search(tmp_path / f"imp/seed_{seed}", seed, 97.0, 98.0, overrides=more)
    (task,) = tasks(read_all([tmp_path])[0])
    assert task.dense == (1, {0: 90.0, 1: 90.0})


def test_a_whole_network_trained_under_a_penalty_is_no_dense_network(tmp_path):
    pytest.importorskip("torch_pruning")
    runs = [Run("round_00", 50.0, penalised=True), Run("round_01", 70.0, 0.5, round=1)]
    write(tmp_path / "a", runs, overrides=["pruner.name=tp_bn_scale", "pruner.rewind=0ep"])
    assert said(tmp_path)["tp_bn_scale", "dense"].startswith("no dense network was trained as long: add it")
    (task,) = tasks(read_all([tmp_path])[0])
    assert task.dense == (0, {})


@pytest.mark.parametrize("dense", ["beside", "alone"])
def test_tweaks_that_the_ticket_alone_had_are_said(tmp_path, dense):
    tweaked = ["retrain.tweaks=[label_smoothing]"]
    ours = [Run("dense", 90.0)] if dense == "beside" else []
    runs = [*ours, Run("shuffled_layers", 89.0, 0.5), Run("round_01", 91.0, 0.5, round=1)]
    write(tmp_path / "a", runs, overrides=tweaked)
    if dense == "alone":
        write(tmp_path / "b", [Run("round_00", 90.0)], kind="training of dense")
    found = said(tmp_path)
    clause = "; the ticket was trained with the tweaks label_smoothing, the control with none"
    assert found["imp", "dense"].endswith(clause)
    assert "tweaks" not in found["imp", "shuffled_layers"]


def test_every_control_of_a_search_has_its_sentence_and_is_no_ticket_itself(tmp_path):
    beside = [Run("dense", 94.0), Run("random_mask", 90.0, 0.5), Run("shuffled_layers", 91.0, 0.5)]
    write(tmp_path / "a", [*beside, Run("random_reinit", 92.0, 0.5), Run("round_01", 93.0, 0.5, round=1)])
    rounds = [Run("round_00", 94.0), Run("round_01", 92.5, 0.5, round=1)]
    for name in ("one_shot", "equal_rate_imp"):
        write(tmp_path / "a" / name, rounds, overrides=["pruner.prune_rate=0.5"])
    longer = [Run("round_00", 95.0, 0.5, epochs=3), Run("round_01", 95.0, 0.5, epochs=3, round=1)]
    gradual = ["pruner.name=gradual", "pruner.epochs=3", "training.epochs=1"]
    write(tmp_path / "a" / "equal_cost", longer, overrides=gradual)
    found = said(tmp_path)
    assert {label for label, _ in found} == {"imp"}
    assert {control: text.partition(" with one seed")[0] for (_, control), text in found.items()} == {
        "dense": "1.0 points below the dense network",
        "random_mask": "3.0 points above a random mask of the same size",
        "shuffled_layers": "2.0 points above a random mask with the same layer counts",
        "random_reinit": "1.0 points above the same mask over another random start",
        "one_shot": "0.5 points above one-shot magnitude pruning",
        "equal_rate_imp": "0.5 points above IMP at the same rate",
        "equal_cost": "2.0 points below gradual magnitude pruning for as many epochs as search and ticket together",
    }
    (task,) = tasks(read_all([tmp_path])[0])
    assert {one.label.partition(" (")[0] for one in task.series} == {
        *("imp", "imp, one_shot", "imp, equal_rate_imp", "gradual, equal_cost")
    }


def test_a_dense_network_trained_as_long_as_the_weights_is_a_control_of_its_own(tmp_path):
    pytest.importorskip("torch_pruning")
    rounds = [Run(f"round_{n:02d}", 90.0, 0.1 * n, round=n) for n in range(7)]
    runs = [Run("dense", 90.0), Run("equal_epochs", 92.0, epochs=7), *rounds]
    write(tmp_path / "a", runs, overrides=["pruner.name=tp_magnitude", "pruner.rounds=6"])
    found = said(tmp_path)
    assert "trained 7 times as long (7 and 1 epochs)" in found["tp_magnitude", "dense"]
    longer = "2.0 points below the dense network trained as long as the ticket's weights with one seed"
    assert found["tp_magnitude", "equal_epochs"].startswith(longer)
    why = "no random mask with the same layer counts was trained, and none can be: tp_magnitude prunes while it trains"
    assert found["tp_magnitude", "shuffled_layers"].startswith(why)


def test_masks_that_begin_as_a_ticket_of_trained_weights_does_are_compared_with_it(tmp_path):
    runs = [Run("dense", 90.0), Run("shuffled_layers", 91.0, 0.5), Run("random_reinit", 91.0, 0.5)]
    runs += [Run("round_00", 80.0), Run("round_01", 95.0, 0.5, round=1)]
    write(tmp_path / "a", runs, overrides=["pruner.rewind=2ep"])  # which no run reaches, so that its end is the start
    found = said(tmp_path)
    assert found["imp", "shuffled_layers"].startswith("4.0 points above a random mask with the same layer counts")
    assert "trained 2 times as long (2 and 1 epochs)" in found["imp", "random_reinit"]


def test_unequal_trainings_are_refused_as_a_comparison(tmp_path):
    write(tmp_path / "a", [Run("dense", 90.0, epochs=1), Run("round_01", 95.0, 0.5, epochs=7, round=1)])
    assert (
        "not a fair comparison with the dense network: trained 7 times as long (7 and 1 epochs)"
        in (said(tmp_path)["imp", "dense"])
    )


def test_a_rewind_point_that_no_run_reached_is_more_training(tmp_path):
    runs = [Run("dense", 90.0), Run("round_00", 80.0, 0.5), Run("round_01", 95.0, 0.5, round=1)]
    write(tmp_path / "a", runs, overrides=["pruner.rewind=2ep"])
    assert "trained 2 times as long (2 and 1 epochs)" in said(tmp_path)["imp", "dense"]


def test_weights_that_rounds_go_on_from_are_trained_as_long_as_all_of_them(tmp_path):
    pytest.importorskip("torch_pruning")
    rounds = [Run(f"round_{n:02d}", 90.0, 0.1 * n, round=n) for n in range(7)]
    switched = ["pruner.name=tp_magnitude", "pruner.rounds=6"]
    write(tmp_path / "a", [Run("dense", 90.0), *rounds], overrides=switched)
    assert "trained 7 times as long (7 and 1 epochs)" in said(tmp_path)["tp_magnitude", "dense"]


def test_a_ticket_trained_again_under_other_settings_is_a_line_of_its_own(tmp_path):
    ticket = ticket_of(0)
    search(tmp_path / "search", 0, 95.0, 90.0, ticket=ticket)
    runs = [Run("shuffled_layers", 90.0, 0.5), Run("ticket", 92.0, 0.5), Run("dense", 93.0)]
    kind = f"transfer of ticket {ticket.fingerprint}"
    for name, more in (("same", []), ("other", ["training.lr=0.5"])):
        write(tmp_path / name, runs, kind=kind, ticket=ticket, overrides=more)
    found = said(tmp_path)
    assert {label for label, _ in found} == {"imp", "ticket, transfer"}
    assert found["imp", "shuffled_layers"].startswith("2.0 points above")
    assert found["ticket, transfer", "dense"].startswith("1.0 points below the dense network")


def test_where_not_all_masks_have_room_each_two_tickets_have_a_pair_before_any_has_a_second(tmp_path, monkeypatch):
    for seed in range(3):
        for name, sparsity in (("magnitude", 0.5), ("imp", 0.5), ("snip", 0.25)):
            more = [f"pruner.name={name}", f"pruner.sparsity={sparsity}"]
            search(tmp_path / f"{name}{seed}", seed, 95.0, 90.0, ticket=ticket_of(seed, sparsity), overrides=more)
    monkeypatch.setattr(masks, "_MOST_PAIRS", 7)
    (task,) = tasks(read_all([tmp_path])[0])
    found, left = overlaps([one.experiments for one in task.series])
    names = [sorted(one.folder.name[:-1] for one in (pair.first, pair.second)) for pair in found]
    assert sorted(names[:4]) == [["imp", "imp"], ["imp", "magnitude"], ["magnitude", "magnitude"], ["snip", "snip"]]
    assert sorted(names[4:6]) == [["imp", "snip"], ["magnitude", "snip"]]  # of two sparsities
    assert (len(found), left) == (7, 11)
    drawn = figures.overlaps(task, found, "one")
    assert drawn is not None
    assert "imp & magnitude: 1.000 shared, 0.333 by chance" in drawn.alt
    assert "imp, two seeds: 0.3" in drawn.alt


def test_masks_are_compared_between_seeds_of_a_ticket_and_between_tickets_of_a_seed(tmp_path):
    for seed in (0, 1):
        search(tmp_path / f"a{seed}", seed, 95.0, 90.0, ticket=ticket_of(seed))
        more = ["pruner.sparsity=0.25"]
        search(tmp_path / f"b{seed}", seed, 95.0, 90.0, ticket=ticket_of(seed, 0.25), overrides=more)
    (task,) = tasks(read_all([tmp_path])[0])
    found, left = overlaps([one.experiments for one in task.series])
    told = {(one.first.folder.name, one.second.folder.name): (one.iou, one.by_chance) for one in found}
    assert (sorted(map(sorted, told)), left) == ([["a0", "a1"], ["a0", "b0"], ["a1", "b1"], ["b0", "b1"]], 0)
    by_names = {tuple(sorted(names)): numbers for names, numbers in told.items()}
    assert by_names["a0", "b0"] == pytest.approx((0.5 / 0.75, 0.375 / 0.875), rel=1e-3)  # one within the other
    assert by_names["a0", "a1"] == pytest.approx((1 / 3, 1 / 3), abs=0.02)  # as chance would have it


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"overrides": ["training.lr=0.5"]}, "training.lr 0.05 and 0.5"),
        ({"images": {**IMAGES, "train": {"": [9, "c"]}}}, "other images were trained or validated on"),
        ({"overrides": ["training.batch_size=32"]}, "training.batch_size 64 and 32"),
    ],
)
def test_a_control_of_another_folder_is_compared_only_if_all_but_the_mask_is_the_same(tmp_path, more, why):
    write(tmp_path / "imp", [Run("round_01", 95.0, 0.5, round=1)])
    dense = {"kind": "training of dense"}
    write(tmp_path / "same", [Run("round_00", 94.0)], **dense)
    assert said(tmp_path)["imp", "dense"].startswith("1.0 points above the dense network")
    (tmp_path / "same").rename(tmp_path.with_name(f"{tmp_path.name}_aside"))
    write(tmp_path / "other", [Run("round_00", 94.0)], **dense, **more)
    assert f"not a fair comparison with the dense network: {why}" in said(tmp_path)["imp", "dense"]


def test_other_test_images_are_another_task(tmp_path):
    search(tmp_path / "a", 0, 91.0, 90.0)
    search(tmp_path / "b", 1, 91.0, 90.0, images={**IMAGES, "test": {"": [360, "c"]}})
    search(tmp_path / "c", 2, 91.0, 90.0, overrides=["data.img_size=40"])
    found, _ = read_all([tmp_path])
    made = tasks(found)
    assert [[one.seed for one in task.experiments] for task in made] == [[0], [1], [2]]
    assert [task.title for task in made] == [f"test_resnet on digits, test set {n}" for n in (1, 2, 3)]


@pytest.fixture
def every_state(tmp_path):
    """A search that has ended, one that runs, one that was killed, and one that was stopped."""
    search(tmp_path / "finished", 0, 91.0, 90.0, logs=["round_00", "round_01"])
    for seed, name in enumerate(("running", "killed", "stopped"), 1):
        write(tmp_path / name, [Run("round_00", 90.0)], seed, done=False, logs=["round_00", "round_01"])
    (tmp_path / "killed" / ".timm-tickets-running.json").write_text('{"pid": 1, "host": "a", "since": "2026-01-01"}')
    holder = os.open(tmp_path / "running", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    yield tmp_path
    os.close(holder)


def test_each_folder_is_named_as_what_it_is(every_state):
    found, left = read_all([every_state])
    assert left == []
    assert {one.folder.name: one.state for one in found} == {
        name: name for name in ("finished", "running", "killed", "stopped")
    }
    assert [held(every_state / name) for name in ("running", "killed")] == [True, False]
    assert {one.folder.name: len(one.trained) for one in found} == {
        "finished": 2,
        "running": 1,
        "killed": 1,
        "stopped": 1,
    }
    text = said(every_state)["imp", "dense"]
    assert text.endswith("seed 1 is running, seed 2 is killed, seed 3 is stopped")


class Page(HTMLParser):
    """What a page asks for, its texts, and its figures."""

    def __init__(self, text):
        super().__init__()
        self.asked, self.figures, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.asked += [
            value for name, value in attrs.items() if name in ("src", "href", "xlink:href", "data", "srcset")
        ]
        if attrs.get("role") == "img":
            self.figures.append(attrs["aria-label"])

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_that_asks_for_nothing_and_says_every_figure_in_numbers(every_state):
    (every_state / "report").mkdir()
    (every_state / "report" / "report.md").write_text(
        "<!-- timm-tickets report -->\nof yesterday"
    )  # ours, so it may go
    files, left = report([every_state], every_state / "report")
    assert left == []
    assert "of yesterday" not in files[1].read_text()
    html, plain = (file.read_text() for file in files[:2])
    page = Page(html)
    assert "4 run folders: 1 finished, 1 running, 1 killed, 1 stopped" in page.text
    assert "round_01 at epoch 1, validation 62.50 %" in page.text
    assert all(one.startswith("#") for one in page.asked)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<img", html)
    assert '<td data-of="verdict"' in html  # on a phone each cell says what it is
    assert page.tags.count("figure") == len(page.figures) == page.tags.count("svg") > 3
    assert all(re.search(r"\d", one) for one in page.figures)
    assert "imp: 91.00 % (1 seed, no interval) at sparsity 0.5" in page.figures[0]
    assert "currentColor" in html or "var(--ink)" in html  # legible on dark: nothing is drawn in a fixed black
    assert "#101112" not in html
    pictures = re.findall(r"\]\((\d_\w+\.svg)\)", plain)
    assert len(pictures) == len(page.figures)
    assert all((every_state / "report" / name).read_bytes().startswith(b"<?xml") for name in pictures)


def test_tickets_of_one_sparsity_stand_side_by_side_in_the_middle(tmp_path):
    search(tmp_path / "imp", 0, 91.0, 90.0)
    search(tmp_path / "magnitude", 0, 81.0, 90.0, overrides=["pruner.name=magnitude"])
    (task,) = tasks(read_all([tmp_path])[0])
    figure = figures.accuracy(task, "one")
    assert figure is not None
    points = re.findall(r'<g clip-path="[^"]*">\s*<use [^>]*?x="([\d.]+)"', figure.svg.decode())
    places = [float(x) / (5.4 * 72) for x in points]  # of the picture's width
    assert len(places) == 4  # each with its seed and its mean
    assert max(places) - min(places) < 0.1
    assert all(0.3 < place < 0.7 for place in places)


def test_somebody_elses_report_is_not_written_over(tmp_path):
    search(tmp_path / "a", 0, 91.0, 90.0)
    (tmp_path / "report.md").write_text("# My own notes\n")
    out = call("report", tmp_path / "a", "--output", tmp_path)
    assert out.exit_code == 2
    assert "report.md was not written by this command" in out.stderr
    assert (tmp_path / "report.md").read_text() == "# My own notes\n"


def damage_name(folder):
    write_result(folder, [Run("../../<script>alert(1)</script>", 90.0).record(None)], "0", {})


def damage_score(folder):
    rows = [Run("round_01", 1e9, 0.5).record(None), Run("round_00", float("nan")).record(None)]
    write_result(folder, rows, "0", {})


def damage_seal(folder):
    (folder / "result.json").write_text((folder / "result.json").read_text().replace("91.0", "99.0"))


def damage_size(folder):
    with (folder / "result.json").open("ab") as file:
        file.truncate(1 << 25)


def damage_log(folder):
    (folder / "round_00" / "epochs.csv").write_text(LOG.replace("val_top1", "x") + "1," * 9 + "\n")


def damage_ticket(folder):
    (folder / "digits_imp.ticket").write_bytes(b"PK")


def test_damaged_records_are_named_and_left_out_and_names_are_shown_and_not_obeyed(tmp_path):
    name = "<img src=x onerror=alert(1)> | `a` $x^2$ [b](javascript:1)"
    damages = [damage_name, damage_score, damage_seal, damage_size, damage_log, damage_ticket]
    for seed, damage in enumerate(damages):
        folder = tmp_path / name / damage.__name__
        damage(search(folder, seed, 91.0, 90.0, logs=["round_00"], overrides=["data.dataset=hfds/<b>&"]))
    files, left = report([tmp_path], tmp_path / "report")
    for damage in damages:
        assert any(f"{tmp_path / name / damage.__name__}" in one and "left out" in one for one in left), (damage, left)
    html, plain = (file.read_text() for file in files[:2])
    assert not re.search("<script|<img|<b>|99.00", html)
    assert "6 run folders" in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "](javascript" not in plain
    assert markdown(name) in plain


@pytest.fixture
def undrawn(monkeypatch):
    """A report's words alone."""
    monkeypatch.setattr(figures, "drawn", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_ticket_of_the_first_seed_leaves_the_others_theirs(tmp_path):
    for seed in range(2):
        search(tmp_path / f"seed_{seed}", seed, 91.0, 90.0)
    damage_ticket(tmp_path / "seed_0")
    (section,), _, left = composed([tmp_path], 0.5)
    assert [one.split(" its ticket is left out")[0] for one in left] == [f"{tmp_path}/seed_0:"]
    size = (tmp_path / "seed_1/digits_imp.ticket").stat().st_size
    assert section.tickets.rows[0][6] == f"{size:,} bytes"


def test_what_cannot_be_listed_is_named_and_the_rest_reported(tmp_path, monkeypatch):
    search(tmp_path / "a", 0, 91.0, 90.0)
    (tmp_path / "closed").mkdir()
    whole = type(tmp_path).iterdir

    def closed(folder):
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return whole(folder)

    monkeypatch.setattr(type(tmp_path), "iterdir", closed)
    found, left = read_all([tmp_path])
    assert [one.folder.name for one in found] == ["a"]
    assert left == [f"{tmp_path}/closed: what is in it is left out: [Errno 13] Permission denied"]


def test_seeds_in_the_folder_of_an_earlier_search_and_a_leaderboard_below_are_found(tmp_path):
    search(tmp_path / "run", 42, 91.0, 90.0)
    search(tmp_path / "run/seed_0", 0, 92.0, 90.0)  # as `--seeds 0,1` leaves them when it comes later
    cell = tmp_path / "output/board/imp/0.5/seed_1"
    search(cell, 1, 93.0, 90.0)
    search(cell / "one_shot", 1, 90.0, 90.0, overrides=["pruner.prune_rate=0.5"])
    search(tmp_path / "run/round_00/seed_7", 7, 94.0, 90.0)  # nothing of ours puts one there
    found, left = read_all([tmp_path])
    assert left == []
    assert {one.folder for one in found} == {tmp_path / "run", tmp_path / "run/seed_0", cell, cell / "one_shot"}


def test_images_that_nobody_knows_are_named(tmp_path):
    folder = search(tmp_path / "a", 0, 91.0, 90.0)
    (folder / "images.json").unlink()
    (one,), _ = read_all([tmp_path])
    assert one.notes == [f"{folder}: images.json is missing, so it is compared with no other folder"]


@pytest.mark.usefixtures("undrawn")
def test_a_table_that_is_cut_says_so(tmp_path, monkeypatch):
    for seed in range(2):
        search(tmp_path / f"{seed}", seed, 91.0 + seed, 90.0)
    monkeypatch.setattr(page, "_ROWS", 1)
    (section,), files, left = composed([tmp_path], 0.5)
    assert len(section.verdicts.rows) == 1
    assert "run folders: the first 1 of 2 are shown" in left
    assert "test_resnet on digits: verdicts: the first 1 of 2 are shown" in left
    assert "and 1 more" in files["report.html"].decode()  # of what is left out
    assert "2 run folders: 2 finished" in files["report.html"].decode()


@pytest.mark.parametrize("margin", [-1, float("nan"), 101])
def test_a_margin_that_is_none_is_refused(tmp_path, margin):
    with pytest.raises(tt.SettingError, match=r"margin: .* is not valid; give points of accuracy, from 0 to 100"):
        tt.report(search(tmp_path / "a", 0, 91.0, 90.0), margin=margin)


def test_a_damaged_recipe_leaves_its_folder_out_and_the_others_in(tmp_path):
    search(tmp_path / "a", 0, 91.0, 90.0)
    for name, text in (("b", "model: [\n"), ("c", "x: " + "a" * (1 << 24))):
        search(tmp_path / name, 1, 91.0, 90.0)
        (tmp_path / name / "recipe.yaml").write_text(text)
    found, left = read_all([tmp_path])
    assert [one.folder.name for one in found] == ["a"]
    assert [one.split(" is left out")[0] for one in left] == [str(tmp_path / name) for name in ("b", "c")]


def test_a_folder_without_an_experiment_is_refused(tmp_path):
    out = call("report", tmp_path, "--output", tmp_path / "report")
    assert out.exit_code == 2
    assert "holds no experiment" in out.stderr
    assert not (tmp_path / "report").exists()


def test_a_real_search_is_reported(tmp_path):
    small = ["training.epochs=1", "data.val_fraction=0.6", "data.img_size=16", "controls=[]"]
    small.append(f"output={tmp_path / 'run'}")
    result = searched("digits_magnitude", small)
    out = call("report", tmp_path / "run", "--output", tmp_path / "report")
    assert out.exit_code == 0, out.output
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert "1 run folder: 1 finished" in page.text
    top1 = result.rows[-1]["metrics"]["test_top1"]
    assert f"{top1:.2f} % (1 seed, no interval)" in page.figures[0]
    assert f"{(result.folder / 'digits_magnitude.ticket').stat().st_size:,} bytes" in page.text
    assert "No dense network was trained as long: add it with" in page.text
    assert "373,658" in page.text  # parameters of test_resnet with ten classes
