"""`popen data check` as a person meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.trees import MSCOCO, muse_record, muse_tree

POPEN = Path(sys.executable).with_name("popen")
PARAMS = Path(__file__).parents[1] / "params.yaml"


def check(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [POPEN, "data", "check", root, *words, "--params", PARAMS]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return muse_tree(tmp_path / "tree", train=[muse_record(), muse_record(file_name="b.png")])


def test_the_exit_code_tells_whether_all_is_there(root: Path) -> None:
    done = check(root, "--own")
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].split() == ["muse/train", "2", "6", "own", "0", "0", "ok"]
    done = check(root, "muse")
    assert done.returncode == 1
    assert "muse/test_many: there is no muse/muse_test_many.json" in done.stdout
    (root / MSCOCO / "train2014/b.png").unlink()
    done = check(root, "--own", "--json")
    assert done.returncode == 1
    (found,) = json.loads(done.stdout)
    assert found["missing_images"][0]["rule"].endswith("train2014/b.png: no such file")


def test_what_cannot_be_checked_is_one_line(root: Path, tmp_path: Path) -> None:
    done = check(root, "voc")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("popen: error: 'voc' is no split; known are muse/train")
    done = check(tmp_path / "tree/muse", "--own")
    assert done.returncode == 1
    first = done.stdout.splitlines()[0]
    assert first == f"{tmp_path / 'tree/muse'}: no split of any known layout in it; is it the right folder?"
    assert check(root / "muse/muse_train.json").returncode == 2  # a file
    assert check(tmp_path / "nowhere").returncode == 2
