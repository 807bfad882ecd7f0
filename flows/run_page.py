"""What a person finds on the flow run's page: the results, example answers, and the way to MLflow."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from prefect.artifacts import create_image_artifact, create_markdown_artifact

from popen.errors import without_password
from popen.tracking import runs_below

FIGURES = ("gIoU", "cIoU", "gIoU_matched", "chair_i", "chair_s", "missing", "area_ratio", "questions")
LARGEST = 2_000_000  # bytes of a picture that is stored with the run


def publish_links(root: Path, parent: str) -> None:
    """The MLflow run of this flow run and its children."""
    create_markdown_artifact(links(root, parent), key="mlflow", description="The runs in MLflow")


def publish_results(root: Path, experiment: str | None = None) -> None:
    """The table of results and example answers as this run has left them; with `experiment` the results
    of that DVC experiment."""
    summary = _summary(root, experiment)
    if summary is not None:
        create_markdown_artifact(table(json.loads(summary)), key="results", description="The results")
    picture = root / "reports/teaser.png"
    if picture.is_file() and picture.stat().st_size <= LARGEST and not experiment:
        data = base64.b64encode(picture.read_bytes()).decode()
        words = "Questions, answers and masks; more of them, good and bad, in reports/examples.html"
        create_image_artifact(f"data:image/png;base64,{data}", key="examples", description=words)


def table(summary: dict[str, Any]) -> str:
    """The figures of `metrics/summary.json` (benchmark -> system -> figures) as a Markdown table."""
    rows = [
        [benchmark, system, *(_number(figures.get(name)) for name in FIGURES)]
        for benchmark, systems in summary.items()
        if isinstance(systems, dict)  # beside the benchmarks there is the list of comparisons
        for system, figures in systems.items()
    ]
    head = ["benchmark", "system", *FIGURES]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def links(root: Path, parent: str) -> str:
    """A Markdown list of the MLflow run `parent` and its children, with their pages."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    own = f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT', 5000)}"  # `make up`, `make ui`
    server = without_password(uri) if uri.startswith("http") else own
    pages = f"{server.rstrip('/')}/#/experiments"
    return "\n".join(
        f"- [{run.info.run_name}]({pages}/{run.info.experiment_id}/runs/{run.info.run_id}): "
        f"{run.info.status.lower()}"
        for run in runs_below(root, parent)
    )


def _summary(root: Path, experiment: str | None) -> str | None:
    path = "metrics/summary.json"
    if experiment is None:
        return (root / path).read_text(encoding="utf-8") if (root / path).is_file() else None
    words = ["git", "for-each-ref", "--format=%(objectname)", f"refs/exps/**/{experiment}"]
    commit = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=root, capture_output=True, text=True)
    return shown.stdout if shown.returncode == 0 else None


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
