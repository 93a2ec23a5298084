"""The same search for several seeds: each is what it would be by itself, however many processes share them."""

import csv
import json
import signal
import statistics

import pytest
from rich.console import Console
from support.commands import IMP, call, running, searched
from support.run_folders import leftovers, same

import timm_tickets as tt

SEEDS = [0, 1]


def rows(folder):
    return list(csv.DictReader((folder / "seeds.csv").open()))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Both seeds by one process."""
    folder = tmp_path_factory.mktemp("one")
    searched(folder, IMP, 1, seeds=SEEDS)
    return folder


def test_each_seed_is_what_a_search_with_it_gives(one, tmp_path):
    searched(tmp_path, [*IMP, "seed=1"], 1)
    same(one / "seed_1", tmp_path)
    files = [sorted(str(path.relative_to(at)) for path in at.rglob("*")) for at in (one / "seed_1", tmp_path)]
    assert files[0] == files[1]
    tickets = [tt.load_ticket(one / f"seed_{seed}" / "digits_imp.ticket").fingerprint for seed in SEEDS]
    assert tickets[0] != tickets[1]


def test_the_summary_has_mean_and_spread(one):
    *each, mean, std = rows(one)
    results = [json.loads((one / f"seed_{seed}" / "result.json").read_text())["rows"] for seed in SEEDS]
    found = [result[-1]["metrics"]["test_top1"] for result in results]
    dense = [result[0]["metrics"]["test_top1"] for result in results]  # IMP's first round
    assert [int(row["seed"]) for row in each] == SEEDS
    for name, values in (("test_top1", found), ("dense_test_top1", dense)):
        assert [float(row[name]) for row in each] == values
        assert float(mean[name]) == pytest.approx(statistics.mean(values))
        assert float(std[name]) == pytest.approx(statistics.stdev(values))
    assert (mean["seed"], std["seed"]) == ("mean", "std")


@pytest.mark.slow  # tests/test_parallel.py kills one of two in the continuous run
def test_one_of_two_processes_is_killed_and_the_same_command_continues_to_the_same_tickets(one, tmp_path):
    done = searched(tmp_path, IMP, 2, seeds=SEEDS, moment=60, of=1, check=False)
    assert done.returncode != 0
    assert not running(tmp_path)
    assert not (tmp_path / "seeds.csv").exists()
    told = [json.loads(line) for line in searched(tmp_path, IMP, 2, seeds=SEEDS).stdout.splitlines()]
    for seed in SEEDS:
        same(tmp_path / f"seed_{seed}", one / f"seed_{seed}")
    assert rows(tmp_path) == rows(one)
    assert not leftovers(tmp_path)
    first, other = sorted((process["said"] for process in told), key=len, reverse=True)
    assert "seed 0, 1 of 2" in first
    assert "std" in first
    assert other == ""  # lines of several processes would be mixed


@pytest.mark.slow
def test_a_restart_clears_every_seed_before_the_first_is_searched(monkeypatch, tmp_path):
    recipe = tt.load_recipe("digits_magnitude", [*IMP[2:], "pruner.sparsity=0.8", "controls=[]"])
    folder = tmp_path / "runs #3: a"  # what YAML would read otherwise
    recipe = recipe.model_copy(update={"output": folder})
    first = tt.search_seeds(recipe, SEEDS, console=Console(quiet=True))
    assert [one.folder for one in first] == [folder / "seed_0", folder / "seed_1"]
    assert first[0].ticket.metadata["pruner"]["seed"] == 0
    assert first[1].ticket.metadata["pruner"]["seed"] == 1
    assert len(rows(folder)) == 4

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("timm_tickets.experiments.seeds.search", stop)
        with pytest.raises(KeyboardInterrupt):
            tt.search_seeds(recipe, SEEDS, restart=True, console=Console(quiet=True))
    assert not list(folder.rglob("result.json"))
    assert not (folder / "seeds.csv").exists()
    again = tt.search_seeds(recipe, SEEDS, console=Console(quiet=True))
    assert [one.ticket.fingerprint for one in again] == [one.ticket.fingerprint for one in first]
    more = tt.search_seeds(recipe, [*SEEDS, 2], console=Console(quiet=True))
    assert [one.ticket.fingerprint for one in more[:2]] == [one.ticket.fingerprint for one in first]
    assert [row["seed"] for row in rows(folder)] == ["0", "1", "2", "mean", "std"]


@pytest.mark.parametrize("again", ["yaml", "loaded"])
def test_the_pruners_seed_follows_in_a_recipe_that_is_read_again(monkeypatch, tmp_path, again):
    recipe = tt.load_recipe("digits_magnitude", ["pruner.sparsity=0.8", f"output={tmp_path}"])
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    searched = []

    def search(one, console):
        searched.append(one)
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_tickets.experiments.seeds.search", search)
    for seeds in ([3, 4], [4, 3]):
        with pytest.raises(KeyboardInterrupt):
            tt.search_seeds(recipe if again == "loaded" else tmp_path / "again.yaml", seeds)
    assert [(one.seed, one.pruner["seed"]) for one in searched] == [(3, 3), (4, 4)]


@pytest.mark.slow
def test_sigterm_ends_it_with_code_143_and_the_same_command_continues(one, tmp_path):
    done = searched(tmp_path, IMP, 1, seeds=SEEDS, lives=[600, 0], number=signal.SIGTERM)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [life["ended"] for life in told if "ended" in life] == [143, 0]
    assert "is finished" in told[1]["said"]  # the first seed was
    for seed in SEEDS:
        same(tmp_path / f"seed_{seed}", one / f"seed_{seed}")
    assert rows(tmp_path) == rows(one)
    assert not leftovers(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["data", "groups"])
def test_seeds_that_two_processes_search_together(tmp_path, how):
    """One after the other, or two groups of two beside each other: the same arithmetic."""
    searched(tmp_path / "alone", [*IMP, "seed=1", "parallel=data"], 2)
    settings = [*IMP, *(["parallel=data"] if how == "data" else ["processes_per_run=2"])]
    searched(tmp_path / "seeds", settings, 2 if how == "data" else 4, seeds=SEEDS)
    same(tmp_path / "seeds" / "seed_1", tmp_path / "alone")
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("seeds", ["3", "0,0", "-1,2", "a,b", ""])
def test_seeds_that_are_none_are_refused(tmp_path, seeds):
    out = call("search", "digits_imp", "--seeds", seeds, "--set", f"output={tmp_path / 'x'}")
    assert out.exit_code == 2
    assert "seeds:" in out.output
    assert "such as 0,1,2" in " ".join(out.output.split())
    assert not (tmp_path / "x").exists()


def test_a_finished_search_for_seeds_says_so_and_tells_of_a_seed_that_is_fixed(one):
    settings = [word for setting in IMP for word in ("--set", setting)]
    out = call("search", "digits_imp", *settings, "--set", f"output={one}", "--seeds", "0,1")
    assert out.exit_code == 0, out.output
    assert out.output.count("is finished") == 2
    assert "std" in out.output
    out = call("search", "digits_imp", *settings, "--set", f"output={one}", "--seeds", "0,1", "--set", "pruner.seed=5")
    assert "pruner.seed: the recipe sets it to 5" in " ".join(out.output.split())
    assert out.exit_code == 2  # the folders' searches had other ones
