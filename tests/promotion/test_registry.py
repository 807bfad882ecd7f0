"""Real MLflow on SQLite: versions with lineage, aliases that move whole, also when a step is the last one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from popen import cli
from popen import params as parameters
from popen.promotion import registry
from popen.promotion.card import card
from popen.promotion.gate import Check, Verdict
from popen.promotion.listing import table
from popen.promotion.opponent import download
from popen.promotion.registry import RegistryError, aliases, lineage, register, versions

GATE = parameters.load(Path(__file__).parents[2] / "params.yaml").gate
GOOD = Verdict(True, "on 8 questions", (Check("gIoU", True, "gIoU: 0.5 -> 0.6", 0.5, 0.6, 0.1, 0.05, 0.15),))
BAD = Verdict(False, "on 8 questions", (Check("gIoU", False, "gIoU: worse", 0.5, 0.4, -0.1, -0.2, 0.0),))
WRITES = ("create_", "set_", "update_", "delete_", "log_")


class Killed(BaseException):
    """The process is gone."""


def killed() -> None:
    raise Killed


class Mortal:
    """The real client; just before write number `writes` comes the fault."""

    def __init__(self, client: MlflowClient, writes: int, fault: Callable[[], object]) -> None:
        self.client, self.left, self.fault = client, writes, fault

    def __getattr__(self, name: str) -> Any:
        if name.startswith(WRITES):
            if self.left == 0:
                self.fault()
            self.left -= 1
        return getattr(self.client, name)


def new(client: Any, clone: Path, lock: str) -> ModelVersion:
    return register(client, clone, replace(lineage(clone), lock=lock), "# card")


def champion(client: MlflowClient) -> ModelVersion | None:
    return registry.version(client, registry.CHAMPION)


def made_champion(client: MlflowClient, clone: Path, lock: str) -> str:
    version = new(client, clone, lock)
    assert registry.promote(client, version, GOOD, champion(client), GATE)
    return str(version.version)


def test_a_version_has_its_lineage_and_is_found_again(empty: MlflowClient, clone: Path) -> None:
    facts = lineage(clone)
    one = register(empty, clone, facts, card(clone, facts))
    two = register(empty, clone, facts, "another card")
    assert [str(v.version) for v in versions(empty)] == [str(one.version)] == [str(two.version)]
    assert aliases(empty) == {registry.CHALLENGER: str(one.version)}
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=clone, text=True).strip()
    assert (one.tags["git.commit"], one.tags["dvc.lock"], one.tags["data"]) == (head, facts.lock, facts.data)
    assert json.loads(one.tags["params"])["gate"]["benchmark"] == "muse_val"
    kept = json.loads(one.tags["figures"])["muse_val"]
    assert {"sft", "control", "chosen", "popen", "popen+ensemble"} <= set(kept)
    base = Path(str(one.source).removeprefix("file://"))
    written = (base / "lineage" / facts.lock / "MODEL_CARD.md").read_text()
    assert all(f"## {part}" in written for part in ("Data", "Figures", "Known failures", "Licence"))
    assert f"| muse_val | control | {100 * kept['control']['gIoU_matched']:.1f} |" in written
    assert "weak at questions of the kind" in written


def test_versions_of_the_same_weights_keep_their_own_lineage_and_card(
    empty: MlflowClient, clone: Path, tmp_path: Path
) -> None:
    """`dvc.lock` also changes where a test set does, of which the weights know nothing."""
    old = {name: (clone / name).read_bytes() for name in registry.LINEAGE_FILES}
    try:
        one = register(empty, clone, lineage(clone), "# first")
        new = {name: content + b"\n# another test set\n" for name, content in old.items()}
        for name, content in new.items():
            (clone / name).write_bytes(content)
        two = register(empty, clone, lineage(clone), "# second")
        assert register(empty, clone, lineage(clone), "# third").version == two.version
    finally:
        for name, content in old.items():
            (clone / name).write_bytes(content)
    assert one.version != two.version
    assert one.tags["bundle"] == two.tags["bundle"]
    for version, files, words in ((one, old, "# first"), (two, new, "# second")):
        folder = tmp_path / str(version.version)  # as docs/operations.md says
        mlflow.artifacts.download_artifacts(f"models:/popen/{version.version}", dst_path=str(folder))
        kept = folder / "lineage" / version.tags["dvc.lock"]
        assert {name: (kept / name).read_bytes() for name in registry.LINEAGE_FILES} == files
        assert (kept / "MODEL_CARD.md").read_text() == words
        assert str((kept / "MODEL_CARD.md").relative_to(folder)) in str(version.description)


def test_the_registered_model_answers_its_own_example(
    empty: MlflowClient, clone: Path, weights: Path
) -> None:
    one = new(empty, clone, "a")
    model = mlflow.pyfunc.load_model(f"models:/{registry.NAME}@{registry.CHALLENGER}")
    (answer,) = model.predict(model.input_example)
    assert set(answer) == {"answer", "masks", "scores", "seconds"}
    assert model.metadata.get_input_schema().input_names() == ["image", "question"]
    fetched = download(one, clone / "fetched")
    names = {file.relative_to(weights) for file in weights.rglob("*")}
    assert {file.relative_to(fetched) for file in fetched.rglob("*")} == names


def test_files_that_were_moved_away_are_missed_in_one_line(empty: MlflowClient, clone: Path) -> None:
    """MLflow's database has absolute places; of one that is not there MLflow itself fetches nothing."""
    one = new(empty, clone, "a")
    files = clone / "mlartifacts"
    files.rename(clone / "elsewhere")
    try:
        with pytest.raises(
            RegistryError, match=rf"files of version {one.version} are gone from where MLflow's"
        ):
            download(one, clone / "nothing")
    finally:
        (clone / "elsewhere").rename(files)
    assert (download(one, clone / "again") / "settings.json").is_file()


def test_what_was_not_made_or_recorded_is_not_registered(empty: MlflowClient, clone: Path) -> None:
    with pytest.raises(RegistryError, match="never recorded in MLflow"):
        register(empty, clone, replace(lineage(clone), bundle="0" * 16), "# card")
    assert versions(empty) == []
    with pytest.raises(RegistryError, match=r"no dvc.lock, no the hash of data/.*dvc repro"):
        lineage(Path(__file__).parent)


def test_the_better_one_moves_up_and_the_worse_one_stays(empty: MlflowClient, clone: Path) -> None:
    first, second = made_champion(empty, clone, "a"), made_champion(empty, clone, "b")
    assert aliases(empty) == {registry.CHAMPION: second, registry.PREVIOUS: first}
    third = new(empty, clone, "c")
    assert not registry.promote(empty, third, BAD, champion(empty), GATE)
    assert aliases(empty) == {
        registry.CHAMPION: second,
        registry.PREVIOUS: first,
        registry.CHALLENGER: str(third.version),
    }
    refused = empty.get_model_version(registry.NAME, third.version)
    assert refused.description == f"{BAD.words} (champion: version {second})"
    gate = json.loads(refused.tags["gate"])
    assert (gate["passed"], gate["against"], gate["checks"][0]["gain"]) == (False, second, -0.1)
    assert gate["gate"] == GATE.model_dump(mode="json")


def test_a_verdict_over_another_champion_does_not_count(empty: MlflowClient, clone: Path) -> None:
    made_champion(empty, clone, "a")
    before = champion(empty)
    slow = new(empty, clone, "slow")
    made_champion(empty, clone, "b")
    with pytest.raises(RegistryError, match=r"the champion changed to version 3 .*run `retrain` again"):
        registry.promote(empty, slow, GOOD, before, GATE)
    assert "gate" not in empty.get_model_version(registry.NAME, slow.version).tags


def test_rollback_and_back_again(empty: MlflowClient, clone: Path) -> None:
    first = made_champion(empty, clone, "a")
    with pytest.raises(RegistryError, match="no previous champion"):
        registry.rollback(empty)
    second = made_champion(empty, clone, "b")
    assert registry.rollback(empty) == (first, second)
    assert aliases(empty) == {registry.CHAMPION: first, registry.PREVIOUS: second}
    assert registry.ROLLED_BACK in empty.get_model_version(registry.NAME, second).tags
    assert new(empty, clone, "b").version == int(second)
    assert registry.CHALLENGER not in aliases(empty)  # what a person took down is no challenger
    assert registry.rollback(empty) == (second, first)
    assert registry.ROLLED_BACK not in empty.get_model_version(registry.NAME, second).tags


def test_the_weights_of_a_version_that_was_rolled_back_are_known_again(
    empty: MlflowClient, clone: Path
) -> None:
    """In a version of their own: `dvc.lock` also changes where a test set does."""
    made_champion(empty, clone, "a")
    second = made_champion(empty, clone, "b")
    twin = new(empty, clone, "c")
    assert registry.rolled_back(empty, twin) is None
    registry.rollback(empty)
    undone = registry.rolled_back(empty, twin)
    assert undone is not None
    assert str(undone.version) == second
    other = register(empty, clone, replace(lineage(clone), lock="d"), "# card")
    other.tags["bundle"] = "0" * 16
    assert registry.rolled_back(empty, other) is None


def test_a_rollback_that_is_killed_is_finished(empty: MlflowClient, clone: Path) -> None:
    first, second = made_champion(empty, clone, "a"), made_champion(empty, clone, "b")
    crashes = 0
    for writes in range(7):
        mortal: Any = Mortal(empty, writes, killed)
        try:
            registry.rollback(mortal)
        except Killed:
            crashes += 1
            if writes == 0:  # nothing was noted: nothing happened
                assert aliases(empty)[registry.CHAMPION] == second
                registry.rollback(empty)
            registry.finish(empty)
        assert aliases(empty) == {registry.CHAMPION: first, registry.PREVIOUS: second}
        first, second = second, first
    assert crashes >= 5


def test_the_command_line(empty: MlflowClient, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    run = CliRunner()
    first, second = made_champion(empty, clone, "a"), made_champion(empty, clone, "b")
    listed = run.invoke(cli.app, ["models"])
    assert listed.exit_code == 0, listed.output
    head, newest, oldest = listed.output.splitlines()
    assert head.split()[:4] == ["version", "alias", "made", "commit"]
    assert newest.split()[:2] == [second, "champion"]
    assert oldest.split()[:2] == [first, "previous"]
    assert lineage(clone).commit[:8] in newest
    assert f"passed (against {first})" in newest
    assert "gIoU=0.600(+0.100)" in newest
    assert "passed (first)" in oldest
    done = run.invoke(cli.app, ["models", "rollback"])
    assert done.output == f"the champion is version {first} again; version {second} is kept as previous\n"
    assert "rolled back" in table(empty).splitlines()[1]


def test_without_a_registry_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = "http://me:secret@127.0.0.1:9"
    for uri, says in (("", "no registry yet"), (away, "MLflow at http://me@127.0.0.1:9 cannot be reached")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setattr("sys.argv", ["popen", "models"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        error = capsys.readouterr().err
        assert ended.value.code == 1
        assert error.startswith("popen: error: ")
        assert says in error
        assert "secret" not in error
        assert error.count("\n") == 1
    assert not (tmp_path / "mlflow.db").exists()
