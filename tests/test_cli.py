"""The command line as a person meets it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from popen.cli import shown, spoken, to_json
from popen.evaluation.prediction import Prediction
from popen.masks import decode, encode

ROOT = Path(__file__).parents[1]
POPEN = Path(sys.executable).with_name("popen")


def popen(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([POPEN, *words], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A photograph, and what looks like a model's folder: these tests end before it is read."""
    Image.new("RGB", (8, 6), "red").save(tmp_path / "cup.png")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def test_help_names_the_commands_and_their_options(tmp_path: Path) -> None:
    done = popen("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "scenes" in done.stdout
    assert "predict" in done.stdout
    done = popen("predict", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("IMAGE", "QUESTION", "--model", "--ensemble", "--out", "--json", "--threshold"):
        assert word in done.stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'mlflow', 'pandas', 'numpy', 'pydantic', 'matplotlib', 'PIL'}"
    program = f"import sys, popen.cli; print(*sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == ""


def giant(path: Path) -> None:
    """A valid PNG header that promises 50000 x 50000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)


@pytest.mark.parametrize(
    ("image", "question", "model", "message"),
    [
        ("cup.png", " ", "model", "the question is empty; ask one"),
        ("cup.png", "Where?", "none", "none: no model there; run `make repro` first"),
        ("gone.png", "Where?", "model", "gone.png: no such file"),
        ("model", "Where?", "model", "model: is a folder, not an image"),
        ("broken.png", "Where?", "model", "broken.png: not a readable image"),
        ("giant.png", "Where?", "model", "giant.png: "),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    folder: Path, image: str, question: str, model: str, message: str
) -> None:
    (folder / "broken.png").write_bytes((folder / "cup.png").read_bytes()[:40])
    giant(folder / "giant.png")
    done = popen("predict", image, question, "--model", model, cwd=folder)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"popen: error: {message}")
    assert done.stderr.count("\n") == 1
    assert not list(folder.glob("*_answer*"))


@pytest.mark.parametrize("words", [("models",), ("models", "list"), ("plan",), ("corrections", "export")])
def test_what_needs_a_clone_says_so_outside_of_one(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = popen(*words, cwd=tmp_path)
    assert done.returncode == 1
    problem = "not inside a clone of the project (no .dvc folder above it); cd into one"
    assert done.stderr == f"popen: error: {tmp_path}: {problem}\n"


def test_a_folder_for_the_results_must_exist(folder: Path) -> None:
    done = popen("predict", "cup.png", "Where?", "--model", "model", "--out", "no/where.png", cwd=folder)
    assert done.returncode == 1
    assert done.stderr == "popen: error: no/where.png: the folder no does not exist; make it first\n"


def test_wrong_numbers_are_refused(folder: Path) -> None:
    done = popen("predict", "cup.png", "Where?", "--ensemble", "0", cwd=folder)
    assert done.returncode == 2
    assert "--ensemble" in done.stderr


def test_scenes_go_into_a_new_folder_only(folder: Path) -> None:
    done = popen("scenes", "model", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("popen: error: model exists and is not an empty folder")
    done = popen("scenes", "new", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith(f"popen: error: {folder}: not inside a clone of the project")


def test_defaults_are_those_of_the_clone_in_all_of_its_folders(folder: Path, tmp_path: Path) -> None:
    inside = tmp_path / "clone" / "deep"
    inside.mkdir(parents=True)
    (tmp_path / "clone/.dvc").mkdir()
    shutil.copy(ROOT / "params.yaml", tmp_path / "clone")
    asked = popen("predict", str(folder / "cup.png"), "Where?", cwd=inside)
    assert asked.stderr.startswith(
        f"popen: error: {tmp_path / 'clone'}/artifacts/models/popen+ensemble: no model"
    )
    drawn = popen("scenes", "/proc/scenes", cwd=inside)  # where nobody can write
    assert (drawn.returncode, drawn.stderr.count("\n")) == (1, 1)
    assert drawn.stderr.endswith("; name another place\n")


def test_an_answer_in_words_and_as_json() -> None:
    left, right = np.zeros((6, 8), dtype=bool), np.zeros((6, 8), dtype=bool)
    left[1:3, 1:4] = True
    right[5, 7] = True
    text = "Here, the red cup {seg} and a fork {seg}."
    answer = Prediction("cup.png", text, (encode(left), encode(right)), -0.25, 0.9, 1.5)
    assert spoken(answer) == "Here, the red cup and a fork."

    record = json.loads(to_json(answer, Path("cup.png"), "Where?"))
    assert record["answer"] == text
    assert record["scores"] == {"loglik": -0.25, "confidence": 0.9}
    assert [(mask["name"], mask["area"]) for mask in record["masks"]] == [("the red cup", 6), ("a fork", 1)]
    assert (decode(record["masks"][0]["rle"]) == left).all()
    assert (decode(record["masks"][1]["rle"]) == right).all()


def test_a_file_whose_name_is_no_utf8_can_be_told() -> None:
    odd = Path(os.fsdecode(b"caf\xe9.png"))  # written on a system with another encoding
    answer = Prediction("", "nothing.", (), 0.0, 1.0, 0.0)
    text = to_json(answer, odd, "was ist süß?")
    assert json.loads(text.encode("utf-8"))["image"] == shown(odd) == "caf\ufffd.png"
    assert "süß" in text
