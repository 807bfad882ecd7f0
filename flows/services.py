"""`make up` and `make down`: Prefect's server and worker and MLflow's pages, for this clone, on loopback.

    python -m flows.services up|down

Ports: `PREFECT_SERVER_API_PORT` (4200) and `MLFLOW_PORT` (5000). They listen on loopback unless
`PREFECT_SERVER_API_HOST` and `MLFLOW_HOST` say otherwise.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import heartbeats, orphans
from flows.by_hand import spare_loopback
from popen.errors import without_password
from popen.pipeline import CloneError, find_root, is_gone, process_name, state_folder
from popen.tracking import tracking_uri

POOL = "popen"
WORKER = "popen"
PATIENCE = 120.0  # seconds in which a service must answer
GRACE = 40.0  # seconds that a service has to end; a worker waits for its flows, they for their stages
_SETTINGS = "# written by `make up`, removed by `make down`\n"


class ServiceError(RuntimeError):
    """A service cannot be started."""


@dataclass(frozen=True)
class Service:
    """A program of ours: `words` after the interpreter, where it answers, which variable names its port."""

    name: str
    words: list[str]
    host: str = ""
    port: int = 0  # 0: it listens nowhere
    variable: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.port}"


def up(root: Path) -> dict[str, str]:
    """Start what does not run yet, wait until it answers, apply the deployments. Returns the addresses.

    Raises ServiceError; what was started by this call is then stopped again.
    """
    server, worker, pages = services(root)
    wanted = [service for service in (server, pages, worker) if service]
    missing = [service for service in wanted if not _running(root, service.name)]
    try:
        for service in missing:
            if service.port:
                _check_port(service)
                _start(root, service)
        address = _address(root, server)
        _wait(root, server, lambda: httpx.get(f"{address}/api/health").is_success)
        _write_settings(root, address)
        os.environ["PREFECT_API_URL"] = f"{address}/api"
        with temporary_settings({PREFECT_API_URL: f"{address}/api"}):  # of this process: read at its start
            left = orphans.close(root)
            if worker in missing:
                left += orphans.close_taken(root, POOL, WORKER)
                heartbeats.watch()
        for run in left:
            print(f"flow run {run} was left by a dead worker: closed as crashed", flush=True)
        heard = None
        if worker in missing:
            if httpx.get(f"{address}/api/work_pools/{POOL}").status_code == 404:
                _prefect(root, "work-pool", "create", POOL, "--type", "process")
            _prefect(root, "deploy", "--all")
            heard = _heartbeat(address)  # of the one that is dead
            _start(root, worker)
        _wait(root, worker, lambda: _heartbeat(address) not in (None, heard))
        if pages:
            _wait(root, pages, lambda: httpx.get(f"{_address(root, pages)}/health").is_success)
    except BaseException:
        for service in missing:
            _stop(root, service.name)
        raise
    records = _address(root, pages) if pages else without_password(tracking_uri(root))
    return {"Prefect": address, "MLflow": records}


def down(root: Path) -> list[str]:
    """Stop what `up` started, and only that. Returns the names of the services that ran."""
    # flows end with the worker and tell the server so
    stopped = [name for name in ("worker", "pages", "server") if _stop(root, name)]
    settings = root / "prefect.toml"
    if settings.is_file() and settings.read_text(encoding="utf-8").startswith(_SETTINGS):
        settings.unlink()
    return stopped


def services(root: Path) -> tuple[Service, Service, Service | None]:
    """Prefect's server and worker, and MLflow's pages, unless a server of MLflow's, which has pages, keeps
    the records."""
    env = os.environ
    host, port = (
        env.get("PREFECT_SERVER_API_HOST", "127.0.0.1"),
        int(env.get("PREFECT_SERVER_API_PORT", 4200)),
    )
    server = Service(
        "server",
        ["prefect", "server", "start"],
        host,
        port,
        "PREFECT_SERVER_API_PORT",
        {
            "PREFECT_SERVER_API_HOST": host,
            "PREFECT_SERVER_API_PORT": str(port),
            # of this clone alone: two servers on one database would take each other's runs
            "PREFECT_API_DATABASE_CONNECTION_URL": env.get(
                "PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{root / 'prefect.db'}"
            ),
            # who holds a slot of a limit is kept in files of this clone: what is kept in memory (the default)
            # a restart forgets, and the run that holds the slot is stopped minutes later
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_HOME": str(state_folder(root) / "prefect"),
        },
    )
    words = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", WORKER]
    worker = Service("worker", [*words, "--install-policy", "never"])
    if tracking_uri(root).startswith("http"):
        return server, worker, None
    host, port = env.get("MLFLOW_HOST", "127.0.0.1"), int(env.get("MLFLOW_PORT", 5000))
    words = ["mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    pages = Service(
        "pages",
        [*words, "--backend-store-uri", tracking_uri(root)],
        host,
        port,
        "MLFLOW_PORT",
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # seven processes for features that we do not use
    )
    return server, worker, pages


def _address(root: Path, service: Service) -> str:
    """Where a service answers that runs; it may have been started with another port than that of now."""
    return _pid_file(root, service.name).read_text(encoding="utf-8").split()[1]


def _check_port(service: Service) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the services themselves do
        try:
            probe.bind((service.host, service.port))
        except OSError as error:
            raise ServiceError(
                f"the {service.name} cannot listen on {service.host}:{service.port} ({error.strerror}): stop "
                f"what listens there, or choose another port: {service.variable}={service.port + 10} make up"
            ) from error


def _start(root: Path, service: Service) -> None:
    with _log(root, service.name).open("wb") as log:
        process = psutil.Popen(
            [sys.executable, "-m", *service.words],
            cwd=root,
            env=os.environ | service.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it outlives the terminal
        )
    _pid_file(root, service.name).write_text(f"{process_name(process)} {service.address}", encoding="utf-8")


def _wait(root: Path, service: Service, answers: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and _running(root, service.name):
        try:
            if answers():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.25)
    path = _log(root, service.name)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    raise ServiceError("\n".join([f"the {service.name} did not start; the end of {path}:", *lines]))


def _heartbeat(server: str) -> str | None:
    """When the server last heard of our worker. None where it counts as gone, which a dead one does only when
    three heartbeats are missing."""
    answer = httpx.post(f"{server}/api/work_pools/{POOL}/workers/filter", json={})
    workers: list[dict[str, Any]] = answer.raise_for_status().json()
    online = (worker for worker in workers if worker["name"] == WORKER and worker["status"] == "ONLINE")
    return next((str(worker["last_heartbeat_time"]) for worker in online), None)


def _prefect(root: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *words], cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        raise ServiceError(f"`prefect {' '.join(words)}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _write_settings(root: Path, server: str) -> None:
    """Every `prefect` command and flow that is started in the clone finds the server."""
    path = root / "prefect.toml"
    if path.exists() and not path.read_text(encoding="utf-8").startswith(_SETTINGS):
        raise ServiceError(f"{path} is in the way: `make up` writes it; move your settings to pyproject.toml")
    path.write_text(f'{_SETTINGS}[api]\nurl = "{server}/api"\n', encoding="utf-8")


def _stop(root: Path, name: str) -> bool:
    """End a service that `up` started; whether it ran."""
    path = _pid_file(root, name)
    runs = _running(root, name)
    if runs:
        _end(int(path.read_text(encoding="utf-8").split(":")[1]))
    path.unlink(missing_ok=True)
    return runs


def _end(pid: int) -> None:
    """SIGTERM to a service, SIGKILL to what is left of it and of the processes below it."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        process.terminate()
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs(family, GRACE)
    for survivor in alive:
        survivor.kill()
    psutil.wait_procs(alive, 5)


def _running(root: Path, name: str) -> bool:
    """Whether a service runs. Raises ServiceError where it was started on another machine: its number means
    another process here."""
    path = _pid_file(root, name)
    if not path.is_file():
        return False
    process = path.read_text(encoding="utf-8").split()[0]
    host = process.partition(":")[0]
    if host != socket.gethostname():
        raise ServiceError(
            f"the {name} of this clone was started on the machine {host}: `make down` there, or, if that "
            f"machine is gone or has another name now, remove {path}"
        )
    return not is_gone(process)


def _pid_file(root: Path, name: str) -> Path:
    return state_folder(root) / f"service-{name}"


def _log(root: Path, name: str) -> Path:
    return state_folder(root) / f"log-{name}.txt"


def main() -> None:
    if sys.argv[1:] not in (["up"], ["down"]):
        sys.exit("usage: python -m flows.services up|down")
    try:
        root = find_root(Path.cwd())
        spare_loopback()
        if sys.argv[1] == "up":
            for name, address in up(root).items():
                print(f"{name:8} {address}")
        else:
            print(f"stopped: {', '.join(down(root)) or 'nothing, as nothing ran'}")
    except (CloneError, ServiceError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
