"""Checkpoints: complete or not there at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from popen.checkpoints import CheckpointError, Checkpoints, digest, fingerprint, write_whole


def writes(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "state").write_text(text * 2)

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill_disk(folder: Path) -> None:
    """A real ENOSPC from the kernel, whatever the file system."""
    (folder / "weights").write_text("half")
    with open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def test_the_newest_of_the_last_two_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "a" / "b")
    assert checkpoints.latest() is None
    for step in (9, 10, 100):
        saved = checkpoints.save(step, writes(str(step)))
        assert checkpoints.latest() == (step, saved)
    assert names(checkpoints.folder) == ["step-00000010", "step-00000100"]
    assert (saved / "weights").read_text() == "100"
    assert (saved / "sub" / "state").read_text() == "100100"
    checkpoints.clear()
    assert checkpoints.latest() is None
    checkpoints.clear()  # nothing there: no error


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, writes("old"))
    checkpoints.save(1, writes("new"))
    assert names(tmp_path) == ["step-00000001"]
    assert (tmp_path / "step-00000001" / "weights").read_text() == "new"


def test_a_full_disk_leaves_the_previous_one_and_says_what_to_do(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, writes("one"))
    with pytest.raises(
        CheckpointError, match=r"disk full .* step 2: free space and run `dvc repro` again"
    ) as caught:
        checkpoints.save(2, fill_disk)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "step-00000002")
    assert checkpoints.latest() == (1, tmp_path / "step-00000001")
    assert names(tmp_path) == ["step-00000001"]
    assert (tmp_path / "step-00000001" / "weights").read_text() == "one"


def test_a_library_that_words_a_full_disk_its_own_way_is_understood(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(CheckpointError, match="disk full"):
        Checkpoints(tmp_path).save(1, write)


def test_other_errors_pass_through_and_leave_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise ZeroDivisionError

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, writes("one"))
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(2, write)
    assert names(tmp_path) == ["step-00000001"]


def test_a_process_killed_while_writing_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from popen.checkpoints import Checkpoints
checkpoints = Checkpoints(Path({str(tmp_path)!r}))
checkpoints.save(1, lambda folder: (folder / "weights").write_text("one"))
def die(folder):
    (folder / "weights").write_text("ha")
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(2, die)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert names(tmp_path) == ["step-00000001", "step-00000002.writing"]
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == (1, tmp_path / "step-00000001")
    checkpoints.save(2, writes("two"))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_files_and_folders_are_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def record(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path).as_posix())
        real(handle)

    monkeypatch.setattr(os, "fsync", record)
    Checkpoints(tmp_path).save(3, writes("three"))
    draft = "step-00000003.writing"
    assert set(synced[:-2]) == {f"{draft}/weights", f"{draft}/sub", f"{draft}/sub/state"}
    assert synced[-2:] == [draft, "."]


class Group(BaseModel):
    lr: float
    steps: int


def test_a_fingerprint_depends_on_every_part() -> None:
    base = fingerprint(Group(lr=0.1, steps=3), "abc", {"b": 1, "a": [2]})
    assert base == fingerprint(Group(lr=0.1, steps=3), "abc", {"a": [2], "b": 1})
    assert len(base) == 16
    others = {
        fingerprint(Group(lr=0.2, steps=3), "abc", {"b": 1, "a": [2]}),
        fingerprint(Group(lr=0.1, steps=3), "abd", {"b": 1, "a": [2]}),
        fingerprint(Group(lr=0.1, steps=3), "abc", {"b": 1, "a": [3]}),
        fingerprint(Group(lr=0.1, steps=3), "abc"),
        base,
    }
    assert len(others) == 5
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    with pytest.raises(TypeError):
        fingerprint(object())


def test_a_digest_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("abc")
    # sha256("abc"), FIPS 180-2 appendix B.1
    assert (
        digest(tmp_path / "sub" / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    first = digest(tmp_path)
    (tmp_path / "sub" / "a").rename(tmp_path / "sub" / "b")
    second = digest(tmp_path)
    (tmp_path / "sub" / "b").write_text("abd")
    assert len({first, second, digest(tmp_path)}) == 3
    with pytest.raises(FileNotFoundError, match="run the stage that makes it"):
        digest(tmp_path / "gone")


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    """Killed after half of the content: the file is not there, and the next try writes it."""
    path = tmp_path / "new" / "reply.json"
    program = (
        "import os, signal, sys; from pathlib import Path; from popen import checkpoints\n"
        "checkpoints._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoints.write_whole(Path(sys.argv[1]), b'half')"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -9
    assert names(path.parent) == ["reply.json.writing"]
    write_whole(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["reply.json"]
