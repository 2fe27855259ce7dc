"""Videos decoded in a process of their own: a file that crashes the decoder costs that file only.

About one in a hundred files with a few flipped bits in its header makes decord 0.6 read where it
must not (measured by flipping bits: segmentation fault), which no `try` can catch. The process
lives as long as it can and is started again after a crash or at the time limit, which also ends
native calls that never return.

decord hides damage inside a picture and only writes about it: most copies of a clip with a few
flipped bits in its pictures gave noise without an error. Here such a file is an error. What no
decoder can notice is a flipped bit that leaves a valid picture.

    reader = IsolatedReader()
    frames = reader.read("clip.mp4", fps=2.0)

The other side is `python -m internvideo3.tasks.decoder`: a JSON line with the request comes in, a
JSON line with the answer goes out, followed by the pixels.
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
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from internvideo3.tasks.video import TIME_LIMIT_S, Frames, VideoError, read_frames

_GRACE_S = 5.0
"""The process looks at the clock itself and answers; only where it cannot is it killed."""


class IsolatedReader:
    """Reads frames as `read_frames` does, in other processes; safe to share between threads.

    Args:
        processes: how many videos are decoded at once; more callers wait their turn.
    """

    def __init__(self, processes: int = 1) -> None:
        if processes < 1:
            raise ValueError(f"a reader needs at least one process, got {processes}")
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
        time_limit_s: float = TIME_LIMIT_S,
    ) -> Frames:
        """The frames of a video; arguments, result and errors are those of `read_frames`.

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
            "time_limit_s": time_limit_s,
        }
        worker = self._idle.get()
        try:
            return worker.read(request)
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

    def read(self, request: Mapping[str, Any]) -> Frames:
        """One video.

        Raises:
            VideoError: it cannot be read, or the decoder crashed on it.
            ValueError: the request makes no sense.
        """
        process = self._running()
        try:
            return _ask(process, request)
        except BaseException as error:
            if isinstance(error, VideoError | ValueError):
                raise
            # Whatever else happens, an interrupt too, leaves the pipe in the middle of a reply.
            status = _end(process)
            self.process = None
            if isinstance(error, _CrashError | OSError):
                said = _said(request["path"], status, request["time_limit_s"])
                raise VideoError(said) from None
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
                # The process keeps what decoders write; its replies say what is of use.
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": _python_path()},
            )
        return self.process


class _CrashError(RuntimeError):
    """The process ended, or did not answer in time."""


def _python_path() -> str:
    source = Path(str(sys.modules["internvideo3"].__file__)).parents[1]
    return os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))


def _ask(process: "subprocess.Popen[bytes]", request: Mapping[str, Any]) -> Frames:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    ready, _, _ = select.select([process.stdout], [], [], request["time_limit_s"] + _GRACE_S)
    line = process.stdout.readline() if ready else b""
    if not line.endswith(b"\n"):
        raise _CrashError
    answer = json.loads(line)
    if "error" in answer:
        kind = VideoError if answer["kind"] == "VideoError" else ValueError
        raise kind(answer["error"])
    pixels_THWC = np.empty(answer["shape"], np.uint8)
    _fill(process.stdout, pixels_THWC.reshape(-1).data)
    return Frames(
        pixels_THWC=pixels_THWC,
        indices=tuple(answer["indices"]),
        source_fps=answer["source_fps"],
        total_frames=answer["total_frames"],
        duration_s=answer["duration_s"],
        digest=answer["digest"],
    )


def _fill(stream: IO[bytes], room: memoryview) -> None:
    while room:
        chunk = stream.read(min(len(room), 1 << 24))
        if not chunk:
            raise _CrashError
        room[: len(chunk)] = chunk
        room = room[len(chunk) :]


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


def _said(path: str | Path, status: int, time_limit_s: float) -> str:
    if status == -signal.SIGKILL:
        what = f"it did not decode within {time_limit_s:g} s"
    else:
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        what = f"the decoder crashed on it ({name})"
    return f"cannot read the video {path}: {what}. Check that it plays, or fetch or build it again"


_DAMAGE = re.compile(
    r"\[\w+ @ 0x[0-9a-f]+\] .*(?:error while decoding|error decoding|concealing"
    r"|corrupted macroblock|is invalid|out of range|too large|unavailable for requested).*"
)
"""What FFmpeg's decoders write of a picture that they could not decode as it was encoded."""


def damage(written: str) -> str | None:
    """The first line of a decoder's messages that tells of a damaged picture."""
    found = _DAMAGE.search(written)
    return None if found is None else found.group().partition("] ")[2]


def main() -> None:
    """Answer requests until the other side closes."""
    # Native code may print; the replies keep a descriptor of their own.
    replies = os.fdopen(os.dup(1), "wb")
    written = os.memfd_create("messages")
    os.dup2(written, 1)
    os.dup2(written, 2)
    # Ctrl-C goes to the whole group; the other side decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        os.ftruncate(written, 0)
        os.lseek(written, 0, os.SEEK_SET)
        path = request.pop("path")
        try:
            frames = read_frames(path, speak=True, **request)
            hidden = damage(os.pread(written, 1 << 20, 0).decode(errors="replace"))
            if hidden is not None:
                raise VideoError(
                    f"cannot read the video {path}: a picture is damaged ({hidden}). "
                    "Check that it plays, or fetch or build it again"
                )
        except ValueError as error:  # VideoError is one
            _write(replies, {"kind": type(error).__name__, "error": str(error)})
            continue
        header = {
            "shape": frames.pixels_THWC.shape,
            "indices": frames.indices,
            "source_fps": frames.source_fps,
            "total_frames": frames.total_frames,
            "duration_s": frames.duration_s,
            "digest": frames.digest,
        }
        _write(replies, header, np.ascontiguousarray(frames.pixels_THWC).reshape(-1).data)


def _write(stream: IO[bytes], header: Mapping[str, Any], payload: memoryview | bytes = b"") -> None:
    stream.write(json.dumps(header).encode() + b"\n")
    stream.write(payload)
    stream.flush()


if __name__ == "__main__":
    main()
