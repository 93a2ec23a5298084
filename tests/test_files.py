"""How files are written and waited for: never through a link, never half, with the umask's permissions."""

import os
import shutil
import stat
import time

import pytest
import torch

import timm_tickets as tt
from timm_tickets.storage import files


def test_nothing_is_written_through_a_link(tmp_path, monkeypatch):
    mine, target = tmp_path / "mine", tmp_path / "run.json"
    mine.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "guessed")
    planted = [tmp_path / ".guessed.timm-tickets-tmp", tmp_path / ".run.json.timm-tickets-tmp"]
    for link in planted:
        link.symlink_to(mine)
    with pytest.raises(OSError, match=r"cannot write .*run.json: File exists"):
        files.write_json(target, {})
    files.remove_temporaries(tmp_path)
    assert not any(map(os.path.lexists, planted))
    target.symlink_to(mine)
    files.write_json(target, {})
    files.write_state(target, {"a": torch.ones(3)})
    assert not target.is_symlink()
    assert mine.read_text() == "precious"


def test_what_a_killed_process_has_left_goes_and_what_links_lead_to_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    left = tmp_path / ".0123.timm-tickets-tmp"
    left.mkdir()
    (left / "half").touch()
    (left / "link").symlink_to(tmp_path / "mine")
    (tmp_path / ".model.timm-tickets-tmp").touch()
    (tmp_path / ".link.timm-tickets-tmp").symlink_to(tmp_path / "mine")
    files.remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def masks(model):
    return {"conv1.0.weight": torch.ones_like(model.conv1[0].weight, dtype=torch.bool)}


def test_files_have_the_permissions_that_the_umask_gives(tmp_path, model):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
        files.write_state(tmp_path / "b.safetensors", {"a": torch.ones(3)})
        tt.Ticket.of(model, masks(model)).save(tmp_path / "c.ticket")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_waiting_for_another_process_s_file_ends_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_APPEARS", -1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match=r"cannot find .*which another process has written"):
        files.appearing(tmp_path / "run.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(files.DamagedError, match=r"run.json is damaged \(it is not JSON\)"):
        files.appearing(tmp_path / "run.json")
    monkeypatch.setattr(files, "stop_asked", lambda: True)
    monkeypatch.setattr(files, "_APPEARS", 100)
    with pytest.raises(SystemExit):
        files.appearing(tmp_path / "nothing.json")


def test_a_disk_that_is_full_leaves_what_was_pushed_before(tmp_path, model, monkeypatch):
    tt.Ticket.of(model, masks(model)).save(tmp_path / "one.ticket")
    tt.push(tmp_path / "one.ticket", f"local-dir:{tmp_path / 'shared'}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()}

    def full(source, target):
        target.write_bytes(source.read_bytes()[:1000])
        raise OSError(28, os.strerror(28), str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match=r"No space left on device"):
        tt.push(tmp_path / "one.ticket", f"local-dir:{tmp_path / 'shared'}")
    assert {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == before
