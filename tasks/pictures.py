"""The pictures of a video file by their number in the order of showing: exactly those asked for.

PyAV decodes. The packets are read first, without decoding: their time stamps in order are the
numbers. After a jump to a keyframe a picture counts only if it has the very stamp that was asked
for; where one is missing, or stamps tell no order (MPEG program streams, recordings that begin
between keyframes), the file is decoded from its first packet to its last and its pictures counted.

decord, with which lmms-eval's stock class reads, counts from the keyframe that it jumped to. It
gives other pictures than asked, without an error, where pictures stored behind a keyframe are
shown before it (open groups, the default of x265), where an edit list hides some (what
`ffmpeg -ss ... -c copy` writes), and in AVI, MPEG-TS and MPEG-PS. Where it is right its pixels are
these to the bit. tests/tasks/test_pictures.py holds both.

Axes: T frames, H rows, W columns, C colours; N pictures in the order of showing, P packets in the
order of the file.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Tick = Callable[[], None]
"""Called again and again while a file is read; raises to stop it."""

_SMALL_FILE: Final = 4 << 20
"""Below this size starting decoder threads costs more than they save (measured: twice the time)."""


class LostError(RuntimeError):
    """A picture was not where the packets said; `instead` is another way to read the file."""

    def __init__(self, instead: Reel) -> None:
        super().__init__(f"the pictures of {instead.path} are not those of its packets")
        self.instead = instead


class _DamagedError(ValueError):
    """A picture lacks parts, or was made up where it did."""


@dataclass(frozen=True, slots=True, eq=False)
class _Packets:
    """What leads to a picture without decoding all before it."""

    stamps_P: NDArray[np.int64]
    decode_P: tuple[int | None, ...]
    sizes_P: NDArray[np.int64]
    keys_K: NDArray[np.int64]
    """Places of the keyframes among the packets."""
    order_P: NDArray[np.int64]
    """Places in the order of their stamps."""

    def place(self, stamp: int | None) -> int | None:
        """Where the packet of a stamp is; None if there is none."""
        if stamp is None:
            return None
        at = int(np.searchsorted(self.stamps_P, stamp, sorter=self.order_P))
        if at == len(self.order_P) or self.stamps_P[self.order_P[at]] != stamp:
            return None
        return int(self.order_P[at])

    def stamps_to(self, entry: int) -> Iterator[int]:
        """Stamps to jump to in order to come to a keyframe or before it.

        Some containers look up the time of showing and others that of decoding; where there is no
        index of keyframes, a jump may end behind one.
        """
        yield int(self.stamps_P[entry])
        decode = self.decode_P[entry]
        if decode is not None:
            yield decode
        before_K = self.keys_K[self.keys_K < entry]
        yield from self.stamps_P[before_K[-1:]].tolist()

    def entry(self, place: int) -> int:
        """The last keyframe from which a packet's picture is decoded whole.

        A picture shown before a keyframe may refer to what is stored before that.
        """
        before_K = self.keys_K[: np.searchsorted(self.keys_K, place, side="right")]
        shown_K = before_K[self.stamps_P[before_K] <= self.stamps_P[place]]
        return int(shown_K[-1]) if len(shown_K) else 0


@dataclass(frozen=True, slots=True, eq=False)
class Reel:
    """What a file says of its pictures before any is decoded."""

    path: Path
    total: int
    """How many there are."""
    fps: float
    """The average rate that the file states; 0 if it states none."""
    times_N: NDArray[np.float64] | None
    """When each is shown, in seconds from the first; None where the file does not tell."""
    packets: _Packets | None
    """None where the pictures are to be counted."""
    shown_N: NDArray[np.int64] | None
    """Stamps in the order of showing."""

    def pictures(self, numbers: Sequence[int], tick: Tick) -> Iterator[NDArray[np.uint8]]:
        """Decode pictures.

        Args:
            numbers: which, in ascending order; a number that comes again gives its picture again.
            tick: called at every packet.

        Yields:
            RGB pixels `[H,W,C]`, turned as the file asks, all of the first one's size.

        Raises:
            LostError: a picture is not there; what was given is to be forgotten.
            ValueError: a picture is damaged, or none could be decoded.
        """
        painter = _Painter()
        with _opened(self.path) as (container, stream):
            _thread(self.path, stream)
            distinct = [number for number, _ in itertools.groupby(numbers)]
            if self.packets is None or self.shown_N is None:
                frames = self._counted(container, stream, distinct, tick)
            else:
                frames = self._found(_Cursor(container, stream, self.packets, tick), distinct)
            repeats = (len(list(same)) for _, same in itertools.groupby(numbers))
            for frame, times in zip(frames, repeats, strict=True):
                yield from itertools.repeat(painter.paint(frame), times)

    def _found(self, cursor: _Cursor, numbers: Sequence[int]) -> Iterator[Any]:
        assert self.shown_N is not None
        for stamp in self.shown_N[list(numbers)].tolist():
            frame = cursor.go_to(stamp)
            if frame is None:
                raise LostError(replace(self, packets=None))
            yield frame

    def _counted(
        self, container: Any, stream: Any, numbers: Sequence[int], tick: Tick
    ) -> Iterator[Any]:
        wanted, count = set(numbers), 0
        # Of H.265 that begins between keyframes FFmpeg makes up the pictures before the first one.
        begun = stream.codec_context.name != "hevc"
        for packet in container.demux(stream):
            tick()
            for frame in packet.decode():
                begun = begun or bool(frame.key_frame)
                if not begun:
                    continue
                _check_whole(frame)
                if count in wanted:
                    yield frame
                count += 1
        if not count:
            raise ValueError("none of its pictures could be decoded")
        if count != self.total:
            # Of stamps without pictures nobody knows which those are.
            raise LostError(replace(self, total=count, packets=None, times_N=None))


def read_reel(path: Path, tick: Tick) -> Reel:
    """Read the packets of a file's video stream.

    Args:
        path: the file.
        tick: called at every packet.

    Raises:
        ValueError: it has no pictures, or is cut off.
    """
    rows: list[tuple[int | None, int | None, int, bool, bool]] = []
    cut = False
    with _opened(path) as (container, stream):
        fps, base_s = float(stream.average_rate or 0), float(stream.time_base or 0)
        for packet in container.demux(stream):
            tick()
            if packet.size:
                row = packet.pts, packet.dts, packet.size, packet.is_keyframe, packet.is_discard
                rows.append(row)
                cut = packet.is_corrupt
    if cut:
        raise ValueError("it is cut off in its last picture")
    # What an edit list hides is decoded, since other pictures refer to it, and not shown.
    total = sum(not hidden for *_, hidden in rows)
    stamps = [row[0] for row in rows]
    if not rows or not rows[0][3] or None in stamps or len(set(stamps)) < len(stamps):
        return Reel(path, total, fps, times_N=None, packets=None, shown_N=None)
    packets = _packets(rows)
    if (np.diff(packets.stamps_P[packets.keys_K]) < 0).any():
        # Parts put behind one another, each with a clock of its own.
        return Reel(path, total, fps, times_N=None, packets=None, shown_N=None)
    shown_N = np.sort(packets.stamps_P[[not hidden for *_, hidden in rows]])
    times_N = (shown_N - shown_N[:1]).astype(np.float64) * base_s
    return Reel(path, total, fps, times_N=times_N, packets=packets, shown_N=shown_N)


def _packets(rows: Sequence[tuple[Any, ...]]) -> _Packets:
    stamps, decode, sizes, keys, _ = zip(*rows, strict=True)
    stamps_P = np.asarray(stamps, np.int64)
    return _Packets(
        stamps_P=stamps_P,
        decode_P=decode,
        sizes_P=np.asarray(sizes, np.int64),
        keys_K=np.flatnonzero(keys),
        order_P=np.argsort(stamps_P),
    )


class _Cursor:
    """A decoder somewhere in a file."""

    def __init__(self, container: Any, stream: Any, packets: _Packets, tick: Tick) -> None:
        self.container = container
        self.stream = stream
        self.packets = packets
        self.tick = tick
        self.fed = -1
        """Place of the last packet that the decoder was given."""
        self.floor: int | None = None
        """Stamp of the keyframe that was jumped to; pictures shown before it may lack parts."""
        self.frames = self._decoded(iter(container.demux(stream)))

    def go_to(self, stamp: int) -> Any | None:
        """The frame of a stamp behind that of the last call; None if there is none."""
        import av

        place = self.packets.place(stamp)
        assert place is not None
        entry = self.packets.entry(place)
        if entry > self.fed + 1 and not self._jump(entry):
            return None
        try:
            return self._shown_at(stamp)
        except (_DamagedError, av.FFmpegError):
            # After a jump that may be why: what is decoded from the first packet on has no excuse.
            if self.floor is None:
                raise
            return None

    def _shown_at(self, stamp: int) -> Any | None:
        for frame in self.frames:
            if frame.pts is None or frame.pts > stamp:
                return None
            if self.floor is None or frame.pts >= self.floor:
                _check_whole(frame)
            if frame.pts == stamp:
                return frame
        return None

    def _jump(self, entry: int) -> bool:
        """Go on from a keyframe; whether it was found."""
        import av

        for stamp in self.packets.stamps_to(entry):
            try:
                self.container.seek(stamp, stream=self.stream)
                coming = iter(self.container.demux(self.stream))
                first = self._first(coming, entry)
            except av.FFmpegError:
                return False
            if first is not None:
                self.fed, self.floor = entry - 1, first.pts
                self.frames = self._decoded(itertools.chain([first], coming))
                return True
        return False

    def _first(self, coming: Iterator[Any], entry: int) -> Any | None:
        """The packet of a place, out of those from somewhere before it; None if they miss it."""
        for packet in coming:
            self.tick()
            place = self.packets.place(packet.pts)
            if place == entry:
                whole = packet.is_keyframe and packet.size == self.packets.sizes_P[entry]
                return packet if whole else None
            if place is not None and place > entry:
                return None
        return None

    def _decoded(self, coming: Iterator[Any]) -> Iterator[Any]:
        for packet in coming:
            self.tick()
            self.fed += bool(packet.size)
            yield from packet.decode()


class _Painter:
    """Frames to pixels, as decord does it: by the file's own colours, all of one size."""

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self.reformatter = VideoReformatter()
        self.size: tuple[int, int] | None = None

    def paint(self, frame: Any) -> NDArray[np.uint8]:
        self.size = self.size or (frame.width, frame.height)
        # swscale's tables: of codes that it does not have it takes BT.601's (5).
        space = frame.colorspace if 0 < frame.colorspace <= 10 and frame.colorspace != 8 else 5
        full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
        made: Any = self.reformatter.reformat(
            frame,
            *self.size,
            format="rgb24",
            src_colorspace=space,
            # Of no meaning in RGB; PyAV heeds the source's only where the two differ.
            dst_colorspace=1 if space == 5 else 5,
            src_color_range=2 if full else 1,
            interpolation="BILINEAR",
        )
        pixels_HWC: NDArray[np.uint8] = made.to_ndarray()
        turns = round(frame.rotation / 90)
        return np.ascontiguousarray(np.rot90(pixels_HWC, turns)) if turns else pixels_HWC


def _check_whole(frame: Any) -> None:
    if frame.is_corrupt:
        raise _DamagedError("a picture is damaged")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A file and its main video stream.

    Raises:
        ValueError: it has none, or one that cannot be decoded.
    """
    import av  # here: 0.1 s that a run without videos need not pay

    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        if stream is None:
            kinds = [one.type for one in container.streams]
            raise ValueError(f"it has no picture, its streams are {kinds}")
        if stream.codec_context is None:
            raise ValueError("FFmpeg has no decoder for its pictures")
        yield container, stream


def _thread(path: Path, stream: Any) -> None:
    if path.stat().st_size < _SMALL_FILE:
        stream.codec_context.thread_count = 1
    else:
        stream.thread_type = "AUTO"
