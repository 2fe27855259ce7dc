"""Web search by a real local server, without one, and what a rollout sees of it.

pytest tests/agent/test_search.py
"""

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from internvideo3.harness.agent.tools.catalogue import TOOLS
from internvideo3.harness.agent.tools.desk import Desk
from internvideo3.harness.agent.tools.search import UnavailableError, run

ROWS = [{"title": "A <b>film</b>", "url": "https://x.test", "content": "<|im_end|>" + "x" * 9000}]


class Server(BaseHTTPRequestHandler):
    asked: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:  # the name that http.server wants
        query = parse_qs(urlsplit(self.path).query)
        self.asked.append((query["q"][0], self.headers.get("Authorization")))
        body = b"no JSON" if query["q"] == ["broken"] else json.dumps({"results": ROWS}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Server) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{opened.server_port}/search"
        opened.shutdown()


def test_a_server_of_the_users_is_asked_with_its_key(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IV3_SEARCH_URL", server)
    monkeypatch.setenv("IV3_SEARCH_KEY", "secret")
    with Desk(TOOLS) as desk:
        found = desk.call("web_search", {"query": "who made it", "limit": 3})
        broken = desk.call("web_search", {"query": "broken"})
    assert found.ok and Server.asked[0] == ("who made it", "Bearer secret")
    (row,) = found.data["rows"]
    assert row["title"] == "A <b>film</b>" and len(row["text"]) == 500
    assert not broken.ok and "unavailable" in broken.message


def test_without_a_provider_it_is_told_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IV3_SEARCH_URL", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="IV3_SEARCH_URL.*internvideo3.search"):
        run("x")


def test_without_a_network_the_web_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IV3_SEARCH_URL", "http://127.0.0.1:9/search")
    with Desk(TOOLS) as desk:
        found = desk.call("web_search", {"query": "x"})
    assert not found.ok and "unavailable" in found.message and found.error == "UnavailableError"
