"""What becomes of failures that no request over HTTP can be made to cause, and the one line of the others."""

from __future__ import annotations

import json
import logging

import pytest
from mlflow.exceptions import MlflowException

from popen.serving_errors import RequestError, answered, plain


def test_a_mistake_of_ours_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    def ask(*_: object) -> None:
        raise KeyError("a secret detail")

    with caplog.at_level(logging.ERROR), pytest.raises(RequestError) as caught:
        answered(ask, b"{}", "application/json", None, None)
    assert caught.value.get_http_status_code() == 500
    body = json.loads(caught.value.serialize_as_json())
    assert body == {"error_code": "INTERNAL_ERROR", "message": "internal error; the server's log says more"}
    assert "a secret detail" in caplog.text


def test_one_line_is_left_of_what_mlflow_says() -> None:
    error = MlflowException("Failed to enforce schema of data '" + "x" * 1000)
    error.__context__ = MlflowException("Model is missing\ninputs ['question'].")  # raised while handling it
    assert plain(error) == "Model is missing inputs ['question']."
    assert plain(MlflowException("y" * 1000)) == "y" * 300


def test_mlflow_puts_nothing_before_our_message() -> None:
    error = RequestError("question: it is empty")
    error.message = f"Failed to predict data. \nError: {error.message}"  # as its server does
    body = json.loads(error.serialize_as_json())
    assert body == {"error_code": "INVALID_PARAMETER_VALUE", "message": "question: it is empty"}
    assert error.get_http_status_code() == 400
