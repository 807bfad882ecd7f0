"""Pictures of the pages that the README shows: `make up`, a run, then `python docs/screenshots.py`.

Needs Chromium (Debian: `apt install chromium`). Writes docs/prefect.png, the newest run of the pipeline, and
docs/mlflow.png, MLflow's comparison of the systems on one benchmark.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from urllib.parse import quote

import httpx
from browser import Browser, browser
from mlflow.tracking import MlflowClient

from popen.pipeline import find_root
from popen.tracking import EXPERIMENT, tracking_uri

HERE = Path(__file__).resolve().parent
BENCHMARK = "muse_test_less"


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


def shoot_prefect(page: Browser, address: str) -> None:
    """The graph of stages above the list of what became of them."""
    page.open(f"{address}/runs/flow-run/{newest_run(address)}", 1500, 1000)
    page.click("(//*[normalize-space(.)='Task Runs'])[last()]")
    time.sleep(10)  # nothing on the page tells when its canvas is drawn
    page.shoot(HERE / "prefect.png")


def shoot_mlflow(page: Browser, address: str) -> None:
    """The comparison opens on a plot of one metric; below it is the table that says more."""
    experiment, runs = systems(find_root(HERE))
    asked = f"runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([experiment]))}"
    page.open(f"{address}/#/compare-runs?{asked}", 1500, 1040)
    page.see("gIoU_matched")
    page.click("//button[@aria-label='Close']")
    for part in ("Visualizations", "Parameters", "Artifacts"):
        page.click(f"//div[@role='button'][.='{part}']")
    page.shoot(HERE / "mlflow.png")


def main() -> None:
    with browser() as page:
        shoot_prefect(page, f"http://127.0.0.1:{os.environ.get('PREFECT_SERVER_API_PORT', 4200)}")
        shoot_mlflow(page, f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT', 5000)}")


if __name__ == "__main__":
    main()
