"""What the routes share: one object on the application."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from latentrt.serve.http.board import Board
from latentrt.serve.http.catalog import Catalog
from latentrt.serve.process.config import Settings
from latentrt.serve.process.metrics import Metrics

if TYPE_CHECKING:
    from latentrt.serve.core.service import Service


@dataclass(frozen=True, slots=True)
class Context:
    """A server's parts."""

    service: Service
    settings: Settings
    catalog: Catalog
    metrics: Metrics
    board: Board = field(default_factory=Board)
    created: int = field(default_factory=lambda: int(time.time()))


async def _context(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


Served = Annotated[Context, Depends(_context)]
