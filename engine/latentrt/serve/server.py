"""The process: it loads a model, listens, drains on a signal, and ends itself where a step hangs."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from latentrt.adapters.mixed import RANK
from latentrt.bundle.bundle import Bundle
from latentrt.engine import Engine
from latentrt.errors import BackendError, LatentrtError, PromptSyntaxWarning, PromptTruncatedWarning
from latentrt.model.control import controlnets_of
from latentrt.model.prompts.embeddings import embeddings_of
from latentrt.serve.core import pipeline
from latentrt.serve.core.device import Device
from latentrt.serve.core.measured import curve
from latentrt.serve.core.measured.footprint import budget_of, measured
from latentrt.serve.core.queue import Limits
from latentrt.serve.core.rules.budget import Budget, Footprint
from latentrt.serve.core.service import Service
from latentrt.serve.http.app import Lifespan, app_of
from latentrt.serve.http.background.store import Jobs
from latentrt.serve.http.catalog import Catalog
from latentrt.serve.http.generation import Context
from latentrt.serve.http.guard.origins import LOOPBACK
from latentrt.serve.http.models.entry import Entry
from latentrt.serve.http.models.models import Models
from latentrt.serve.http.models.share import Share, guess_of
from latentrt.serve.http.sizes import most_pixels
from latentrt.serve.process.config import MIB, Settings
from latentrt.serve.process.logs import configure, logger
from latentrt.serve.process.metrics import Metrics
from latentrt.serve.process.traces import tracing

UNDRAINED, HUNG = 1, 70  # exit codes; 0 is a drain that lost nothing
_MOST_HEAD = 2**16  # bytes of a request's line and headers
_LAST_ANSWERS = 5  # seconds for the last bytes of answers, after their pictures are done
_IDLE = 75  # seconds that a connection is kept for a next request; longer than clients and proxies keep theirs


def serve(settings: Settings) -> int:
    """Serve until a signal ends it.

    Returns:
        The process' exit code.

    Raises:
        LatentrtError: the port is taken, or the bundle or backend cannot be used.
    """
    with listening(settings) as sock, assembled(settings) as app:
        # Otherwise each full collection scans all that was imported, which stops the server for a tenth of a second,
        # and a burst of requests starts dozens of small ones. Objects that survive a few of these are scanned soon.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 2, 2)
        return asyncio.run(run(app, settings, sock))


@contextmanager
def assembled(settings: Settings, kind: type[Metrics] = Metrics, lifespan: Lifespan | None = None) -> Iterator[FastAPI]:
    """Load the first of the models that the settings name, or all; yield the application around them.

    Args:
        kind: of the metrics.
        lifespan: as of `app_of`.

    Raises:
        LatentrtError: a bundle, its curve or the backend cannot be used.
    """
    configure(settings)
    for told in (PromptTruncatedWarning, PromptSyntaxWarning):  # their texts are what a client wrote
        warnings.simplefilter("ignore", told)
    each = settings.each()
    names = [one.model_name or Bundle.open(one.bundle, check_hashes=False).spec.id for one in each]
    metrics, share, device = kind(names[0]), Share.of(settings, each), Device()
    by_name = dict(zip(names, each, strict=True))

    def open_one(name: str) -> AbstractContextManager[Context]:
        return _opened(by_name[name], metrics.of(name), share.calls, device)

    entries = [Entry(name, one, guess_of(one), _aliases(name, one)) for name, one in by_name.items()]
    models = Models(entries, open_one, metrics, room=share.room, idle=settings.idle_unload)
    with tracing(settings) as traces, closing(models):
        for entry in entries if settings.preload else entries[:1]:
            models.loader.open(entry)
        yield app_of(models, settings, lifespan=lifespan, traces=traces)


def _aliases(name: str, settings: Settings) -> tuple[str, ...]:
    return tuple(alias for alias in settings.aliases if alias != name)


@contextmanager
def _opened(settings: Settings, metrics: Metrics, calls: int | None, device: Device) -> Iterator[Context]:
    """Load the engine that a model's settings name and start its threads; yield its parts.

    Args:
        calls: bytes that network calls may take; None: as of `budget_of`.

    Raises:
        LatentrtError: the bundle, its curve or the backend cannot be used.
    """
    with loaded(settings) as engine:
        known = curve.load(engine)
        if known is None:
            fix = f"latentrt bench {settings.bundle} --save"
            logger().info("no curve was measured: every step may have all lanes", fix=fix)
        budget = _budget(engine, known or curve.Curve(), settings, calls, device)
        profiles = engine.model.profiles(engine.denoiser.lanes)
        catalog = Catalog(engine.model, profiles, settings, refiner=engine.refiner_name, budget=budget)
        limits = Limits(settings.queue, settings.queue_timeout, settings.run_timeout, settings.hang_timeout)
        with Service(
            engine, limits, curve=known, budget=budget, observer=metrics, on_hang=_end, device=device
        ) as service:
            memory = None if engine.backend.gpu is None else engine.backend.gpu.memory
            yield Context(service.scheduler, settings, catalog, metrics, memory)


def _budget(engine: Engine, known: curve.Curve, settings: Settings, memory: int | None, device: Device) -> Budget:
    """Return what network calls may have, and write it into the log."""
    latents, enlarges = engine.spec.latents, engine.model.enlarges
    most = most_pixels(latents, settings, enlarges) // latents.factor**2
    taken = known.memory or _measured(engine, device)
    budget = budget_of(engine, taken, memory, most, processes=settings.most_replicas)
    told: dict[str, Any] = {} if settings.model_name is None else {"model": settings.model_name}
    told["memory_mib"] = None if budget.memory is None else budget.memory // MIB
    told["tile"] = None if budget.tile is None else budget.tile * latents.factor
    logger().info("budget", **told, most_pixels=budget.largest(most) * latents.factor**2)
    return budget


def _measured(engine: Engine, device: Device) -> dict[pipeline.Shape, Footprint]:
    """Return what a picture takes; nothing where the engine fails, which its self-check then shows, or the size is not
    for this model.
    """
    try:
        with device.stages, device.steps:  # what others take meanwhile would count too
            return measured(engine)
    except LatentrtError as error:
        logger().warning("memory could not be measured: it bounds no size", error=str(error))
        return {}


def _end() -> None:
    """End the process, since a thread that hangs cannot be ended."""
    logger().critical("a step hangs; the process ends, so that another can replace it", exit_code=HUNG)
    os._exit(HUNG)


@contextmanager
def loaded(settings: Settings) -> Iterator[Engine]:
    """Load an engine with every network that will be used: what is loaded later stalls other requests."""
    with Engine.load(
        settings.bundle,
        backend=settings.backend,
        device=settings.device,
        precision=settings.precision,
        plans=settings.plans,
        threads=settings.threads,
        lanes=settings.lanes,
        embeddings=embeddings_of(settings.embedding),
        cache=settings.cache,
        spin=settings.spin,
        refiner=settings.refiner,
        vae=settings.vae,
        preview_vae=settings.preview_vae,
        tile=settings.tile,
        adapters=settings.lora_dir,
        adapter_rank=settings.lora_rank or RANK,
        control=controlnets_of(settings.controlnet),
        ip_adapter=controlnets_of(settings.ip_adapter_model, "--ip-adapter-model"),
        lora=settings.lora,
        allow_unmatched=settings.allow_unmatched,
    ) as engine:
        if settings.edits:
            pipeline.load_encoder(engine)
        yield engine


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """Bind a socket before anything is loaded, so that a port that is taken is reported at once."""
    with ExitStack() as stack:
        try:
            found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            sock = stack.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * settings.stall_timeout))
            sock.bind(address)
        except OSError as error:
            raise BackendError(
                f"{settings.host}:{settings.port} cannot be listened on ({error.strerror or error})",
                needed="an address of this machine and a free port",
                fix="change --host or --port",
            ) from error
        yield sock


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which stop listening at once; it says when it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()


async def run(app: FastAPI, settings: Settings, sock: socket.socket) -> int:
    """Serve the application on a bound socket until it is drained; return the exit code."""
    server = _Server(
        uvicorn.Config(
            app,
            http="h11",
            h11_max_incomplete_event_size=_MOST_HEAD,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # the client's address is never asked for
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=_LAST_ANSWERS,
            timeout_keep_alive=_IDLE,
        ),
        lambda: announce(settings, *sock.getsockname()[:2]),
    )
    drained = True
    loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
    tasks: set[asyncio.Task[None]] = set()

    async def end() -> None:
        nonlocal drained
        drained = await drain(app, settings.drain_timeout)
        if not drained:
            logger().error("not everything was finished in time", seconds=settings.drain_timeout)
        server.should_exit = True

    def on_signal(number: signal.Signals) -> None:
        if tasks:
            logger().warning("a second signal: ending at once", signal=number.name)
            os._exit(128 + number)
        logger().info("draining", signal=number.name, seconds=settings.drain_timeout)
        tasks.add(loop.create_task(end()))

    for number in signals:
        loop.add_signal_handler(number, on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, app.state.keys.read_again)
    try:
        await server.serve(sockets=[sock])
    finally:
        for number in (*signals, signal.SIGHUP):
            loop.remove_signal_handler(number)
    return 0 if drained else UNDRAINED


async def drain(app: FastAPI, seconds: float) -> bool:
    """Refuse new requests, and finish those that have a place, so many seconds at most; background jobs are told of.

    Return whether all were done.
    """
    models: Models = app.state.models
    jobs: Jobs = app.state.jobs
    begun = time.monotonic()
    models.drain()
    done = await models.drained(seconds)
    return await jobs.drained(begun, seconds) and done


def announce(settings: Settings, host: str, port: int, path: str = "") -> None:
    """Write into the log where clients find the server, below which path, and whether it is open to all."""
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}{path}"
    logger().info("serving", url=url, openai=f"{url}/v1", openapi=f"{url}/openapi.json", bundle=_bundles(settings))
    if host not in LOOPBACK and not settings.secrets():
        logger().warning("no keys are set: every client that reaches this address may draw", host=host)


def _bundles(settings: Settings) -> str:
    return " ".join(str(one.bundle) for one in settings.each())
