"""Pictures of the pages that the README shows: `make up`, a run, then `python docs/screenshots.py`.

Needs Chromium (Debian: `apt install chromium`). Writes docs/prefect.png, the newest run of the pipeline, and
docs/mlflow.png, MLflow's comparison of the systems on one benchmark.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

import httpx
from mlflow.tracking import MlflowClient

from popen.pipeline import find_root
from popen.tracking import EXPERIMENT, tracking_uri

HERE = Path(__file__).resolve().parent
BENCHMARK = "muse_test_less"
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1000",
    "--virtual-time-budget=30000",
]


def shoot(address: str, path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("error: no Chromium on the PATH; install it (Debian: apt install chromium)")
    with tempfile.TemporaryDirectory() as profile:
        words = [browser, *QUIET, f"--user-data-dir={profile}", f"--screenshot={path}", address]
        subprocess.run(words, check=True, capture_output=True, timeout=180)
    print(f"{path}: {address}")


def newest_run(prefect: str) -> str:
    body = {"sort": "START_TIME_DESC", "limit": 1, "flows": {"name": {"any_": ["pipeline"]}}}
    found = httpx.post(f"{prefect}/api/flow_runs/filter", json=body).raise_for_status().json()
    if not found:
        sys.exit("error: the pipeline has not run yet; `prefect deployment run pipeline/on-demand --watch`")
    return str(found[0]["id"])


def systems(root: Path) -> tuple[str, list[str]]:
    """The experiment's id, and the newest run of each system on the benchmark."""
    client = MlflowClient(tracking_uri(root))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        sys.exit("error: nothing is recorded in MLflow yet; `make repro` first")
    asked = f"tags.benchmark = '{BENCHMARK}' and attributes.status = 'FINISHED'"
    newest = {}
    for run in client.search_runs([experiment.experiment_id], asked, order_by=["attributes.start_time ASC"]):
        newest[run.data.tags["system"]] = run.info.run_id
    return experiment.experiment_id, list(newest.values())


def main() -> None:
    root = find_root(HERE)
    prefect = f"http://127.0.0.1:{os.environ.get('PREFECT_SERVER_API_PORT', 4200)}"
    mlflow = f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT', 5000)}"
    shoot(f"{prefect}/runs/flow-run/{newest_run(prefect)}", HERE / "prefect.png")
    experiment, runs = systems(root)
    asked = f"runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([experiment]))}"
    shoot(f"{mlflow}/#/compare-runs?{asked}", HERE / "mlflow.png")


if __name__ == "__main__":
    main()
