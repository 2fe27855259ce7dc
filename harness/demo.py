"""`internvideo3 demo`: the whole story, small: videos, evaluation, profile, page.

Every step continues where an earlier, interrupted demo stopped: videos are cached, answers are in
run directories, and a profile that is complete is not repeated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from internvideo3.harness.options import EvalOptions
from internvideo3.tasks.world.build import build_suite, world_root

BASE, CONVERTED, CONTROL = "scale:base", "scale:m2la", "scale:control"
# First videos of each suite; every prefix of a suite has its declared mix of lengths. Chosen so
# that the demo takes under four minutes on two slow cores.
VIDEOS: Mapping[str, int] = {
    "world_long": 20,
    "world_ego": 20,
    "world_short": 24,
    "world_grounding": 24,
    "world_spatial": 24,
    "world_manyq": 4,
}
Tell = Callable[[str], None]
EvalWithBars = Callable[[EvalOptions], object]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """One demo command."""

    out: Path
    """Folder for the runs and the page."""
    full: bool = False
    """Whole suites instead of their first videos; hours instead of minutes."""
    videos: int | None = None
    """At most so many videos of each suite; None for what `VIDEOS` says."""
    root: Path | None = None
    """The scale world's root; None for the usual place."""
    threads: int = 1
    """CPU threads of torch."""
    command: tuple[str, ...] = ()
    """The command line, for the record."""


class Shown(NamedTuple):
    """What a demo leaves."""

    page: Path
    runs: list[Path]
    """Run directories, in the order of the tables."""


def demo(options: DemoOptions, tell: Tell, run_eval: EvalWithBars) -> Shown:
    """Build the world, evaluate before and after conversion, profile, make the page.

    Args:
        options: the command.
        tell: gets one line for each step.
        run_eval: runs one evaluation and shows its progress.

    Returns:
        The page and its runs.

    Raises:
        ValueError: whole suites and a number of videos were both asked for, or the page would
            overwrite files of others.
    """
    from internvideo3.reports.page import check_place

    if options.full and options.videos:
        raise ValueError("--full and --videos exclude each other; leave one of them out.")
    check_place(options.out)  # now, and not after minutes of work
    # A subset has a root of its own: a suite's file lists all that is built of it, and a run
    # belongs to one such list.
    root = world_root(options.root)
    if not options.full:
        root /= "demo" if options.videos is None else f"demo-{options.videos}"
    tell(f"1/4 Videos and questions, in {root}")
    _build(root, options, tell)
    runs = {
        "base": _eval_options(options, root, BASE, None),
        "m2la": _eval_options(options, root, CONVERTED, None),
        "blind": _eval_options(options, root, BASE, "blind"),
    }
    if options.full:
        # First, because the page's headline compares with the first: the control had the
        # conversion's extra training, the base did not.
        runs = {"control": _eval_options(options, root, CONTROL, None), **runs}
    for name, command in runs.items():
        tell(f"2/4 Evaluation through lmms-eval: {name}")
        run_eval(command)
    tell("3/4 Profile on this CPU: prefill and decode rates, cache bytes")
    _profile(options, {BASE: runs["base"].out, CONVERTED: runs["m2la"].out}, tell)
    tell("4/4 Page")
    folders = [command.out for command in runs.values()]
    return Shown(_page(options, folders), folders)


def _build(root: Path, options: DemoOptions, tell: Tell) -> None:
    for name, videos in VIDEOS.items():
        limit = min(videos, options.videos or videos)
        built = build_suite(name, root, limit_videos=None if options.full else limit)
        tell(
            f"  {name}: {built.videos} videos ({built.made} made now), {built.questions} questions"
        )


def _eval_options(
    options: DemoOptions, root: Path, model: str, control: Literal["blind"] | None
) -> EvalOptions:
    name = control or model.removeprefix("scale:")
    return EvalOptions(
        model=model,
        suites=tuple(VIDEOS),
        out=options.out / "runs" / name,
        root=root,
        control=control,
        threads=options.threads,
        command=options.command,
    )


def _profile(options: DemoOptions, runs: Mapping[str, Path], tell: Tell) -> None:
    from internvideo3.harness.profile.command import ProfileOptions, is_complete, profile
    from internvideo3.harness.profile.workload import Workload

    command = ProfileOptions(
        workload=Workload(models=tuple(runs), repeats=3),
        out=options.out / "runs",
        into=runs,
        threads=options.threads,
        command=options.command,
    )
    if is_complete(command):
        tell("  kept from before")
    else:
        profile(command, lambda line: tell(f"  {line}"))


def _page(options: DemoOptions, runs: list[Path]) -> Path:
    from internvideo3.reports.page import build_report

    return build_report(runs, options.out, title="InternVideo3 at small scale")
