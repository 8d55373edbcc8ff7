"""/sdapi/v1: enough of A1111's API for its clients."""

from __future__ import annotations

from fastapi import APIRouter

from latentrt.serve.http.errors import documented
from latentrt.serve.http.sdapi import drawing, extras, jobs, lists
from latentrt.serve.http.sdapi.answers import Error

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"], responses=documented(401, model=Error))
for part in (drawing, jobs, lists, extras):
    router.include_router(part.router)
