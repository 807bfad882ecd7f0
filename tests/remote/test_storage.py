"""What runs compute, shared through an SSH and an S3 remote; each away for a while."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL

from flows import pipeline
from tests.flows.conftest import Make, commit, lock, stage
from tests.flows.test_pipeline import Start, start, tasks
from tests.remote.servers import S3, Sshd
from tests.waiting import until

__all__ = ["start"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]


@dataclass
class Remote:
    """A server, and what makes it a DVC remote: commands for the repository, variables for each machine."""

    server: Sshd | S3
    commands: list[str]
    environment: dict[str, str]


def ssh(folder: Path) -> Remote:
    program = shutil.which("sshd", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if program is None:
        pytest.skip("no SSH server here: apt install openssh-server")
    server = Sshd(folder, Path(program))
    server.start()
    return Remote(server, [f"remote add -d store ssh://store{server.files}"], {"HOME": str(server.client)})


def s3(folder: Path) -> Remote:
    server = S3()
    commands = ["remote add -d store s3://popen/store", f"remote modify store endpointurl {server.address}"]
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    keys |= {"AWS_MAX_ATTEMPTS": "1"}  # DVC fails soon, not after many tries of its own
    return Remote(server, commands, keys)


@pytest.fixture(scope="module", params=[ssh, s3])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    remote = request.param(tmp_path_factory.mktemp("store"))
    yield remote
    remote.server.stop()


@pytest.fixture
def remote(store: Remote, monkeypatch: pytest.MonkeyPatch) -> Remote:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return store


def sharing(root: Path, remote: Remote) -> Path:
    for words in remote.commands:
        subprocess.run(["dvc", *words.split()], cwd=root, check=True)
    commit(root)
    return root


def test_what_one_clone_has_computed_another_restores(
    make: Make, start: Start, remote: Remote, tmp_path: Path
) -> None:
    cmd = "echo {0} >> ran.here; echo {0} > {0}.txt"
    # what depends on nothing DVC never takes from the run cache
    root = sharing(make({n: stage(cmd.format(n), f"{n}.txt", params=["x"]) for n in "ab"}, x=1), remote)
    other = tmp_path / "other"
    subprocess.run(["git", "clone", "-q", str(root), str(other)], check=True)
    assert start(root, share=True).result() == {"a": "ran", "b": "ran"}
    assert start(other, share=True).result() == {"a": "restored", "b": "restored"}
    assert not (other / "ran.here").exists()
    assert lock(other) == lock(root)


def failed_twice(task: str) -> bool:
    waiting = {"name": {"any_": [task]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
    answer = httpx.post(
        f"{PREFECT_API_URL.value()}/task_runs/filter", json={"task_runs": waiting}, timeout=60
    )
    return any(run["run_count"] >= 2 for run in answer.raise_for_status().json())


def test_storage_that_fails_twice_and_then_works(
    make: Make, start: Start, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is down when the run fetches, and goes down again while a stage works."""
    wait = "touch begun.here; until test -e go.here; do sleep .1; done;"
    root = sharing(make({"a": stage(f"{wait} echo 1 > a.txt", "a.txt", params=["y"])}, y=1), remote)
    monkeypatch.setattr(pipeline, "PAUSES", [2.0, 4.0, 8.0, 16.0])
    remote.server.stop()

    def outages() -> None:
        until(lambda: failed_twice("pull"))
        remote.server.start()
        until((root / "begun.here").exists)
        remote.server.stop()
        (root / "go.here").touch()
        until(lambda: failed_twice("push"))
        remote.server.start()

    thread = threading.Thread(target=outages)
    thread.start()
    state = start(root, share=True)
    thread.join()
    assert state.result() == {"a": "ran"}
    assert min(tasks(state)[direction]["run_count"] for direction in ("pull", "push")) >= 3
    fetch_anew(root)

    remote.server.lose()  # from any clone that has it, all of it comes back
    subprocess.run(["dvc", "push", "-q", "--run-cache"], cwd=root, check=True)
    fetch_anew(root)


def fetch_anew(root: Path) -> None:
    shutil.rmtree(root / ".dvc/cache")
    (root / "a.txt").unlink()
    subprocess.run(["dvc", "pull", "-q", "--run-cache"], cwd=root, check=True)
    assert (root / "a.txt").read_text() == "1\n"
    assert any((root / ".dvc/cache/runs").iterdir())
