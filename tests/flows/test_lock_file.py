"""Files that DVC or git left half done."""

from __future__ import annotations

import json
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from dvc.lock import make_lock

from flows.lock_file import LockError, settle
from popen.errors import explain
from popen.pipeline import state_folder

WHOLE = "schema: '2.0'\nstages: {}\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / "dvc.lock").write_text(WHOLE)
    settle(tmp_path)
    assert (state_folder(tmp_path) / "dvc.lock").read_text() == WHOLE
    return tmp_path


@pytest.mark.parametrize("left", ["", '{"/clone/a.txt": {"wri'])
def test_a_list_of_readers_that_was_cut_off_is_removed(root: Path, left: str) -> None:
    """DVC itself refuses it for ever."""
    readers = root / ".dvc/tmp/rwlock"
    readers.write_text(left)
    settle(root)
    assert not readers.exists()


def test_a_list_that_is_being_written_is_waited_for(root: Path) -> None:
    """DVC empties the file before it writes, while another stage of the flow may settle."""
    readers, whole = root / ".dvc/tmp/rwlock", json.dumps({"read": {}, "write": {}})
    with make_lock(str(root / ".dvc/tmp/rwlock.lock"), wait=True):
        readers.write_text("")
        settling = get_context("spawn").Process(target=settle, args=(root,))
        settling.start()
        time.sleep(6.0)  # it has to import DVC first
        assert settling.is_alive()
        assert readers.exists()
        readers.write_text(whole)
    settling.join(60)
    assert (settling.exitcode, readers.read_text()) == (0, whole)


def test_a_whole_list_of_readers_stays(root: Path) -> None:
    readers = root / ".dvc/tmp/rwlock"
    readers.write_text(json.dumps({"/clone/a.txt": {"write": {"pid": 1, "cmd": "dvc repro"}}}))
    before = readers.read_bytes()
    settle(root)
    assert readers.read_bytes() == before


@pytest.mark.parametrize("half", ["", "schema: '2.0'\nstages: {a: [", "schema: '2.0'\nsta"])
def test_half_a_lock_is_replaced_by_the_copy(root: Path, half: str) -> None:
    (root / "dvc.lock").write_text(half)
    settle(root)
    assert (root / "dvc.lock").read_text() == WHOLE


def test_what_git_could_not_merge_is_for_a_person(root: Path) -> None:
    text = "schema: '2.0'\n<<<<<<< HEAD\nstages: {}\n=======\nstages: {a: 1}\n>>>>>>> theirs\n"
    (root / "dvc.lock").write_text(text)
    with pytest.raises(LockError, match="what git could not merge; `git checkout --theirs") as caught:
        settle(root)
    assert explain(caught.value) == str(caught.value)
    assert (root / "dvc.lock").read_text() == text
