"""Servers of other people's, on loopback and free ports, that can be stopped and started again in place."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg2
from moto.server import ThreadedMotoServer

from tests.waiting import free_port, until


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Postgres:
    """A cluster of its own, set up like Debian's: the superuser by the socket, others by password over TCP.
    PostgreSQL refuses root, so there it runs as its own user."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.port, self.programs = free_port(), programs
        self._folder, self._data, self._log = folder, folder / "data", folder / "log.txt"
        words = ["--auth-local=trust", "--auth-host=scram-sha-256", "--username=postgres", "--no-sync"]
        self._run("initdb", *words)
        settings = (
            f"port = {self.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{folder}'\n"
        )
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(settings)

    def start(self) -> None:
        self._run("pg_ctl", "start", "--wait", f"--log={self._log}")

    def stop(self) -> None:
        """At once, as in a crash: what was not committed is lost."""
        self._run("pg_ctl", "stop", "--mode=immediate")

    def ask(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """As superuser."""
        words = {"host": str(self._folder), "port": self.port, "user": "postgres", "dbname": database}
        connection = psycopg2.connect(**words)
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def address(self, database: str, driver: str = "postgresql") -> str:
        return f"{driver}://popen:secret@127.0.0.1:{self.port}/{database}"

    def _run(self, program: str, *words: str) -> None:
        as_another: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            as_another = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        done = subprocess.run(
            [self.programs / program, "-D", self._data, *words],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # pg_ctl's server would hold a pipe open
            stderr=subprocess.DEVNULL,
            **as_another,
        )
        assert done.returncode == 0, f"{program} failed; see {self._log}"


def postgres_programs() -> Path | None:
    """The folder of Debian's newest PostgreSQL, or of that on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = str(found[-1]) if found else shutil.which("initdb")
    return Path(path).parent if path else None


@contextmanager
def running(
    words: list[str], folder: Path, log: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the background, ended with the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # Prefect's worker does not always end when it is asked
            process.kill()
            process.wait()


class Sshd:
    """OpenSSH's server for this user alone, with keys of its own; `client` is a folder that serves as the
    client's home, in whose `.ssh/config` the server is the host `store`."""

    def __init__(self, folder: Path, program: Path) -> None:
        self.files, self.client, self.port = folder / "files", folder / "home", free_port()
        keys = self.client / ".ssh"
        keys.mkdir(parents=True)
        self.files.mkdir()
        for key in (folder / "host_key", keys / "id_ed25519"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        user = pwd.getpwuid(os.geteuid()).pw_name
        (keys / "config").write_text(
            f"Host store\n  HostName 127.0.0.1\n  Port {self.port}\n  User {user}\n"
            f"  IdentityFile {keys / 'id_ed25519'}\n"
        )
        settings = f"""
            ListenAddress 127.0.0.1:{self.port}
            HostKey {folder / "host_key"}
            AuthorizedKeysFile {keys / "id_ed25519.pub"}
            PidFile none
            PasswordAuthentication no
            UsePAM no
            StrictModes no
            Subsystem sftp internal-sftp
        """
        (folder / "sshd_config").write_text(settings)
        self._words = [str(program), "-D", "-e", "-f", str(folder / "sshd_config")]
        self._log = folder / "log.txt"
        self._process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # as Debian's service does at its start

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(lambda: listens(self.port))

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(60)

    def lose(self) -> None:
        """Everything that was stored."""
        shutil.rmtree(self.files)
        self.files.mkdir()


class S3:
    """moto's S3 server with the bucket `popen`. It keeps its objects while it is stopped."""

    def __init__(self) -> None:
        self.address = f"http://127.0.0.1:{free_port()}"
        self._server = ThreadedMotoServer("127.0.0.1", int(self.address.rpartition(":")[2]), verbose=False)
        self.start()
        self.lose()

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def lose(self) -> None:
        """Everything that was stored."""
        httpx.post(f"{self.address}/moto-api/reset").raise_for_status()
        httpx.put(f"{self.address}/popen").raise_for_status()
