"""`internvideo3 eval`: preflight, then each suite through lmms-eval into a run directory."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvideo3.harness import provenance
from internvideo3.harness.comparable import comparable
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.preflight import (
    Benchmark,
    PreflightError,
    blind_videos,
    check_sample_ids,
    check_videos,
    find_benchmark,
    load_benchmark,
)
from internvideo3.harness.ranks import Meeting, Share, share_of
from internvideo3.harness.recorder import Progress, SuiteRecorder, scored_doc, suite_result
from internvideo3.harness.store import SCHEMA, Row, RunStore, write_text
from internvideo3.harness.submission import write_submission
from internvideo3.model.checkpoint import (
    cache_bytes_per_token,
    inspect,
    weights_digest,
)
from internvideo3.tasks.benchmarks.lmms import task_files
from internvideo3.tasks.benchmarks.local import data_root
from internvideo3.tasks.brief import EVALUABLE
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.scoring import aggregate, score
from internvideo3.tasks.world.build import world_root

if TYPE_CHECKING:
    from internvideo3.harness.lmms import InternVideo3


@dataclass(frozen=True, kw_only=True)
class EvalSummary:
    """What an evaluation did."""

    run: Path
    """The run directory."""
    computed: int
    """Samples answered by this command, by all processes of a launch together."""
    kept: int
    """Samples that an earlier command had answered."""
    errors: tuple[Row, ...] = field(default=())
    """Records of samples that failed."""
    left: int = 0
    """Samples that other processes have still to answer."""


def evaluate(options: EvalOptions, progress: Progress = lambda *_: None) -> EvalSummary:
    """Run an evaluation, or what is left of it.

    Under a launcher this process answers its share and rank 0 merges; see `ranks`.

    Args:
        options: the command.
        progress: told whenever samples are answered.

    Returns:
        What was done, and which samples failed.

    Raises:
        PreflightError: something named does not exist or is of the wrong kind.
        RanksError: the launcher did not start what was asked for.
        ErrorBudgetError: too many samples failed.
        StoreError: the run directory is another command's, or cannot be written.
        CheckpointError: the weights cannot be loaded.
    """
    settle_environment()
    share = share_of(options.shard, options.processes)
    meeting = Meeting(share)
    benchmarks = load_benchmarks(options)
    run = describe_run(options, benchmarks)
    with RunStore.open(options.out, run, share.part) as store:
        recorders = _answer(options, benchmarks, store, share, progress)
    computed = sum(recorder.computed for recorder in recorders)
    meeting.total("computed", computed)
    meeting.wait("answered")
    if share.launched and share.index == 0:
        with RunStore.open(options.out, run) as store:
            for recorder in recorders:
                recorder.answered = store.answered(recorder.benchmark.suite)
                _finish(store, recorder)
    if share.launched:
        computed = meeting.total("computed", 0)
    meeting.leave()
    return _summary(options, recorders, computed)


def _answer(
    options: EvalOptions,
    benchmarks: Sequence[Benchmark],
    store: RunStore,
    share: Share,
    progress: Progress,
) -> list[SuiteRecorder]:
    """Answer this process's share of all suites; finish them if that is all of them."""
    recorders = [
        SuiteRecorder(
            one,
            store,
            mine=share.takes(one.docs) if share.part else one.docs,
            blind=_blind(one, options.control),
            options=options,
            progress=progress,
        )
        for one in benchmarks
    ]
    for recorder in recorders:
        recorder.beside = [one for one in recorders if one is not recorder]
    model: InternVideo3 | None = None
    try:
        for recorder in recorders:
            if recorder.missing:
                model = model or load_plugin(options, share)
                _run(model, recorder, options)
            if share.part is None:
                _finish(store, recorder)
    finally:
        if model is not None:
            model.answerer.close()
    return recorders


def _summary(
    options: EvalOptions, recorders: Sequence[SuiteRecorder], computed: int
) -> EvalSummary:
    docs = [(recorder, doc["id"]) for recorder in recorders for doc in recorder.benchmark.docs]
    rows = [recorder.answered[key] for recorder, key in docs if key in recorder.answered]
    return EvalSummary(
        run=options.out,
        computed=computed,
        kept=len(rows) - computed,
        errors=tuple(row for row in rows if row["error"] is not None),
        left=len(docs) - len(rows),
    )


def load_benchmarks(options: EvalOptions) -> list[Benchmark]:
    """The suites of a command, checked.

    Raises:
        PreflightError: a suite is not built, an id unknown, a video missing.
    """
    check_sample_ids(options.answered_suites, options.sample_ids)
    suites = [load_suite(name, options) for name in options.answered_suites]
    chosen = [one for one in suites if one.docs]
    check_videos(chosen, options.max_errors or 0)
    for one in chosen:
        _blind(one, options.control)  # refused before anything is written
    return chosen


def load_suite(suite: str, options: EvalOptions) -> Benchmark:
    """One suite of a command, of the scale world or a benchmark.

    Raises:
        PreflightError: it is not built or not there, or an id is unknown.
    """
    if suite in EVALUABLE:
        return load_benchmark(
            suite,
            world_root(options.root),
            options.split,
            limit=options.limit,
            sample_ids=options.sample_ids,
        )
    return find_benchmark(
        suite,
        data_root(options.data),
        options.preset,
        tasks=options.out / "lmms",
        limit=options.limit,
        sample_ids=options.sample_ids,
    )


def describe_run(options: EvalOptions, benchmarks: Sequence[Benchmark]) -> Row:
    """The content of run.json for a command; reads headers and digests, loads no weights.

    Raises:
        CheckpointError: the checkpoint is unknown, incomplete or of another architecture.
    """
    device, dtype = resolve_device(options)
    commit, dirty = provenance.revision()
    config = asdict(options.settings())
    model = describe_model(options.model, dtype)
    left_out = {"left_out": options.left_out} if options.left_out else {}
    return left_out | {
        "schema": SCHEMA,
        "id": options.out.resolve().name,
        "created": provenance.now(),
        "command": list(options.command),
        "mode": "agentic" if options.agent else "direct",
        "model": model,
        "suites": {one.suite: _describe_suite(one, options) for one in benchmarks},
        "config": {
            **config,
            "split": options.split,
            "limit": options.limit,
            "sample_ids": list(options.sample_ids),
            "control": options.control,
            "agent": asdict(options.agent) if options.agent else None,
            "device": device,
            "dtype": dtype,
            "threads": options.threads,
        },
        "commit": commit,
        "dirty": dirty,
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "comparable": comparable(benchmarks, model["label"], options.departures()),
    }


def _describe_suite(benchmark: Benchmark, options: EvalOptions) -> Row:
    found: Row = {"n": len(benchmark.docs), "data_digest": benchmark.digest}
    if benchmark.local is None or benchmark.preset is None:
        return found
    if benchmark.local.notes:
        found["notes"] = list(benchmark.local.notes)
    protocol = {"preset": options.preset, "source": benchmark.preset.source}
    return found | {
        "benchmark": benchmark.scorer,
        "title": benchmark.local.benchmark.title,
        "protocol": protocol,
        "settings": asdict(options.settings(benchmark)),
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


def load_plugin(options: EvalOptions, share: Share = Share()) -> "InternVideo3":  # noqa: B008
    """Load the weights into the lmms-eval model class. Slow: imports lmms-eval, 10 to 20 s.

    Raises:
        CheckpointError: the weights cannot be loaded.
    """
    import torch

    from internvideo3.harness import lmms
    from internvideo3.harness.agentic import AgenticAnswerer
    from internvideo3.harness.direct import Answerer, decoders
    from internvideo3.harness.frame_cache import FrameCache
    from internvideo3.model.checkpoint import load_model

    lmms.quiet()
    torch.set_num_threads(options.threads)
    device, dtype = resolve_device(options)
    if device == "cuda" and share.local is not None:
        device = f"cuda:{share.local}"
    cache = None
    if options.frame_cache is not None:
        cache = FrameCache(options.frame_cache.expanduser(), options.frame_cache_bytes)
    loaded = load_model(options.model, device, dtype)
    ahead = decoders(share.beside)
    reader = IsolatedReader(ahead, options.decode_limit_s)
    direct = Answerer(*loaded, options.settings(), cache, reader, ahead)
    answerer: Any = direct
    if options.agent is not None:
        answerer = AgenticAnswerer(direct, options.agent, name=options.model)
    return lmms.InternVideo3(answerer=answerer, name=options.model, control=options.control)


def resolve_device(options: EvalOptions) -> tuple[str, str]:
    """The device and number type of a command, with the defaults filled in.

    Raises:
        DeviceError: there is no such GPU here.
    """
    from internvideo3.model.device import device_of

    device = str(device_of(options.device))
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


def _run(model: "InternVideo3", recorder: SuiteRecorder, options: EvalOptions) -> None:
    from internvideo3.harness.lmms import run_benchmark

    benchmark = recorder.benchmark
    _write_tasks(benchmark)
    part = len(recorder.mine) < benchmark.whole
    model.recorder = recorder
    model.answerer = model.answerer.at(options.settings(benchmark))
    model.fps_of_documents = options.fps is None and options.max_frames is None
    numbers = run_benchmark(
        model,
        benchmark.task,
        benchmark.tasks_folder,
        [str(doc["id"]) for doc in recorder.mine] if part else None,
    )
    _compare(benchmark, [recorder.answered[doc["id"]] for doc in recorder.mine], numbers)


def _write_tasks(benchmark: Benchmark) -> None:
    """Write the task of a benchmark for lmms-eval; those of the scale world lie beside its data."""
    from internvideo3.harness.lmms import lmms_tasks

    if benchmark.local is None or benchmark.preset is None:
        return
    files = task_files(
        benchmark.suite,
        benchmark.local.benchmark,
        benchmark.preset,
        benchmark.everything,
        benchmark.tasks_folder,
        lmms_tasks(),
    )
    for path, text in files.items():
        write_text(path, text)


def _compare(benchmark: Benchmark, rows: Sequence[Row], numbers: Mapping[str, float]) -> None:
    """Raise if lmms-eval, given the same answers, came to another number.

    It strips answers, and gives failed samples the empty text.

    Raises:
        PreflightError: the numbers differ.
    """
    scored = [
        (scored_doc(row), score(benchmark.scorer, scored_doc(row), _stripped(row))) for row in rows
    ]
    ours = aggregate(benchmark.scorer, scored)
    # A part of a mixed suite may be of one kind, whose mean has another name but the same value.
    metric = benchmark.metric or (ours.metric if ours.metric in numbers else "score")
    theirs = numbers[metric]
    value = math.nan if ours.value is None else ours.value
    if abs(theirs - value) > 1e-9 or math.isnan(theirs) != math.isnan(value):
        raise PreflightError(
            f"lmms-eval's {metric} of {benchmark.suite} is {theirs}, from the same answers "
            f"ours is {value}: {benchmark.tasks_folder} is of another version. "
            "Run `internvideo3 world build` again, then repeat this command; the answers are kept."
        )


def _stripped(row: Row) -> str:
    return str(row["prediction"] or "").strip()


def _finish(store: RunStore, recorder: SuiteRecorder) -> None:
    suite = recorder.benchmark.suite
    order = [doc["id"] for doc in recorder.benchmark.docs]
    rows = [recorder.answered[key] for key in order]
    store.finish(suite, order, suite_result(suite, rows))
    write_submission(store.root, suite, rows)
