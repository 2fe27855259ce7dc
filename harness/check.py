"""`internvideo3 eval --check`: what a run needs and what is missing, before anything is loaded.

Reads annotations, names of files and headers of a checkpoint; opens no video, imports no torch.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvideo3.harness.comparable import comparable, reasons_of
from internvideo3.harness.evaluate import load_suite
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.preflight import Benchmark, PreflightError, missing_media
from internvideo3.harness.settings import Settings
from internvideo3.harness.store import Row, read_rows
from internvideo3.reports.wording import suite_title
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS, SUBTITLED
from internvideo3.tasks.benchmarks.local import data_root
from internvideo3.tasks.benchmarks.protocol import TOKEN_PIXELS, no_images
from internvideo3.tasks.benchmarks.protocol import Benchmark as Protocol
from internvideo3.tasks.video import FRAME_FACTOR
from internvideo3.tasks.world.build import world_root

GIB = 1 << 30
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a model was measured to be, in tokens a second."""

    prefill: float
    decode: float
    context: int
    """Tokens of context at which it was measured."""
    encode: float | None = None
    """Vision tokens a second of the vision tower; None where the profile had no video."""
    frames: float | None = None
    """Frames a second of the video decoder, likewise."""


@dataclass(frozen=True, kw_only=True)
class SuiteCheck:
    """What is known of one suite before it is run."""

    suite: str
    title: str
    problem: str | None
    """Why it cannot be run; None if everything is there."""
    questions: int = 0
    videos: int = 0
    """Different videos, present or not."""
    missing: tuple[str, ...] = ()
    """Paths of files that are not there."""
    files_here: int = 0
    """Files that are there."""
    bytes_here: int = 0
    """Their bytes."""
    frames: int = 0
    """Most frames that are decoded: each video once."""
    tokens: int = 0
    """Most visual tokens: each video once, each question's images."""
    new_tokens: int = 0
    """Most tokens of all answers together."""
    guessed_lengths: bool = False
    """Whether annotations tell no lengths, so that every video counts with the most frames."""
    reasons: tuple[str, ...] = ()
    """Why the number will not be comparable with the paper's."""
    holds: int | None = None
    """Questions that the annotations hold; None where they cannot be read."""
    notes: tuple[str, ...] = ()
    """What is odd about the annotations."""

    @property
    def ready(self) -> bool:
        """Whether it can be run."""
        return self.problem is None and not self.missing

    def seconds(self, rates: Rates) -> float:
        """Time to encode, prefill and answer at measured rates.

        Videos are decoded meanwhile; only where that takes longer does it count, in full.
        """
        model = self.tokens / rates.prefill + self.new_tokens / rates.decode
        if rates.encode is not None:
            model += self.tokens / rates.encode
        return model if rates.frames is None else max(model, self.frames / rates.frames)


def check(options: EvalOptions) -> list[SuiteCheck]:
    """Look at every suite of a command.

    Raises:
        PreflightError: an option makes no sense.
        CheckpointError: the checkpoint is unknown.
    """
    options.settings()
    return [_check(suite, options) for suite in options.suites]


def _check(suite: str, options: EvalOptions) -> SuiteCheck:
    known = BENCHMARKS.get(suite.removesuffix(SUBTITLED))
    title = suite_title(suite)
    try:
        one = load_suite(suite, options)
    except PreflightError as error:
        if known is None:
            return SuiteCheck(suite=suite, title=title, problem=str(error))
        return _unread(suite, known, str(error), options)
    settings = options.settings(one)
    lengths = {str(doc["video_id"]): doc["length_s"] for doc in one.docs if one.videos(doc)}
    paths = {path for doc in one.docs for path in one.media(doc)}
    missing = missing_media(one)
    single = known is not None and known.between is not None
    frames_of = pictures if single else video_frames
    images = sum(len(doc.get("images") or ()) for doc in one.docs)

    def image_tokens(length_s: float | None) -> int:
        return visual_tokens(settings, frames_of(settings, length_s), 1 if single else FRAME_FACTOR)

    return SuiteCheck(
        suite=suite,
        title=title,
        problem=None,
        questions=len(one.docs),
        videos=len(lengths),
        missing=missing,
        files_here=len(paths) - len(missing),
        bytes_here=sum(path.stat().st_size for path in paths if path.is_file()),
        frames=sum(frames_of(settings, length) for length in lengths.values()),
        tokens=sum(map(image_tokens, lengths.values()))
        + images * (settings.max_pixels // TOKEN_PIXELS),
        new_tokens=len(one.docs) * (settings.max_new_tokens or 0),
        guessed_lengths=None in lengths.values(),
        reasons=_reasons(one, options),
        holds=one.whole,
        notes=one.local.notes if one.local else (),
    )


def _unread(suite: str, known: Protocol, problem: str, options: EvalOptions) -> SuiteCheck:
    """Bounds for a benchmark that cannot be read: every question with a longest video of its own.

    Images are not counted: only the annotations tell how many a question shows.
    """
    preset = known.preset(options.preset)
    empty = Benchmark(
        suite=suite, folder=Path(), docs=(), everything=(), digest="", preset=preset
    )  # fmt: skip
    settings = options.settings(empty)
    whole = known.data.questions
    asked = len(options.sample_ids) or min(whole, options.limit or whole)
    merged = FRAME_FACTOR if known.between is None else 1
    frames = settings.max_frames if known.images is no_images else 0
    return SuiteCheck(
        suite=suite,
        title=suite_title(suite),
        problem=problem,
        questions=asked,
        frames=asked * frames,
        tokens=asked * visual_tokens(settings, frames, merged) if frames else 0,
        new_tokens=asked * (settings.max_new_tokens or 0),
        guessed_lengths=True,
        reasons=tuple(reasons_of(suite, known, asked, _label(options), options.departures())),
    )


def _reasons(one: Benchmark, options: EvalOptions) -> tuple[str, ...]:
    verdict = comparable([one], _label(options), options.departures())
    found = verdict.get("suites", {}).get(one.suite, {}).get("reasons")
    return tuple(found if found is not None else [verdict["reason"]])


def _label(options: EvalOptions) -> str | None:
    return "scale" if options.model.startswith("scale:") else None


def video_frames(settings: Settings, length_s: float | None) -> int:
    """Most frames of a video.

    Args:
        settings: how it is sampled.
        length_s: its length in seconds; None for as long as it takes to fill the frames.
    """
    if length_s is None:
        return settings.max_frames
    return min(settings.max_frames, max(FRAME_FACTOR, round(length_s * settings.fps)))


def pictures(settings: Settings, length_s: float | None) -> int:
    """Most pictures of a video that is shown as single pictures, at most one a second."""
    if length_s is None:
        return settings.max_frames
    return min(settings.max_frames, max(1, int(length_s)))


def visual_tokens(settings: Settings, frames: int, merged: int = FRAME_FACTOR) -> int:
    """Most visual tokens of so many frames: 32 x 32 pixels of merged frames make one."""
    _, most = settings.bounds(frames)
    return frames // merged * (most // TOKEN_PIXELS)


def read_rates(measurements: Path) -> Rates:
    """The rates at the longest context of a profile.

    Args:
        measurements: a `measurements.jsonl`, or the run directory that holds one.

    Raises:
        PreflightError: the file is missing or holds no rates.
    """
    path = measurements / "measurements.jsonl" if measurements.is_dir() else measurements
    every = read_rows(path)
    rows = [row for row in every if row.get("tokens_per_s")]
    found = {kind: _longest(rows, kind) for kind in ("prefill", "decode")}
    if None in found.values():
        raise PreflightError(
            f"{path} holds no prefill and decode rates; give a run of `internvideo3 profile`."
        )
    prefill, decode = found["prefill"] or {}, found["decode"] or {}
    return Rates(
        prefill=float(prefill["tokens_per_s"]),
        decode=float(decode["tokens_per_s"]),
        context=int(decode["context_tokens"]),
        encode=_rate(every, "vision_encoding", "tokens_per_s"),
        frames=_rate(every, "video_decoding", "frames_per_s"),
    )


def _rate(rows: Sequence[Row], kind: str, name: str) -> float | None:
    found = [float(row[name]) for row in rows if row.get("kind") == kind and row.get(name)]
    return found[-1] if found else None


def _longest(rows: Sequence[Row], kind: str) -> Row | None:
    return max(
        (row for row in rows if row.get("kind") == kind),
        key=lambda row: int(row.get("context_tokens") or 0),
        default=None,
    )


def lines(checks: Sequence[SuiteCheck], options: EvalOptions, rates: Rates | None) -> Iterator[str]:
    """The findings as text, a block for each suite and a verdict at the end."""
    if not options.model:
        yield "no --model is given; frames are counted as large as any model sees them"
    for one in checks:
        yield f"{one.title} ({one.suite}): {_state(one)}"
        yield from (f"  {line}" for line in _block(one, rates))
    yield from _together(checks, rates)
    if rates is None:
        yield "time is not estimated; give the rates with --profile RUN (`internvideo3 profile`)"
    yield from _places(options)
    ready = sum(one.ready for one in checks)
    yield f"{ready} of {len(checks)} suites are ready."


def _state(one: SuiteCheck) -> str:
    known = BENCHMARKS.get(one.suite.removesuffix(SUBTITLED))
    if not one.ready:
        return "NOT READY"
    part = known is not None and (one.holds or 0) < known.data.questions
    return "ready, a part of it" if part else "ready"


def _together(checks: Sequence[SuiteCheck], rates: Rates | None) -> Iterator[str]:
    """What all suites that can be read cost, where that is more than one."""
    read = [one for one in checks if one.problem is None]
    if len(read) < 2:
        return
    hours = sum(one.seconds(rates) for one in read) / 3600 if rates is not None else None
    yield (
        f"together: {sum(one.questions for one in read):,} questions, at most "
        f"{sum(one.tokens for one in read):,} visual tokens and "
        f"{sum(one.new_tokens for one in read):,} tokens of answers"
        + (f", about {hours:.2f} h" if hours is not None else "")
    )


def _block(one: SuiteCheck, rates: Rates | None) -> Iterator[str]:
    known = BENCHMARKS.get(one.suite.removesuffix(SUBTITLED))
    if one.problem:
        yield one.problem
        if known is not None:
            yield f"the whole of it: {known.data.questions:,} questions"
            yield (
                f"at most {one.tokens:,} visual tokens, were each of {one.questions:,} questions "
                "about a longest video of its own"
                if one.tokens
                else "how many images are shown only the annotations tell"
            ) + f", {one.new_tokens:,} tokens of answers"
            if rates is not None and one.tokens:
                yield f"at most {one.seconds(rates) / 3600:,.0f} h at the profile's rates"
            verdict = "; ".join(one.reasons)
            yield (
                f"not comparable with the paper: {verdict}"
                if verdict
                else "comparable with the paper, once all of it is answered"
            )
    else:
        if known is not None and one.holds != known.data.questions:
            stated = "" if known.data.counted == "verified" else ", as commonly stated"
            yield (
                f"the annotations hold {one.holds:,} questions; published are "
                f"{known.data.questions:,}{stated}"
            )
        yield from one.notes
        yield f"{one.questions:,} questions, {one.videos:,} videos, {one.bytes_here / GIB:.2f} GiB"
        yield from _missing(one)
        guess = ", where no lengths are told as many as a video can have"
        yield (
            f"at most {one.tokens:,} visual tokens{guess if one.guessed_lengths else ''}, "
            f"{one.new_tokens:,} tokens of answers"
        )
        if rates is not None:
            yield (
                f"about {one.seconds(rates) / 3600:.2f} h at the profile's rates "
                f"(measured at {rates.context:,} tokens; {_counted(rates)})"
            )
        verdict = "; ".join(one.reasons)
        yield f"not comparable with the paper: {verdict}" if verdict else "comparable"
    if known is not None:
        if known.verdict:
            yield known.verdict
        yield f"get: {known.data.get}"
        yield f"licence: {known.data.licence}"


def _counted(rates: Rates) -> str:
    """What of the way from file to answer is in the estimate."""
    if rates.encode is None or rates.frames is None:
        return "without the vision tower and decoding: give a profile that was made with --video"
    return "with the vision tower; videos are decoded meanwhile"


def _missing(one: SuiteCheck) -> Iterator[str]:
    if one.missing:
        yield f"{len(one.missing):,} files are missing or empty:"
        yield from (f"  {path}" for path in one.missing[:_SHOWN])
        if len(one.missing) > _SHOWN:
            yield f"  and {len(one.missing) - _SHOWN:,} more"
        if one.files_here:
            need = one.bytes_here / one.files_here * len(one.missing)
            yield f"they need about {need / GIB:.2f} GiB, if they are as large as those here"


def _places(options: EvalOptions) -> Iterator[str]:
    """Where the suites' files lie and what is free there, and what the archives take."""
    known = [BENCHMARKS.get(suite.removesuffix(SUBTITLED)) for suite in options.suites]
    data = {one.home: one for one in known if one is not None}.values()
    if None in known:
        yield _free(world_root(options.root))
    if not data:
        return
    needs = "".join(
        f"; {one.title}'s videos take {one.data.gigabytes:g} GB"
        for one in data
        if one.data.gigabytes
    )
    yield _free(data_root(options.data)) + needs
    unknown = [one.title for one in data if not one.data.gigabytes]
    if unknown and needs:
        yield f"how much the videos of the others take is not known: {', '.join(unknown)}"


def _free(root: Path) -> str:
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    return f"{root}: {shutil.disk_usage(there).free / GIB:,.0f} GiB free"
