"""`mlflow models serve` as the documentation has it: a real server, real requests, good and bad."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from popen.masks import decode
from popen.predict import Predictor
from popen.promotion.registry import CHAMPION, NAME
from popen.samples import Sample
from popen.stages.model_record import record
from tests.test_serving import bundle  # noqa: F401

Data = tuple[Path, list[Sample]]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def home(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:  # noqa: F811
    """A folder with a registry that has one version, the champion."""
    home = tmp_path_factory.mktemp("registry")
    uri, before = f"sqlite:///{home / 'mlflow.db'}", mlflow.get_tracking_uri()
    client = MlflowClient(uri)
    experiment = client.create_experiment("popen", (home / "mlartifacts").as_uri())
    model = client.get_logged_model(record(uri, client.create_run(experiment).info.run_id, bundle))
    client.create_registered_model(NAME)
    version = client.create_model_version(NAME, model.artifact_location, model_id=model.model_id)
    client.set_registered_model_alias(NAME, CHAMPION, version.version)
    yield home
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["mlflow", "models", "serve", "-m", f"models:/{NAME}@{CHAMPION}", "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}", "PATH": path}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true"}
    log = home / "serve.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=home,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def post(address: str, body: bytes, headers: dict[str, str] = JSON) -> tuple[int, Any]:
    request = urllib.request.Request(address, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def rows(image: str, question: str = "What?", **params: object) -> bytes:
    records = [{"image": image, "question": question}]
    return json.dumps({"dataframe_records": records} | ({"params": params} if params else {})).encode()


def test_a_request_is_answered_with_words_masks_and_scores(address: str, bundle: Path, data: Data) -> None:  # noqa: F811
    root, samples = data
    path, sample = root / samples[0].image, samples[0]
    status, body = post(address, rows(base64.b64encode(path.read_bytes()).decode(), sample.question))
    assert status == 200, body
    (answer,) = body["predictions"]
    expected = Predictor(bundle)(Image.open(path), sample.question)
    assert answer["answer"] == expected.text == sample.answer
    assert answer["masks"] == [dict(mask) for mask in expected.masks]
    assert decode(answer["masks"][0]).any()
    assert answer["scores"] == pytest.approx({"loglik": expected.loglik, "confidence": expected.confidence})
    status, body = post(address, rows(str(path), sample.question, members=2))
    assert status == 200, body
    assert body["predictions"][0]["scores"]["loglik"] < 0


PICTURE = "R0lGODdhAQABAIABAAAAAP///ywAAAAAAQABAAACAkQBADs="  # a GIF of one pixel


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "the body is not JSON: Expecting property name"),
        (b"\xff\xfe", "the body is not JSON: "),
        (b"[1, 2]", "dataframe_records"),
        (b"{}", "dataframe_records"),
        (b'{"dataframe_records": 5}', ""),
        (b'{"dataframe_split": {"columns": ["image"], "data": [[1, 2]]}}', "1 columns passed"),
        (b'{"dataframe_records": [{"image": "aGVsbG8="}]}', "missing inputs ['question']"),
        (rows("%%% no base64"), "image: neither the base64 text of an image nor a file on the server"),
        (rows("aGVsbG8="), "image: not a readable image"),
        (rows(PICTURE, "  "), "question: it is empty"),
        (rows(PICTURE, "why " * 500), "tokens"),
        (rows(PICTURE, members=0), "members: 1 to 64, not 0"),
        (rows(PICTURE, members="many"), "members"),
    ],
    ids=lambda value: value[:30] if isinstance(value, bytes) else "",
)
def test_a_bad_request_gets_a_400_with_one_clear_line(address: str, body: bytes, says: str) -> None:
    status, answer = post(address, body)
    assert status == 400, answer
    assert set(answer) == {"error_code", "message"}
    assert says in answer["message"]
    assert 10 < len(answer["message"]) <= 300
    assert "\n" not in answer["message"]
    assert "Traceback" not in answer["message"]


def test_a_request_without_its_type_is_refused(address: str) -> None:
    status, answer = post(address, rows(PICTURE), {"Content-Type": ""})
    assert (status, answer["message"]) == (400, "Content-Type: it is missing; send application/json")
