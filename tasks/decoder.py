"""Videos decoded in a process of their own: a file that crashes the decoder costs that file only.

The process lives as long as it can and is started again after a crash or at the time limit, which
also ends native calls that never return. Frames come over a few at a time and are fitted on this
side while more are decoded, so that a film of 2,048 frames takes the room of the fitted ones.

    reader = IsolatedReader()
    frames = reader.read("clip.mp4", fps=2.0)

The other side is `python -m internvideo3.tasks.decoder`: a JSON line with the request comes in.
Messages go out, each a JSON object behind its length in eight bytes: first what will come
(`plan`; again if it has to be begun anew), then frames (`shape`, followed by the pixels), at the
end the `digest`, or at any time an `error`.
"""

import contextlib
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from internvideo3.tasks.sampling import Choice, Plan
from internvideo3.tasks.video import (
    TIME_LIMIT_S,
    Clock,
    Fit,
    Frames,
    Gathered,
    VideoError,
    check_file,
    decode,
    too_slow,
)

_GRACE_S = 5.0
"""The process looks at the clock itself and answers; only where it cannot is it killed."""


class IsolatedReader:
    """Reads frames as `read_frames` does, in other processes; safe to share between threads.

    Args:
        processes: how many videos are decoded at once; more callers wait their turn.
        time_limit_s: longest that one is decoded; None for what its length allows.
    """

    def __init__(self, processes: int = 1, time_limit_s: float | None = None) -> None:
        if processes < 1:
            raise ValueError(f"a reader needs at least one process, got {processes}")
        self.time_limit_s = time_limit_s
        self._workers = tuple(_Worker() for _ in range(processes))
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def read(
        self,
        path: str | Path,
        *,
        fps: float = 2.0,
        max_frames: int = 768,
        start_s: float | None = None,
        end_s: float | None = None,
        steps_over_s: float | None = None,
        time_limit_s: float | None = None,
        fit: Fit | None = None,
    ) -> Frames:
        """The frames of a video; arguments, result and errors are those of `read_frames`.

        `fit` is called here, in the thread of the caller; without a `time_limit_s` the reader's
        own holds.

        Raises:
            VideoError: as `read_frames`, or the decoder crashed on the file.
            ValueError: as `read_frames`.
        """
        request = {
            "path": str(path),
            "fps": fps,
            "max_frames": max_frames,
            "start_s": start_s,
            "end_s": end_s,
            "steps_over_s": steps_over_s,
            "time_limit_s": self.time_limit_s if time_limit_s is None else time_limit_s,
        }
        worker = self._idle.get()
        try:
            return worker.read(request, fit)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes; the next read starts another."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process; it is started when it is first asked, and again after it was ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def read(self, request: Mapping[str, Any], fit: Fit | None) -> Frames:
        """One video.

        Raises:
            VideoError: it cannot be read, or the decoder crashed on it.
            ValueError: the request makes no sense.
        """
        process = self._running()
        try:
            return _ask(process, request, fit)
        except _RefusedError as refused:
            raise refused.error from None
        except BaseException as error:
            # Whatever else happens, an interrupt too, leaves the pipe in the middle of a reply.
            status = _end(process)
            self.process = None
            if isinstance(error, _LateError):
                raise too_slow(request["path"], error.limit_s) from None
            if isinstance(error, _CrashError | OSError):
                raise VideoError(_said(request["path"], status)) from None
            raise

    def close(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is not None and process.stdin is not None:
            # It ends by itself when nobody can ask any more.
            with contextlib.suppress(OSError):
                process.stdin.close()
            _end(process)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Waiting looks at the pipe, so nothing may be held back on this side of it.
                bufsize=0,
                # The process keeps what decoders write; its replies say what is of use.
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": _python_path()},
            )
        return self.process


class _CrashError(RuntimeError):
    """The process ended."""


class _LateError(RuntimeError):
    """It did not answer in time."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s)
        self.limit_s = limit_s


class _RefusedError(RuntimeError):
    """It answered with an error."""

    def __init__(self, error: ValueError) -> None:
        super().__init__(str(error))
        self.error = error


def _python_path() -> str:
    source = Path(str(sys.modules["internvideo3"].__file__)).parents[1]
    return os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))


def _ask(process: "subprocess.Popen[bytes]", request: Mapping[str, Any], fit: Fit | None) -> Frames:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    limit_s = request["time_limit_s"]
    replies = _Replies(process.stdout, TIME_LIMIT_S if limit_s is None else limit_s)
    gathered = Gathered(Path(request["path"]), fit)
    while True:
        answer = replies.next()
        if "error" in answer:
            kind = VideoError if answer["kind"] == "VideoError" else ValueError
            raise _RefusedError(kind(answer["error"]))
        if "digest" in answer:
            return gathered.frames(answer["digest"])
        if "plan" in answer:
            replies.allow(answer["limit_s"])
            plan = answer["plan"]
            gathered.begin(Plan(**plan | {"indices": tuple(plan["indices"])}))
        else:
            pixels_THWC = np.empty(answer["shape"], np.uint8)
            replies.fill(pixels_THWC.reshape(-1).data)
            gathered.add(pixels_THWC)


class _Replies:
    """What a process answers; only the time spent in waiting for it counts."""

    def __init__(self, stream: IO[bytes], limit_s: float) -> None:
        self.stream = stream
        self.limit_s = limit_s
        self.left_s = limit_s + _GRACE_S

    def allow(self, limit_s: float) -> None:
        """Take in the limit of a video whose length is known now."""
        self.left_s += limit_s - self.limit_s
        self.limit_s = limit_s

    def next(self) -> dict[str, Any]:
        """The next message, without the pixels that may follow it.

        Raises:
            _CrashError: there will be none.
            _LateError: there is none in time.
        """
        length = bytearray(8)
        self.fill(memoryview(length))
        message = bytearray(int.from_bytes(length, "little"))
        self.fill(memoryview(message))
        answer: dict[str, Any] = json.loads(message)
        return answer

    def fill(self, room: memoryview) -> None:
        """As many bytes as there is room for; raises as `next`."""
        while room:
            before = time.monotonic()
            ready, _, _ = select.select([self.stream], [], [], max(self.left_s, 0.0))
            self.left_s -= time.monotonic() - before
            if not ready:
                raise _LateError(self.limit_s)
            count = self.stream.readinto(room)  # type: ignore[attr-defined]
            if not count:
                raise _CrashError
            room = room[count:]


def _end(process: "subprocess.Popen[bytes]") -> int:
    """End the process if it has not ended by itself, and return its status."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.kill()
    for pipe in (process.stdin, process.stdout):
        # What is left to be flushed has no reader any more.
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
    return process.wait()


def _said(path: str | Path, status: int) -> str:
    """What became of a process that ended by itself."""
    if status == -signal.SIGKILL:
        # Nobody here sent it: at the limit it is another error.
        return (
            f"cannot read the video {path}: the decoder was killed (SIGKILL), as a system does "
            "when memory runs out. Free memory, or lower max_frames"
        )
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return (
        f"cannot read the video {path}: the decoder crashed on it ({name}). "
        "Check that it plays, or fetch or build it again"
    )


_CUT = re.compile(
    r"\[[\w,]+ @ 0x[0-9a-f]+\] .*(?:File ended prematurely|partial file"
    r"|exceeds containing master element|Invalid track number).*"
)
"""What FFmpeg writes of a file that is cut off or lacks a part, and then reads as a shorter one."""


def damage(written: str) -> str | None:
    """The first line of FFmpeg's messages that tells of a damaged file."""
    found = _CUT.search(written)
    return None if found is None else found.group().partition("] ")[2]


class _Pipe:
    """Sends frames over as they are decoded."""

    def __init__(self, stream: IO[bytes], clock: Clock) -> None:
        self.stream = stream
        self.clock = clock

    def begin(self, plan: Plan) -> None:
        _write(self.stream, {"plan": asdict(plan), "limit_s": self.clock.limit_s})

    def add(self, pixels_THWC: NDArray[np.uint8]) -> None:
        _write(self.stream, {"shape": pixels_THWC.shape}, pixels_THWC.reshape(-1).data)


def main() -> None:
    """Answer requests until the other side closes."""
    import av  # here: the other side needs none of it

    # Native code may print; the replies keep a descriptor of their own.
    replies = os.fdopen(os.dup(1), "wb")
    written = os.memfd_create("messages")
    os.dup2(written, 1)
    os.dup2(written, 2)
    # Ctrl-C goes to the whole group; the other side decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.ERROR)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        os.ftruncate(written, 0)
        os.lseek(written, 0, os.SEEK_SET)
        path = Path(request.pop("path"))
        try:
            digest = _decode(path, request, replies)
            hidden = damage(os.pread(written, 1 << 20, 0).decode(errors="replace"))
            if hidden is not None:
                raise VideoError(
                    f"cannot read the video {path}: it is damaged ({hidden}). "
                    "Check that it plays, or fetch or build it again"
                )
        except ValueError as error:  # VideoError is one
            _write(replies, {"kind": type(error).__name__, "error": str(error)})
        else:
            _write(replies, {"digest": digest})


def _decode(path: Path, request: dict[str, Any], replies: IO[bytes]) -> str:
    clock = Clock.of(request.pop("time_limit_s"))
    choice = Choice(**request)
    choice.check()
    check_file(path)
    return decode(path, choice, clock, _Pipe(replies, clock))


def _write(
    stream: IO[bytes], message: Mapping[str, Any], payload: memoryview | bytes = b""
) -> None:
    text = json.dumps(message).encode()
    stream.write(len(text).to_bytes(8, "little") + text)
    stream.write(payload)
    stream.flush()


if __name__ == "__main__":
    main()
