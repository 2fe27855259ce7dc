"""`internvideo3 eval`: preflight, then each suite through lmms-eval into a run directory."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from internvideo3.harness import provenance
from internvideo3.harness.preflight import (
    Benchmark,
    PreflightError,
    blind_videos,
    check_videos,
    load_benchmark,
)
from internvideo3.harness.settings import SYSTEM_PROMPT, Settings, pixel_range
from internvideo3.harness.store import SCHEMA, Row, RunStore
from internvideo3.model.checkpoint import (
    cache_bytes_per_token,
    inspect,
    resolve_checkpoint,
    weights_digest,
)
from internvideo3.tasks.scoring import Score, aggregate, score
from internvideo3.tasks.scoring.result import RULES
from internvideo3.tasks.world.build import world_root

if TYPE_CHECKING:
    from internvideo3.harness.direct import Outcome
    from internvideo3.harness.lmms import InternVideo3

Doc = Mapping[str, Any]
Progress = Callable[[str, int, int], None]
"""Called with a suite, how many of its samples are on disk, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """One evaluation command."""

    model: str
    """Checkpoint folder, or a name such as `scale:m2la`."""
    suites: tuple[str, ...]
    """Suites, in order."""
    out: Path
    """Run directory."""
    root: Path | None = None
    """The scale world's root; None for the usual place."""
    split: str = "test"
    """Which split of the suites."""
    limit: int | None = None
    """Answer only the first so many samples of a suite."""
    sample_ids: tuple[str, ...] = ()
    """Answer only these samples."""
    control: Literal["blind"] | None = None
    """`blind`: every question is asked about another video."""
    fps: float = 2.0
    """Frames from a second of video."""
    max_frames: int = 768
    """Most frames of a video."""
    min_pixels: int | None = None
    """Fewest pixels of a frame; None for the checkpoint's default."""
    max_pixels: int | None = None
    """Most pixels of a frame; None for the checkpoint's default."""
    max_new_tokens: int = 32
    """Most tokens of an answer."""
    system_prompt: str = SYSTEM_PROMPT
    """Text of the system turn."""
    batch: int = 16
    """Most questions of one video decoded together."""
    device: str | None = None
    """torch device; None for CUDA if there is one."""
    dtype: str = "auto"
    """float32, bfloat16, or auto."""
    threads: int = 1
    """CPU threads of torch. One thread is fastest for models of a few million parameters."""
    seed: int = 0
    """Seed of sampling."""
    retry_errors: bool = False
    """Answer samples again whose record is an error."""
    command: tuple[str, ...] = ()
    """The command line, for the record."""

    def settings(self) -> Settings:
        """The part that decides the numbers.

        Raises:
            CheckpointError: the checkpoint is unknown.
        """
        path = resolve_checkpoint(self.model)
        low, high = pixel_range(path, self.min_pixels, self.max_pixels)
        return Settings(
            min_pixels=low,
            max_pixels=high,
            fps=self.fps,
            max_frames=self.max_frames,
            system_prompt=self.system_prompt,
            max_new_tokens=self.max_new_tokens,
            batch=self.batch,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class EvalSummary:
    """What an evaluation did."""

    run: Path
    """The run directory."""
    computed: int
    """Samples answered by this command."""
    kept: int
    """Samples that an earlier command had answered."""
    errors: tuple[Row, ...] = field(default=())
    """Records of samples that failed."""


class SuiteRecorder:
    """Scores the answers to one suite as they come, and writes them to the run."""

    def __init__(
        self,
        benchmark: Benchmark,
        store: RunStore,
        *,
        blind: Mapping[str, Path] | None,
        retry_errors: bool,
        progress: Progress,
    ):
        self.benchmark = benchmark
        self.answered = store.answered(benchmark.suite)
        if retry_errors:
            self.answered = {key: row for key, row in self.answered.items() if row["error"] is None}
        self.kept = len(self.answered)
        self._store = store
        self._blind = blind
        self._progress = progress
        self.report()

    def known(self, task: str, doc: Doc) -> str | None:
        """The recorded answer to a document, or None."""
        row = self.answered.get(doc["id"])
        return None if row is None else row["prediction"] or ""

    def video(self, task: str, doc: Doc) -> str | None:
        """The blind control's video for a document, or None for the document's own."""
        return str(self._blind[doc["video_id"]]) if self._blind else None

    def record(self, task: str, answers: Sequence[tuple[Doc, "Outcome"]]) -> None:
        """Score a batch of answers and write it to disk."""
        rows = [self._row(doc, outcome) for doc, outcome in answers]
        timings = [{"id": doc["id"], **asdict(outcome.seconds)} for doc, outcome in answers]
        self._store.add(self.benchmark.suite, rows, timings)
        self.answered.update((row["id"], row) for row in rows)
        self.report()

    def report(self) -> None:
        """Tell the progress bar."""
        self._progress(self.benchmark.suite, len(self.answered), len(self.benchmark.docs))

    def _row(self, doc: Doc, outcome: "Outcome") -> Row:
        reply = outcome.reply
        prediction = reply.text if reply else None
        video = self.video("", doc) or str(self.benchmark.video(doc))
        return {
            **{key: doc[key] for key in _DOC_FIELDS},
            "suite": self.benchmark.suite,
            "video": video,
            "prediction": prediction,
            **score_fields(self.benchmark.suite, doc, prediction),
            "tokens": {
                "prompt": reply.prompt_tokens if reply else 0,
                "new": reply.new_tokens if reply else 0,
            },
            "error": outcome.error,
        }


_DOC_FIELDS = (
    "id",
    "video_id",
    "family",
    "length_s",
    "question",
    "options",
    "answer",
    "answer_type",
    "evidence",
)


def score_fields(suite: str, doc: Doc, prediction: str | None) -> Row:
    """Both scores of an answer, as they are stored; None, a sample that failed, scores 0."""
    return {rule: score(suite, doc, prediction, rule=rule).as_dict() for rule in RULES}


def suite_result(suite: str, rows: Sequence[Row]) -> Row:
    """A suite's TaskResult under the official rule, with the plain rule's beside it."""
    both = {
        rule: aggregate(
            suite, [(row, Score.from_dict(row[rule])) for row in rows], rule=rule
        ).as_dict()
        for rule in RULES
    }
    return {**both["official"], "plain": both["plain"]}


def evaluate(options: EvalOptions, progress: Progress = lambda *_: None) -> EvalSummary:
    """Run an evaluation, or what is left of it.

    Args:
        options: the command.
        progress: told whenever samples are answered.

    Returns:
        What was done, and which samples failed.

    Raises:
        PreflightError: something named does not exist or is of the wrong kind.
        StoreError: the run directory is another command's, or cannot be written.
        CheckpointError: the weights cannot be loaded.
    """
    settle_environment()
    benchmarks = load_benchmarks(options)
    blind = {one.suite: _blind(one, options.control) for one in benchmarks}
    with RunStore.open(options.out, describe_run(options, benchmarks)) as store:
        recorders = [
            SuiteRecorder(
                one,
                store,
                blind=blind[one.suite],
                retry_errors=options.retry_errors,
                progress=progress,
            )
            for one in benchmarks
        ]
        model: InternVideo3 | None = None
        for recorder in recorders:
            if len(recorder.answered) < len(recorder.benchmark.docs):
                model = model or load_plugin(options)
                _run(model, recorder)
            _finish(store, recorder)
    rows = [
        recorder.answered[doc["id"]] for recorder in recorders for doc in recorder.benchmark.docs
    ]
    kept = sum(recorder.kept for recorder in recorders)
    return EvalSummary(
        run=options.out,
        computed=len(rows) - kept,
        kept=kept,
        errors=tuple(row for row in rows if row["error"] is not None),
    )


def load_benchmarks(options: EvalOptions) -> list[Benchmark]:
    """The suites of a command, checked.

    Raises:
        PreflightError: a suite is not built, an id unknown, a video missing.
    """
    root = world_root(options.root)
    found = [
        load_benchmark(
            suite, root, options.split, limit=options.limit, sample_ids=options.sample_ids
        )
        for suite in options.suites
    ]
    chosen = [one for one in found if one.docs]
    for sample in options.sample_ids:
        if not any(sample == doc["id"] for one in chosen for doc in one.docs):
            raise PreflightError(
                f"--sample-id {sample} belongs to none of the suites "
                f"{', '.join(options.suites)}; an id starts with its suite's name."
            )
    check_videos(chosen)
    return chosen


def describe_run(options: EvalOptions, benchmarks: Sequence[Benchmark]) -> Row:
    """The content of run.json for a command; reads headers and digests, loads no weights.

    Raises:
        CheckpointError: the checkpoint is unknown, incomplete or of another architecture.
    """
    device, dtype = resolve_device(options)
    commit, dirty = provenance.revision()
    settings = asdict(options.settings())
    return {
        "schema": SCHEMA,
        "id": options.out.resolve().name,
        "created": provenance.now(),
        "command": list(options.command),
        "mode": "direct",
        "model": describe_model(options.model, dtype),
        "suites": {
            one.suite: {"n": len(one.docs), "data_digest": one.digest} for one in benchmarks
        },
        "config": {
            **settings,
            "split": options.split,
            "limit": options.limit,
            "sample_ids": list(options.sample_ids),
            "control": options.control,
            "device": device,
            "dtype": dtype,
            "threads": options.threads,
        },
        "commit": commit,
        "dirty": dirty,
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "comparable": {
            "paper": False,
            "reason": "the scale world and the scale model are this repository's own",
        },
    }


def describe_model(name: str, dtype: str) -> Row:
    """The `model` part of run.json, from headers and digests.

    Raises:
        CheckpointError: the checkpoint is unknown, incomplete or of another architecture.
    """
    info = inspect(name)
    return {
        "name": name,
        "path": str(info.path.resolve()),
        "digest": weights_digest(info.path),
        "attention": info.attention,
        "parameters": info.parameters,
        "cache_bytes_per_token": cache_bytes_per_token(info.path, dtype),
        "label": "scale" if name.startswith("scale:") else None,
    }


def load_plugin(options: EvalOptions) -> "InternVideo3":
    """Load the weights into the lmms-eval model class. Slow: imports lmms-eval, 10 to 20 s.

    Raises:
        CheckpointError: the weights cannot be loaded.
    """
    import torch

    from internvideo3.harness import lmms
    from internvideo3.harness.direct import Answerer
    from internvideo3.model.checkpoint import load_model

    lmms.quiet()
    torch.set_num_threads(options.threads)
    device, dtype = resolve_device(options)
    answerer = Answerer(*load_model(options.model, device, dtype), options.settings())
    return lmms.InternVideo3(answerer=answerer, name=options.model)


def resolve_device(options: EvalOptions) -> tuple[str, str]:
    """The device and number type of a command, with the defaults filled in."""
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.dtype != "auto":
        return device, options.dtype
    return device, "bfloat16" if device.startswith("cuda") else "float32"


def settle_environment() -> None:
    """Set what lmms-eval, datasets and tqdm read when they are imported: no network, no bars.

    Call it before torch is imported; what the user has set stays.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HOME", str(Path("~/.cache/huggingface").expanduser()))


def _blind(benchmark: Benchmark, control: str | None) -> dict[str, Path] | None:
    return blind_videos(benchmark) if control == "blind" else None


def _run(model: "InternVideo3", recorder: SuiteRecorder) -> None:
    from internvideo3.harness.lmms import run_benchmark

    benchmark = recorder.benchmark
    ids = [doc["id"] for doc in benchmark.docs] if benchmark.selected else None
    model.recorder = recorder
    numbers = run_benchmark(model, benchmark.task, benchmark.tasks_folder, ids)
    ours = suite_result(benchmark.suite, [recorder.answered[doc["id"]] for doc in benchmark.docs])
    theirs = numbers[ours["metric"]]
    if abs(theirs - ours["value"]) > 1e-9:
        raise PreflightError(
            f"lmms-eval's {ours['metric']} of {benchmark.suite} is {theirs}, from the same answers "
            f"ours is {ours['value']}: {benchmark.tasks_folder} is of another version. "
            "Run `internvideo3 world build` again, then repeat this command; the answers are kept."
        )


def _finish(store: RunStore, recorder: SuiteRecorder) -> None:
    suite = recorder.benchmark.suite
    order = [doc["id"] for doc in recorder.benchmark.docs]
    rows = [recorder.answered[key] for key in order]
    store.finish(suite, order, suite_result(suite, rows))
