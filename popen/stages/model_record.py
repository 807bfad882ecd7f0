"""The calibrated model in MLflow: a pyfunc from code around the bundle, so `models:/...` can serve it."""

from __future__ import annotations

from pathlib import Path

from popen.stages.run import Run

PACKAGE = Path(__file__).resolve().parents[1]


def log_model(run: Run, bundle: Path) -> None:
    """Log `bundle` as the model `popen` of the stage's run; nothing where MLflow is away."""
    if run.tracker.run_id is None:
        run.say("warning: MLflow is away, the model was not recorded")
        return
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
    mlflow.set_tracking_uri(run.tracker.uri)
    with mlflow.start_run(run_id=run.tracker.run_id):
        mlflow.pyfunc.log_model(
            name="popen",
            python_model=str(PACKAGE / "serving.py"),
            artifacts={"bundle": str(bundle)},
            code_paths=[str(PACKAGE)],
            signature=signature,
            pip_requirements=str(PACKAGE.parent / "requirements.lock"),
        )
