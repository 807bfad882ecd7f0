"""The model as MLflow serves it: a pyfunc made from this file ("models from code"), so nothing is pickled."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from PIL import Image

from popen.data.images import MAX_PIXELS, ImageError, decode_image, open_image
from popen.serving_errors import RequestError, internal, speak_plainly

_SERVER = "mlflow.pyfunc.scoring_server.app"  # the module whose import starts `mlflow models serve`


def read_image(value: str) -> Image.Image:
    """An image from its file's base64 text, or from a path on the server. Raises RequestError, ImageError."""
    try:
        on_disk = len(value) < 1024 and Path(value).is_file()
    except OSError:  # base64 text may be too long for a file's name
        on_disk = False
    if on_disk:
        path = Path(value).resolve()
        return open_image(path.parent, path.name, MAX_PIXELS)
    try:
        data = base64.b64decode(value, validate=True)
    except ValueError as error:
        raise RequestError(
            f"image: neither the base64 text of an image nor a file on the server ({error})"
        ) from None
    return decode_image(data, "image", MAX_PIXELS)


class PopenModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """Rows of (image, question) -> answer, masks as RLE, scores. Parameters: members, threshold."""

    def load_context(self, context: Any) -> None:
        from popen.predict import Predictor

        self.predictor = Predictor(Path(context.artifacts["bundle"]))
        if _SERVER in sys.modules:
            speak_plainly()

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One record a row: {answer, masks: [RLE], scores: {loglik, confidence}, seconds}. Masks are of the
        image turned as its EXIF data says.

        Raises RequestError.
        """
        from popen.model.segmenter import ModelError
        from popen.predict import QuestionError

        try:
            return self._answers(model_input, params or {})
        except (ImageError, QuestionError, ModelError) as error:
            raise RequestError(str(error)) from None
        except RequestError:
            raise
        except Exception as error:
            raise internal(error) from error

    def _answers(self, asked: pd.DataFrame, params: dict[str, Any]) -> list[dict[str, Any]]:
        members, threshold = int(params.get("members", 1)), params.get("threshold")
        if not 1 <= members <= 64:
            raise RequestError(f"members: 1 to 64, not {members}")
        out = []
        for image, question in zip(asked["image"], asked["question"], strict=True):
            if not str(question).strip():
                raise RequestError("question: it is empty")
            found = self.predictor(read_image(str(image)), str(question), members, threshold)
            scores = {"loglik": found.loglik, "confidence": found.confidence}
            masks = [dict(mask) for mask in found.masks]
            out.append({"answer": found.text, "masks": masks, "scores": scores, "seconds": found.seconds})
        return out


mlflow.models.set_model(PopenModel())
