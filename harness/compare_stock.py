"""`internvideo3 compare-stock`: our model class against lmms-eval's own, many questions a video.

Both classes hold the very same module in memory, read the same files, and get the same requests of
`world_manyq` in one process, in turns. The gate comes first: equal `input_ids` and
`video_grid_thw` of every request, equal answers, and enough different answers that equality says
something. Times are then taken twice: with decoding, and with the decoded frames kept.

Stock's own class repeats decoding, encoding and prefill for every question of a video; ours does
them once and decodes the questions together. That is what the ratio shows.
"""

import hashlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from internvideo3.harness import provenance
from internvideo3.harness.direct import Answerer, Clip, Outcome, Seconds
from internvideo3.harness.evaluate import describe_model, settle_environment
from internvideo3.harness.preflight import Benchmark, check_videos, load_benchmark
from internvideo3.harness.settings import Settings, pixel_range
from internvideo3.harness.store import Row, write_json
from internvideo3.model.checkpoint import load_model
from internvideo3.model.session import Session
from internvideo3.tasks.world.build import world_root

SUITE = "world_manyq"
ENOUGH_ANSWERS = 30
BAR_TOTAL, BAR_WITHOUT_DECODING = 8.0, 4.0


class CompareError(ValueError):
    """The two classes do not do the same work; nothing is timed."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """One comparison."""

    model: str
    """A GQA checkpoint, which both classes run."""
    videos: int
    """First videos of the suite."""
    repeats: int
    """Rounds of timing; the median counts."""
    out: Path | None
    """JSON file for the figures; None to write none."""
    root: Path | None = None
    """The scale world's root; None for the usual place."""
    threads: int = 1
    """CPU threads of torch."""
    answers: int = ENOUGH_ANSWERS
    """Fewest different answers for the gate."""
    command: tuple[str, ...] = ()
    """The command line, for the record."""


@dataclass(kw_only=True)
class Phases:
    """Seconds of one round over all questions."""

    total_s: float = 0.0
    """Wall time of the whole round."""
    decode_s: float = 0.0
    """Reading frames; ours does it in a thread beside the rest."""
    encode_s: float = 0.0
    """The vision tower."""
    prefill_s: float = 0.0
    """The text model over prompts. Stock: all of it for each question. Ours: the video once, then
    the questions of a video together; with the processor's work on the video."""
    answer_s: float = 0.0
    """The replies and what else is done to give them. Stock: one by one. Ours: those of a video
    together."""


@dataclass(frozen=True)
class _Inputs:
    ids: tuple[int, ...]
    grid: tuple[tuple[int, ...], ...]
    pixels: str
    """Digest of the patches."""


class _Keeper:
    """A recorder that keeps nothing but where the time went."""

    def __init__(self) -> None:
        self.seconds: list[Seconds] = []

    def known(self, task: str, doc: Mapping[str, Any]) -> None:
        """Nothing is known beforehand."""

    def video(self, task: str, doc: Mapping[str, Any]) -> None:
        """Every document shows its own video."""

    def record(self, task: str, answers: Sequence[tuple[Mapping[str, Any], Outcome]]) -> None:
        """Keep the times of a batch.

        Raises:
            CompareError: a sample failed.
        """
        for _, outcome in answers:
            if outcome.error is not None:
                raise CompareError(f"our class failed on a sample: {outcome.error['message']}")
            self.seconds.append(outcome.seconds)


class _Contest:
    """Both classes around one module, and the requests."""

    def __init__(self, options: CompareOptions, benchmark: Benchmark):
        from internvideo3.harness import lmms

        lmms.quiet()
        described = describe_model(options.model, "float32")
        self.model, processor = load_model(options.model, "cpu", "float32")
        low, high = pixel_range(Path(described["path"]))
        settings = Settings(min_pixels=low, max_pixels=high)
        self.keeper = _Keeper()
        answerer = Answerer(self.model, processor, settings)
        self.ours = lmms.InternVideo3(answerer=answerer, recorder=self.keeper)
        self.stock = lmms.stock_model(Path(described["path"]), settings, self.model)
        ids = [doc["id"] for doc in benchmark.docs]
        self.requests = lmms.requests_for(self.ours, benchmark.task, benchmark.tasks_folder, ids)
        self.stock.task_dict = self.ours.task_dict
        self.described = described
        self.kept: dict[str, Any] = {}
        self.frames: dict[tuple[Clip, ...], Any] = {}
        self.settings = settings

    def our_answers(self) -> list[str]:
        """One round of ours."""
        return [one.text for one in self.ours.generate_until(self.requests)]

    def stock_answers(self) -> list[str]:
        """One round of stock."""
        return [one.text for one in self.stock.generate_until(self.requests)]


def compare(options: CompareOptions, tell: Callable[[str], None] = lambda _: None) -> Row:
    """Gate and time the two classes.

    Args:
        options: what to compare.
        tell: gets one line for each step.

    Returns:
        Everything measured, as JSON data; also written to `options.out`.

    Raises:
        CompareError: inputs or answers differ, or too few answers differ from each other.
        PreflightError: the suite is not built.
    """
    settle_environment()
    torch.set_num_threads(options.threads)
    benchmark = _first_videos(options)
    contest = _Contest(options, benchmark)
    tell(f"{len(contest.requests)} questions on {options.videos} videos, one process, in turns")
    distinct = _gate(contest, options.answers)
    tell(f"gate green: equal input ids, grids and answers; {distinct} different answers")
    rounds: dict[str, list[Row]] = {}
    for number in range(options.repeats):
        for name, measured in _round(contest):
            rounds.setdefault(name, []).append(asdict(measured))
        tell(f"round {number + 1} of {options.repeats} done")
    result = _result(options, contest, rounds, distinct)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, result)
    return result


def lines(result: Row) -> list[str]:
    """A comparison in words, for the terminal."""
    questions = result["questions"]
    rows = [f"{'milliseconds a question':<28}total  decode  encode  prefill  answer"]
    for name, phases in result["median"].items():
        each = [1000 * phases[field.name] / questions for field in fields(Phases)]
        rows.append(f"{name:<26}" + "".join(f"{value:8.1f}" for value in each))
    total, without = result["ratio_total"], result["ratio_without_decoding"]
    return [
        *rows,
        f"ratio in total {total:.1f}x (bar {BAR_TOTAL:.0f}x), "
        f"without decoding {without:.1f}x (bar {BAR_WITHOUT_DECODING:.0f}x)",
    ]


def _first_videos(options: CompareOptions) -> Benchmark:
    root = world_root(options.root)
    whole = load_benchmark(SUITE, root, "test", limit=None, sample_ids=())
    videos = list(dict.fromkeys(doc["video_id"] for doc in whole.docs))[: options.videos]
    ids = [doc["id"] for doc in whole.docs if doc["video_id"] in videos]
    chosen = load_benchmark(SUITE, root, "test", limit=None, sample_ids=ids)
    check_videos([chosen])
    return chosen


def _gate(contest: _Contest, enough: int) -> int:
    """Check that both classes see and say the same; returns the number of different answers."""
    # The same pass decodes every video for the rounds without decoding.
    with _frames_kept(contest), _captured(contest) as (stock_inputs, our_inputs):
        said = contest.stock_answers()
        replied = contest.our_answers()
    # Stock sorts its requests by prompt; answers come back in order, inputs do not.
    theirs, mine = Counter(stock_inputs), Counter(our_inputs)
    if theirs != mine:
        raise CompareError(
            f"{(theirs - mine).total()} of {len(said)} requests reach the model with other input "
            f"ids, grids or pixels than in stock, {_example(theirs - mine, mine - theirs)}."
        )
    return check_answers(said, replied, enough)


def check_answers(said: Sequence[str], replied: Sequence[str], enough: int) -> int:
    """Number of different answers, if the two lists are equal and there are enough.

    Raises:
        CompareError: an answer differs, or too few answers differ from each other.
    """
    different = [at for at, (a, b) in enumerate(zip(said, replied, strict=True)) if a != b]
    if different:
        at = different[0]
        raise CompareError(
            f"{len(different)} of {len(said)} answers differ, first question {at}: "
            f"stock {said[at]!r}, ours {replied[at]!r}."
        )
    distinct = len(set(said))
    if distinct < enough:
        raise CompareError(
            f"only {distinct} different answers, the gate asks for {enough}: equality would say "
            "little. Take more --videos, or a trained model."
        )
    return distinct


def _example(theirs: Counter[_Inputs], mine: Counter[_Inputs]) -> str:
    a, b = (min(one, key=lambda inputs: (len(inputs.ids), inputs.ids)) for one in (theirs, mine))
    what = [
        field.name for field in fields(_Inputs) if getattr(a, field.name) != getattr(b, field.name)
    ]
    return f"for example in {' and '.join(what)} ({len(a.ids)} and {len(b.ids)} ids)"


@contextmanager
def _captured(contest: _Contest) -> Iterator[tuple[list[_Inputs], list[_Inputs]]]:
    """Note what each class gives the model, in the order of the requests."""
    theirs: list[_Inputs] = []
    mine: list[_Inputs] = []
    generate = contest.model.generate
    generate_batch = Session.generate_batch
    plain_encode = Session._encode
    seen: dict[str, Any] = {}

    def stock_generate(**inputs: Any) -> Any:
        ids = tuple(inputs["input_ids"][0].tolist())
        pixels = _digest(inputs["pixel_values_videos"])
        theirs.append(_Inputs(ids, _grid(inputs["video_grid_thw"]), pixels))
        return generate(**inputs)

    def encode(session: Session, appended: Any) -> Any:
        seen["grid"] = _grid(torch.stack([medium.grid_thw for medium in appended.media]))
        seen["pixels"] = _digest(torch.cat([medium.pixels for medium in appended.media]))
        return plain_encode(session, appended)

    def our_batch(sessions: Sequence[Session], limits: Any) -> Any:
        mine.extend(_Inputs(tuple(one.ids), seen["grid"], seen["pixels"]) for one in sessions)
        return generate_batch(sessions, limits)

    with (
        mock.patch.object(contest.model, "generate", stock_generate),
        mock.patch.object(Session, "_encode", encode),
        mock.patch.object(Session, "generate_batch", staticmethod(our_batch)),
    ):
        yield theirs, mine


def _grid(grid_N3: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in grid_N3.tolist())


def _digest(pixels_PV: torch.Tensor) -> str:
    return hashlib.sha256(pixels_PV.contiguous().numpy().tobytes()).hexdigest()


def _round(contest: _Contest) -> Iterator[tuple[str, Phases]]:
    yield "stock", _time_stock(contest)
    yield "ours", _time_ours(contest)
    with _frames_kept(contest):
        yield "stock, frames kept", _time_stock(contest)
        yield "ours, frames kept", _time_ours(contest)


def _time_ours(contest: _Contest) -> Phases:
    contest.keeper.seconds.clear()
    started = time.perf_counter()
    contest.our_answers()
    total = time.perf_counter() - started
    spent = contest.keeper.seconds
    return Phases(
        total_s=total,
        decode_s=sum(one.decode_s for one in spent),
        encode_s=sum(one.encode_s for one in spent),
        prefill_s=sum(one.prefill_s for one in spent),
        answer_s=sum(one.generate_s for one in spent),
    )


def _time_stock(contest: _Contest) -> Phases:
    phases = Phases()
    module: Any = sys.modules[type(contest.stock).__module__]
    model = contest.model
    # transformers encodes the video inside or before the first forward pass, by version; the two
    # parts of the model are timed apart.
    forward, encode = _Stopwatch(model.model.language_model), _Stopwatch(model.model.visual)
    plain_decode, plain_generate = module.process_vision_info, model.generate

    def decode(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        frames = plain_decode(*args, **options)
        phases.decode_s += time.perf_counter() - started
        return frames

    def generate(**inputs: Any) -> Any:
        forward.seconds.clear()
        encode.seconds.clear()
        started = time.perf_counter()
        tokens = plain_generate(**inputs)
        took, encoded = time.perf_counter() - started, sum(encode.seconds)
        phases.encode_s += encoded
        phases.prefill_s += forward.seconds[0]
        phases.answer_s += took - encoded - forward.seconds[0]
        return tokens

    with (
        forward,
        encode,
        mock.patch.object(module, "process_vision_info", decode),
        mock.patch.object(model, "generate", generate),
    ):
        started = time.perf_counter()
        contest.stock_answers()
        phases.total_s = time.perf_counter() - started
    return phases


class _Stopwatch:
    """Times the calls of a module while it is entered."""

    def __init__(self, module: torch.nn.Module):
        self.seconds: list[float] = []
        self._module = module
        self._started = 0.0

    def __enter__(self) -> None:
        self._hooks = (
            self._module.register_forward_pre_hook(self._start),
            self._module.register_forward_hook(self._stop),
        )

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self._started)


@contextmanager
def _frames_kept(contest: _Contest) -> Iterator[None]:
    """Let both classes decode each video once for all rounds, to time the rest alone."""
    module: Any = sys.modules[type(contest.stock).__module__]
    decode = module.process_vision_info
    kept, frames = contest.kept, contest.frames

    def process_vision_info(messages: Any, **options: Any) -> Any:
        path = next(p["video"] for m in messages[0] for p in m["content"] if p["type"] == "video")
        if path not in kept:
            kept[path] = decode(messages, **options)
        return kept[path]

    def our_decode(answerer: Answerer, clips: tuple[Clip, ...]) -> Any:
        if clips not in frames:
            frames[clips] = replace(plain_decode(answerer, clips), seconds=0.0)
        return frames[clips]

    plain_decode = Answerer.decode

    with (
        mock.patch.object(module, "process_vision_info", process_vision_info),
        mock.patch.object(Answerer, "decode", our_decode),
    ):
        yield


def _result(
    options: CompareOptions, contest: _Contest, rounds: Mapping[str, list[Row]], distinct: int
) -> Row:
    median = {
        name: {key: statistics.median(one[key] for one in taken) for key in taken[0]}
        for name, taken in rounds.items()
    }
    commit, dirty = provenance.revision()
    kept = (median["stock, frames kept"]["total_s"], median["ours, frames kept"]["total_s"])
    return {
        "suite": SUITE,
        "label": "scale",
        "created": provenance.now(),
        "command": list(options.command),
        "model": contest.described,
        "settings": asdict(contest.settings) | {"dtype": "float32", "threads": options.threads},
        "videos": options.videos,
        "questions": len(contest.requests),
        "gate": {"equal_inputs": True, "equal_answers": True, "different_answers": distinct},
        "ratio_total": median["stock"]["total_s"] / median["ours"]["total_s"],
        "ratio_without_decoding": kept[0] / kept[1],
        "bars": {"total": BAR_TOTAL, "without_decoding": BAR_WITHOUT_DECODING},
        "median": median,
        "rounds": rounds,
        "commit": commit,
        "dirty": dirty,
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
    }
