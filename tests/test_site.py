"""What docs/generate makes of the code for the documentation site, whose build in CI checks every link and page."""

import shlex
import sys
from pathlib import Path

import pytest
from commands import call

import timm_tickets as tt

sys.path.append(str(Path(__file__).parents[1] / "docs" / "generate"))
import cards
import figures
import notebooks


@pytest.mark.slow
@pytest.mark.parametrize("name", cards.METHODS)
@pytest.mark.filterwarnings("ignore")  # a jackpot of a network that nobody trained
def test_the_commands_of_a_method_s_page_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = cards.method_page(name)
    shown, *before, dry, search = commands = cards.commands(name)
    assert "\n".join(commands) in page
    assert dry == f"{search} --dry-run"
    for line in before:  # what it starts from, made short
        done = call(*shlex.split(line)[1:], "--set", "training.epochs=1", "--set", "pruner.sparsity=0.1")
        assert done.exit_code == 0, done.output
    for line in (shown, dry):
        done = call(*shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
        assert name in done.output
    assert "nothing was trained or written" in done.output
    assert not (tmp_path / "output" / f"digits_{name}").exists()


def test_a_pruner_that_nobody_has_written_about_ends_the_build():
    with pytest.raises(tt.SettingError, match=r"differ by \['another'\]; add or remove them"):
        cards.complete([*cards.METHODS, "another"])


WIDE = """
2026-01-01, conditions

| | 0.9 | spent | 0.98 | spent |
|---|---|---|---|---|
| dense | 99.50 ± 0.25 | 1.0 | 99.50 ± 0.25 | 1.0 |
| imp | 99.00 ± 0.50 | 12.0 | 97.00 ± 2.00 | 19.5 |
| imp, one shot | 98.00 ± 0.50 | 2.0 | 96.00 ± 0.00 | 2.0 |
| imp's layer counts, random mask | 98.00 ± 0.50 | 2.0 | 96.00 ± 0.00 | 2.0 |
"""
RANKING = """
2026-01-01, conditions

| sparsity | rank | ticket | test top-1 \\(%\\) | 95 % interval | dense trainings | beside dense |
| --- | --- | --- | --- | --- | --- | --- |
| 0.9 | 1 | dense | 99.50 | 99.25 to 99.75 | 1 |  |
| 0.9 | 2 | imp | 99.00 | 98.50 to 99.50 | 12 | matches |
| 0.9 | 3 | imp in one\\ shot | 98.00 | none | 2 | worse by 1.5 |
| 0.98 | 1 | dense | 99.50 | 99.25 to 99.75 | 1 |  |
| 0.98 | 2 | imp | 97.00 | 95.00 to 99.00 | 19.5 |  |
| 0.98 | 3 | imp in one shot | 96.00 | 96.00 to 96.00 | 2 |  |
"""


@pytest.mark.parametrize(("table", "one_shot"), [(WIDE, "imp, one shot"), (RANKING, "imp in one shot")])
def test_figures_come_from_the_benchmark_s_table_or_from_a_ranking(tmp_path, monkeypatch, table, one_shot):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    (tmp_path / figures.TABLE).write_text(table)
    rows = figures.rows_of("imp")
    assert list(rows) == ["imp", one_shot]
    assert rows["imp"].accuracy == {"0.9": 99.0, "0.98": 97.0}
    assert rows["imp"].low == {"0.9": 98.5, "0.98": 95.0}
    assert rows["imp"].high == {"0.9": 99.5, "0.98": 99.0}
    assert rows["imp"].spent == {"0.9": "12", "0.98": "19.5"}
    assert figures.conditions() == "2026-01-01, conditions"
    drawn = figures.curve("imp", {"imp": rows["imp"], "dense": figures.measured()["dense"]})
    assert 'aria-label="Test top-1 in percent against sparsity on digits: imp 99.0 at 0.9, 97.0 at 0.98; dense' in drawn
    assert drawn.count("<circle") == 2


def test_a_notebook_becomes_a_page():
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {"cell_type": "code", "source": ["1 + 1"], "outputs": [{"data": {"text/plain": ["2"]}}]},
        {"cell_type": "code", "source": ["print(3)"], "outputs": [{"name": "stdout", "text": ["3\n"]}]},
        {"cell_type": "code", "source": ["draw()"], "outputs": [{"data": {"image/png": "aGk=\n", "text/plain": "x"}}]},
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    blocks = notebooks.page({"cells": cells}, "one.ipynb").strip().split("\n\n")
    assert blocks == [
        *("# Title\nwords", "The notebook: [one.ipynb](one.ipynb)."),
        *("```python\n1 + 1\n```", "```text\n2\n```", "```python\nprint(3)\n```", "```text\n3\n```"),
        *("```python\ndraw()\n```", '<img alt="what the cell draws" src="data:image/png;base64,aGk=">'),
    ]
