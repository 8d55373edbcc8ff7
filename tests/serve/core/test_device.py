"""Services of one device take turns: together they take no more than one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from latentrt.serve.core.device import Device, Turnstile
from latentrt.serve.core.service import Service
from tests.serve.conftest import eventually
from tests.support.serve.fake_engine import Fakes, fake_engine, handle_of, submit, wait


def test_turns_come_in_the_order_of_coming() -> None:
    turn, order = Turnstile(), list[int]()

    def take(number: int) -> None:
        with turn:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(5)]
    with turn:
        for number, thread in enumerate(threads):
            thread.start()
            eventually(lambda number=number: len(turn._line) == number + 2)
    for thread in threads:
        thread.join()
    assert order == list(range(5))
    with turn, turn:  # by the same thread
        take(5)
    assert (order[-1], len(turn._line)) == (5, 0)


class Counted(Fakes):
    """Counts calls that are made at the same time, over all of the class."""

    def __init__(self, now: dict[str, int], most: dict[str, int]) -> None:
        super().__init__()
        self._now, self._most = now, most

    def unet(self, feeds):  # type: ignore[no-untyped-def]
        return self._counted("steps", super().unet, feeds)

    def vae(self, feeds):  # type: ignore[no-untyped-def]
        return self._counted("stages", super().vae, feeds)

    def _counted(self, kind, call, feeds):  # type: ignore[no-untyped-def]
        self._now[kind] += 1
        self._most[kind] = max(self._most[kind], self._now[kind])
        time.sleep(0.002)
        found = call(feeds)
        self._now[kind] -= 1
        return found


@pytest.fixture
def two() -> Iterator[tuple[list[Service], dict[str, int]]]:
    now, most = ({"steps": 0, "stages": 0} for _ in range(2))
    with ExitStack() as stack:
        device, services = Device(), list[Service]()
        for _ in range(2):
            engine = stack.enter_context(fake_engine(Counted(now, most)))
            services.append(stack.enter_context(Service(engine, device=device)))
        for service in services:
            eventually(lambda service=service: service.scheduler.state == "ready")
        yield services, most


def test_one_service_calls_at_a_time(two: tuple[list[Service], dict[str, int]]) -> None:
    services, most = two
    handles = [submit(service, handle_of(steps=12, count=3)) for service in services for _ in range(2)]

    async def all_of_them() -> list[int]:
        return [len(await handle.pictures()) for handle in handles]

    assert wait(all_of_them()) == [3, 3, 3, 3]
    assert most == {"steps": 1, "stages": 1}
