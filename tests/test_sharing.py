"""Comparing and sharing tickets."""

import ast
import re

import pytest
import timm
import torch
from support.commands import call

import timm_tickets as tt
from timm_tickets.tickets import compare
from timm_tickets.tickets import publish as hub


def mask(*kept):
    return {"a": torch.tensor([bool(value) for value in kept])}


def test_set_operations_by_hand():
    one, other = mask(1, 1, 0, 0), mask(0, 1, 1, 0)
    assert tt.union(one, other)["a"].tolist() == [True, True, True, False]
    assert tt.intersect(one, other)["a"].tolist() == [False, True, False, False]
    assert tt.difference(one, other)["a"].tolist() == [True, False, False, False]
    assert one["a"].tolist() == [True, True, False, False]


def test_overlap_by_hand():
    """Layer a: 2 and 2 of 4, one shared, one expected; b: 1 and 2 of 2, one shared, one expected."""
    one = {**mask(1, 1, 0, 0), "b": torch.tensor([True, False])}
    other = {**mask(0, 1, 1, 0), "b": torch.tensor([True, True])}
    found = tt.overlap(one, other)
    assert found == {"iou": 2 / 5, "by_chance": 2 / 5, "shared": 1.0}
    layers = compare.layer_overlaps(one, other)
    assert layers["a"]["iou"] == 1 / 3
    assert layers["b"] == {"iou": 0.5, "by_chance": 0.5, "shared": 1.0}
    assert tt.overlap(one, one)["iou"] == 1
    assert tt.overlap(mask(1, 1, 0, 0), mask(0, 0, 1, 1)) == {"iou": 0, "by_chance": 1 / 3, "shared": 0}


def test_masks_of_other_weights_are_refused():
    with pytest.raises(tt.SettingError, match=r"1 differ in name or shape, the first is a \(\(4,\) and \(3,\)\)"):
        tt.overlap(mask(1, 1, 0, 0), mask(1, 1, 0))


@pytest.fixture
def files(tmp_path):
    """Tickets of magnitude and of two random masks over one model, at 0.9."""
    out = []
    for name, settings in (("magnitude", {}), ("random", {"seed": 1}), ("random", {"seed": 2})):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=10)
        path = tmp_path / f"{name}_{settings.get('seed', 0)}.ticket"
        tt.create_pruner(name, model, sparsity=0.9, **settings).ticket.save(path)
        out.append(path)
    return out


def test_two_random_masks_share_what_chance_says(files):
    masks = [tt.load_ticket(file).masks for file in files]
    found = tt.overlap(masks[1], masks[2])
    assert found["shared"] == pytest.approx(1, abs=0.05)
    assert found["iou"] == pytest.approx(0.1 * 0.1 / (0.2 - 0.01), abs=0.004)


def test_compare_from_the_command_line(files, tmp_path):
    plot = tmp_path / "map.png"
    out = call("compare", *files, "--plot", plot, COLUMNS="200")
    assert out.exit_code == 0, out.output
    assert out.output.count("_0, random_") + out.output.count("random_1, random_2") == 3  # every pair
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = call("compare", *files[1:], COLUMNS="200")
    assert "layer1.0.conv1.weight" in out.output
    out = call("compare", files[0])
    assert out.exit_code == 2
    assert "give two or more" in out.output


def test_a_folder_works_like_the_hub(files, tmp_path):
    place = f"local-dir:{tmp_path / 'shared'}"
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"\x89PNG")
    out = call("push", files[0], place, "--plot", plot)
    assert out.exit_code == 0, out.output
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"model.ticket", "README.md", "accuracy.png"}
    ticket = tt.load_ticket(place)
    assert ticket.fingerprint == tt.load_ticket(files[0]).fingerprint
    tt.push(tmp_path / "shared" / "model.ticket", place)  # again, over itself
    text = (tmp_path / "shared" / "README.md").read_text()
    assert "90.00% of its prunable weights are zero. Found by magnitude" in text
    assert "| `layer1.0.conv1.weight` | 32x32x3x3 | 0." in text


def test_the_cards_code_rebuilds_the_ticket(files, tmp_path):
    place = f"local-dir:{tmp_path / 'shared'}"
    ticket = tt.load_ticket(files[0])
    tt.push(files[0], place)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "shared" / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) == 3
    assert "create_model('test_resnet', num_classes=10, in_chans=3)" in code
    names = {}
    exec(code, names)
    for name, value in ticket.state().items():
        assert torch.equal(names["model"].state_dict()[name], value)


def test_pushing_to_the_hub_uploads_the_same_folder(files, monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def create_repo(self, name, exist_ok, private):
            seen["repo"] = name, exist_ok, private

        def upload_folder(self, repo_id, folder_path, commit_message):
            from pathlib import Path

            seen["files"] = repo_id, {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert tt.push(files[0], "hf-hub:user/name", private=True) == "https://huggingface.co/user/name"
    assert seen["repo"] == ("user/name", True, True)
    repo, content = seen["files"]
    assert repo == "user/name"
    assert content["model.ticket"] == files[0].read_bytes()
    assert b"load_ticket('hf-hub:user/name')" in content["README.md"]


def test_loading_from_the_hub(files, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, file, revision=None):
        asked.append((name, file, revision))
        return str(files[0])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert tt.load_ticket("hf-hub:user/name@v1").fingerprint == tt.load_ticket(files[0]).fingerprint
    tt.load_ticket("hf-hub:user/name")
    assert asked == [("user/name", hub.FILE, "v1"), ("user/name", hub.FILE, None)]

    def refused(*_, **__):
        raise huggingface_hub.errors.HFValidationError("no such name")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: None)
    with pytest.raises(OSError, match="the Hub did not take the ticket: 'NoneType'"):
        tt.push(files[0], "hf-hub:user/name")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(tt.TicketError, match=r"hf-hub:!!: model\.ticket cannot be had from the Hub"):
        tt.load_ticket("hf-hub:!!")


def test_a_place_that_is_neither_is_refused(files):
    for place in ("user/name", "hf-hub:a/b/c", "hf-hub:../x"):
        with pytest.raises(tt.SettingError, match=r"is not valid; write hf-hub:user/name"):
            tt.push(files[0], place)
    with pytest.raises(tt.SettingError, match=r"there is no file nothing\.png"):
        tt.push(files[0], "local-dir:x", plot="nothing.png")


HOSTILE = [
    {"model": {"architecture": "test_resnet", "kwargs": {"num_classes=10); import os; os.system('x'); dict(x": 1}}},
    {"model": {"architecture": "x'); import os; print('", "kwargs": {"class": 1, "a": object}}},
    {"model": {"architecture": "a\n```\n<script>alert(1)</script>"}, "pruner": {"name": "`x`\n# Title\n<b>"}},
    {"recipe": {"dataset": "[link](http://x) |\n| x"}, "metrics": {"a|b\n## T": "<img>"}, "dense": {"a": "\x1b[2J"}},
    {"model": "x", "recipe": [1], "pruner": 5, "metrics": [1], "dense": "q"},
    {"model": {"kwargs": [1]}, "metrics": {"x": {}}},
]


@pytest.mark.parametrize("metadata", HOSTILE, ids=range(len(HOSTILE)))
def test_a_strangers_metadata_stays_text_in_the_card(files, metadata):
    """The card's code parses to its three statements with literal arguments, and nothing breaks out of a line."""
    ticket = tt.load_ticket(files[0])
    ticket.metadata = metadata
    text = hub.card(ticket, "local-dir:x")
    assert "<" not in text
    assert "\x1b" not in text
    plain = hub.card(tt.Ticket(ticket.masks, ticket.values), "local-dir:x")
    headings = [[line for line in one.splitlines() if line.startswith("#")] for one in (text, plain)]
    assert len(headings[0]) == len(headings[1]) == 1
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    statements = ast.parse(code).body
    assert [type(one).__name__ for one in statements] == ["Import", "Assign", "Assign", "Expr"]
    call = statements[1].value
    assert ast.unparse(call.func) == "timm.create_model"
    assert all(isinstance(one, ast.Constant) for one in call.args)
    assert all(ast.literal_eval(one.value) is not ... for one in call.keywords)


def test_every_command_takes_an_address(files, tmp_path):
    place = f"local-dir:{tmp_path / 'shared'}"
    tt.push(files[0], place)
    out = call("info", place)
    assert out.exit_code == 0, out.output
    assert "test_resnet" in out.output


def test_looking_at_a_ticket_does_not_steer_the_terminal(files):
    ticket = tt.load_ticket(files[0])
    ticket.metadata["recipe"] = "\x1b[2J\x1b[31mgone"
    ticket.save(files[0])
    assert "\x1b" not in call("info", files[0]).output


def test_masks_of_other_weights_are_refused_everywhere():
    for operation in (tt.union, tt.intersect, tt.difference):
        for other in ({"b": torch.ones(4, dtype=torch.bool)}, mask(1)):
            with pytest.raises(tt.SettingError, match="not of the same weights"):
                operation(mask(1, 1, 0, 0), other)
