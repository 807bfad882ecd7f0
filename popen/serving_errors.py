"""What a client of the served model reads when its request cannot be answered: a status and one line.

MLflow's scoring server answers most bad requests with 400, but its messages repeat the whole request (images
and all), and an exception of a model's is sent with its stack trace.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import scoring_server

_LONGEST = 300  # characters of a line
_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)
_log = logging.getLogger(__name__)


class RequestError(MlflowException):
    """A request cannot be answered; the message is one line that says why. Status 400 unless told."""

    def __init__(self, message: str, code: int = INVALID_PARAMETER_VALUE) -> None:
        super().__init__(message, code)

    def serialize_as_json(self) -> str:
        """The body of the answer, with our message: MLflow puts the request before `self.message`."""
        return json.dumps({"error_code": self.error_code, "message": str(self)})


def speak_plainly() -> None:
    """Have the scoring server of this process answer in our words (once is enough)."""
    if not isinstance(scoring_server.invocations, partial):
        scoring_server.invocations = partial(answered, scoring_server.invocations)


def answered(
    ask: Callable[..., Any], data: bytes, content_type: str | None, model: Any, input_schema: Any
) -> Any:
    """MLflow's `invocations` with every failure as a RequestError."""
    if not content_type:
        raise RequestError("Content-Type: it is missing; send application/json")
    try:
        return ask(data, content_type, model, input_schema)
    except RequestError:
        raise
    except MlflowException as error:
        raise RequestError(plain(error)) from None
    except Exception as error:
        raise internal(error) from error


def internal(error: Exception) -> RequestError:
    """A mistake of ours: the client reads that much (status 500), the log has the rest."""
    _log.exception("a request failed", exc_info=error)
    return RequestError("internal error; the server's log says more", INTERNAL_ERROR)


def plain(error: BaseException) -> str:
    """One line from an exception of MLflow's: what the exception it began with says."""
    while (before := error.__cause__ or error.__context__) is not None and not isinstance(error, _NO_JSON):
        error = before
    line = " ".join(str(error).split())[:_LONGEST]
    return f"the body is not JSON: {line}" if isinstance(error, _NO_JSON) else line
