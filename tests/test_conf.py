"""Compositions of conf/: the default is params.yaml, and every choice makes parameters that fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import compose_and_dump

from popen.data.published import SIZES
from popen.data.tree import parse
from popen.params import Params, load

ROOT = Path(__file__).parents[1]


def compose(out: Path, *overrides: str) -> Params:
    """As DVC does it under `hydra.enabled`."""
    compose_and_dump(out, str(ROOT / "conf"), None, "config", str(ROOT), list(overrides))
    return load(out)


def test_the_default_composition_is_params_yaml(tmp_path: Path) -> None:
    assert compose(tmp_path / "params.yaml") == load(ROOT / "params.yaml")
    assert yaml.safe_load((tmp_path / "params.yaml").read_text()) == yaml.safe_load(
        (ROOT / "params.yaml").read_text()
    )


def test_the_compositions_of_full_scale_fit(tmp_path: Path) -> None:
    small, large = (
        compose(tmp_path / f"{name}.yaml", f"model={name}", "data=muse") for name in ("llava-7b", "llava-13b")
    )
    for params, width in ((small, 4096), (large, 5120)):
        language, vision, decoder = params.model.language, params.model.vision, params.model.decoder
        assert (vision.name, vision.pretrained, vision.image_size) == ("ViT-L-14-336", "openai", 448)
        assert (len(vision.levels), decoder.tokens) == (2, 3)
        assert (language.lora_r, language.lora_alpha, language.lora_targets) == (8, 16, ["q_proj", "v_proj"])
        assert (language.width, language.dtype, language.checkpointing) == (width, "bfloat16", True)
        loss = params.sft.loss
        assert (loss.ce, loss.bce, loss.dice) == (1.0, 2.0, 0.5)
        assert params.data.splits.keys() == {"train", "preference", "val", *params.benchmarks}
        one_step = params.sft.train.images * params.sft.train.accumulate
        assert one_step == 128  # on all devices together
    assert small.model_dump(exclude={"model", "sft"}) == large.model_dump(exclude={"model", "sft"})
    kept = load(ROOT / "params.yaml")
    assert small.align.beta_t == kept.align.beta_t  # what no choice names is as in params.yaml
    assert (small.align.fewer, kept.align.fewer) == (True, False)


@pytest.mark.parametrize("name", ["muse", "refcoco", "refcoco+", "refcocog"])
def test_published_data_are_read_where_they_do_not_share_photographs(tmp_path: Path, name: str) -> None:
    params = compose(tmp_path / "params.yaml", "model=llava-7b", f"data={name}")
    assert params.data.splits.keys() == {"train", "preference", "val", *params.benchmarks}
    assert params.gate.benchmark in params.benchmarks
    assert 0 < params.contract.tolerated < 0.05
    fitted = {
        parse(spec).base for role in ("train", "preference", "val") for spec in params.data.splits[role]
    }
    measured = {parse(spec).base for role in params.benchmarks for spec in params.data.splits[role]}
    assert not fitted & measured  # no threshold is fitted on what goes into a published table
    read = fitted | measured
    own = {split for split in SIZES if split.startswith(f"{name}/")}
    assert read == own if name != "muse" else own < read  # all that is published of it


def test_the_quick_run_is_every_stage_in_less_of_everything(tmp_path: Path) -> None:
    quick, whole = compose(tmp_path / "quick.yaml", "scale=quick"), load(ROOT / "params.yaml")
    assert quick.systems == whole.systems
    assert quick.gate == whole.gate
    assert quick.data.splits.keys() == {"train", "preference", "val", *quick.benchmarks}
    assert {role.partition("/")[0] for parts in quick.data.splits.values() for role in parts} == {
        role.partition("/")[0] for parts in whole.data.splits.values() for role in parts
    }  # every layout is read
    for ours, theirs in (
        (quick.pretrain_vision, whole.pretrain_vision),
        (quick.sft.train, whole.sft.train),
        (quick.align.train, whole.align.train),
    ):
        assert ours.steps * ours.images < theirs.steps * theirs.images / 2
        assert ours.model_copy(update={"steps": theirs.steps, "images": theirs.images}) == theirs


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout


def _dvc(root: Path, *words: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["dvc", *words], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """This project's parameters, conf/ and DVC settings, with one stage that keeps what it was given."""
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    shutil.copy(ROOT / ".dvc/config", root / ".dvc")
    (root / ".dvc/config.local").write_text(f"[core]\n    site_cache_dir = {tmp_path / 'site'}\n")
    (root / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    shutil.copy(ROOT / "params.yaml", root)
    shutil.copytree(ROOT / "conf", root / "conf", symlinks=True)
    stage = {
        "cmd": "cp params.yaml seen.yaml",
        "params": ["model", "data", "align"],
        "outs": [{"seen.yaml": {"cache": False}}],
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"look": stage}}))
    for words in (
        ["init", "-q"],
        ["config", "user.name", "test"],
        ["config", "user.email", "t@example.org"],
        ["add", "-A"],
        ["commit", "-q", "-m", "state"],
    ):
        _git(root, *words)
    return root


def test_dvc_composes_them_and_plain_repro_does_not(project: Path) -> None:
    written = (project / "params.yaml").read_text()
    _dvc(project, "repro", "-q")
    assert (project / "params.yaml").read_text() == written == (project / "seen.yaml").read_text()

    edited = written.replace("  text: 0.3", "  text: 0.7")
    assert edited != written
    (project / "params.yaml").write_text(edited)
    words = [
        "exp",
        "run",
        "--temp",
        "-q",
        "-S",
        "model=llava-7b",
        "-S",
        "data=muse",
        "-S",
        "align.beta_t=0.2",
    ]
    _dvc(project, *words, "--name", "large")
    assert (project / "params.yaml").read_text() == edited  # a temporary workspace leaves this one alone
    refs = _git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    experiment = next(ref for ref in refs if ref.endswith("/large"))
    found = yaml.safe_load(_git(project, "show", f"{experiment}:params.yaml"))
    assert found["model"]["language"]["name"] == "llava-hf/llava-1.5-7b-hf"
    assert found["data"]["splits"]["val"] == ["muse/train[98%:]"]
    assert (found["align"]["beta_t"], found["align"]["text"]) == (0.2, 0.7)  # an edit counts, too
