"""Errors on the wire: their status, code and shape."""

from __future__ import annotations

import pytest

from latentrt.errors import BackendError, NetworkError, RequestError, ScheduleError, UnknownSolverError
from latentrt.serve.core import errors
from latentrt.serve.http.errors import Problem, answer_to, answer_to_status

PARTS = ("found", "needed", "fix")


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (Problem(*PARTS, param="n"), 400, "invalid_value", "invalid_request_error"),
        (Problem(*PARTS, status=404, code="model_not_found"), 404, "model_not_found", "invalid_request_error"),
        (RequestError(*PARTS), 400, "invalid_value", "invalid_request_error"),
        (UnknownSolverError(*PARTS), 400, "invalid_value", "invalid_request_error"),
        (ScheduleError(*PARTS), 400, "invalid_value", "invalid_request_error"),
        (errors.QueueFull(*PARTS), 429, "queue_full", "rate_limit_error"),
        (errors.DeadlineUnreachable(*PARTS), 429, "deadline_unreachable", "rate_limit_error"),
        (errors.NotReady(*PARTS), 503, "not_ready", "server_error"),
        (errors.Draining(*PARTS), 503, "draining", "server_error"),
        (errors.QueueTimeout(*PARTS), 504, "queue_timeout", "server_error"),
        (errors.RunTimeout(*PARTS), 504, "run_timeout", "server_error"),
        (errors.Cancelled(*PARTS), 409, "cancelled", "invalid_request_error"),
        (errors.EngineFault(*PARTS), 500, "engine_error", "server_error"),
        (NetworkError(*PARTS), 500, "engine_error", "server_error"),
        (BackendError(*PARTS), 500, "engine_error", "server_error"),
        (ValueError("secret"), 500, "engine_error", "server_error"),
    ],
)
def test_every_error_has_its_answer(error: Exception, status: int, code: str, kind: str) -> None:
    answer = answer_to(error)
    assert (answer.status, answer.code) == (status, code)
    assert set(answer.body["error"]) == {"message", "type", "param", "code"}
    assert (answer.body["error"]["type"], answer.body["error"]["code"]) == (kind, code)
    assert "secret" not in answer.message


def test_every_error_of_the_scheduler_is_known() -> None:
    problems = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")]
    assert len(problems) >= 8
    for kind in problems:
        assert answer_to(kind(*PARTS)).code == kind.code


def test_when_to_try_again() -> None:
    assert answer_to(errors.QueueFull(*PARTS, retry_after=2.1)).headers == {"retry-after": "3"}
    assert answer_to(errors.QueueFull(*PARTS, retry_after=0.0)).headers == {"retry-after": "1"}
    assert answer_to(errors.QueueFull(*PARTS)).headers == {}
    assert answer_to(errors.QueueFull(*PARTS, retry_after=float("inf"))).headers == {}
    assert answer_to(errors.RunTimeout(*PARTS)).headers == {"x-should-retry": "false"}


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "not_found"),
        (405, "method_not_allowed"),
        (408, "body_timeout"),
        (400, "invalid_value"),
        (500, "engine_error"),
    ],
)
def test_what_the_framework_refuses(status: int, code: str) -> None:
    assert answer_to_status(status, "detail").code == code
