import pydoc
import re
import sys
from collections.abc import Callable
from typing import Annotated

import pytest
from pydantic import Field
from support import started

import timm_tickets as tt
from timm_tickets.core.masks import cut, keep_count, total
from timm_tickets.core.registry import read_lines
from timm_tickets.core.settings import about
from timm_tickets.pruning import registry


@pytest.mark.parametrize("module", ["masks", "networks", "processes", "scores"])
def test_the_modules_that_the_readme_names_are_there_without_being_imported(module):
    forget = "import sys\nfor name in [*sys.modules]:\n    if name.startswith('timm_tickets'): del sys.modules[name]\n"
    found = started.run("-c", f"{forget}import timm_tickets; print(timm_tickets.{module}.__name__)")
    assert found.stdout.strip() == f"timm_tickets.{module}", found.stderr


def test_names_are_sorted_and_filtered():
    names = tt.list_pruners()
    assert names == sorted(names)
    assert {"imp", "magnitude", "random"} <= set(names)
    assert tt.list_pruners("ma*") == [name for name in names if name.startswith("ma")]
    assert tt.list_pruners("none*") == []


def test_the_overview_read_from_files_is_what_is_registered():
    for kind, package, names, get in (
        ("pruner", "timm_tickets.methods", tt.list_pruners(), tt.get_method),
        ("tweak", "timm_tickets.tweaks", tt.list_tweaks(), tt.get_tweak),
    ):
        assert list(read_lines(kind, package).items()) == [(name, about(get(name))) for name in names]


@pytest.mark.parametrize("cls", [tt.Method, tt.get_method("rigl"), tt.get_tweak("smooth_activation")])
def test_help_shows_what_a_class_can_be_told_and_not_how_it_is_checked(cls):
    text = pydoc.plain(pydoc.render_doc(cls))
    assert not re.search("pydantic|FieldInfo|__dataclass|__init__", text)
    assert f"{cls.__name__}(*, " in text
    for name, field in cls.__pydantic_fields__.items():
        assert f" {name}: {field.description.split()[0]}" in text
    if cls is tt.get_method("rigl"):
        assert "(*, sparsity: float, epochs: int = 20, seed: int = 0, include: tuple[str, ...] = ('*',)" in text
        assert "interval: optimizer steps between two exchanges; 100 or less where not given (integer >= 1" in text
        assert "bool; default False)" in text


@pytest.mark.usefixtures("unregister")
def test_a_setting_that_is_no_plain_data_and_a_class_without_a_docstring_can_be_registered():
    @tt.register_pruner("with_a_function")
    class WithAFunction(tt.Method):
        of: Callable[[float], float] = abs

    assert "of: (anything; default <built-in function abs>)" in WithAFunction.__doc__
    assert about(WithAFunction) == ""


def test_an_unknown_pruner_is_refused_with_the_closest(model):
    with pytest.raises(tt.SettingError, match="'magnitud' is unknown; did you mean 'magnitude'"):
        tt.create_pruner("magnitud", model, sparsity=0.5)


@pytest.mark.usefixtures("unregister")
@pytest.mark.filterwarnings("ignore:.*without an optimizer step")
def test_a_method_is_one_class(model):
    @tt.register_pruner("smallest_layers_first")
    class Mine(tt.Method):
        """Keep the first weights."""

        power: Annotated[float, Field(gt=0)] = 1.0

        def search(self, subnet):
            (end,) = yield [tt.Run(epochs=1)]
            keep = keep_count(total(end.mask), self.sparsity)
            subnet.set_mask_(cut(end.mask, {n: -(w.abs() ** self.power) for n, w in end.weights.items()}, keep))
            subnet.rewind_()

    with pytest.raises(tt.SettingError, match=r"pruner\.power: -1 is not valid; it must be greater than 0"):
        tt.create_pruner("smallest_layers_first", model, sparsity=0.5, power=-1)
    pruner = tt.create_pruner("smallest_layers_first", model, sparsity=0.5, power=2)
    assert [run.epochs for run in pruner] == [1]
    assert pruner.ticket.sparsity == pytest.approx(0.5, abs=1e-5)
    assert pruner.ticket.metadata["pruner"]["power"] == 2
    with pytest.raises(ValueError, match="registered already"):
        tt.register_pruner("smallest_layers_first")(tt.get_method("imp"))


@pytest.mark.usefixtures("unregister")
def test_a_method_of_another_package_is_found_through_its_entry_point(tmp_path, monkeypatch, model):
    (tmp_path / "elsewhere.py").write_text(
        "import timm_tickets as tt\n"
        "from timm_tickets.masks import cut, keep_count, total\n"
        "@tt.register_pruner('elsewhere')\n"
        "class Elsewhere(tt.Method):\n"
        "    '''Prune the largest.'''\n"
        "    def search(self, subnet):\n"
        "        keep = keep_count(total(subnet.mask), self.sparsity)\n"
        "        scores = {n: -w.abs() for n, w in subnet.weights().items()}\n"
        "        subnet.set_mask_(cut(subnet.mask, scores, keep))\n"
        "        yield from ()\n"
    )
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[timm_tickets.pruners]\nelsewhere = elsewhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._pruners._loaded = False
    assert "elsewhere" in tt.list_pruners()
    assert tt.create_pruner("elsewhere", model, sparsity=0.25).ticket.sparsity == pytest.approx(0.25, abs=1e-5)
    del sys.modules["elsewhere"]
    registry._pruners._loaded = False


@pytest.mark.usefixtures("unregister")
def test_another_packages_class_does_not_replace_a_pruner_of_the_same_name():
    class IMP(tt.Method):
        """Another."""

    with pytest.raises(ValueError, match="registered already"):
        tt.register_pruner("imp")(IMP)


def test_a_broken_entry_point_is_named_and_the_others_stay(tmp_path, monkeypatch):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[timm_tickets.pruners]\nbroken = not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._pruners._loaded = False
    with pytest.warns(UserWarning, match="not_there_at_all"):
        assert "imp" in tt.list_pruners()
    registry._pruners._loaded = False
