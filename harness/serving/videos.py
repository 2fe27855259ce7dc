"""The videos of a request: uploads as data URLs, and files of one folder. Nothing else is read."""

from __future__ import annotations

import base64
import binascii
import tempfile
from pathlib import Path
from urllib.parse import unquote

from internvideo3.harness.agent.environment import SUBTITLE_SUFFIXES
from internvideo3.harness.serving.containers import HEAD_BYTES, problem, problem_of
from internvideo3.harness.serving.wire import ApiError

SHOWN_CHARS = 120


class Shelf:
    """Finds videos.

    Args:
        folder: whose files may be read; None for uploads only.
        uploads: folder for what is uploaded; the caller empties it.
    """

    def __init__(self, folder: Path | None, uploads: Path) -> None:
        self.folder = folder.resolve() if folder else None
        self.uploads = uploads

    def find(self, url: str) -> Path:
        """The file that a URL stands for; an upload is written to one.

        Args:
            url: `data:video/…;base64,…`, `file://…`, or a path, relative to the folder.

        Raises:
            ApiError: it is no such URL, lies outside the folder, is not there, or is no file of
                pictures of its own.
        """
        scheme = url[:SHOWN_CHARS].partition(":")[0].lower()
        if scheme == "data":
            return self._upload(url)
        if scheme == "file":
            return self._file(unquote(url[len("file:") :].removeprefix("//")), url)
        if "://" in url[:SHOWN_CHARS]:
            raise _refused(
                f"{url[:SHOWN_CHARS]!r} is not fetched: this server opens no connections. Send "
                "the video as a data URL, or put it into the server's folder."
            )
        return self._file(url, url)

    def _upload(self, url: str) -> Path:
        head, comma, data = url.partition(",")
        kind = head[len("data:") :].split(";")
        if not comma or not kind[0].startswith("video/") or kind[-1] != "base64":
            raise _refused(
                f"a video is sent as data:video/mp4;base64,…, not as {head[:SHOWN_CHARS]!r}."
            )
        try:
            content = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise _refused(f"the data URL of a video is not base64 ({error}).") from None
        if not content:
            raise _refused("the data URL of a video is empty.")
        _check("of the data URL", problem(content[:HEAD_BYTES]))
        with tempfile.NamedTemporaryFile(dir=self.uploads, suffix=".video", delete=False) as file:
            file.write(content)
        return Path(file.name)

    def _file(self, path: str, url: str) -> Path:
        shown = url[:SHOWN_CHARS]
        if self.folder is None:
            raise _refused(
                f"{shown!r} is not read: this server has no folder of videos. Send the video as a "
                "data URL, or start the server with --folder.",
                403,
            )
        try:
            # Links and dots are followed first: what counts is where the file is in the end.
            found = (self.folder / path).resolve()
            inside = found.is_relative_to(self.folder)
            there = inside and found.is_file()
        except (OSError, ValueError):  # a name that no file system takes
            raise _refused(f"{shown!r} is no path of a file.") from None
        if not inside:
            raise _refused(f"{shown!r} lies outside the folder that this server reads.", 403)
        if not there:
            raise _refused(f"there is no file {shown!r} in the server's folder.", 404)
        try:
            # Like a link, a list in the folder could lead out of it.
            why = problem_of(found)
        except OSError as error:
            raise _refused(f"the file {shown!r} cannot be read: {error.strerror}.") from None
        _check(repr(shown), why)
        self._check_subtitles(found)
        return found

    def _check_subtitles(self, video: Path) -> None:
        """What the agent reads beside a video must lie in the folder too."""
        assert self.folder is not None
        for suffix in SUBTITLE_SUFFIXES:
            beside = video.with_suffix(suffix)
            if not beside.resolve().is_relative_to(self.folder):
                raise _refused(
                    f"the subtitles {beside.name!r} link to a file outside the server's folder.",
                    403,
                )


def _check(shown: str, why: str | None) -> None:
    if why is not None:
        raise _refused(f"cannot read the video {shown}: {why}.")


def _refused(message: str, status: int = 400) -> ApiError:
    kind = "permission_error" if status == 403 else "invalid_request_error"
    return ApiError(status, message, kind=kind, param="messages")
