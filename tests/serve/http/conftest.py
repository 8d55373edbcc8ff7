"""A fake scheduler, the application around it, a server of it, and OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import openai
import pytest
from structlog.testing import capture_logs

from tests.support.serve.fakes import FakeScheduler, app_of, live


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
def app(scheduler: FakeScheduler) -> Any:
    return app_of(scheduler)


@pytest.fixture
def url(app: Any) -> Iterator[str]:
    with live(app) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def log() -> Iterator[list[MutableMapping[str, Any]]]:
    with capture_logs() as lines:
        yield lines
