"""Webhooks: signed as the standard says, to listed hosts and checked addresses, with bounded retries."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from latentrt.errors import RequestError
from latentrt.serve.process.webhooks import sender
from latentrt.serve.process.webhooks.hosts import Hosts, is_public
from latentrt.serve.process.webhooks.sender import Webhooks
from latentrt.serve.process.webhooks.signature import secret_of, signed
from tests.support.serve.fakes import until

SECRETS = ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_" + "b2xk" * 10)
KIND, DATA = "image.job.completed", {"id": "job_1", "status": "completed"}


class Receiver:
    """Answers each message with the next of these statuses, the last one again and again; None: not at all."""

    def __init__(self, *statuses: int | None) -> None:
        self.statuses = list(statuses)
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.port = 0

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        self.got.append((head[0], headers, await reader.readexactly(int(headers["content-length"]))))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status is None:
            await reader.read()
        else:
            writer.write(f"HTTP/1.1 {status} Any\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n".encode())
        writer.close()


@asynccontextmanager
async def receiving(*statuses: int | None, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver(*statuses)
    server = await asyncio.start_server(receiver.take, "127.0.0.1", 0, ssl=tls)
    async with server:
        receiver.port = server.sockets[0].getsockname()[1]
        yield receiver


def webhooks(
    told: Counter[str],
    *private: str,
    public: tuple[str, ...] = (),
    delays: Any = (0.01, 0.01),
    lasting: float = 60,
) -> Webhooks:
    def count(outcome: str) -> None:
        told[outcome] += 1

    secrets = [secret_of(one) for one in SECRETS]
    return Webhooks(Hosts(public, private), secrets, lasting=lasting, told=count, delays=delays)


def test_signatures_are_the_standards() -> None:
    headers = signed("msg_1", 1614265330, b'{"test": 2432232314}', [secret_of(one) for one in SECRETS])
    at = datetime.fromtimestamp(1614265330)
    expected = [Webhook(one).sign("msg_1", at, '{"test": 2432232314}') for one in SECRETS]
    assert headers["webhook-signature"].split(" ") == expected
    with pytest.raises(ValueError, match="base64 of 24 to 64"):
        secret_of(SECRETS[0].removeprefix("whsec_"))


def test_a_message_is_tried_again_and_no_redirect_is_followed() -> None:
    told = Counter[str]()

    async def go() -> None:
        async with receiving(500, 302, 204) as receiver:
            sends = webhooks(told, origin := f"http://127.0.0.1:{receiver.port}")
            sends.send("a", sends.hosts.target(f"{origin}/hook?a=1"), KIND, DATA)
            await until(lambda: told["delivered"])
        assert [line for line, _, _ in receiver.got] == ["POST /hook?a=1 HTTP/1.1"] * 3
        assert len({headers["webhook-id"] for _, headers, _ in receiver.got}) == 1
        for _, headers, body in receiver.got:
            assert headers["host"] == f"127.0.0.1:{receiver.port}"
            for secret in SECRETS:
                message = Webhook(secret).verify(body, headers)
                assert (message["type"], message["data"]) == (KIND, DATA)
                assert abs(datetime.fromisoformat(message["timestamp"]).timestamp() - time.time()) < 60

    asyncio.run(go())


@pytest.mark.parametrize(("status", "attempts"), [(410, 1), (404, 3)])
def test_attempts_are_bounded(status: int, attempts: int) -> None:
    told = Counter[str]()

    async def go() -> None:
        async with receiving(status) as receiver:
            sends = webhooks(told, origin := f"http://127.0.0.1:{receiver.port}")
            sends.send("a", sends.hosts.target(origin), KIND, DATA)
            await until(lambda: told["failed"])
        assert len(receiver.got) == attempts

    asyncio.run(go())


def test_a_slow_receiver_holds_nobody_and_the_end_is_a_last_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "MOST", 6)
    monkeypatch.setattr(sender, "PART", 2)
    told = Counter[str]()

    async def go() -> None:
        async with receiving(None) as slow, receiving(503, 200) as other:
            origins = [f"http://127.0.0.1:{one.port}" for one in (slow, other)]
            sends = webhooks(told, *origins, delays=(60,))
            for owner, origin in (*[("a", origins[0])] * 4, ("b", origins[1]), *[("c", origins[0])] * 3):
                sends.send(owner, sends.hosts.target(origin), KIND, DATA)
            assert told == {"dropped": 2}  # one for its owner's many, one for all
            await until(lambda: other.got)
            await sends.finish(0.3)
            assert told == {"dropped": 2, "delivered": 1, "failed": 5}
            assert (len(slow.got), len(other.got), sends.tasks) == (2, 2, {})

    asyncio.run(go())


def test_a_message_that_waited_too_long_for_others_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "ATTEMPT", 0.1)
    told = Counter[str]()

    async def go() -> None:
        async with receiving(None) as slow:
            sends = webhooks(told, origin := f"http://127.0.0.1:{slow.port}", delays=(), lasting=0.15)
            for _ in range(5):
                sends.send("a", sends.hosts.target(origin), KIND, DATA)
            await until(lambda: not sends.tasks)
            assert len(slow.got) < 5  # two at once
        assert told == {"failed": 5}

    asyncio.run(go())


@pytest.mark.parametrize(
    "url",
    [
        *("http://a.example/", "https://b.example/", "https://a.example:8443/", "https://a.example@b.example/"),
        *("https://a.example.:443/", "https://user@a.example/", "https://a.example/#x", "https://a.example/a b"),
        *("https://a.example\\@b.example/", "//a.example/", "a.example", "https://a.example:x/", "file:///etc", ""),
        *("https://a.example/\r\nx: y", "http://b.example:8080/", "https://a.example/" + "a" * 2048),
    ],
)
def test_urls_of_other_hosts_are_refused(url: str) -> None:
    hosts = Hosts(["a.example", "http://b.example:81"], [])
    with pytest.raises(RequestError, match="webhook_url"):
        hosts.target(url)
    assert hosts.target("HTTPS://A.example:443?x").path == "/?x"
    assert hosts.target("http://b.example:81/y").authority == "b.example:81"
    with pytest.raises(RequestError, match="this server sends none"):
        Hosts([], []).target("https://a.example/")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *(("93.184.215.14", True), ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True)),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0")),
        *((address, False) for address in ("::1", "fe80::1%1", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1")),
        *((address, False) for address in ("224.0.0.1", "2002:7f00:1::", "ff02::1")),
        *((address, False) for address in ("::127.0.0.1", "fec0::1", "64:ff9b:1::7f00:1", "::ffff:0:127.0.0.1")),
    ],
)
def test_private_addresses_are_known(address: str, public: bool) -> None:
    assert is_public(address) is public


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Let names lead to these addresses, one list at each question; return the names that were asked."""
    asked, left = list[str](), list(answers)

    def look_up(host: str, port: int, *_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in left.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_a_name_that_leads_inside_is_refused_unless_it_is_listed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Counter[str]()

    async def go(listed_private: bool) -> int:
        async with receiving(200) as receiver:
            origin = f"http://hooks.example:{receiver.port}"
            inside, mixed = ["127.0.0.1"], ["93.184.215.14", "127.0.0.1"]
            asked = resolving(monkeypatch, inside if listed_private else mixed, mixed, mixed)
            lists: dict[str, Any] = {"public": () if listed_private else (origin,)}
            sends = webhooks(told, *((origin,) if listed_private else ()), **lists)
            sends.send("a", sends.hosts.target(origin), KIND, DATA)
            await until(lambda: not sends.tasks)
            assert asked == ["hooks.example"] * (1 if listed_private else 3)
            if listed_private:  # the address that was checked is the one that is connected to
                assert receiver.got[0][1]["host"] == f"hooks.example:{receiver.port}"
            return len(receiver.got)

    assert [asyncio.run(go(listed)) for listed in (False, True)] == [0, 1]
    assert told == {"failed": 1, "delivered": 1}


def test_certificates_are_checked_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, cert = tmp_path / "key", tmp_path / "cert"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made += ["-subj", "/CN=hooks.example", "-addext", "subjectAltName=DNS:hooks.example", "-days", "2"]
    subprocess.run([*made, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)

    async def go(name: str) -> str:
        told = Counter[str]()
        async with receiving(200, tls=tls) as receiver:
            resolving(monkeypatch, ["127.0.0.1"])
            sends = webhooks(told, origin := f"{name}:{receiver.port}", delays=())
            sends.send("a", sends.hosts.target(f"https://{origin}/"), KIND, {})
            await until(lambda: told)
        return next(iter(told))

    assert asyncio.run(go("hooks.example")) == "failed"
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    assert [asyncio.run(go(name)) for name in ("hooks.example", "other.example")] == ["delivered", "failed"]
