"""A server's own process: a job is drawn, told of and fetched while the server ends."""

from __future__ import annotations

import base64
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

from PIL import Image
from standardwebhooks import Webhook

from benchmarks.serving.process import running
from tests.serve.conftest import eventually
from tests.support.serve.fakes import get, post

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
Messages = list[tuple[dict[str, str], bytes]]


@contextmanager
def receiver(messages: Messages) -> Iterator[str]:
    class Taking(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append((dict(self.headers), self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Taking)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_job_is_drawn_told_of_and_fetched_while_the_server_ends(tmp_path: Path) -> None:
    messages: Messages = []
    with receiver(messages) as url:
        config = tmp_path / "serve.toml"
        config.write_text(f'webhook_secret = ["{SECRET}"]\nwebhook_private_host = ["{url}"]\nthreads = 1\n')
        with running("--config", str(config)) as one:
            body = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 20, "background": True}
            order = post(f"{one.url}/v1/images/generations", json={**body, "webhook_url": f"{url}/hook"})
            assert order.status_code == 202
            one.process.send_signal(signal.SIGTERM)
            eventually(lambda: messages)
            ((headers, sent),) = messages
            message = Webhook(SECRET).verify(sent, headers)
            assert (message["type"], message["data"]["id"]) == ("image.job.completed", order.json()["id"])
            assert message["data"]["status"] == "completed"
            result = get(one.url + message["data"]["result"]).json()
            assert one.end() == 0
    assert SECRET.removeprefix("whsec_") not in json.dumps(one.log)
    drawn = Image.open(BytesIO(base64.b64decode(result["data"][0]["b64_json"])))
    assert (result["data"][0]["seed"], drawn.size) == (7, (128, 128))
