"""Whose turn it is at a policy's server, and what its end does.

pytest tests/harness/test_policy.py
"""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn

from internvideo3.harness.serving.policy import PolicyServing

JSON = {"Content-Type": "application/json"}
PROMPT = {"model": "m", "prompt": [1], "max_tokens": 1}


class Puppet:
    """A policy that samples once it may."""

    digest = "d"
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9))
    )
    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_token_id=1, convert_ids_to_tokens=lambda ids: ids)
    )

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.may = threading.Event()

    def sample(self, *_: object, seed: int, **__: object) -> list[Any]:
        self.seeds.append(seed)
        assert self.may.wait(20)
        return [SimpleNamespace(ids=(1,), logps=(0.0,), text="x")]


@contextmanager
def serving() -> Iterator[tuple[Puppet, PolicyServing, httpx.Client]]:
    puppet: Any = Puppet()
    served = PolicyServing(policy=puppet, name="p")
    server = uvicorn.Server(uvicorn.Config(served.app(), lifespan="off", log_level="critical"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=20) as client:
            yield puppet, served, client
    finally:
        puppet.may.set()
        server.should_exit = True
        thread.join(20)
        listening.close()
    assert not thread.is_alive()


def until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end, "it did not come about in ten seconds"
        time.sleep(0.01)


def body(seed: int) -> bytes:
    return json.dumps(PROMPT | {"seed": seed}).encode()


def asking(client: httpx.Client, seed: int, replies: dict[int, int]) -> threading.Thread:
    def ask() -> None:
        reply = client.post("/v1/completions", content=body(seed), headers=JSON)
        replies[seed] = reply.status_code

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def ask_and_leave(client: httpx.Client, seed: int) -> None:
    request = body(seed)
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            b"\r\nContent-Length: %d\r\n\r\n" % len(request) + request
        )
        # As a trainer's timeout does, after it has been read.
        time.sleep(0.2)


def test_nothing_is_computed_for_clients_that_left_while_they_waited() -> None:
    replies: dict[int, int] = {}
    with serving() as (puppet, _, client):
        threads = [asking(client, 1, replies)]
        until(lambda: puppet.seeds == [1])
        for seed in (2, 3, 4):
            ask_and_leave(client, seed)
        time.sleep(0.5)  # two looks at whether they are there
        threads.append(asking(client, 5, replies))
        time.sleep(0.2)
        puppet.may.set()
        for thread in threads:
            thread.join(20)
        assert puppet.seeds == [1, 5] and replies == {1: 200, 5: 200}


def test_who_asks_again_gets_what_is_computed_already() -> None:
    """As a trainer does after its timeout: else a slow answer is computed for nobody, again."""
    replies: dict[int, int] = {}
    with serving() as (puppet, _, client):
        for _ in range(2):
            ask_and_leave(client, 1)
        until(lambda: puppet.seeds == [1])
        time.sleep(0.5)
        again = asking(client, 1, replies)
        time.sleep(0.2)
        puppet.may.set()
        again.join(20)
        assert puppet.seeds == [1] and replies == {1: 200}
        asking(client, 1, replies).join(20)
        assert puppet.seeds == [1, 1], "and nothing of it is kept"


def test_at_the_end_those_who_wait_are_told_and_what_has_begun_is_answered() -> None:
    replies: dict[int, int] = {}
    with serving() as (puppet, served, client):
        first = asking(client, 1, replies)
        until(lambda: puppet.seeds == [1])
        waits = asking(client, 2, replies)
        time.sleep(0.3)
        served.close()
        waits.join(5)
        assert replies == {2: 503}
        late = client.post("/v1/completions", json=PROMPT)
        assert late.status_code == 503 and "stopping" in late.json()["error"]["message"]
        puppet.may.set()
        first.join(20)
        assert replies == {1: 200, 2: 503} and puppet.seeds == [1]


def test_sigterm_ends_the_process_while_it_computes() -> None:
    short = (
        "from internvideo3.harness.serving import server; server.LAST_SECONDS = 1\n"
        "from internvideo3.harness.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", short, "serve-policy", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    found = re.search(r"(http://\S+)/v1", process.stdout.readline())
    assert found
    url, replies = found[1], list[httpx.Response]()
    # Ids that end a reply are barred, so that it is as long as it may be.
    endless = PROMPT | {"max_tokens": 1 << 20, "logit_bias": {str(n): -100 for n in range(300)}}
    asks = threading.Thread(
        target=lambda: replies.append(httpx.post(f"{url}/v1/completions", json=endless, timeout=60))
    )
    asks.start()
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0)) as half:
        half.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            b"application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    asks.join(20)
    assert process.returncode == 0 and "Traceback" not in said, said
    assert [one.status_code for one in replies] == [503]
