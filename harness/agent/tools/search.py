"""Tool: web search, by a server of the user's or by `ddgs`.

A provider takes a query and a number and gives rows with title, url and text. `$IV3_SEARCH_URL`
names a server with SearXNG's JSON form (`?q=...&format=json`), `$IV3_SEARCH_KEY` its bearer token;
without them `ddgs` asks public engines. Without a network the answer says that the web is
unavailable, and nothing is made up in its place.
"""

import importlib
import importlib.util
import json
import os
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

SECONDS = 15.0
MOST_BYTES = 2 << 20
MOST_CHARS = 500
"""Of one row's text."""
Row = dict[str, str]
Provider = Callable[[str, int], list[Row]]


class UnavailableError(ValueError):
    """The web cannot be searched now; says why."""


def run(query: str, limit: int = 5) -> dict[str, Any]:
    """Search the web.

    Args:
        query: what is looked for.
        limit: most rows.

    Raises:
        UnavailableError: there is no provider or no network.
    """
    rows = provider()(query, limit)
    return {"rows": [{key: str(row.get(key, ""))[:MOST_CHARS] for key in _KEYS} for row in rows]}


_KEYS = ("title", "url", "text")


def provider() -> Provider:
    """The provider that the environment names.

    Raises:
        UnavailableError: there is none.
    """
    if os.environ.get("IV3_SEARCH_URL"):
        return _server
    if importlib.util.find_spec("ddgs") is not None:
        return _ddgs
    raise UnavailableError(
        "unavailable: no search provider. Set IV3_SEARCH_URL to a SearXNG server, or "
        "pip install 'internvideo3[search]'."
    )


def _server(query: str, limit: int) -> list[Row]:
    url = os.environ["IV3_SEARCH_URL"]
    if not url.startswith(("http://", "https://")):
        raise UnavailableError("unavailable: IV3_SEARCH_URL must begin with http:// or https://.")
    words = urllib.parse.urlencode({"q": query, "format": "json"})
    request = urllib.request.Request(f"{url}{'&' if '?' in url else '?'}{words}")
    if os.environ.get("IV3_SEARCH_KEY"):
        request.add_header("Authorization", f"Bearer {os.environ['IV3_SEARCH_KEY']}")
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            found = json.loads(reply.read(MOST_BYTES))
    except (OSError, ValueError) as error:
        raise UnavailableError(f"unavailable: the search server fails ({error})") from None
    rows = found.get("results") if isinstance(found, dict) else None
    if not isinstance(rows, list):
        raise UnavailableError("unavailable: the search server gives no list named results.")
    return [
        {"title": r.get("title", ""), "url": r.get("url", ""), "text": r.get("content", "")}
        for r in rows[:limit]
        if isinstance(r, dict)
    ]


def _ddgs(query: str, limit: int) -> list[Row]:
    ddgs = importlib.import_module("ddgs")
    problems = importlib.import_module("ddgs.exceptions")
    try:
        rows = ddgs.DDGS(timeout=int(SECONDS)).text(query, max_results=limit)
    except (problems.DDGSException, OSError) as error:
        raise UnavailableError(f"unavailable: the web cannot be reached ({error})") from None
    return [
        {"title": r.get("title", ""), "url": r.get("href", ""), "text": r.get("body", "")}
        for r in rows
    ]
