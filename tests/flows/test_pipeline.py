"""The flow on small projects with the real DVC, Prefect and MLflow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from prefect import State
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL

from flows import pipeline
from flows.pipeline import _identity, popen_pipeline, remote_failed
from tests.flows.conftest import Make, commit, import_data, lock, stage, status
from tests.pipeline.test_pipeline import make_clone, repro

pytestmark = pytest.mark.usefixtures("server")
DIAMOND = {
    "a": stage("echo ${x} > a.txt", "a.txt", params=["x"]),
    "b": stage("cp a.txt b.txt", "b.txt", "a.txt"),
    "c": stage("sort a.txt > c.txt", "c.txt", "a.txt"),
    "d": stage("cat b.txt c.txt > d.txt", "d.txt", "b.txt", "c.txt"),
}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., State[Any]]:
    """Run the flow in a project; its last state."""

    def run(root: Path, **parameters: Any) -> State[Any]:
        monkeypatch.chdir(root)
        state: State[Any] = popen_pipeline(**parameters, return_state=True)
        return state

    return run


Start = Callable[..., State[Any]]


def ask(what: str, state: State[Any]) -> list[dict[str, Any]]:
    """What the server has of a flow run: "task_runs" or "artifacts"."""
    only = {"flow_runs": {"id": {"any_": [str(state.state_details.flow_run_id)]}}}
    answer = httpx.post(f"{PREFECT_API_URL.value()}/{what}/filter", json=only, timeout=60).raise_for_status()
    return list(answer.json())


def tasks(state: State[Any]) -> dict[str, dict[str, Any]]:
    """The task runs by name."""
    deadline = time.monotonic() + 120
    while True:  # they reach the server as events
        found = {run["name"]: run for run in ask("task_runs", state)}
        ended = all(run["end_time"] or run["state_name"] == "NotReady" for run in found.values())
        if (found and ended) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def names(state: State[Any]) -> dict[str, str | None]:
    """Task -> name of its state, of the stages."""
    return {name: run["state_name"] for name, run in tasks(state).items() if name != "mlflow run"}


def artifacts(state: State[Any]) -> dict[str, str]:
    """Key -> data of what the flow made; Prefect's own records of results have no key."""
    return {found["key"]: found["data"] for found in ask("artifacts", state) if found["key"]}


def mlflow_runs(root: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    found = client.get_experiment_by_name("popen")
    return list(client.search_runs([found.experiment_id])) if found else []


def test_stages_side_by_side_share_the_cores(
    make: Make, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two with a thread for every core each take many times as long as two that share."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = "printenv OMP_NUM_THREADS > {0} || echo all > {0}"
    below = {"a": [], "b": ["a.txt"], "c": ["a.txt"], "d": ["b.txt", "c.txt"]}
    out = "{}.txt".format
    root = make({name: stage(told.format(out(name)), out(name), *needs) for name, needs in below.items()})
    start(root, at_once=2).result()
    half = str(max(1, len(os.sched_getaffinity(0)) // 2))
    found = {name: (root / out(name)).read_text().strip() for name in below}
    assert found == {"a": "all", "b": half, "c": half, "d": "all"}

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    start(root, force=True).result()
    assert {(root / out(name)).read_text().strip() for name in below} == {"7"}


def test_it_does_what_dvc_repro_does(make: Make, start: Start, tmp_path: Path) -> None:
    root = make(DIAMOND, x=1)
    clone = tmp_path / "plain"
    subprocess.run(["git", "clone", "-q", str(root), str(clone)], check=True)
    subprocess.run(["dvc", "repro", "-q"], cwd=clone, check=True)

    first = start(root)
    assert first.result() == dict.fromkeys("abcd", "ran")
    assert names(first) == dict.fromkeys("abcd", "Completed")
    assert lock(root) == lock(clone)
    assert status(root) == {}
    runs = tasks(first)
    assert {i["id"] for i in runs["d"]["task_inputs"]["wait_for"]} == {runs["b"]["id"], runs["c"]["id"]}

    again = start(root)
    assert again.result() == dict.fromkeys("abcd", "cached")
    assert names(again) == dict.fromkeys("abcd", "Cached")
    assert len(mlflow_runs(root)) == 1  # nothing ran, so nothing is recorded


def test_a_change_that_changes_no_output_stops_where_it_is(make: Make, start: Start) -> None:
    root = make(DIAMOND | {"a": stage("echo 1 > a.txt", "a.txt", params=["x"])}, x=1)
    subprocess.run(["dvc", "repro", "-q"], cwd=root, check=True)
    (root / "params.yaml").write_text("x: 2\n")
    assert start(root).result() == {"a": "ran", "b": "cached", "c": "cached", "d": "cached"}
    (root / "params.yaml").write_text("x: 1\n")  # computed before
    assert start(root, targets=["b"]).result() == {"a": "restored", "b": "cached"}
    assert start(root, targets=["b"], force=True).result() == {"a": "ran", "b": "ran"}
    assert status(root) == {}


def test_independent_stages_run_side_by_side_as_far_as_allowed(make: Make, start: Start) -> None:
    meet = (
        "touch {0}.here; for i in $(seq 100); do test -e {1}.here && break; sleep .1; done; "
        "test -e {1}.here && touch {0}.txt"
    )
    root = make({one: stage(meet.format(one, other), f"{one}.txt") for one, other in ("bc", "cb")})
    assert start(root).result() == {"b": "ran", "c": "ran"}
    assert set(lock(root)["stages"]) == {"b", "c"}
    alone = "mkdir busy.here && sleep 1 && rmdir busy.here"
    stages = {name: stage(f"{alone} && touch {name}.txt", f"{name}.txt") for name in "bcde"}
    (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    assert start(root, at_once=1).result() == dict.fromkeys("bcde", "ran")
    assert set(lock(root)["stages"]) == set("bcde")
    assert status(root) == {}


def test_a_failed_stage_fails_the_flow_and_not_its_neighbours(make: Make, start: Start) -> None:
    bad = stage("echo 1 >> tries.here; echo connection refused; false", "b.txt", "a.txt")
    root = make(DIAMOND | {"b": bad}, x=1)
    state = start(root)
    assert state.is_failed()
    with pytest.raises(pipeline.PipelineError, match=r"failed: b; not run, because they need them: d\."):
        state.result()
    assert names(state) == {"a": "Completed", "b": "Failed", "c": "Completed", "d": "NotReady"}
    assert "exited with 1" in tasks(state)["b"]["state"]["message"]
    assert (root / "tries.here").read_text() == "1\n"  # no second try
    assert [run.info.status for run in mlflow_runs(root)] == ["FAILED"]
    assert set(artifacts(state)) == {"mlflow"}  # no results: those that lie there are not of this run


def test_the_storage_of_the_data_may_come_back(
    make: Make, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Storage(BaseHTTPRequestHandler):
        away, version = False, 1

        def do_GET(self) -> None:
            ok = not Storage.away
            self.send_response(200 if ok else 503)
            self.send_header("ETag", f'"{Storage.version}"')
            self.send_header("Content-Length", "1" if ok else "0")
            self.end_headers()
            if ok and self.command == "GET":
                self.wfile.write(b"1")

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Storage) as storage:
        threading.Thread(target=storage.serve_forever, daemon=True).start()
        root = make({"a": stage("cp data a.txt", "a.txt", "data")})
        import_data(root, f"http://127.0.0.1:{storage.server_port}/data")
        monkeypatch.setattr(pipeline, "PAUSES", [0.1, 0.2, 0.4])
        failures: list[bool] = []

        def failed(*words: Any) -> bool:
            failures.append(remote_failed(*words))
            Storage.away = len(failures) < 2
            return failures[-1]

        monkeypatch.setattr(pipeline, "remote_failed", failed)
        Storage.away, Storage.version = True, 2
        state = start(root)
        storage.shutdown()
    assert state.result() == {"data.dvc": "ran", "a": "ran"}
    assert failures == [True, True]
    assert tasks(state)["data.dvc"]["run_count"] == 3
    assert tasks(state)["a"]["run_count"] == 1


def test_a_committer_is_named_where_git_knows_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC keeps an experiment as a commit, and fails without one: on a fresh machine."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "me")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert _identity(tmp_path) == {
        "GIT_AUTHOR_NAME": "me",
        "GIT_AUTHOR_EMAIL": "popen@localhost",
        "GIT_COMMITTER_NAME": "popen",
        "GIT_COMMITTER_EMAIL": "popen@localhost",
    }
    subprocess.run(["git", "config", "user.email", "me@example.org"], cwd=tmp_path, check=True)
    assert _identity(tmp_path) == {}


def test_an_override_becomes_an_experiment(make: Make, start: Start) -> None:
    report = 'mkdir -p metrics; echo \'{"muse": {"sft": {"gIoU": 0.${x}}}}\' > metrics/summary.json'
    entry = stage(report, params=["x"], metrics=[{"metrics/summary.json": {"cache": False}}])
    root = make({"a": entry, "fails": stage("exit ${x}", "f.txt")}, x=1)
    assert start(root, targets=["a"]).is_completed()
    commit(root)
    before = {path: path.read_bytes() for path in (root / "params.yaml", root / "metrics/summary.json")}
    state = start(root, targets=["a"], overrides=["x=5"])
    name = state.result()["experiment"]
    assert {path: path.read_bytes() for path in before} == before
    assert status(root) == {"fails": status(root)["fails"]}
    shown = subprocess.check_output(["dvc", "exp", "show", "--csv"], cwd=root, text=True)
    (row,) = (line.split(",") for line in shown.splitlines() if name in line)
    assert "0.5" in row
    assert "| muse | sft | 0.5 |" in artifacts(state)["results"]
    assert [run.info.status for run in mlflow_runs(root)] == ["FINISHED", "FINISHED"]
    assert "nowhere" in str(start(root, targets=["nowhere"], overrides=["x=6"]).message)
    failed = start(root, targets=["fails"], overrides=["x=6"])
    assert failed.is_failed()
    assert "exited with 6" in str(failed.message)


def test_the_page_shows_results_examples_and_the_way_to_mlflow(make: Make, start: Start) -> None:
    report = "mkdir reports metrics; printf png > reports/teaser.png; cp given.json metrics/summary.json"
    entry = stage(report, "reports", "given.json", metrics=[{"metrics/summary.json": {"cache": False}}])
    root = make({"report": entry, "other": stage("touch b.txt", "b.txt")})
    figures = {"gIoU": 0.123456, "questions": 7, "chair_s": None}
    (root / "given.json").write_text(json.dumps({"muse": {"popen": figures}, "comparisons": [{"low": 1}]}))
    made = artifacts(start(root, targets=["report"]))
    assert made["results"].splitlines()[2] == "| muse | popen | 0.1235 |  |  |  |  |  |  | 7 |"
    assert made["examples"] == "data:image/png;base64,cG5n"
    (parent,) = mlflow_runs(root)
    page = f"http://127.0.0.1:5000/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
    assert f"]({page}): finished" in made["mlflow"]
    assert set(artifacts(start(root, targets=["other"]))) == {"mlflow"}  # those results are not of this run


def test_the_stages_record_below_one_parent(make: Make, start: Start) -> None:
    root = make({n: stage(f"echo $POPEN_PARENT_RUN > {n}.txt", f"{n}.txt") for n in "ab"})
    start(root)
    (parent,) = mlflow_runs(root)
    assert {(root / f"{n}.txt").read_text().strip() for n in "ab"} == {parent.info.run_id}
    assert parent.data.tags["stage"] == "pipeline"
    assert parent.info.status == "FINISHED"


def test_a_tracking_server_that_stays_away_stops_no_stage(
    make: Make, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import parent_run

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    impatient = parent_run.start_parent.with_options(retry_delay_seconds=0.1)
    monkeypatch.setattr(parent_run, "start_parent", impatient)
    root = make({"a": stage("echo ${x} > a.txt", "a.txt", params=["x"])}, x=1)
    state = start(root)
    assert state.result() == {"a": "ran"}
    assert tasks(state)["mlflow run"]["run_count"] == 5


@pytest.mark.slow
def test_the_first_stages_of_this_project(start: Start, tmp_path: Path) -> None:
    """The whole of it takes minutes: tests/pipeline runs it with plain `dvc repro`."""
    clone = make_clone(tmp_path)
    state = start(clone, targets=["pretrain_vision"])
    assert state.result() == {"data.dvc": "ran", "validate": "ran", "pretrain_vision": "ran"}
    parent, *children = sorted(mlflow_runs(clone), key=lambda run: run.info.start_time)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert sorted(run.data.tags["stage"] for run in children) == ["pretrain_vision", "validate"]
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert artifacts(state)["mlflow"].count("/#/experiments/") == 3
    assert "Data and pipelines are up to date." in repro(clone, "pretrain_vision")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_flow_leaves_no_dvc_behind(make: Make, server: str, number: signal.Signals) -> None:
    root = make({"a": stage("touch begun.here; exec sleep 7776", "a.txt")})
    environment = os.environ | {"PREFECT_API_URL": server, "PYTHONPATH": str(Path(__file__).parents[2])}
    flow = subprocess.Popen([sys.executable, "-m", "flows.pipeline"], cwd=root, env=environment)
    deadline = time.monotonic() + 240
    while not (root / "begun.here").exists():
        assert flow.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(flow.pid).children(recursive=True)
    dvc = [child for child in children if "repro" in child.cmdline()]
    assert dvc
    flow.send_signal(number)
    assert flow.wait(120) != 0
    _, alive = psutil.wait_procs(children if number == signal.SIGTERM else dvc, timeout=60)
    assert not alive
    for child in children:  # a stage of shell words knows nothing of its parent's death; ours do
        if child.is_running():
            child.kill()
    (left,) = (root / ".popen").glob("flow-*")
    dead = UUID(left.name.removeprefix("flow-"))
    with get_client(sync_client=True) as client:
        if number == signal.SIGTERM:
            assert [run.info.status for run in mlflow_runs(root)] == ["KILLED"]
            assert client.read_flow_run(dead).state_name == "Crashed"
            return
        assert client.read_flow_run(dead).state_name == "Running"  # the next run closes it
        (root / "dvc.yaml").write_text(json.dumps({"stages": {"a": stage("touch a.txt", "a.txt")}}))
        subprocess.run([sys.executable, "-m", "flows.pipeline"], cwd=root, env=environment, check=True)
        closed: FlowRun = client.read_flow_run(dead)
        assert closed.state_name == "Crashed"
    assert not left.exists()
    assert sorted(run.info.status for run in mlflow_runs(root)) == ["FINISHED", "KILLED"]
