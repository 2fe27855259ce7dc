"""The command line. It parses and prints; each command's work is a plain function elsewhere.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from internvideo3.harness.evaluate import EvalSummary
    from internvideo3.harness.options import EvalOptions

USER_ERROR = 1
INTERRUPTED = 130

_EXAMPLES = """
[bold]First steps[/bold]

  internvideo3 demo                               all of it, small, in minutes

  internvideo3 world show world_long --index 3    one video and its question

[bold]Evaluate, compare, read[/bold]

  internvideo3 world build world_long             make the videos, once

  internvideo3 eval --model scale:base --suite world_long --out runs/base

  internvideo3 eval --model scale:m2la --suite world_long --out runs/m2la

  internvideo3 report runs/base runs/m2la --out page

An interrupted eval continues when the same command is repeated; nothing is
computed twice.
"""

app = typer.Typer(
    name="internvideo3",
    help="Evaluate, profile and compare M²LA video-language models.\n" + _EXAMPLES,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
world_app = typer.Typer(help="The scale world: small videos with questions.", no_args_is_help=True)
app.add_typer(world_app, name="world")

ModelOption = Annotated[
    str,
    typer.Option(help="Checkpoint folder, or scale:base, scale:m2la, scale:control."),
]
RootOption = Annotated[
    Path | None,
    typer.Option(help="Where the scale world is built. Default: $IV3_WORLD or the user's cache."),
]
ThreadsOption = Annotated[
    int, typer.Option(min=1, help="CPU threads; one is fastest for the scale models.")
]


@app.callback()
def _settings(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the full traceback of an error.")
    ] = False,
) -> None:
    if debug:
        os.environ["IV3_DEBUG"] = "1"


@app.command("eval")
def evaluate_command(
    model: ModelOption,
    suite: Annotated[
        str,
        typer.Option(help="Suites, comma-separated; `scale` stands for all of the scale world."),
    ],
    out: Annotated[Path, typer.Option(help="Run directory; repeat the command to continue it.")],
    limit: Annotated[
        int | None, typer.Option(help="Answer only the first N samples of each suite.")
    ] = None,
    sample_id: Annotated[
        list[str] | None,
        typer.Option(help="Answer only this sample, e.g. world_long/000123. Repeatable."),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(help="`blind`: ask every question about another video of the same length."),
    ] = None,
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    fps: Annotated[float, typer.Option(help="Frames taken from a second of video.")] = 2.0,
    max_frames: Annotated[int, typer.Option(help="Most frames of a video.")] = 768,
    min_pixels: Annotated[
        int | None, typer.Option(help="Fewest pixels of a frame. Default: by checkpoint.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Most pixels of a frame. Default: by checkpoint.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 32,
    batch: Annotated[
        int, typer.Option(min=1, help="Most questions of one video decoded together.")
    ] = 16,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. Default: cuda if there is one.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto (float32 on cpu).")
    ] = "auto",
    threads: ThreadsOption = 1,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Answer samples again that failed before.")
    ] = False,
    max_errors: Annotated[
        int, typer.Option(min=0, help="Failed samples to accept before the exit status is 1.")
    ] = 0,
    root: RootOption = None,
) -> None:
    """Answer the questions of suites with a model, through lmms-eval; resumable.

    Each answer is on disk when it is given. Repeat the command after a crash, a Ctrl-C or a full
    disk: only what is missing is computed. Scores are recomputed at any time by `score`.

    [bold]Examples[/bold]

      internvideo3 eval --model scale:m2la --suite scale --out runs/m2la

      internvideo3 eval --model scale:m2la --suite world_long --control blind --out runs/blind

      internvideo3 eval --model ./checkpoint --suite world_short --limit 50 --out runs/try
    """
    with _errors_in_words(out):
        from internvideo3.harness.options import EvalOptions
        from internvideo3.harness.preflight import suite_names

        options = EvalOptions(
            model=model,
            suites=tuple(suite_names(suite)),
            out=out,
            root=root,
            split=_one_of("--split", split, ("test", "validation", "train")),
            limit=limit,
            sample_ids=tuple(sample_id or ()),
            control="blind" if _control(control) else None,
            fps=fps,
            max_frames=max_frames,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_new_tokens=max_new_tokens,
            batch=batch,
            device=device,
            dtype=_one_of("--dtype", dtype, ("auto", "float32", "bfloat16")),
            threads=threads,
            retry_errors=retry_errors,
            command=_command(),
        )
        summary = _evaluate_with_bars(options)
        _print_runs([out])
        _tell_summary(summary, max_errors)


@app.command("score")
def score_command(
    run: Annotated[Path, typer.Argument(help="Run directory of an earlier eval.")],
) -> None:
    """Score the stored answers of a run again; needs no model and no GPU.

    [bold]Example[/bold]

      internvideo3 score runs/m2la
    """
    with _errors_in_words(run):
        from internvideo3.harness.rescore import rescore

        rescore(run)
        _print_runs([run])


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, the base model's first.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.md.")],
    title: Annotated[str, typer.Option(help="Title of the page.")] = "InternVideo3",
) -> None:
    """Make the leaderboard page from runs: tables, plots, and every answer with its frames.

    [bold]Example[/bold]

      internvideo3 report runs/base runs/m2la runs/blind --out page
    """
    with _errors_in_words(out):
        from internvideo3.reports.page import build_report

        page = build_report(runs, out, title=title)
        _print_runs(runs)
        print(f"Page: {page}")


@world_app.command("build")
def world_build_command(
    suites: Annotated[
        list[str] | None, typer.Argument(help="Suites; all of them by default.")
    ] = None,
    root: RootOption = None,
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    videos: Annotated[
        int | None, typer.Option(help="Only the first so many videos of each suite.")
    ] = None,
    sound: Annotated[bool, typer.Option("--sound", help="With a sound track.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one a core.")] = None,
) -> None:
    """Make the videos, questions and lmms-eval tasks of suites; only what is missing.

    [bold]Example[/bold]

      internvideo3 world build world_long world_ego --videos 50
    """
    with _errors_in_words(Path("world")):
        from internvideo3.tasks.world.build import world_build, world_root

        with _bars() as advance:
            built = world_build(
                suites,
                root=root,
                split=split,
                limit_videos=videos,
                sound=sound,
                workers=workers,
                progress=advance,
            )
        for one in built:
            print(f"{one.suite}: {one.videos} videos, {one.questions} questions")
        print(f"World: {world_root(root)}; for stock lmms-eval: --include_path {built[-1].tasks}")


@world_app.command("show")
def world_show_command(
    suite: Annotated[str, typer.Argument(help="A suite, e.g. world_long.")],
    index: Annotated[int, typer.Option(help="Which question of the suite, from 0.")] = 0,
    sample_id: Annotated[
        str | None, typer.Option(help="The question's id instead, e.g. world_long/000123.")
    ] = None,
    root: RootOption = None,
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    out: Annotated[
        Path | None, typer.Option(help="The PNG file. Default: named after the question.")
    ] = None,
) -> None:
    """Show one question as a picture: frames with their times, options, and the right answer.

    The suite need not be built: frames are then drawn on the spot.

    [bold]Example[/bold]

      internvideo3 world show world_long --index 3
    """
    with _errors_in_words(out or Path()):
        from internvideo3.tasks.world.show import world_show

        picture = world_show(
            suite, index=index, sample_id=sample_id, root=root, split=split, out=out
        )
        print(f"Picture: {picture.resolve()}")


@app.command("profile")
def profile_command(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Checkpoint; repeatable. Default: scale:base and scale:m2la in turns."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for one run directory a model.")] = Path(
        "runs/profile"
    ),
    contexts: Annotated[
        str, typer.Option(help="Context lengths in tokens, comma-separated.")
    ] = "512,2048,8192",
    repeats: Annotated[int, typer.Option(min=1, help="Timings of each kind.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: ThreadsOption = 1,
) -> None:
    """Measure prefill and decode rates and cache bytes on this CPU, models in turns.

    A model is timed only after its session's logits agree with one forward pass.

    [bold]Example[/bold]

      internvideo3 profile --model scale:base --model scale:m2la --out runs/profile
    """
    with _errors_in_words(out):
        from internvideo3.harness.profile_cpu import ProfileOptions, profile

        options = ProfileOptions(
            models=tuple(model or ("scale:base", "scale:m2la")),
            out=out,
            contexts=_numbers(contexts),
            repeats=repeats,
            threads=threads,
            dtype=_one_of("--dtype", dtype, ("float32", "bfloat16")),
            command=_command(),
        )
        for run in profile(options, print):
            print(f"Measurements: {run / 'measurements.jsonl'}")


@app.command("demo")
def demo_command(
    full: Annotated[
        bool, typer.Option("--full", help="Whole suites: hours instead of minutes.")
    ] = False,
    videos: Annotated[
        int | None, typer.Option(min=2, help="Smaller still: at most so many videos of a suite.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs and page.")] = Path("demo"),
    root: RootOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """The whole story, small: videos, evaluation before and after conversion, profile, page.

    Repeat the command to continue an interrupted demo.

    [bold]Example[/bold]

      internvideo3 demo --out demo
    """
    with _errors_in_words(out):
        from internvideo3.harness.demo import DemoOptions, demo

        options = DemoOptions(
            out=out, full=full, videos=videos, root=root, threads=threads, command=_command()
        )
        shown = demo(options, print, _evaluate_with_bars)
        _print_runs(shown.runs)
        print(f"Page: {shown.page.resolve()}")


@app.command("compare-stock")
def compare_stock_command(
    model: Annotated[str, typer.Option(help="A GQA checkpoint; both classes run its weights.")] = (
        "scale:base"
    ),
    videos: Annotated[int, typer.Option(min=1, help="Videos of world_manyq.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the classes take turns.")] = 3,
    out: Annotated[Path, typer.Option(help="JSON file for the figures.")] = Path(
        "reports/results/compare_stock.json"
    ),
    root: RootOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Time our model class against lmms-eval's own qwen3_vl on many questions per video.

    The gate first: equal input ids and grids, equal answers. Then seconds for decoding, prefill
    and answering, apart.

    [bold]Example[/bold]

      internvideo3 compare-stock --videos 6 --repeats 3
    """
    with _errors_in_words(out):
        from internvideo3.harness.compare_stock import CompareOptions, compare, lines

        options = CompareOptions(
            model=model,
            videos=videos,
            repeats=repeats,
            out=out,
            root=root,
            threads=threads,
            command=_command(),
        )
        for line in lines(compare(options, print)):
            print(line)


@app.command("inspect")
def inspect_command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or e.g. scale:m2la.")],
) -> None:
    """Say what a checkpoint is: attention, ranks, parameters, cache bytes per token.

    [bold]Example[/bold]

      internvideo3 inspect scale:m2la
    """
    with _errors_in_words(Path(checkpoint)):
        from internvideo3.harness.inspection import describe

        for line in describe(checkpoint):
            print(line)


def main() -> None:
    """Entry point of the `internvideo3` command."""
    app()


def _one_of(option: str, given: str, known: tuple[str, ...]) -> str:
    from internvideo3.harness.preflight import PreflightError, nearest

    if given not in known:
        raise PreflightError(f"{option} {given!r} is not known. {nearest(given, known)}")
    return given


def _command() -> tuple[str, ...]:
    return ("internvideo3", *sys.argv[1:])


def _numbers(text: str) -> tuple[int, ...]:
    from internvideo3.harness.preflight import PreflightError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PreflightError(f"Expected whole numbers with commas between, got {text!r}.") from None


def _control(given: str | None) -> str | None:
    return None if given is None else _one_of("--control", given, ("blind",))


@contextmanager
def _errors_in_words(out: Path) -> Iterator[None]:
    """Turn an error into one message and an exit status, and Ctrl-C into how to continue."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        print(
            f"\nStopped. Everything answered so far is kept in {out}; "
            "repeat the same command to continue.",
            file=sys.stderr,
        )
        _leave(INTERRUPTED)
    except (ValueError, OSError) as error:
        if os.environ.get("IV3_DEBUG"):
            raise
        print(f"Error: {error}", file=sys.stderr)
        _leave(USER_ERROR)
    except (RuntimeError, LookupError, TypeError, ArithmeticError) as error:
        if os.environ.get("IV3_DEBUG"):
            raise
        print(
            f"Unforeseen error, {type(error).__name__}: {error}\n"
            "What is finished is kept. `internvideo3 --debug ...` shows where it happened.",
            file=sys.stderr,
        )
        _leave(USER_ERROR)


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    raise typer.Exit(status)


def _evaluate_with_bars(options: "EvalOptions") -> "EvalSummary":
    from internvideo3.harness.evaluate import evaluate

    with _bars() as advance:
        return evaluate(options, advance)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar a name, with the time that is left; yields what moves them."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                # The bar starts where an earlier command stopped: its samples tell nothing
                # about how fast this command is.
                tasks[name] = bars.add_task(name, completed=done, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield advance


def _print_runs(runs: list[Path]) -> None:
    from internvideo3.reports.terminal import print_report

    print_report(runs)


def _tell_summary(summary: "EvalSummary", max_errors: int) -> None:
    print(f"{summary.computed} samples answered, {summary.kept} kept from before: {summary.run}")
    if not summary.errors:
        return
    shown = "\n".join(
        f"  {row['id']}: {row['error']['type']}: {row['error']['message']}"
        for row in summary.errors[:5]
    )
    print(
        f"{len(summary.errors)} samples failed and count as wrong:\n{shown}\n"
        "Repair the cause and repeat the command with --retry-errors.",
        file=sys.stderr,
    )
    if len(summary.errors) > max_errors:
        _leave(USER_ERROR)


if __name__ == "__main__":
    main()
