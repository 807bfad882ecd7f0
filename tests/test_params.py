"""params.yaml is complete, and what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from popen.params import ParamsError, load

PARAMS = Path(__file__).parents[1] / "params.yaml"


def test_the_committed_file_fits() -> None:
    params = load(PARAMS)
    raw = yaml.safe_load(PARAMS.read_text())
    assert params.sft.train.steps == raw["sft"]["train"]["steps"]
    assert params.model_dump(mode="json", exclude_unset=True).keys() == raw.keys()
    assert set(params.benchmarks) <= params.data.splits.keys()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(params, "seed", 1)  # noqa: B010


def _unknown(raw: Any) -> None:
    raw["align"]["gama"] = 2.0


def _unknown_at_the_top(raw: Any) -> None:
    raw["sftt"] = {}


def _missing(raw: Any) -> None:
    del raw["sft"]["train"]["lr"]


def _wrong_type(raw: Any) -> None:
    raw["scenes"]["train"] = "many"


def _out_of_range(raw: Any) -> None:
    raw["contract"]["tolerated"] = 1.5


def _not_a_choice(raw: Any) -> None:
    raw["ensemble"]["mode"] = "median"


def _judge_without_a_model(raw: Any) -> None:
    raw["text_preferences"]["source"] = "judge"


def _unknown_of_the_judge(raw: Any) -> None:
    raw["text_preferences"]["judge"]["api_key"] = "sk-1"  # a key belongs into the environment


def _corrections_elsewhere(raw: Any) -> None:
    raw["text_preferences"]["people"]["file"] = "../answers.jsonl"  # DVC would not see it change


def _two_masks(raw: Any) -> None:
    raw["mask_preferences"]["perturbed"] = 2  # no medium between a high and a low


def _no_such_role(raw: Any) -> None:
    raw["benchmarks"] = ["muse_tset_less"]  # would have cost all trainings


def _no_such_system(raw: Any) -> None:
    raw["systems"] = ["sfx"]


def _heads_too_many(raw: Any) -> None:
    raw["model"]["decoder"]["heads"] = 5


def _sides_in_the_wrong_order(raw: Any) -> None:
    raw["mask_preferences"]["side"] = [0.5, 0.2]


@pytest.mark.parametrize(
    ("spoil", "key", "problem"),
    [
        (_unknown, "align.gama", "there is no such parameter"),
        (_unknown_at_the_top, "sftt", "there is no such parameter"),
        (_missing, "sft.train.lr", "is missing"),
        (_wrong_type, "scenes.train", "valid integer"),
        (_out_of_range, "contract.tolerated", "less than or equal to 1"),
        (_sides_in_the_wrong_order, "mask_preferences.side", "0 < low <= high <= 1"),
        (_judge_without_a_model, "text_preferences", "needs judge.model"),
        (_unknown_of_the_judge, "text_preferences.judge.api_key", "there is no such parameter"),
        (_corrections_elsewhere, "text_preferences.people.file", "should match pattern"),
        (_two_masks, "mask_preferences.perturbed", "greater than or equal to 3"),
        (_no_such_role, "benchmarks", "no role 'muse_tset_less'; it has "),
        (_no_such_system, "systems.0", "'popen+ensemble'"),
        (_heads_too_many, "model.decoder", "width 96 is no multiple of heads 5"),
        (_not_a_choice, "ensemble.mode", "'attention', 'mean'"),
    ],
)
def test_a_bad_key_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[Any], None], key: str, problem: str
) -> None:
    raw = yaml.safe_load(PARAMS.read_text())
    spoil(raw)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} does not fit:"
    assert len(lines) == 2
    assert lines[1].startswith(f"  {key}: ")
    assert problem in lines[1]


def test_published_towers_stay_frozen(tmp_path: Path) -> None:
    raw = yaml.safe_load(PARAMS.read_text())
    raw["model"]["vision"]["pretrained"] = "openai"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError, match=r"\n  sft\.vision must be 0"):
        load(tmp_path / "params.yaml")


def test_a_role_that_is_null_is_left_out(tmp_path: Path) -> None:
    raw = yaml.safe_load(PARAMS.read_text())
    raw["data"]["splits"]["refcoco"] = None
    raw["benchmarks"].remove("refcoco")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    left = load(PARAMS).data.splits.keys() - load(tmp_path / "params.yaml").data.splits.keys()
    assert left == {"refcoco"}


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ParamsError, match=r"params\.yaml: no such file; name another one, or run inside a clone"
    ):
        load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(ParamsError, match="is not valid YAML"):
        load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("")
    with pytest.raises(ParamsError, match="holds no parameters"):
        load(tmp_path / "params.yaml")
