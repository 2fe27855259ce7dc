"""Runs tools in processes that can be killed, within limits, and remembers what they found.

A tool is a module with `run(**arguments)` that returns JSON data. Its process is started at the
first call and lives on, so that weights are read once; it is killed when a call exceeds its
seconds, memory or output, and started anew by the next. Whatever happens is a `Result`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

LOOK_EVERY_S = 0.05
"""Time between two looks at a process's memory."""
ERROR_CHARS = 300


@dataclass(frozen=True, kw_only=True)
class Tool:
    """What a tool is and what one call of it may take."""

    name: str
    """Its name in calls."""
    module: str
    """The module with `run`."""
    needs: tuple[str, ...] = ()
    """Packages that must be there, as they are imported."""
    seconds: float = 300.0
    """Wall time of a call, the start of the process included."""
    memory_bytes: int = 4 << 30
    """Resident memory of the process."""
    output_bytes: int = 2 << 20
    """Size of the reply."""
    recorded: bool = True
    """Whether traces keep its results, so that a rollout can be replayed without it."""
    cached: bool = True
    """Whether equal calls on equal files give equal results, which are kept on disk."""
    version: int = 1
    """Raised when the tool's results change, so that old ones are not used."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a call."""

    ok: bool
    data: Any = None
    """What the tool returned, if ok."""
    error: str = ""
    """unavailable, timeout, memory, flood, crashed, garbage, or the name of an exception."""
    message: str = ""
    """What went wrong, for the policy to read."""
    seconds: float = 0.0
    """How long it took; kept out of traces."""
    from_cache: bool = False
    """Whether it was known; kept out of traces too."""


@dataclass
class Desk:
    """The tools of one rollout.

    Args:
        tools: what can be called.
        cache: folder of results by content, None to keep none.
    """

    tools: Mapping[str, Tool]
    cache: Path | None = None
    timings: list[dict[str, Any]] = field(default_factory=list)
    """Seconds of every call, in order."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """What every call of the policy's tools came to, in order, for a trace; emptied by
    `begin_rollout`."""
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _digests: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def __enter__(self) -> Desk:
        """Nothing is started before it is called."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kills every process."""
        self.close()

    def close(self) -> None:
        """Kills every process; the next call starts one anew."""
        for name in list(self._running):
            self._kill(name)

    def interrupt(self) -> None:
        """Kills what runs, from another thread too; a call in progress fails as crashed."""
        for process in list(self._running.values()):
            # It may have ended by itself.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def missing(self, name: str) -> tuple[str, ...]:
        """Packages that a tool needs and that are not installed."""
        needs = self.tools[name].needs
        return tuple(one for one in needs if importlib.util.find_spec(one) is None)

    def begin_rollout(self) -> None:
        """Begins a new record of results."""
        self.results = []

    def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Runs a tool, or gives what is known of the same call on the same file.

        Args:
            name: a key of `tools`.
            arguments: JSON data; `path`, if there, is a file and stands for its content.
        """
        result = self._result(name, arguments)
        if self.tools[name].recorded:
            told = {key: value for key, value in arguments.items() if key != "path"}
            self.results.append(
                {"tool": name, "arguments": told, "ok": result.ok, "data": result.data,
                 "error": result.error, "message": result.message}
            )  # fmt: skip
        return result

    def _result(self, name: str, arguments: Mapping[str, Any]) -> Result:
        tool = self.tools[name]
        missing = self.missing(name)
        if missing:
            return Result(
                ok=False,
                error="unavailable",
                message=f"{name} needs {', '.join(missing)}, not installed here; "
                "pip install 'internvideo3[agent]' has it.",
            )
        started = time.perf_counter()
        kept = self._place(tool, arguments)
        data = _read(kept)
        result = Result(ok=True, data=data, from_cache=True) if data is not None else None
        if result is None:
            result = self._ask(tool, arguments)
            if result.ok and kept is not None:
                _write(kept, result.data)
        seconds = time.perf_counter() - started
        self.timings.append(
            {"tool": name, "seconds": round(seconds, 3), "from_cache": result.from_cache}
        )
        return result

    def _place(self, tool: Tool, arguments: Mapping[str, Any]) -> Path | None:
        if self.cache is None or not tool.cached:
            return None
        content = dict(arguments)
        if "path" in content:
            content["path"] = self.digest(Path(content["path"]))
        key = json.dumps([tool.name, tool.module, tool.version, content], sort_keys=True)
        return self.cache / tool.name / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def digest(self, path: Path) -> str:
        """SHA-256 of a file; read once while size and time stay the same."""
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._digests:
            with path.open("rb") as file:
                self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[key]

    def _ask(self, tool: Tool, arguments: Mapping[str, Any]) -> Result:
        deadline = time.monotonic() + tool.seconds
        process = self._process(tool)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(dict(arguments)).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._fail(tool, "crashed", "it ended before it could be asked")
        return self._listen(tool, process, process.stdout, deadline)

    def _listen(
        self, tool: Tool, process: subprocess.Popen[bytes], out: IO[bytes], deadline: float
    ) -> Result:
        line = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                problem = _over(tool, process, deadline, len(line))
                if problem:
                    return self._fail(tool, *problem)
                piece = os.read(out.fileno(), 1 << 16) if selector.select(LOOK_EVERY_S) else None
                if piece == b"":
                    return self._fail(tool, "crashed", "its process ended without a reply")
                line += piece or b""
        return self._understand(tool, bytes(line))

    def _understand(self, tool: Tool, line: bytes) -> Result:
        try:
            reply = json.loads(line)
        except ValueError:
            return self._fail(tool, "garbage", "its reply is not JSON")
        if not isinstance(reply, dict) or not isinstance(reply.get("ok"), bool):
            return self._fail(tool, "garbage", "its reply is not of the agreed form")
        if reply["ok"]:
            return Result(ok=True, data=reply.get("data"))
        error, message = str(reply.get("error", "")), str(reply.get("message", ""))
        return Result(ok=False, error=error, message=f"{tool.name}: {message[:ERROR_CHARS]}")

    def _process(self, tool: Tool) -> subprocess.Popen[bytes]:
        running = self._running.get(tool.name)
        if running is not None and running.poll() is None:
            return running
        # Its own session, so that what the tool starts is killed with it; no stream of ours.
        self._running[tool.name] = subprocess.Popen(
            [sys.executable, "-m", "internvideo3.harness.agent.tools.worker", tool.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        return self._running[tool.name]

    def _fail(self, tool: Tool, error: str, what: str) -> Result:
        self._kill(tool.name)
        return Result(ok=False, error=error, message=f"{tool.name} was stopped: {what}.")

    def _kill(self, name: str) -> None:
        process = self._running.pop(name)
        # It may have ended by itself, and its group with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                # A request may be left that a dead process did not read.
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@dataclass
class RecordedDesk(Desk):
    """Gives what a trace has recorded instead of running tools.

    Args:
        recorded: `tool_results` of a trace.
        absent: `tools` of it: what each tool lacked where the trace was made.
    """

    recorded: list[dict[str, Any]] = field(default_factory=list)
    absent: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def missing(self, name: str) -> tuple[str, ...]:
        """What was missing then; what is recorded needs no package now."""
        if self.tools[name].recorded:
            return tuple(self.absent.get(name, ()))
        return super().missing(name)

    def _result(self, name: str, arguments: Mapping[str, Any]) -> Result:
        if not self.tools[name].recorded:
            return super()._result(name, arguments)
        told = {key: value for key, value in arguments.items() if key != "path"}
        for number, row in enumerate(self.recorded):
            if (row["tool"], row["arguments"]) == (name, told):
                del self.recorded[number]
                kept = {key: row[key] for key in ("ok", "data", "error", "message")}
                return Result(**kept)
        return Result(
            ok=False, error="unrecorded", message=f"the trace has no result of this call of {name}"
        )


def _over(
    tool: Tool, process: subprocess.Popen[bytes], deadline: float, given: int
) -> tuple[str, str] | None:
    """The limit that a process has exceeded, with the reason in words."""
    if given > tool.output_bytes:
        return "flood", f"it gave more than {tool.output_bytes} bytes"
    if time.monotonic() > deadline:
        return "timeout", f"it took more than {tool.seconds:g} s"
    try:
        used = psutil.Process(process.pid).memory_info().rss
    except psutil.Error:
        return None  # it has ended; its stream tells
    if used > tool.memory_bytes:
        return "memory", f"it took more than {tool.memory_bytes / 2**30:.1f} GiB"
    return None


def _read(kept: Path | None) -> Any:
    """A result from the cache, None if there is none or it is damaged."""
    if kept is None or not kept.is_file():
        return None
    try:
        return json.loads(kept.read_text(encoding="utf-8"))["data"]
    except (ValueError, KeyError, TypeError):
        return None  # computed again, and written over


def _write(kept: Path, data: Any) -> None:
    """Keeps a result; a reader sees all of it or nothing."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False, encoding="utf-8") as file:
        json.dump({"data": data}, file)
    Path(file.name).replace(kept)
