"""Which files of others are given to the decoder: containers that hold their pictures themselves.

FFmpeg goes by content, whatever a file is called. Some of what it knows is a list of other files,
which it opens: HLS, `ffconcat`, DASH, IMF, SDP. One that is sent as a video would show what lies on
this machine, or tell by the error what does. So a file must begin as a container of a known kind
does, and hold nothing by which FFmpeg could take it for a list.

An MP4 may name other files too (`dref`); FFmpeg follows that with `enable_drefs` only, which is off
in what decodes here, as a test holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

HEAD_BYTES = 1 << 20
"""As many as FFmpeg looks at before it decides what a file is (`PROBE_BUF_MAX`)."""
KINDS = "MP4, MOV, 3GP, Matroska, WebM, AVI, FLV, MPEG-TS, MPEG-PS, Ogg, WMV, GIF"
_ATOMS = (
    b"ftyp",
    b"styp",
    b"moov",
    b"mdat",
    b"wide",
    b"free",
    b"skip",
    b"pnot",
    b"moof",
    b"sidx",
    b"uuid",
)
"""With what MP4 and older QuickTime files begin, after four bytes of length."""
_BEGINNINGS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG-1 and -2 video alone
    b"OggS",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
    b"GIF87a",
    b"GIF89a",
)
_STREAMS = (188, 192, 204)
"""How long packets of an MPEG transport stream are; a recording may begin in the middle of one."""
_SYNC, _PACKETS = 0x47, 8
# FFmpeg skips an ID3 tag before it looks.
_LIST = re.compile(rb"\A(?:ID3|#EXTM3U|ffconcat)|(?:\A|\n)\r?c=IN IP")
# XML is looked for up to the first zero, as in a text.
_XML_LIST = re.compile(rb"\A[^\0]*?(?:<MPD|<CompositionPlaylist)", re.IGNORECASE)
_NAMED_A_FILM = re.compile(
    r"\.(mp4|m4v|mov|qt|3gp|3g2|mkv|webm|avi|flv|m?ts|m2ts|mpe?g|m1v|m2v|vob|og[vg]|wmv|asf)\Z",
    re.IGNORECASE,
)


def problem(head: bytes) -> str | None:
    """Why a file is not decoded, None if it may be.

    Args:
        head: its first `HEAD_BYTES`.
    """
    if _LIST.search(head) or _XML_LIST.match(head):
        return "it is a list that names other files, and none is followed. Send the video itself"
    if not any(is_kind(head) for is_kind in _CONTAINERS):
        return f"it is of none of the kinds that are read here ({KINDS}). Convert it to one"
    return None


def problem_of(file: Path) -> str | None:
    """The same of a file on disk, whose name FFmpeg looks at too.

    Raises:
        OSError: it cannot be read.
    """
    if "%" in str(file) and not _NAMED_A_FILM.search(file.name):
        # `a%03d.gif` would stand for a000.gif, a001.gif, …
        return "its path has a %, by which a picture stands for a series. Rename it"
    with file.open("rb") as opened:
        return problem(opened.read(HEAD_BYTES))


def _is_transport_stream(head: bytes) -> bool:
    syncs = (
        head[first : first + _PACKETS * length : length]
        for length in _STREAMS
        for first in range(length)
    )
    return any(len(one) == _PACKETS and set(one) == {_SYNC} for one in syncs)


_CONTAINERS: tuple[Callable[[bytes], bool], ...] = (
    lambda head: head.startswith(_BEGINNINGS),
    lambda head: head[4:8] in _ATOMS,
    lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ",
    _is_transport_stream,
)
