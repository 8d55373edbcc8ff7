"""The same application behind Ray Serve: replicas with an engine each, as many as the load needs.

Ray chooses the replica, starts and ends replicas, and carries HTTP; it never batches, since the engine does so by step.
`latentrt serve --ray` runs `serve` below; `serve run latentrt.serve.ray_app:app` and Ray's configuration files, `app`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from fastapi import FastAPI
from prometheus_client import Metric, generate_latest
from ray import serve as ray_serve
from ray.serve.context import _get_global_client  # nothing public tells the address
from ray.serve.exceptions import RayServeException

from latentrt.errors import BackendError
from latentrt.run.lanes import ON_A_CPU
from latentrt.runtime.machine.cores import usable_cores
from latentrt.serve import ray_scaling
from latentrt.serve.process.config import Settings, load_settings
from latentrt.serve.process.logs import configure, logger
from latentrt.serve.process.metrics import Metrics
from latentrt.serve.ray_proxy import WithoutPrefix
from latentrt.serve.server import UNDRAINED, announce, assembled, drain, listening

NAME = "latentrt"  # of Ray's application and of its one deployment
BESIDE = 32  # requests at a replica beside those for pictures with a place: refusals, uploads, health
BEFORE = 8  # times the queue: requests that Ray itself may hold, for as long as a refusal takes
_SCRAPE = 5.0  # seconds that a replica has to tell its metrics; Prometheus gives up after ten
_LOOK = 0.2  # seconds between polls of another thread or a signal


class Replica:
    """What Ray asks of a replica beside HTTP. Ray adds `app`, which `_build` makes."""

    app: FastAPI

    async def check_health(self) -> None:
        """Fail where the engine stays faulty, so that Ray replaces the replica; a drained one is healthy.

        Raises:
            BackendError: the engine failed, and no self-check has passed since.
        """
        if self.app.state.models.state == "failed":
            raise BackendError("the engine failed", needed="a self-check that passes", fix="wait for the next replica")

    async def drain(self, timeout: float) -> bool:
        """Refuse what is new and finish what has a place; return whether that was done in time (seconds)."""
        return await drain(self.app, timeout)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what `ByPictures` reads."""
        (entry,) = self.app.state.models.entries
        return {ray_scaling.WAITING: float(entry.pictures), ray_scaling.RUNNING: float(entry.running)}

    async def metrics(self) -> tuple[str, list[Metric]]:
        """Return the replica's name and what it has measured."""
        metrics: Metrics = self.app.state.metrics
        return ray_serve.get_replica_context().replica_tag, list(metrics.registry.collect())


class ReplicaMetrics(Metrics):
    """Metrics whose text is of all replicas, because a scrape reaches any one of them."""

    async def text(self) -> bytes:
        """Return every replica's, with its name as the label `replica`; one that does not answer is left out."""
        context = ray_serve.get_replica_context()
        handle = ray_serve.get_deployment_handle(context.deployment, app_name=context.app_name)
        answers = await handle.broadcast("metrics").results_async(timeout_s=_SCRAPE, return_exceptions=True)
        return merged(answer for answer in answers if not isinstance(answer, BaseException))


def merged(replicas: Iterable[tuple[str, list[Metric]]]) -> bytes:
    """Return the text of several replicas' metrics: each family once."""
    families: dict[str, Metric] = {}
    for replica, metrics in replicas:
        for metric in metrics:
            family = families.setdefault(
                metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit)
            )
            family.samples += [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in metric.samples
            ]
    return generate_latest(SimpleNamespace(collect=families.values))


def app(args: dict[str, Any]) -> ray_serve.Application:
    """Return the application for `serve run latentrt.serve.ray_app:app max_steps=50`, and for Ray's configuration file.

    Args:
        args: settings by name, and `config`, a TOML file; they precede LATENTRT_* variables, those the file.

    Raises:
        RequestError: a setting is out of range or unknown.
    """
    flags = {"ray": True, **args}
    config = flags.pop("config", None)
    return application(load_settings(flags, None if config is None else Path(config)))


def application(settings: Settings) -> ray_serve.Application:
    """Return the application that Ray runs.

    Args:
        settings: of every replica; paths in it are those of the replicas' machines.

    Raises:
        BackendError: the settings name a GPU by number; which one a replica has is Ray's to say.
    """
    (settings,) = settings.each()
    values = settings.model_dump() | {"threads": _threads(settings)}

    def build() -> FastAPI:  # runs in the replica
        return _build(Settings(**values))

    return ray_serve.deployment(ray_serve.ingress(build)(Replica), name=NAME, **_options(settings)).bind()


def _options(settings: Settings) -> dict[str, Any]:
    at_once = settings.lanes or ON_A_CPU
    return {
        "ray_actor_options": _needs(settings),
        "autoscaling_config": {
            "min_replicas": settings.fewest_replicas,
            "max_replicas": settings.most_replicas,
            "policy": {
                "policy_function": ray_scaling.PATH,
                "policy_kwargs": {"seats": max(1, at_once // 2)},  # guidance takes two lanes: with more, pictures wait
            },
        },
        "max_ongoing_requests": settings.queue + at_once + BESIDE,
        "max_queued_requests": BEFORE * settings.queue,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": settings.drain_timeout,
        "logging_config": {"enable_access_log": False},  # our own line says more
    }


def _needs(settings: Settings) -> dict[str, int]:
    kind, _, number = (settings.device or "").partition(":")
    if number:
        raise BackendError(
            f"the device is {settings.device!r}",
            needed="cuda, or cpu",
            fix="leave the number out: Ray gives each replica its GPU",
        )
    on_gpu = kind == "cuda" or settings.backend.startswith("tensorrt")
    return {"num_gpus": 1, "num_cpus": 1} if on_gpu else {"num_cpus": _threads(settings)}


def _threads(settings: Settings) -> int:
    return settings.threads or max(1, usable_cores() // settings.most_replicas)


def _build(settings: Settings) -> FastAPI:
    """Return the application of one replica, its engine loaded; the lifespan closes it."""
    owned = ExitStack()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with owned:
            while app.state.models.state == "starting":
                await asyncio.sleep(_LOOK)
            yield

    app = owned.enter_context(assembled(settings, ReplicaMetrics, lifespan))
    app.add_middleware(WithoutPrefix)
    return app


def serve(settings: Settings) -> int:
    """Serve by Ray until a signal ends it: in a cluster of this machine alone, or in the one that RAY_ADDRESS names.

    Returns:
        The process' exit code.

    Raises:
        LatentrtError: the port is taken, or there are too few GPUs or cores for the fewest replicas.
    """
    configure(settings)
    target = application(settings)
    port = settings.port
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        if "RAY_ADDRESS" in os.environ:
            _join_cluster()
        else:
            with listening(settings) as sock:  # a port that is taken is reported before anything starts
                port = sock.getsockname()[1]
            ray.init("local", include_dashboard=False, num_cpus=usable_cores())
            _refuse_if_too_small(settings)
        ray_serve.start(http_options={"host": settings.host, "port": port})
        _refuse_a_second(settings.ray_name)
        stack.callback(ray_serve.delete, settings.ray_name)  # waits until the last bytes of answers are out
        handle = _run(target, settings)
        announce(settings, *_address(), settings.ray_route.rstrip("/"))
        _wait_for_signal(settings)
        return 0 if _drained(handle, settings.drain_timeout) else UNDRAINED


def _join_cluster() -> None:
    try:
        ray.init(log_to_driver=False)
    except ConnectionError as error:
        if "AuthToken" in str(error.__cause__):
            raise BackendError(
                "the cluster asks for a token, and this is none of its",
                needed="the cluster's, from ~/.ray/auth_token of one of its nodes",
                fix="RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN",
            ) from error
        raise BackendError(
            f"the cluster cannot be reached ({error})",
            needed="a running one at RAY_ADDRESS",
            fix="ray start --head there, or unset RAY_ADDRESS for a cluster of this machine alone",
        ) from error


def _refuse_a_second(name: str) -> None:
    """Ray would replace an application that has this name."""
    if name in ray_serve.status().applications:
        raise BackendError(
            f"an application {name!r} runs in this cluster",
            needed="a name of its own",
            fix=f"--ray-name OTHER --ray-route /OTHER, or end it: serve delete {name}",
        )


def _address() -> tuple[str, int]:
    """Return where Ray's proxies listen: in a cluster where Serve ran before, as they were told then."""
    options = _get_global_client().http_config
    return options.host, options.port


def _run(target: ray_serve.Application, settings: Settings) -> Any:
    try:
        return ray_serve.run(target, name=settings.ray_name, route_prefix=settings.ray_route)
    except RayServeException as error:
        raise BackendError(
            f"Ray takes no application {settings.ray_name!r} at {settings.ray_route} "
            f"({str(error).strip().splitlines()[-1]})",
            needed="a name and a path of its own",
            fix="--ray-name OTHER --ray-route /OTHER",
        ) from error
    except RuntimeError as error:
        raise BackendError(
            f"the replicas did not start ({error})",
            needed="replicas that do",
            fix="read what Ray says of them: above, or in logs/serve of its session",
        ) from error


def _refuse_if_too_small(settings: Settings) -> None:
    there = ray.cluster_resources()
    for name, each in (("GPU", "num_gpus"), ("CPU", "num_cpus")):
        needed = settings.fewest_replicas * _needs(settings).get(each, 0)
        if needed > there.get(name, 0):
            raise BackendError(
                f"this machine has {there.get(name, 0):g} {name}s",
                needed=f"{needed} for {settings.fewest_replicas} replicas",
                fix="take fewer --replicas, or a cluster: set RAY_ADDRESS",
            )


def _wait_for_signal(settings: Settings) -> None:
    """Wait for the first one; a second one ends the process at once."""
    seen: list[int] = []

    def on_signal(number: int, _: object) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    while not seen:
        time.sleep(_LOOK)
    logger().info("draining", signal=signal.Signals(seen[0]).name, seconds=settings.drain_timeout)


def _drained(handle: Any, seconds: float) -> bool:
    """Drain every replica; return whether all finished in time."""
    good = False
    with suppress(TimeoutError):
        answers = handle.broadcast("drain", seconds).results(timeout_s=seconds + _SCRAPE, return_exceptions=True)
        good = all(answer is True for answer in answers)
    if not good:
        logger().error("not everything was finished in time", seconds=seconds)
    return good
