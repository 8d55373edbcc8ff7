"""What the routes share: one object on the application."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from engine.serve.board import Board
from engine.serve.catalog import Catalog
from engine.serve.config import Settings
from engine.serve.metrics import Metrics

if TYPE_CHECKING:
    from engine.serve.service import Service


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
