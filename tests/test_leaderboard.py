"""Leaderboards: what a file asks for, who carries out what, and what can be told apart at the end."""

import csv
import fcntl
import math
import os
import re
import warnings

import numpy as np
import pytest
from rich.console import Console
from support.commands import call
from test_reports import Page, Run, ticket_of, write

import timm_tickets as tt
from timm_tickets.config.leaderboard import load_leaderboard
from timm_tickets.config.recipe import recipes_folder
from timm_tickets.experiments.run_folder import claim_folder, experiment_of, write_result
from timm_tickets.leaderboards import work
from timm_tickets.reports.page import report
from timm_tickets.reports.ranking import ranking_words, standings
from timm_tickets.reports.ranks import logit, ranks, told_apart
from timm_tickets.reports.read import read_all
from timm_tickets.reports.tasks import tasks

BOARD = """
extends: digits_imp
training: {epochs: 1}
data: {img_size: 16, val_fraction: 0.7}
controls: [dense]
seeds: [0, 1]
sparsities: [0.5]
entries:
  magnitude: {pruner: {name: magnitude}}
  imp in one shot: {pruner: {name: imp, prune_rate: "${pruner.sparsity}"}}
"""
JACKPOT = BOARD + "  jackpot: {pruner: {name: jackpot}, start: dense}\n"


@pytest.fixture
def board(tmp_path):
    """Writes a leaderboard's file."""

    def written(text=BOARD):
        (tmp_path / "board.yaml").write_text(text)
        return tmp_path / "board.yaml"

    return written


# The file


def test_cells_are_seed_by_seed_the_dense_network_first_and_whose_weights_are_needed_before(board, tmp_path):
    cells = load_leaderboard(board(JACKPOT), ["sparsities=[0.5,0.75]"], tmp_path / "out").cells
    assert [cell.name for cell in cells[:8]] == [
        "dense, seed 0",
        *(f"{label} at {at}, seed 0" for label in ("magnitude", "imp in one shot", "jackpot") for at in (0.5, 0.75)),
        "dense, seed 1",
    ]
    assert [cell.folder.relative_to(tmp_path / "out").as_posix() for cell in cells[:4]] == [
        *("dense/seed_0", "magnitude/0.5/seed_0", "magnitude/0.75/seed_0", "imp_in_one_shot/0.5/seed_0")
    ]
    shots, jackpots = cells[3:5], cells[5:7]
    assert [cell.recipe.pruner["prune_rate"] for cell in shots] == [0.5, 0.75]  # refers to the sparsity
    assert {cell.after for cell in jackpots} == {cells[0]}
    weights = cells[0].folder / "round_00" / "model.safetensors"
    assert {cell.recipe.model.initial_checkpoint for cell in jackpots} == {weights}
    assert {cell.recipe.training.epochs for cell in cells} == {1}


def test_what_is_set_for_a_call_holds_over_every_entry(board):
    text = BOARD + "  longer: {pruner: {name: magnitude}, training: {epochs: 9}, retrain: {epochs: 3}}\n"
    assert [cell.recipe.ticket_epochs for cell in load_leaderboard(board(text)).cells[:4]] == [1, 1, 1, 3]
    cells = load_leaderboard(board(text), ["training.epochs=5", "retrain.epochs=2", "seeds=[7]"]).cells
    assert {(cell.recipe.training.epochs, cell.recipe.ticket_epochs, cell.recipe.seed) for cell in cells} == {(5, 2, 7)}


@pytest.mark.parametrize(
    ("more", "overrides", "said"),
    [
        ("learning_rate: 1\n", [], "'learning_rate' is unknown"),
        ("  a: {pruner: {name: imp}, lr: 1}\n", [], "entries.a: 'lr' is unknown"),
        ("  a: {pruner: {name: impp}}\n", [], "entries.a: pruner: 'impp' is unknown; did you mean 'imp'"),
        ("  a: {pruner: {name: imp, prune_rte: 1}}\n", [], "'prune_rte' is unknown"),
        ("  a: {pruner: {prune_rate: 0.5}}\n", [], "entries.a.pruner.name: is not set"),
        ("  a: {pruner: {name: imp, sparsity: 0.5}}\n", [], "entries.a.pruner.sparsity: is the leaderboard's"),
        ("  dense: {pruner: {name: imp}}\n", [], "'dense' has the folder of the dense network"),
        ("  imp_in_one_shot: {pruner: {name: imp}}\n", [], "has the folder of imp in one shot"),
        ("  ../x: {pruner: {name: imp}}\n", [], "a label has up to 40 letters"),
        ("  a: {pruner: {name: imp}, start: sparse}\n", [], "entries.a.start: 'sparse' is not valid"),
        ("", ["seeds=[]"], "seeds"),
        ("", ["seeds=[1,1]"], "seeds: 1, 1 has one twice"),
        ("", ["sparsities=[0,0.5]"], "0 is the dense network"),
        ("", ["sparsities=[50]"], "50 % is 0.5"),
        ("", ["seed=3"], "seed is the leaderboard's; set seeds instead"),
        ("", ["pruner.sparsity=0.3"], "set sparsities instead"),
        ("  a: {pruner: {name: edge_popup}, controls: [random_mask]}\n", [], "entries.a: controls: random_mask cannot"),
        ("", ["pruner.name=imp"], "pruner.name is the leaderboard's; set entries instead"),
    ],
)
def test_what_is_wrong_in_a_leaderboard_is_named_before_anything_is_trained(board, tmp_path, more, overrides, said):
    words = [word for override in overrides for word in ("--set", override)]
    out = call("leaderboard", board(BOARD + more), *words, "--output", tmp_path / "out")
    assert out.exit_code == 2
    assert said in out.stderr
    assert not (tmp_path / "out").exists()


def test_a_leaderboard_and_a_recipe_taken_for_each_other_are_named():
    assert "`timm-tickets leaderboard leaderboard_digits` searches it" in call("search", "leaderboard_digits").stderr
    path = str(recipes_folder() / "digits_imp.yaml")
    assert "is no leaderboard: it has no seeds, sparsities, entries" in call("leaderboard", path).stderr
    assert "did you mean 'leaderboard_digits'" in call("leaderboard", "leaderboard_digit").stderr
    listed = call("recipe", "--list").stdout
    assert re.search(r"^leaderboard_digits: .*demonstration", listed, re.MULTILINE)
    assert "leaderboard_digits" not in tt.list_recipes()


@pytest.mark.parametrize("name", tt.list_leaderboards())
def test_every_shipped_leaderboard_resolves(name):
    found = load_leaderboard(name)
    assert found.folder.name == name
    assert len(found.lines.sparsities) == 3
    assert all(cell.recipe.source for cell in found.cells)


def test_the_digits_leaderboard_has_every_pruner_of_single_weights():
    found = load_leaderboard("leaderboard_digits")
    whole = {name for name in tt.list_pruners() if name.startswith("tp_")}  # torch-pruning's criteria on channels
    assert {entry.pruner["name"] for entry in found.entries.values()} == {*tt.list_pruners()} - whole
    assert len(found.lines.seeds) == 5


# Who carries out what


def finish(recipe, console=None):
    """What a search or training leaves, without training."""
    kind = "training of dense" if recipe.label == "dense" else "search"
    recipe.folder.mkdir(parents=True, exist_ok=True)
    claim_folder(recipe.folder, recipe, kind)
    ticket = ticket_of(recipe.seed)
    ticket.save(recipe.folder / f"{recipe.name}.ticket")
    rows = [Run("round_00", 90.0 + recipe.seed, 0.5).record(experiment_of(recipe.folder))]
    write_result(recipe.folder, rows, ticket.fingerprint, {})


@pytest.fixture
def carried_out(monkeypatch):
    """Carries nothing out, but says of each cell what would have been: its label and seed."""
    found = []

    def one(recipe, console):
        found.append((recipe.label, recipe.seed))
        finish(recipe)

    monkeypatch.setattr(work, "search", one)
    monkeypatch.setattr(work, "train", one)
    monkeypatch.setattr(work, "report", lambda folders, output: ([output / "report.html"], []))
    return found


ALL = [(label, seed) for seed in (0, 1) for label in ("dense", "magnitude", "imp in one shot")]


def test_what_is_finished_is_not_carried_out_again_and_what_is_damaged_is(carried_out, board, tmp_path, capsys):
    done = tt.leaderboard(board(), output=tmp_path / "out")
    assert carried_out == ALL
    rows = list(csv.DictReader((tmp_path / "out" / "leaderboard.csv").open()))
    assert [(row["entry"], int(row["seed"])) for row in rows] == ALL
    assert [row["test_top1"] for row in done.rows] == [90.0] * 3 + [91.0] * 3
    assert [float(row["test_top1"]) for row in rows] == [90.0] * 3 + [91.0] * 3
    assert "6 of 6: imp in one shot at 0.5, seed 1: test 91.00 %" in capsys.readouterr().out
    tt.leaderboard(board(), output=tmp_path / "out")
    assert carried_out == ALL
    assert "6 experiments, 6 of them finished before" in capsys.readouterr().out
    (tmp_path / "out/magnitude/0.5/seed_1/magnitude.ticket").write_bytes(b"PK")
    with pytest.warns(UserWarning, match="made again"):
        tt.leaderboard(board(), output=tmp_path / "out")
    assert carried_out == [*ALL, ("magnitude", 1)]
    tt.leaderboard(board(), ["seeds=[0,1,2]"], output=tmp_path / "out")
    assert carried_out[-3:] == [(label, 2) for label in ("dense", "magnitude", "imp in one shot")]


def test_other_settings_in_the_same_folder_are_refused_before_anything_is_carried_out(carried_out, board, tmp_path):
    tt.leaderboard(board(), ["seeds=[1]"], output=tmp_path / "out")
    count = len(carried_out)
    with pytest.raises(tt.SettingError, match=r"training.lr: 0.05 there, 0.1 now(.|\n)*choose another --output"):
        tt.leaderboard(board(), ["training.lr=0.1"], output=tmp_path / "out")
    assert len(carried_out) == count


@pytest.mark.filterwarnings("always:it is slow")
@pytest.mark.parametrize("fails", ["magnitude", "dense"])
def test_what_fails_is_named_the_others_go_on_and_the_same_command_tries_again(
    carried_out, monkeypatch, board, tmp_path, fails
):
    whole = work.search

    def failing(recipe, console):
        if (recipe.label, recipe.seed) == (fails, 0):
            raise tt.TrainingError("the loss is nan")
        warnings.warn("it is slow", stacklevel=1)
        whole(recipe, console)

    for name in ("search", "train"):
        monkeypatch.setattr(work, name, failing)
    out = call("leaderboard", board(JACKPOT), "--output", tmp_path / "out")
    assert out.exit_code == 2
    left = {(fails, 0)} | ({("jackpot", 0)} if fails == "dense" else set())
    assert "warning: imp in one shot at 0.5, seed 1: it is slow" in out.stderr
    assert set(carried_out) == {*ALL, ("jackpot", 0), ("jackpot", 1)} - left
    assert f"{len(left)} of 8 experiments have failed" in out.stderr
    assert "seed 0: the loss is nan" in out.stderr
    assert ("starts from the weights of dense, seed 0, which has failed" in out.stderr) == (fails == "dense")
    assert "report.html" in out.stdout  # of all that is there
    for name in ("search", "train"):
        monkeypatch.setattr(work, name, whole)
    assert call("leaderboard", board(JACKPOT), "--output", tmp_path / "out").exit_code == 0
    assert len(carried_out) == 8


def test_what_another_command_holds_is_left_to_it_and_waited_for(carried_out, monkeypatch, board, tmp_path):
    """The dense network of seed 0 is another's: the jackpot that starts from it waits, and all else goes on."""
    recipe = load_leaderboard(board(JACKPOT), output=tmp_path / "out").cells[0].recipe
    recipe.folder.mkdir(parents=True)
    holder = os.open(recipe.folder, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    waited = []

    def sleep(seconds):  # in which the other one ends
        waited.append([*carried_out])
        if len(waited) == 2:
            finish(recipe)
            os.close(holder)

    monkeypatch.setattr(work.time, "sleep", sleep)
    tt.leaderboard(board(JACKPOT), output=tmp_path / "out")
    before = [one for one in [*ALL, ("jackpot", 1)] if one != ("dense", 0)]
    assert [sorted(one) for one in waited] == [sorted(before)] * 2
    assert carried_out == [*waited[0], ("jackpot", 0)]


def test_one_that_another_takes_first_is_looked_for_again(carried_out, monkeypatch, board, tmp_path):
    whole = work.search

    def late(recipe, console):
        monkeypatch.setattr(work, "train", whole)
        raise work.FolderInUse("in use")

    monkeypatch.setattr(work, "train", late)
    tt.leaderboard(board(), output=tmp_path / "out")
    assert carried_out == ALL


def test_a_leaderboard_is_searched_and_reported(board, tmp_path):
    done = tt.leaderboard(board(), output=tmp_path / "out", console=Console(quiet=True))
    assert [(row["entry"], row["seed"]) for row in done.rows] == ALL
    dense, magnitude, shot = done.rows[:3]
    assert (dense["sparsity_reached"], magnitude["sparsity_reached"]) == (0, pytest.approx(0.5, abs=1e-3))
    assert shot["steps"] == 2 * dense["steps"] == 2 * magnitude["steps"]
    text = done.page.with_suffix(".md").read_text()
    assert "6 run folders: 6 finished" in text
    assert re.search(r"\| imp in one shot \| [\d.]+ \| [\d.to ]+ \| 2 \|", text)  # in dense trainings
    assert "| imp in one shot at 0.5 |" in text


# What can be told apart


@pytest.mark.parametrize(("distance", "apart"), [(1.6, False), (1.7, True), (-1.7, True)])
def test_the_range_test_is_that_of_the_book(distance, apart):
    """What is left of each score without its row and column has squares of 12/9 and 4 degrees of freedom, so a mean of
    3 has the error 1/3; Tukey's table has 5.040 for 3 rows and 4 degrees at .05: they differ from 1.68 on."""
    rows = [[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [distance, distance + 1, distance + 2]]
    found = told_apart(np.array(rows))
    assert found.tolist() == [[False, False, apart], [False, False, apart], [apart, apart, False]]


def test_ranks_are_every_place_that_the_seeds_leave_open():
    scores = {
        "a": {0: 99.0, 1: 98.0, 2: 99.0},
        "b": {0: 98.0, 1: 99.0, 2: 98.0, 3: 50.0},
        "c": {0: 80.0, 1: 81.0, 2: 83.0},
        "d": {0: 50.0, 1: 49.0, 2: 52.0},
        "once": {0: 99.0},
    }
    found, seeds = ranks(scores, 1000)
    assert {name: str(rank) for name, rank in found.items()} == {"a": "1 to 2", "b": "1 to 2", "c": "3", "d": "4"}
    assert seeds == [0, 1, 2]  # what b alone has is left out, and so is what has fewer than half of the seeds
    assert ranks({"a": {0: 99.0}, "b": {0: 50.0}}, 1000) == ({}, [])
    same = {name: dict.fromkeys(range(3), score) for name, score in (("a", 99.0), ("b", 50.0))}
    assert {str(rank) for rank in ranks(same, 1000)[0].values()} == {"1 to 2"}  # no spread gives no interval


def test_the_odds_of_being_right_are_finite_without_an_error():
    assert logit(100.0, 360) == pytest.approx(math.log(360.5 / 0.5))
    assert logit(50.0, 360) == 0


@pytest.fixture
def made_up(tmp_path):
    """Two tickets that cannot be told apart, one far behind, one with a seed only, of five seeds."""
    for seed in range(5):
        dense = {"kind": "training of dense", "overrides": ["label=dense"]}
        write(tmp_path / f"dense/seed_{seed}", [Run("round_00", 97.0 + seed % 2)], seed, **dense)
        for label, top1 in (
            ("one", 96.0 + seed % 3),
            ("$x$ <b>", 97.0 - seed % 3),
            ("far", 60.0 + seed),
            ("single", 99.0),
        ):
            if label != "single" or seed == 0:
                more = [f"label={label}", f"pruner.prune_rate=0.{1 + len(label)}"]
                runs = [Run("round_00", 97.0 + seed % 2), Run("round_01", top1, 0.5, round=1)]
                runs[:0] = [Run("shuffled_layers", 50.0 + seed % 2, 0.5)] * (label == "far")
                write(tmp_path / f"{label[0]}_/{seed}", runs, seed, overrides=more, ticket=ticket_of(seed))
    return tmp_path


def test_a_ranking_says_what_was_not_trained_as_most_are(tmp_path):
    entries = {"imp": [], "colt": [], "snip": ["training.lr=0.5"], "tweaked": ["retrain.tweaks=[label_smoothing]"]}
    entries["gradual"] = ["training.epochs=7"]
    for number, (name, more) in enumerate(entries.items()):
        for seed in range(2 + (name == "imp")):
            epochs = 7 if name == "gradual" else 1
            runs = [Run("dense", 95.0 + seed, epochs=epochs), Run("round_01", 90.0 - number * seed, 0.5, epochs, 1)]
            pruner = f"pruner.name={'imp' if name == 'tweaked' else name}"
            write(tmp_path / name / f"{seed}", runs, seed, overrides=[pruner, f"label={name}", *more])
    (task,) = tasks(read_all([tmp_path])[0])
    (said,) = ranking_words(standings(task))
    assert said.startswith("Sparsity 0.5, by the 2 seeds that all have: ")
    note = said.partition(" Trained otherwise than most, so its place is no fair comparison: ")[2]
    assert sorted(note.removesuffix(".").split("; ")) == [
        "gradual (weights trained for 7 epochs, not 1)",
        "snip (training.lr 0.5 and 0.05)",
        "tweaked (other tweaks)",
    ]


def test_tickets_without_two_seeds_in_common_are_not_told_apart(tmp_path):
    for name, seeds in (("imp", (0, 1)), ("magnitude", (2, 3))):
        for seed in seeds:
            runs = [Run("round_00", 90.0 + seed, 0.5)]
            write(tmp_path / name / f"{seed}", runs, seed, overrides=[f"pruner.name={name}"])
    (task,) = tasks(read_all([tmp_path])[0])
    words = "Sparsity 0.5: there are no two seeds that all have, so nothing is told apart."
    assert ranking_words(standings(task)) == [words]


def test_the_page_ranks_what_can_be_told_apart_and_draws_it(made_up):
    files, _ = report([made_up], made_up / "report")
    lines = (line.split("|")[1:-1] for line in files[1].read_text().splitlines())
    rows = {cells[2].strip(): [cell.strip() for cell in cells] for cells in lines if len(cells) == 9}
    assert {label: cells[1] for label, cells in rows.items() if cells[0] == "0.5"} == {
        "dense": "1 to 3",
        "one": "1 to 3",
        r"\$x\$ \<b\>": "1 to 3",
        "far": "4",
        "single": "too few seeds",
    }
    assert rows["dense"][3:] == ["97.40", "96.72 to 98.08", "1", "", "", ""]
    assert rows["far"][3:] == ["62.00", "60.04 to 63.96", "2", "worse by 35.4", "better by 11.6", ""]
    assert rows["one"][6] == "unclear: 0.6 below"  # -1, -1, 1, -2 and 0 points
    assert rows["single"][3:7] == ["99.00", "none", "2", "+2.0 with one seed"]
    page = Page(files[0].read_text())
    assert (
        "Sparsity 0.5, 5 seeds: the best may be any of dense, one, $x$ <b>; behind it beyond noise: far." in page.text
    )
    assert page.figures[0].startswith("Ranking: test_resnet on digits. at sparsity 0.5: ")
    assert "far 62.00 % (95 % interval 60.04 to 63.96, 5 seeds) rank 4" in page.figures[0]
    versions = "timm-tickets [\\d.]+, timm [\\d.]+, torch "
    assert re.search(
        f"test_resnet on digits, 360 test images, 20[\\d-]+; {versions}",
        (files[0].parent / "1_ranking.svg").read_text(),
    )
    assert {"1_ranking.svg", "1_ranking.png"} <= {file.name for file in files}
