"""The calibrated model in MLflow: a pyfunc from code around the bundle, so `models:/...` can serve it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw

from popen.checkpoints import digest
from popen.stages.run import Run

PACKAGE = Path(__file__).resolve().parents[1]
BUNDLE_TAG = "bundle"  # digest of the bundle's files: finds the record of what lies on the disk


def log_model(run: Run, bundle: Path) -> None:
    """Log `bundle` as the model `popen` of the stage's run; where MLflow is away, as soon as it is back, as
    everything that a stage records. What was not recorded then, `retrain` records."""
    run.tracker.do(lambda _client, run_id: record(run.tracker.uri, run_id, bundle), "the model")


def record(uri: str, run_id: str, bundle: Path) -> str:
    """Log `bundle` as the model `popen` of a run at the tracking address `uri`; returns the model's id."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, name) for name in ("image", "question")]),
        params=ParamSchema(
            [
                ParamSpec("members", DataType.integer, 1),
                ParamSpec("threshold", DataType.double, None),
            ]
        ),
    )
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="popen",
            python_model=str(PACKAGE / "serving.py"),
            artifacts={"bundle": str(bundle)},
            code_paths=[str(PACKAGE)],
            signature=signature,
            input_example=(example(), {"members": 1}),
            pip_requirements=str(PACKAGE.parent / "requirements.lock"),
            tags={BUNDLE_TAG: digest(bundle)},
        )
    return str(logged.model_id)


def example() -> pd.DataFrame:
    """A request to copy: a drawn picture as base64 text, and a question. It shows the form, no more."""
    picture = Image.new("RGB", (64, 64), (226, 214, 190))
    ImageDraw.Draw(picture).ellipse((20, 24, 44, 48), fill=(200, 40, 40))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return pd.DataFrame(
        {"image": [base64.b64encode(file.getvalue()).decode()], "question": ["where is the red plate?"]}
    )
