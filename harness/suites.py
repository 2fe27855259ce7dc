"""`internvideo3 suites`: the benchmarks and suites, how they are run, where their data goes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from internvideo3.harness.preflight import ALL_SUITES, PreflightError, nearest
from internvideo3.reports.wording import suite_title
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS, suites
from internvideo3.tasks.benchmarks.local import annotation_files
from internvideo3.tasks.benchmarks.protocol import Benchmark, Preset
from internvideo3.tasks.benchmarks.wording import place, sampling, task
from internvideo3.tasks.brief import EVALUABLE
from internvideo3.tasks.scoring.entry import sources
from internvideo3.tasks.world.suites import SUITES, Suite


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A benchmark as a row of the list."""

    name: str
    title: str
    where: str
    """Table of the paper, or `scale`."""
    questions: int | None
    """None where they are drawn when the suite is built."""
    metric: str
    task: str
    """lmms-eval's task, or ours."""
    here: bool
    """Whether its annotations are in the data root, or the suite is built."""


def listed(root: Path, world: Path) -> list[Listed]:
    """All benchmarks in the paper's order, and the suites of the scale world.

    Args:
        root: where benchmarks are.
        world: where the scale world is built.
    """
    return [*_benchmarks(root), *_world(world)]


def _world(world: Path) -> list[Listed]:
    return [
        Listed(
            name=one.name,
            title=suite_title(one.name),
            where="scale",
            questions=None,
            metric=one.metric,
            task="ours",
            here=(world / "test" / f"{one.name}.jsonl").is_file(),
        )
        for one in EVALUABLE.values()
    ]


def _benchmarks(root: Path) -> list[Listed]:
    return [
        Listed(
            name=one.name,
            title=one.title,
            where=place(one),
            questions=one.data.questions,
            metric=one.metric,
            task=task(one),
            here=bool(annotation_files(one, root / one.home)),
        )
        for one in BENCHMARKS.values()
    ]


def groups() -> Iterator[str]:
    """Names that stand for several benchmarks, one line each."""
    for name, members in (suites() | {ALL_SUITES: tuple(SUITES)}).items():
        yield f"{name}: {', '.join(members)}"


def describe(name: str, root: Path) -> Iterator[str]:
    """Everything about one benchmark, as text.

    Raises:
        PreflightError: there is no such benchmark.
    """
    if name in EVALUABLE:
        yield from _of_the_world(EVALUABLE[name])
        return
    if name not in BENCHMARKS:
        known = [*BENCHMARKS, *EVALUABLE]
        raise PreflightError(f"Unknown benchmark {name!r}. {nearest(name, known)}")
    one = BENCHMARKS[name]
    folder = root / one.home
    files = annotation_files(one, folder)
    yield f"{one.title} ({one.name}), {place(one)}"
    yield f"data       {one.data.id}, {one.data.split}: {one.data.questions:,} questions"
    yield f"           (the count is {_counted(one)})"
    yield f"licence    {one.data.licence}"
    yield f"get        {one.data.get}"
    yield f"files      {folder}/{{{', '.join(one.data.annotations)}}}"
    yield f"           {', '.join(path.name for path in files) if files else 'not there yet'}"
    yield f"videos     {folder}/videos/, as the annotations name them"
    yield f"metric     {one.metric}"
    yield from (f"scorer     {source}" for source in sources(one.scorer))
    yield f"task       {task(one)}. {one.reason}"
    if one.verdict:
        yield f"verdict    {one.verdict}"
    if one.not_comparable:
        yield f"compare    not with the paper: {one.not_comparable}"
    yield from _preset("paper", one.paper)
    yield from _preset("official", one.official)


def _of_the_world(one: Suite) -> Iterator[str]:
    """What a suite of the scale world asks; it is drawn here, and needs no data."""
    lengths = ", ".join(
        f"{seconds} s {100 * share:.0f} %" for seconds, share in one.lengths.items()
    )
    yield f"{suite_title(one.name)} ({one.name}), of the scale world"
    yield f"videos     {one.videos}: {lengths}"
    yield f"questions  at most {one.questions_per_video} a video: {', '.join(one.families)}"
    yield f"metric     {one.metric}"
    yield f"get        internvideo3 world build {one.name}"
    yield from (f"scorer     {source}" for source in sources(one.name))


def _counted(one: Benchmark) -> str:
    return "verified" if one.data.counted == "verified" else "the one commonly stated"


def _preset(name: str, preset: Preset) -> Iterator[str]:
    prompt = "lmms-eval's prompt" if preset.prompt is None else "prompt of the source"
    yield f"{name:<10} {sampling(preset)}, {preset.max_new_tokens} new tokens, {prompt}"
    yield f"           {preset.source}"
    if preset.note:
        yield f"           {preset.note}"
