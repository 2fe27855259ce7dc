"""`internvideo3 eval --check`: what a run needs and what is missing, before anything is loaded.

Reads annotations, names of files and headers of a checkpoint; opens no video, imports no torch.
`check_lines` puts the findings in words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from internvideo3.harness.comparable import comparable, reasons_of
from internvideo3.harness.evaluate import load_suite
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.preflight import (
    Benchmark,
    Doc,
    PreflightError,
    blind_videos,
    check_sample_ids,
    lost_questions,
    missing_media,
)
from internvideo3.harness.ranks import share_of
from internvideo3.harness.settings import Settings
from internvideo3.harness.store import Row, read_rows
from internvideo3.reports.wording import suite_title
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS, SUBTITLED
from internvideo3.tasks.benchmarks.protocol import TOKEN_PIXELS, no_images
from internvideo3.tasks.benchmarks.protocol import Benchmark as Protocol
from internvideo3.tasks.sampling import FRAME_FACTOR

TOKEN_BYTES = 4
"""Bytes of English text that a token stands for, as a rule of thumb."""


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
    lost: int = 0
    """Questions about them."""
    accepted: bool = False
    """Whether the command accepts that these fail."""
    files_here: int = 0
    """Files that are there."""
    bytes_here: int = 0
    """Their bytes."""
    frames: int = 0
    """Most frames that are decoded: each video once."""
    tokens: int = 0
    """Most visual tokens: each video once, each question's images; for an agent each question's
    first look."""
    text_tokens: int = 0
    """About how many tokens of text are shown, subtitles included."""
    new_tokens: int = 0
    """Most tokens of all answers together; for an agent those of all that it does."""
    agentic: bool = False
    """Whether an agent answers, so that only limits are known."""
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
        return self.problem is None and (self.accepted or not self.missing)

    def seconds(self, rates: Rates) -> float:
        """Time to encode, prefill and answer at measured rates.

        Videos are decoded meanwhile; only where that takes longer does it count, in full.
        """
        read = self.tokens + self.text_tokens
        model = read / rates.prefill + self.new_tokens / rates.decode
        if rates.encode is not None:
            model += self.tokens / rates.encode
        return model if rates.frames is None else max(model, self.frames / rates.frames)


def check(options: EvalOptions) -> list[SuiteCheck]:
    """Look at every suite of a command.

    Raises:
        PreflightError: an option makes no sense.
        RanksError: the part is none of a whole.
        CheckpointError: the checkpoint is unknown.
    """
    options.settings()
    share_of(options.shard, None)  # the launcher comes later
    check_sample_ids(options.answered_suites, options.sample_ids)
    every = [_check(suite, options) for suite in options.answered_suites]
    found = [one for one in every if one.questions or one.problem]
    if sum(one.lost for one in found) <= (options.max_errors or 0):
        return [replace(one, accepted=one.lost > 0) for one in found]
    return found


def _check(suite: str, options: EvalOptions) -> SuiteCheck:
    known = BENCHMARKS.get(suite.removesuffix(SUBTITLED))
    title = suite_title(suite)
    try:
        one = load_suite(suite, options)
        if options.control == "blind":
            blind_videos(one)
    except PreflightError as error:
        if known is None:
            return SuiteCheck(suite=suite, title=title, problem=str(error))
        return _unread(suite, known, str(error), options)
    settings = options.settings(one)
    filmed = [doc for doc in one.docs if one.videos(doc)]
    # Forks of one reading answer all questions about a video; an agent looks for each anew.
    looks = filmed if options.agent else {str(doc["video_id"]): doc for doc in filmed}.values()
    paths = {path for doc in one.docs for path in one.media(doc)}
    missing = missing_media(one)
    seen = options.control != "text"
    images = sum(len(doc.get("images") or ()) for doc in one.docs) if seen else 0
    bounds = [_bound(one, doc, settings) for doc in looks] if seen else []
    return SuiteCheck(
        suite=suite,
        title=title,
        problem=None,
        questions=len(one.docs),
        videos=len({doc["video_id"] for doc in filmed}),
        missing=missing,
        lost=lost_questions([one], missing),
        files_here=len(paths) - len(missing),
        bytes_here=sum(path.stat().st_size for path in paths if path.is_file()),
        frames=sum(frames for frames, _ in bounds),
        tokens=sum(tokens for _, tokens in bounds) + images * (settings.max_pixels // TOKEN_PIXELS),
        text_tokens=sum(map(_text_bytes, one.docs)) // TOKEN_BYTES,
        new_tokens=len(one.docs) * _most_new(options, settings),
        agentic=options.agent is not None,
        guessed_lengths=bool(bounds) and any(doc["length_s"] is None for doc in looks),
        reasons=_reasons(one, options),
        holds=one.whole,
        notes=one.local.notes if one.local else (),
    )


def _bound(one: Benchmark, doc: Doc, settings: Settings) -> tuple[int, int]:
    """Most frames and most visual tokens of a document's videos."""
    single = doc.get("between") is not None
    count = len(one.videos(doc))
    each = (pictures if single else video_frames)(settings, doc["length_s"])
    shared = one.preset.question_frames if one.preset else None
    if shared:
        each = min(each, max(FRAME_FACTOR, -(-shared // count)))
    return count * each, count * visual_tokens(settings, each, 1 if single else FRAME_FACTOR)


def _text_bytes(doc: Doc) -> int:
    """Bytes of what a document shows as text."""
    question = str(doc["question"])
    options = [one for one in doc["options"] or () if one not in question]
    asked = doc.get("prompt") or "\n".join([question, *options])
    between = doc.get("between")
    subtitles = Path(between["path"]) if between else None
    return len(asked.encode()) + (
        subtitles.stat().st_size if subtitles and subtitles.is_file() else 0
    )


def _most_new(options: EvalOptions, settings: Settings) -> int:
    """Most tokens of an answer; an agent's budget holds its looks and calls too."""
    answer = settings.max_new_tokens or 0
    return options.agent.budget.tokens + answer if options.agent else answer


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
    mine = [sample for sample in options.sample_ids if sample.split("/")[0] == suite]
    asked = len(mine) if options.sample_ids else min(whole, options.limit or whole)
    merged = FRAME_FACTOR if known.between is None else 1
    filmed = known.images is no_images and options.control != "text"
    frames = settings.max_frames if filmed else 0
    return SuiteCheck(
        suite=suite,
        title=suite_title(suite),
        problem=problem,
        questions=asked,
        frames=asked * frames,
        tokens=asked * visual_tokens(settings, frames, merged) if frames else 0,
        new_tokens=asked * _most_new(options, settings),
        agentic=options.agent is not None,
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
