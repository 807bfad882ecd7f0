"""What DVC, git and the process table say about a pipeline."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from popen import pipeline


def test_the_nearest_dvc_folder_is_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "a" / "workspace"
    (tmp_path / ".dvc").mkdir()
    (inner / ".dvc").mkdir(parents=True)
    (inner / "sub").mkdir()
    assert pipeline.find_root(inner / "sub") == inner
    assert pipeline.find_root(tmp_path / "a") == tmp_path
    with pytest.raises(FileNotFoundError, match="not inside a clone"):
        pipeline.find_root(Path("/proc"))
    # `dvc exp run --temp` names the clone that the workspace was made from
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert pipeline.find_home(inner) == inner
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert pipeline.find_home(inner) == tmp_path


def test_a_process_is_gone_when_it_ended_or_its_id_was_used_again() -> None:
    mine = pipeline.process_name()
    host, pid, start = mine.split(":")
    assert pid == str(os.getpid())
    assert not pipeline.is_gone(mine)
    assert pipeline.is_gone(f"{host}:{pid}:{int(start) - 1}")
    ended = subprocess.Popen(["sleep", "0.5"])
    name = pipeline.process_name(psutil.Process(ended.pid))
    assert not pipeline.is_gone(name)
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert pipeline.is_gone(name)  # a zombie, as what `make up` started is until that has ended, too
    ended.wait()
    assert pipeline.is_gone(name)
    assert not pipeline.is_gone("elsewhere:1:1")  # nothing is known about other machines
    assert not pipeline.is_gone("")


def test_stages_of_one_dvc_share_a_file_and_others_do_not(tmp_path: Path) -> None:
    show = f"from popen.pipeline import *; print(parent_file(Path({str(tmp_path)!r})))"
    dvc = tmp_path / "dvc"
    dvc.write_text(f"import subprocess, sys\nfor _ in 'ab': subprocess.run([sys.executable, '-c', {show!r}])")
    first, second = (subprocess.check_output([sys.executable, str(dvc)], text=True).split() for _ in "ab")
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert len({first[0], second[0], str(pipeline.parent_file(tmp_path))}) == 3


def test_files_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    host, pid, start = pipeline.process_name().split(":")
    folder = pipeline.state_folder(tmp_path)
    (folder / f"parent-{host}:{pid}:{start}").write_text("alive")
    (folder / f"parent-{host}:{pid}:{int(start) - 1}").write_text("gone")
    assert pipeline.parent_file(tmp_path).read_text() == "alive"
    assert [path.name for path in folder.iterdir()] == [f"parent-{host}:{pid}:{start}"]


def test_hashes_come_from_dvc(tmp_path: Path) -> None:
    assert pipeline.lock_digest(tmp_path) is None
    assert pipeline.data_hash(tmp_path) is None
    lock = "stages:\n  sft:\n    deps:\n    - {path: popen, md5: a}\n    - {path: data, md5: locked.dir}\n"
    (tmp_path / "dvc.lock").write_text(lock)
    assert pipeline.lock_digest(tmp_path) == hashlib.md5(lock.encode()).hexdigest()
    assert pipeline.data_hash(tmp_path) == "locked.dir"
    (tmp_path / "data.dvc").write_text(
        "deps:\n- {path: samples, md5: x}\nouts:\n- {path: data, md5: now.dir}\n"
    )
    assert pipeline.data_hash(tmp_path) == "now.dir"


def test_the_commit_comes_from_git(tmp_path: Path) -> None:
    assert pipeline.git_commit(tmp_path) is None

    def git(*words: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.check_output(["git", *name, *words], cwd=tmp_path, text=True)

    git("init", "-q")
    assert pipeline.git_commit(tmp_path) is None  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert pipeline.git_commit(tmp_path) == git("log", "-1", "--format=%H").strip()
