"""The command line. It parses and prints; each command's work is a plain function elsewhere.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

import inspect
import json
import os
import re
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from internvideo3.harness.evaluate import EvalSummary
    from internvideo3.harness.options import EvalOptions
    from internvideo3.harness.profile.workload import Workload

USER_ERROR = 1
INTERRUPTED = 130
BROKEN_PIPE = 141
POLICIES = ("controller", "model", "trained")

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
    context_settings={"help_option_names": ["-h", "--help"]},
)
world_app = typer.Typer(help="The scale world: small videos with questions.", no_args_is_help=True)
app.add_typer(world_app, name="world")
trace_app = typer.Typer(help="Rollouts from their files.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")
data_app = typer.Typer(
    help="Training data: curate, sample, filter, check, mix.", no_args_is_help=True
)
app.add_typer(data_app, name="data")

ModelOption = Annotated[
    str,
    typer.Option(
        help="Checkpoint folder, or scale:base, scale:m2la, scale:control, scale:teacher, "
        "scale:agent."
    ),
]
RootOption = Annotated[
    Path | None,
    typer.Option(help="Where the scale world is built. Default: $IV3_WORLD or the user's cache."),
]
DataOption = Annotated[
    Path | None,
    typer.Option(help="Where benchmarks are. Default: $IV3_DATA or the user's cache."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1. Default: cuda if there is one.")
]
CONTROLS = ("blind", "text", "shuffled")
ThreadsOption = Annotated[
    int, typer.Option(min=1, help="CPU threads; one is fastest for the scale models.")
]


def _tell_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"internvideo3 {version('internvideo3')}")
        raise typer.Exit


@app.callback()
def _settings(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the full traceback of an error.")
    ] = False,
) -> None:
    if debug:
        os.environ["IV3_DEBUG"] = "1"


@app.command("eval")
def evaluate_command(
    context: typer.Context,
    suite: Annotated[
        str,
        typer.Option(
            help="Suites, comma-separated: `scale` for all of the scale world; benchmarks, or "
            "`long`, `short`, `grounding`, `spatial`, `paper` for many (`internvideo3 suites`)."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="Checkpoint folder, or scale:base, scale:m2la, scale:control, scale:teacher, "
            "scale:agent. Required; --check does without."
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory; repeat the command to continue. Default: runs/..."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only say what is there, what is missing and what it costs."),
    ] = False,
    data: DataOption = None,
    preset: Annotated[
        str, typer.Option(help="Settings of benchmarks: `paper`, or their `official` ones.")
    ] = "paper",
    subtitles: Annotated[
        str, typer.Option(help="off, on, or both, where a benchmark has subtitles.")
    ] = "off",
    thinking: Annotated[
        bool, typer.Option("--thinking", help="Let replies begin with a thinking block.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Answer only the first N samples of each suite.")
    ] = None,
    sample_id: Annotated[
        list[str] | None,
        typer.Option(help="Answer only this sample, e.g. world_long/000123. Repeatable."),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            help="`blind`: ask about another video of the same length; `text`: show none; "
            "`shuffled`: show the frames in another order."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Of the scale world: test, validation or train.")
    ] = "test",
    fps: Annotated[
        float | None,
        typer.Option(
            min=1e-3, help="Frames from a second of video. Default: the benchmark's, else 2."
        ),
    ] = None,
    max_frames: Annotated[
        int | None,
        typer.Option(min=2, help="Most frames of a video. Default: the benchmark's, else 768."),
    ] = None,
    min_pixels: Annotated[
        int | None, typer.Option(min=1, help="Fewest pixels of a frame. Default: by benchmark.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Most pixels of a frame. Default: by benchmark.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of an answer. Default: by benchmark, else 32."),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Most questions of one video decoded together.")
    ] = 16,
    device: DeviceOption = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto (float32 on cpu).")
    ] = "auto",
    threads: ThreadsOption = 1,
    shard: Annotated[
        str | None,
        typer.Option(help="Answer one part only, e.g. 2/8; the command without it merges."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="How many processes torchrun must have started; else stop."),
    ] = None,
    decode_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most seconds for decoding one video. Default: twice its length, at least 300.",
        ),
    ] = None,
    frame_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps decoded frames for the next run.")
    ] = None,
    frame_cache_gb: Annotated[
        float, typer.Option(min=0, help="Most gigabytes that the folder takes.")
    ] = 50.0,
    mode: Annotated[
        str, typer.Option(help="direct: one look, one reply. agentic: a rollout a question.")
    ] = "direct",
    policy: Annotated[
        str,
        typer.Option(
            help="Agentic: `controller` (rules), `model` (its own tool calls), `trained` (the "
            "same, by a model that learnt them from rollouts and is not told of the tools)."
        ),
    ] = "controller",
    turns: Annotated[int, typer.Option(min=1, help="Agentic: most turns.")] = 16,
    tool_calls: Annotated[
        int, typer.Option(min=0, help="Agentic: most looks and tool calls.")
    ] = 16,
    tokens: Annotated[
        int, typer.Option(min=512, help="Agentic: most tokens after the first look and question.")
    ] = 8192,
    looks: Annotated[
        str,
        typer.Option(
            help="Agentic: where the controller looks again: `new` (what no look has shown), "
            "`spread`, `random`, `none`."
        ),
    ] = "new",
    captions: Annotated[
        str,
        typer.Option(
            help="Caption the video first, for memory: `model`, or NAME@http://... of a server."
        ),
    ] = "",
    compress_at: Annotated[
        int | None,
        typer.Option(
            min=512, help="Begin the agent's context anew at so many tokens, with what matters."
        ),
    ] = None,
    zoom_frames: Annotated[
        int, typer.Option(min=2, help="Agentic: most frames of a further look.")
    ] = 16,
    tools: Annotated[
        str | None,
        typer.Option(
            help="Agentic: tools that may be called, with commas between, `none` for looks only. "
            "Default: all but web_search, which makes the row open-web."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Agentic: whether answers must pass verification.")
    ] = True,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Answer samples again that failed before.")
    ] = False,
    max_errors: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Stop when more samples than this have failed; up to so many the exit status "
            "is 0. Default: go on whatever fails, and exit with 1.",
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="With --check: a run of `profile`, to estimate the time from."),
    ] = None,
    root: RootOption = None,
) -> None:
    """Answer the questions of suites with a model, through lmms-eval; resumable.

    Each answer is on disk when it is given. Repeat the command after a crash, a Ctrl-C or a full
    disk: only what is missing is computed. Scores are recomputed at any time by `score`.

    Under torchrun every process answers a share of the videos, and the first one merges.

    [bold]Examples[/bold]

      internvideo3 eval --model scale:m2la --suite scale --out runs/m2la

      internvideo3 eval --model scale:m2la --suite world_long --control blind --out runs/blind

      internvideo3 eval --suite videomme,mvbench --data /data --check

      internvideo3 eval --model scale:m2la --suite world_long --mode agentic --out runs/agent

      torchrun --nproc-per-node 8 -m internvideo3.harness.cli eval --processes 8
      --model ./checkpoint --suite long --data /data --out runs/long
    """
    if not model and not check:
        raise typer.BadParameter(
            "An evaluation needs a model: --model FOLDER, or scale:m2la.", param_hint="--model"
        )
    place = out or _default_run(model, suite)
    with _errors_in_words(place):
        from internvideo3.harness.options import EvalOptions
        from internvideo3.harness.preflight import suite_names
        from internvideo3.harness.ranks import is_first

        agent = None
        if _one_of("--mode", mode, ("direct", "agentic")) == "agentic":
            from internvideo3.harness.agentic_options import agent_options

            agent = agent_options(
                policy, (turns, tool_calls, tokens), looks, zoom_frames, tools, verify=verify,
                compress_at=compress_at, captions=captions,
                direct_only={"--control shuffled": control == "shuffled", "--thinking": thinking},
            )  # fmt: skip
        else:
            _only_agentic(context)
        options = EvalOptions(
            agent=agent,
            model=model,
            suites=tuple(
                suite_names(suite, _one_of("--subtitles", subtitles, ("off", "on", "both")))
            ),
            out=place,
            root=root,
            data=data,
            preset=_one_of("--preset", preset, ("paper", "official")),
            split=_one_of("--split", split, ("test", "validation", "train")),
            limit=limit,
            sample_ids=tuple(sample_id or ()),
            control=_one_of("--control", control, CONTROLS) if control else None,
            thinking=thinking,
            fps=fps,
            max_frames=max_frames,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_new_tokens=max_new_tokens,
            batch=batch,
            device=_device(device),
            dtype=_one_of("--dtype", dtype, ("auto", "float32", "bfloat16")),
            threads=threads,
            retry_errors=retry_errors,
            max_errors=max_errors,
            shard=shard,
            processes=processes,
            decode_limit_s=decode_limit,
            frame_cache=frame_cache,
            frame_cache_bytes=int(frame_cache_gb * 1e9),
            command=_command(),
        )
        if check:
            _check_only(options, profile)
            return
        first = is_first()
        summary = _evaluate_with_bars(options)
        if first:
            _tell_run(summary, max_errors or 0)


@app.command("ask")
def ask_command(
    video: Annotated[Path, typer.Argument(help="A video file; subtitles beside it are used.")],
    question: Annotated[
        str, typer.Argument(help='The question; options on lines of their own as "A. ...".')
    ],
    mode: Annotated[
        str, typer.Option(help="direct: one look and one reply. agentic: looks again, calls tools.")
    ] = "agentic",
    model: ModelOption = "scale:m2la",
    policy: Annotated[
        str,
        typer.Option(
            help="Who acts: `controller` (rules), `model` (its own tool calls), `trained` (the "
            "same, by a model that learnt them from rollouts and is not told of the tools)."
        ),
    ] = "controller",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for trace.json, trace.html, timings.json; without a rollout. Default: "
            "ask, then ask-2, ..."
        ),
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Most turns.")] = 8,
    tool_calls: Annotated[int, typer.Option(min=0, help="Most tool calls.")] = 12,
    tokens: Annotated[
        int, typer.Option(min=512, help="Most tokens after the first look and the question.")
    ] = 8192,
    fps: Annotated[float, typer.Option(help="Frames a second of the first look.")] = 2.0,
    max_frames: Annotated[int, typer.Option(min=4, help="Most frames of the first look.")] = 64,
    captions: Annotated[
        str,
        typer.Option(
            help="Caption the video first, for memory: `model`, or NAME@http://... of a server."
        ),
    ] = "",
    compress_at: Annotated[
        int | None,
        typer.Option(
            min=512, help="Begin the agent's context anew at so many tokens, with what matters."
        ),
    ] = None,
    zoom_frames: Annotated[int, typer.Option(min=2, help="Most frames of a further look.")] = 16,
    web: Annotated[
        bool, typer.Option("--web", help="Let the agent search the web, if there is a network.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one reply.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 for the likeliest reply.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampled replies.")] = 0,
    device: DeviceOption = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto (float32 on cpu).")
    ] = "auto",
    threads: ThreadsOption = 1,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of tool results. Default: $IV3_AGENT_CACHE or the user's cache."),
    ] = None,
) -> None:
    """Ask one question about one video, and write the rollout as a page.

    The agent looks again where it saw least, hears, reads text and finds scenes with the tools of
    the `agent` extra, checks that its answer rests on what was seen, and stops at its budget. Equal
    commands write equal traces.

    [bold]Examples[/bold]

      internvideo3 ask film.mp4 "What is written on the door?"

      internvideo3 ask film.mp4 "Who speaks first?" --mode direct

      internvideo3 ask film.mp4 "Where does it end?" --model ./checkpoint --policy model --turns 12
    """
    with _errors_in_words():
        from rich.console import Console

        from internvideo3.harness.ask import AskOptions, ask
        from internvideo3.harness.ask_live import live_view
        from internvideo3.harness.traces import free_folder

        options = AskOptions(
            video=video,
            question=question,
            out=out or free_folder(Path("ask")),
            model=model,
            mode=_one_of("--mode", mode, ("direct", "agentic")),
            policy=_one_of("--policy", policy, POLICIES),
            turns=turns,
            tool_calls=tool_calls,
            tokens=tokens,
            fps=fps,
            max_frames=max_frames,
            captions=captions,
            compress_at=compress_at,
            zoom_frames=zoom_frames,
            web=web,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            device=device,
            dtype=_one_of("--dtype", dtype, ("auto", "float32", "bfloat16")),
            threads=threads,
            cache=cache,
        )
        with live_view(Console(stderr=True)) as watch:
            asked = ask(options, watch, watch.advance)
        notes = list(asked.notes)
        if model.startswith("scale:"):
            notes.append(
                f"{model} is a small model that knows the drawn videos of `world build` and "
                "nothing else; for other videos give --model."
            )
        for note in notes:
            print(f"Note: {note}", file=sys.stderr)
        print(asked.answer)
        print(f"Page: {asked.page.resolve()}")


@app.command("serve")
def serve_command(
    model: ModelOption = "scale:m2la",
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder whose videos may be asked about. Default: uploads only."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; others need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    token_variable: Annotated[
        str | None,
        typer.Option(help="Environment variable with the token that clients must send."),
    ] = None,
    name: Annotated[str, typer.Option(help="What clients call the model. Default: its own.")] = "",
    upload_mb: Annotated[int, typer.Option(min=1, help="Most MiB of one request.")] = 64,
    waiting: Annotated[
        int, typer.Option(min=0, help="Most requests that wait while one is answered.")
    ] = 8,
    reasoning: Annotated[
        bool, typer.Option(help="Send the agent's turns as reasoning_content, or not at all.")
    ] = True,
    policy: Annotated[
        str,
        typer.Option(
            help="Who acts: `controller` (rules), `model` (its own tool calls), `trained` (the "
            "same, by a model that learnt them from rollouts and is not told of the tools)."
        ),
    ] = "controller",
    turns: Annotated[int, typer.Option(min=1, help="Most turns of the agent.")] = 8,
    tool_calls: Annotated[int, typer.Option(min=0, help="Most tool calls of the agent.")] = 12,
    tokens: Annotated[
        int, typer.Option(min=512, help="Most tokens after the first look and the question.")
    ] = 8192,
    fps: Annotated[float, typer.Option(help="Frames a second of the first look.")] = 2.0,
    max_frames: Annotated[int, typer.Option(min=4, help="Most frames of the first look.")] = 64,
    captions: Annotated[
        str,
        typer.Option(
            help="Caption the video first, for memory: `model`, or NAME@http://... of a server."
        ),
    ] = "",
    compress_at: Annotated[
        int | None,
        typer.Option(
            min=512, help="Begin the agent's context anew at so many tokens, with what matters."
        ),
    ] = None,
    zoom_frames: Annotated[int, typer.Option(min=2, help="Most frames of a further look.")] = 16,
    web: Annotated[
        bool, typer.Option("--web", help="Let the agent search the web, if there is a network.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a reply, where the client does not say.")
    ] = 256,
    device: DeviceOption = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto (float32 on cpu).")
    ] = "auto",
    threads: ThreadsOption = 1,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of tool results. Default: $IV3_AGENT_CACHE or the user's cache."),
    ] = None,
) -> None:
    """Answer clients of OpenAI's chat API about videos, until Ctrl-C.

    NAME answers directly, NAME-agentic by the agent. A video is a `video_url` part: a data URL, or
    the path of a file in --folder. Nothing is fetched from the network. Needs the `serve` extra.

    [bold]Examples[/bold]

      internvideo3 serve --folder ~/videos

      TOKEN=secret internvideo3 serve --host 0.0.0.0 --token-variable TOKEN --model ./checkpoint
    """
    with _errors_in_words():
        from internvideo3.harness.ask import AskOptions
        from internvideo3.harness.serving.command import ServeOptions, serve

        asking = AskOptions(
            video=Path(), question="", out=Path(), model=model,
            policy=_one_of("--policy", policy, POLICIES), turns=turns,
            tool_calls=tool_calls, tokens=tokens, fps=fps, max_frames=max_frames,
            captions=captions,
            compress_at=compress_at,
            zoom_frames=zoom_frames, web=web, max_new_tokens=max_new_tokens, device=device,
            dtype=_one_of("--dtype", dtype, ("auto", "float32", "bfloat16")), threads=threads,
            cache=cache,
        )  # fmt: skip
        options = ServeOptions(
            asking=asking, host=host, port=port, name=name, folder=folder,
            token_variable=token_variable, upload_mb=upload_mb, waiting=waiting,
            reasoning=reasoning,
        )  # fmt: skip
        serve(options, lambda line: print(line, flush=True))


@trace_app.command("show")
def trace_show_command(
    trace: Annotated[Path, typer.Argument(help="A trace: trace.json, or runs/.../*.json.gz.")],
    video: Annotated[
        Path | None, typer.Option(help="The video, for pictures of what was seen.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("trace.html"),
) -> None:
    """Write the page of a rollout.

    [bold]Example[/bold]

      internvideo3 trace show runs/agent/traces/world_long/000007.json.gz --video clip.mp4
    """
    with _errors_in_words():
        from internvideo3.harness.replay import show

        print(f"Page: {show(trace, video, out).resolve()}")


@trace_app.command("replay")
def trace_replay_command(
    trace: Annotated[Path, typer.Argument(help="A trace: trace.json, or runs/.../*.json.gz.")],
    video: Annotated[Path, typer.Argument(help="The video that it is about.")],
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, or e.g. scale:m2la. Default: the trace's.")
    ] = "",
    tools: Annotated[
        str, typer.Option(help="recorded: as the trace has their results. live: run them.")
    ] = "recorded",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the new trace and page; without a rollout. Default: replay, then "
            "replay-2, ..."
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto (float32 on cpu).")
    ] = "auto",
    threads: ThreadsOption = 1,
) -> None:
    """Run a rollout again from its file, and say whether it came out the same.

    [bold]Example[/bold]

      internvideo3 trace replay ask/trace.json film.mp4
    """
    with _errors_in_words():
        from internvideo3.harness.ask import AskOptions
        from internvideo3.harness.replay import replay
        from internvideo3.harness.traces import free_folder

        live = _one_of("--tools", tools, ("recorded", "live")) == "live"
        options = AskOptions(
            video=video, question="", out=out or free_folder(Path("replay")), model=model,
            device=device,
            dtype=_one_of("--dtype", dtype, ("auto", "float32", "bfloat16")), threads=threads,
        )  # fmt: skip
        done = replay(trace, options, live=live)
        print(done.trace["answer"]["answer"])
        differing = ", ".join(done.differing)
        print(f"Other than in the trace: {differing}" if differing else "The same rollout.")
        print(f"Page: {done.page.resolve()}")


@app.command("table6")
def table6_command(
    direct: Annotated[Path, typer.Argument(help="Run directory of `eval --mode direct`.")],
    agentic: Annotated[
        list[Path], typer.Argument(help="Run directories of `eval --mode agentic`, same model.")
    ],
    other_models: Annotated[
        bool,
        typer.Option(
            "--other-models",
            help="Take agentic runs of other models too, such as one that was trained to act; "
            "every row then names its model.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for table6.md, .tex, .csv, .html, .json.")] = (
        Path("table6")
    ),
) -> None:
    """Set agentic runs beside a direct one: score, paired difference, cost (the paper's table 6).

    [bold]Example[/bold]

      internvideo3 table6 runs/direct runs/agentic --out table6
    """
    with _errors_in_words():
        from internvideo3.reports.load import load_run, load_runs
        from internvideo3.reports.table6 import write
        from internvideo3.reports.terminal import print_markdown

        files = write(load_run(direct), load_runs(agentic), out, other_models=other_models)
        print_markdown(files[0].read_text(encoding="utf-8"))
        for file in files:
            print(f"Wrote {file}")


@app.command("suites")
def suites_command(
    benchmark: Annotated[
        str | None, typer.Argument(help="A benchmark, to see everything about it.")
    ] = None,
    data: DataOption = None,
) -> None:
    """List benchmarks and suites: how they are asked and scored, and whether their data is here.

    [bold]Examples[/bold]

      internvideo3 suites

      internvideo3 suites videomme
    """
    with _errors_in_words():
        from internvideo3.harness.suites import describe, groups
        from internvideo3.tasks.benchmarks.local import data_root

        root = data_root(data)
        if benchmark is not None:
            for line in describe(benchmark, root):
                print(line)
            return
        _print_suites(root)
        for line in groups():
            print(line)


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


@app.command("serve-policy")
def serve_policy_command(
    model: ModelOption = "scale:m2la",
    host: Annotated[str, typer.Option(help="Where to listen; others need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8001,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Folder below which trainers may name new weights: their --out, under the same "
            "path. Default: the weights stay, as a teacher's do."
        ),
    ] = None,
    token_variable: Annotated[
        str | None,
        typer.Option(help="Environment variable with the token that clients must send."),
    ] = None,
    upload_mb: Annotated[int, typer.Option(min=1, help="Most MiB of one request.")] = 1024,
    device: DeviceOption = None,
    dtype: Annotated[
        str, typer.Option(help="float32 (as trainers compute), bfloat16, or auto.")
    ] = "float32",
    threads: ThreadsOption = 1,
) -> None:
    """Serve a policy or a teacher to trainers: ids and frames in, ids and log-probabilities out.

    A GSPO or OPD stage with `rollouts: http://HOST:8001/v1` samples here, and pushes its weights
    before each step; `teacher: http://HOST:8001/v1` has the model here judge the student's tokens.
    On one machine the result is the same to the bit as without a server.

    [bold]Examples[/bold]

      internvideo3 serve-policy --model scale:control

      internvideo3 serve-policy --model scale:m2la --weights runs/train
    """
    with _errors_in_words():
        from internvideo3.harness.serving.command import PolicyOptions, serve_policy

        options = PolicyOptions(
            model=model, host=host, port=port, weights=weights, token_variable=token_variable,
            upload_mb=upload_mb, device=_device(device),
            dtype=_one_of("--dtype", dtype, ("auto", "float32", "bfloat16")), threads=threads,
        )  # fmt: skip
        serve_policy(options, lambda line: print(line, flush=True))


@app.command("judge")
def judge_command(
    run: Annotated[Path, typer.Argument(help="Run directory of an earlier eval.")],
    endpoint: Annotated[
        str, typer.Option(help="Base address of a chat API, e.g. http://localhost:8000/v1.")
    ],
    judge: Annotated[str, typer.Option(help="The judging model's name there.")],
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the API key, if it needs one.")
    ] = "OPENAI_API_KEY",
    workers: Annotated[int, typer.Option(min=1, help="Questions that are asked at once.")] = 4,
) -> None:
    """Ask a language model for the verdicts that a benchmark's rules leave to one; resumable.

    The questions and answers are sent to the endpoint that you name, and to nothing else. Verdicts
    are kept in the run as they come, so `score` needs no network afterwards. A busy or restarting
    server is asked again, five times with growing waits; after that the same command goes on.

    [bold]Example[/bold]

      internvideo3 judge runs/short --endpoint http://localhost:8000/v1 --judge qwen
    """
    with _errors_in_words(run):
        from internvideo3.harness.judge import TIMEOUT_S
        from internvideo3.harness.judge import judge as ask
        from internvideo3.harness.rescore import rescore
        from internvideo3.training.endpoint import Endpoint

        whom = Endpoint(url=endpoint, model=judge, key_variable=key_variable, timeout_s=TIMEOUT_S)
        with _bars() as advance:
            done = ask(
                run, whom, lambda now, all_of_them: advance("verdicts", now, all_of_them), workers
            )
        rescore(run)
        _print_runs([run])
        unread = f"{done.unread} answers held none, " if done.unread else ""
        print(
            f"{done.asked} verdicts, {done.kept} kept from before, {unread}{done.left} left open: "
            f"{run}"
        )
        if done.unread:
            print("Repeat the command to ask for those again.", file=sys.stderr)
        for name, count in done.others.items():
            print(
                f"{count} of the kept verdicts are {name}'s, not {judge}'s. To have {judge} asked "
                f"for those too, take {run / 'judgements'} away and repeat the command."
            )
        if done.unread:
            _leave(USER_ERROR)


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
    with _errors_in_words():
        from internvideo3.reports.page import build_report

        page = build_report(runs, out, title=title)
        _print_runs(runs)
        beside = sorted(path.name for path in out.glob("*.*") if path != page and path.is_file())
        print(f"Page: {page}")
        print(f"Beside it: {', '.join(beside)}, plots/*.svg")


@world_app.command("build")
def world_build_command(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="Suites; by default the six of `scale`. world_brief, for the agent, only if named."
        ),
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
    from internvideo3.tasks.brief import build_suites
    from internvideo3.tasks.world.build import world_root

    where = world_root(root)
    with _errors_in_words(where):
        with _bars() as advance:
            built = build_suites(
                suites or (), where, split, videos, sound=sound, workers=workers, progress=advance
            )
        for one in built:
            print(f"{one.suite}: {one.videos} videos, {one.questions} questions")
        print(f"World: {where}; for stock lmms-eval: --include_path {built[-1].tasks}")


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
    with _errors_in_words():
        from internvideo3.tasks.world.show import world_show

        picture = world_show(
            suite, index=index, sample_id=sample_id, root=root, split=split, out=out
        )
        print(f"Picture: {picture.resolve()}")


@app.command("profile")
def profile_command(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Checkpoint, or random:8b-gqa, random:8b-m2la, random:8b-m2la-576 (the shape, "
            "random weights); repeatable. Default: scale:base and scale:m2la."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for one run directory a model, figures and table.")
    ] = Path("runs/profile"),
    workload: Annotated[
        str | None,
        typer.Option(help="YAML file of a workload, or figure6; options given here go before it."),
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Context lengths in tokens, comma-separated.")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens decoded.")] = None,
    batch: Annotated[
        str | None, typer.Option(help="Sequences decoded together, comma-separated.")
    ] = None,
    chunk: Annotated[
        str | None, typer.Option(help="Tokens prefilled at once, comma-separated; 0: by device.")
    ] = None,
    runner: Annotated[
        list[str] | None,
        typer.Option(
            help="engine, or a baseline of transformers: sdpa, flash, static; repeatable."
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="native, fp8 (latents compressed before decoding), or both with a comma."
        ),
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(
            help="prefill; random: decoding only, on a synthetic cache; last: its last chunk."
        ),
    ] = None,
    integrate: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --fill random: time decoding in the middle of a reply of so many tokens.",
        ),
    ] = None,
    warmups: Annotated[
        int | None, typer.Option(min=0, help="Untimed runs of each point before the timed ones.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timings of each point.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, or both with a comma.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    video: Annotated[
        Path | None, typer.Option(help="Time the decoding and encoding of this video as well.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what fits a device's memory, and measure nothing.")
    ] = False,
    memory: Annotated[
        str, typer.Option(help="With --plan: h100, h200, or a size like 80GB.")
    ] = "h200",
    layer: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Time one 8B layer's step at so many tokens, three ways; no model.",
        ),
    ] = None,
    threads: ThreadsOption = 1,
) -> None:
    """Measure prefill, decode, memory and share of the roofline; draw Figure 6.

    A model is timed only after its engine's logits agree with one forward pass, a point after its
    attention agrees with float32 at its own depth. What this code measured already is kept, what
    does not fit is recorded as that, and the others go on.

    [bold]Example[/bold]

      internvideo3 profile --model scale:base --model scale:m2la --out runs/profile
      internvideo3 profile --workload figure6 --plan --memory h100
    """
    with _errors_in_words(out):
        from internvideo3.harness.profile.workload import chosen

        wanted = chosen(
            workload,
            {
                "models": model,
                "runners": runner,
                "contexts": contexts and _numbers(contexts),
                "new_tokens": new_tokens,
                "batches": batch and _numbers(batch),
                "chunks": chunk and _numbers(chunk),
                "caches": cache and _names(cache),
                "fill": fill,
                "integrate": integrate,
                "warmups": warmups,
                "repeats": repeats,
                "dtypes": dtype and _names(dtype),
            },
        )
        if plan:
            from internvideo3.harness.profile.plan import device_bytes, table
            from internvideo3.harness.profile.plan import plan as planned

            print("\n".join(table(planned(wanted, device_bytes(memory)), memory)))
            return
        if layer is not None:
            _print_layer(layer, wanted, device, threads, out)
            return
        from internvideo3.harness.profile.command import (
            ProfileOptions,
            UnfinishedError,
            profile,
        )
        from internvideo3.reports.efficiency import draw

        amiss: UnfinishedError | None = None
        options = ProfileOptions(
            workload=wanted,
            out=out,
            device=device,
            threads=threads,
            video=video,
            command=_command(),
        )
        try:
            profile(options, print)
        except UnfinishedError as error:
            amiss = error
        for run in options.runs():
            print(f"Measurements: {run / 'measurements.jsonl'}")
        for file in draw(options.drawn(), out):
            print(f"Wrote {file}")
        if amiss is not None:
            raise amiss


def _print_layer(tokens: int, wanted: "Workload", device: str, threads: int, out: Path) -> None:
    import torch

    from internvideo3.harness import provenance
    from internvideo3.harness.profile.layer import layer_rows
    from internvideo3.harness.store import write_json
    from internvideo3.model.device import device_of

    torch.set_num_threads(threads)
    commit, dirty = provenance.revision()
    about = {"command": _command(), "commit": commit, "dirty": dirty}
    rows: list[dict[str, object]] = []
    for dtype in wanted.dtypes:
        for row in layer_rows(tokens, getattr(torch, dtype), device_of(device), wanted.repeats):
            print(f"{row['way']:<18} {dtype}, {tokens} tokens: {1e3 * row['median_s']:.2f} ms")
            rows.append(row)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "layer.json", about | {"hardware": provenance.hardware(), "rows": rows})
    print(f"Wrote {out / 'layer.json'}")


@app.command("train")
def train_command(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe (scale, paper, official), PRESET/VARIANT, or a YAML file."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for states, metrics and checkpoints; repeat to continue."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what memory the stages need; train nothing.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --plan: `8b` (the released shape) or a checkpoint; by default the recipe's "
            "start, or `8b` where it has none."
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="With --plan: GPUs that share the model.")] = 8,
    device: DeviceOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Train the stages of a recipe, one from the checkpoint of the other; resumable.

    A recipe is a short YAML file that may extend another one; a key that does not exist is refused
    with the nearest known name. Each stage leaves metrics.jsonl, states and, when it is done, a
    checkpoint that every command takes. Ctrl-C and SIGTERM end after the step in progress; the
    same command goes on from there, bit by bit as if it had never stopped.

    Under torchrun the processes share the model (FSDP2) and the documents of each step.

    [bold]Examples[/bold]

      internvideo3 train scale --out runs/scale

      internvideo3 train my_recipe.yaml --out runs/mine

      internvideo3 train official --plan --gpus 8

      torchrun --nproc-per-node 2 -m internvideo3.harness.cli train scale --out runs/scale
    """
    with _errors_in_words(out or Path()):
        from internvideo3.harness.preflight import PreflightError
        from internvideo3.harness.ranks import is_first
        from internvideo3.harness.train import plan_lines, run_training

        if plan:
            with _bars(stderr=True) as advance:
                lines = plan_lines(recipe, model, gpus, advance)
            print(*lines, sep="\n")
            return
        if out is None:
            raise PreflightError("Say with --out where states and checkpoints go.")
        first = is_first()
        with _bars(shown=first) as bars:
            trained = run_training(recipe, out, threads, bars, _device(device), bars.watch)
        if trained.checkpoint is None:
            print(
                f"Stopped in {trained.stage}; its state is saved. Repeat the same command to "
                "continue.",
                file=sys.stderr,
            )
            _leave(INTERRUPTED)
        if first:
            told = [*_metrics_lines(trained.folders), f"Checkpoint: {trained.checkpoint}"]
            print(*told, sep="\n")


@data_app.command("curate")
def data_curate_command(
    videos: Annotated[list[Path], typer.Argument(help="Videos, or folders of videos.")],
    endpoint: Annotated[
        str, typer.Option(help="Server of OpenAI's form, such as http://localhost:8000/v1.")
    ],
    model: Annotated[str, typer.Option(help="The model's name there; it must see images.")],
    out: Annotated[Path, typer.Option(help="Folder for the questions; repeat to continue.")],
    blind: Annotated[
        bool,
        typer.Option(help="Drop what the model also answers without the video, three times of 3."),
    ] = True,
    per_video: Annotated[int, typer.Option(min=1, help="Questions of a video.")] = 3,
    most_failures: Annotated[
        float, typer.Option(min=0, max=1, help="Share of videos that may fail.")
    ] = 0.1,
) -> None:
    """Make questions of videos: scenes, captions, summaries, narrative, questions; resumable.

    Questions have Table 1's distribution; each is checked, and what is dropped is in
    dropped.jsonl with its reason. Writes the chat form that training reads, Table 1 and Figure 5
    of the corpus, and a data card. A folder that other options made is refused.

    [bold]Example[/bold]

      internvideo3 data curate videos/ --endpoint http://localhost:8000/v1 --model qwen --out corpus
    """
    with _errors_in_words(out):
        from internvideo3.harness.data import CurateOptions, curate
        from internvideo3.training.endpoint import Endpoint

        writer = Endpoint(url=endpoint, model=model)
        options = CurateOptions(
            videos=tuple(videos), out=out, writer=writer, guesser=writer if blind else None,
            per_video=per_video, most_failures=most_failures, command=_command(),
        )  # fmt: skip
        with _bars() as advance:
            told = curate(options, advance)
        print(f"{told['questions']} questions about {told['videos']} videos: {out}")


@data_app.command("report")
def data_report_command(
    rows: Annotated[Path, typer.Argument(help="Curated questions, .jsonl or .parquet.")],
    out: Annotated[Path, typer.Option(help="Folder for Table 1, Figure 5 and the card.")],
) -> None:
    """Write the distribution of a corpus beside the paper's (Table 1, Figure 5), and a card."""
    with _errors_in_words(out):
        from internvideo3.harness.data import describe

        describe(rows, out, _command())
        print((out / "table1.md").read_text(encoding="utf-8"))


@data_app.command("sample")
def data_sample_command(
    rows: Annotated[Path, typer.Argument(help="Questions in the chat form, .jsonl or .parquet.")],
    out: Annotated[Path, typer.Option(help="File for the responses, .jsonl; repeat to go on.")],
    model: ModelOption = "scale:m2la",
    samples: Annotated[
        int, typer.Option(min=1, help="Responses to a question: 1 for iou, several for mixed.")
    ] = 8,
    teacher: Annotated[
        str | None,
        typer.Option(help="For gap: a checkpoint, or a server such as http://localhost:8000/v1."),
    ] = None,
    teacher_model: Annotated[str, typer.Option(help="The teacher's name there.")] = "teacher",
    fps: Annotated[float, typer.Option(min=0.01, help="Frames from a second of video.")] = 2.0,
    max_frames: Annotated[int, typer.Option(min=1, help="Most frames of a video.")] = 512,
    min_pixels: Annotated[
        int | None, typer.Option(min=1, help="Fewest pixels of a frame. Default: the model's.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Most pixels of a frame. Default: the model's.")
    ] = None,
    total_pixels: Annotated[
        int | None, typer.Option(min=1, help="Most pixels of all frames. Default: any number.")
    ] = None,
    pack_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a row of training, to which frames are fitted."),
    ] = None,
    group: Annotated[
        int | None, typer.Option(min=1, help="Responses in such a row. Default: --samples.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a response.")] = 256,
    most_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows that may be unusable.")
    ] = 0.01,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    seed: Annotated[int, typer.Option(help="Of the responses.")] = 0,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    threads: ThreadsOption = 1,
) -> None:
    """Sample responses to questions at temperature 1, as `data filter` reads them; resumable.

    A row that cannot be used is in NAME.dropped.jsonl with its reason, up to a budget. What is
    written, and what a filter keeps of it, trains as it is. Frames are those of training where
    the limits of frames, pixels, --pack-tokens, --group and --max-new-tokens are the recipe's.

    [bold]Example[/bold]

      internvideo3 data sample corpus/questions.jsonl --model ./checkpoint --out sampled.jsonl
    """
    with _errors_in_words(out):
        from internvideo3.harness.sample import SampleOptions, write_samples

        options = SampleOptions(
            rows=rows, out=out, model=model, samples=samples, teacher=teacher,
            teacher_model=teacher_model, fps=fps, max_frames=max_frames, min_pixels=min_pixels,
            max_pixels=max_pixels, total_pixels=total_pixels, pack_tokens=pack_tokens, group=group,
            max_new_tokens=max_new_tokens, most_bad=most_bad, limit=limit,
            seed=seed, device=_device(device),
            dtype=_one_of("--dtype", dtype, ("auto", "float32", "bfloat16")), threads=threads,
        )  # fmt: skip
        with _bars() as advance:
            made = write_samples(options, advance)
        print(
            f"{made.rows} rows with responses, {made.kept} kept from before, "
            f"{made.dropped} left out: {out}"
        )


@data_app.command("filter")
def data_filter_command(
    kind: Annotated[
        str,
        typer.Argument(
            help="iou: grounding with an IoU in [0.1, 0.7]. mixed: questions answered right and "
            "wrong at temperature 1. gap: the teacher is right and the student is not."
        ),
    ],
    rows: Annotated[Path, typer.Argument(help="Rollouts, .jsonl or .parquet.")],
    out: Annotated[Path, typer.Option(help="File for what is kept.")],
    count: Annotated[int | None, typer.Option(min=1, help="Draw so many of them.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Keep the rollouts that reinforcement learning or distillation can learn from."""
    with _errors_in_words(out):
        from internvideo3.harness.data import filter_rows

        kept, dropped = filter_rows(kind, rows, out, count, seed)
        print(f"{kept} kept, {len(dropped)} dropped: {out}")


@data_app.command("check")
def data_check_command(
    rows: Annotated[Path, typer.Argument(help="Training rows, .jsonl or .parquet.")],
    out: Annotated[Path, typer.Option(help="File for the rows that are left.")],
    benchmark_videos: Annotated[
        Path | None, typer.Option(help="Folder of videos that must not be trained on.")
    ] = None,
    benchmark_questions: Annotated[
        Path | None, typer.Option(help="JSONL with `id` and `question` of benchmarks.")
    ] = None,
    most_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows that may be unusable.")
    ] = 0.01,
) -> None:
    """Drop repeated questions, and what shares a video or a question with a benchmark.

    A row that cannot be used, such as one with a broken video, is dropped too, up to a budget.
    """
    with _errors_in_words(out):
        from internvideo3.harness.data import check_rows

        with _bars() as advance:
            kept, dropped = check_rows(
                rows, out, benchmark_videos, benchmark_questions, most_bad, advance
            )
        print(f"{kept} kept, {len(dropped)} dropped: {out}")


@data_app.command("mix")
def data_mix_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="FILE=SHARE, such as long.jsonl=0.172. With --preset SOURCE=FILE, where the "
            "beginning of a source's name suffices; a source may have several files."
        ),
    ],
    out: Annotated[Path, typer.Option(help="File for the mixture.")],
    total: Annotated[
        int, typer.Option(min=1, help="Rows in all; videos, with --preset long_video.")
    ],
    preset: Annotated[
        str | None,
        typer.Option(help="Shares as published: cpt, sft, or long_video (of the videos)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which rows of a source are drawn.")] = 0,
) -> None:
    """Mix files with exact shares, spread evenly; no row twice.

    [bold]Example[/bold]

      internvideo3 data mix long.jsonl=0.3 text.jsonl=0.7 --total 10000 --out mixed.jsonl
    """
    with _errors_in_words(out):
        from internvideo3.harness.data import mix_rows

        print(f"{mix_rows(sources, out, total, seed, preset)} rows: {out}")


@data_app.command("verl")
def data_verl_command(
    recipe: Annotated[str, typer.Argument(help="A recipe with a GSPO stage that has `files`.")],
    out: Annotated[Path, typer.Option(help="Folder for train.parquet and the configuration.")],
    stage: Annotated[str, typer.Option(help="Which stage of the recipe.")] = "gspo",
) -> None:
    """Write a GSPO stage as verl's trainer takes it: rows, options, and the same rule as reward.

    Files only; neither verl nor Ray is needed here. Where verl runs, this package must be
    installed too, since its scorers are the reward.

    [bold]Example[/bold]

      internvideo3 data verl my_recipe.yaml --out verl
    """
    with _errors_in_words(out):
        from internvideo3.training.recipe import load_recipe
        from internvideo3.training.verl import export

        made = export(load_recipe(recipe), stage, out)
        for where, why in made.dropped.items():
            print(f"left out: {where}: {why}", file=sys.stderr)
        print(f"{made.kept} rows, {len(made.dropped)} left out: {made.rows}, {made.config}")


@data_app.command("rollouts")
def data_rollouts_command(
    rows: Annotated[Path, typer.Argument(help="Questions in the chat form, .jsonl or .parquet.")],
    out: Annotated[Path, typer.Option(help="File for the rollouts, .jsonl; repeat to go on.")],
    model: ModelOption = "scale:m2la",
    turns: Annotated[int, typer.Option(min=1, help="Most turns.")] = 8,
    tool_calls: Annotated[int, typer.Option(min=1, help="Most tool calls.")] = 12,
    tokens: Annotated[
        int, typer.Option(min=512, help="Most tokens after the first look and the question.")
    ] = 8192,
    fps: Annotated[float, typer.Option(help="Frames a second of the first look.")] = 2.0,
    max_frames: Annotated[int, typer.Option(min=4, help="Most frames of the first look.")] = 64,
    zoom_frames: Annotated[int, typer.Option(min=2, help="Most frames of a further look.")] = 16,
    signatures: Annotated[
        bool, typer.Option(help="Begin with the tools' signatures, as for --policy model.")
    ] = False,
    slips: Annotated[
        float, typer.Option(min=0, max=1, help="Share whose first answer is wrong, not learnt.")
    ] = 0.25,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    seed: Annotated[int, typer.Option(help="Of the wrong answers.")] = 0,
    threads: ThreadsOption = 1,
) -> None:
    """Write rollouts from which a model learns to act by its own calls, of questions with answers.

    A teacher of rules acts in the model's own form; what it says is learnt by an `sft` stage whose
    data names the file. Budget and frames must be those with which the model will act
    (`eval --mode agentic --policy trained`).

    [bold]Example[/bold]

      internvideo3 data rollouts corpus/questions.jsonl --model ./checkpoint --out rollouts.jsonl
    """
    with _errors_in_words(out):
        from internvideo3.harness.ask import AskOptions
        from internvideo3.harness.rollouts import RolloutsOptions, write_rollouts

        asking = AskOptions(
            video=Path(), question="", out=out.parent, model=model, turns=turns,
            policy="model" if signatures else "trained", tool_calls=tool_calls, tokens=tokens,
            fps=fps, max_frames=max_frames, zoom_frames=zoom_frames, seed=seed, threads=threads,
        )  # fmt: skip
        options = RolloutsOptions(rows=rows, out=out, asking=asking, slips=slips, limit=limit)
        with _bars() as advance:
            made = write_rollouts(options, lambda done, total: advance("questions", done, total))
        print(f"{made.rows} rows of {made.questions} questions, {made.left_out} left out: {out}")


@app.command("ablate")
def ablate_command(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(help="Variants (full, no_cpt, ...) or recipe files. Default: all variants."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for training, evaluation and the table; repeat to go on.")
    ] = Path("runs/ablation"),
    preset: Annotated[
        str, typer.Option(help="What the variants change: scale, paper, official, or a file.")
    ] = "scale",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between.")] = "0,1,2",
    suite: Annotated[
        str | None,
        typer.Option(
            help="Suites or benchmarks, with commas between. Default: the four of the scale world "
            "that stand for Table 5's columns; those are videomme,longvideobench,mlvu,lvbench."
        ),
    ] = None,
    data: DataOption = None,
    limit: Annotated[
        int | None, typer.Option(help="Answer only the first N questions of each suite.")
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that train and evaluate side by side; one a core is fastest.",
        ),
    ] = 1,
    device: DeviceOption = None,
    threads: ThreadsOption = 1,
    root: RootOption = None,
) -> None:
    """Train recipes, evaluate them and write Table 5; resumable at every step.

    Recipes that agree up to a stage share it: it is trained once. The table is written again after
    each evaluation, so that what is finished can be read while the rest is trained. Repeat the
    command to continue, or with more recipes or seeds to add them.

    [bold]Examples[/bold]

      internvideo3 world build world_long world_grounding world_ego world_manyq

      internvideo3 ablate --jobs 2 --out runs/ablation

      internvideo3 ablate full no_cpt --seeds 0 --limit 200 --out runs/quick

      internvideo3 ablate --preset my_8b.yaml --suite videomme,longvideobench,mlvu,lvbench
    """
    with _errors_in_words(out):
        from internvideo3.harness.ablate import AblateOptions, ablate, chosen, suites_of
        from internvideo3.reports.ablation import WRITTEN
        from internvideo3.reports.terminal import print_markdown

        options = AblateOptions(
            suites=suites_of(suite),
            data=data,
            recipes=chosen(recipes or ()),
            preset=preset,
            seeds=_numbers(seeds),
            out=out,
            root=root,
            limit=limit,
            jobs=jobs,
            device=_device(device),
            threads=threads,
            command=_command(),
        )
        with _bars() as advance:
            table = ablate(options, advance)
        if table is None:
            print("Stopped; states are saved. Repeat the same command to continue.",
                  file=sys.stderr)  # fmt: skip
            _leave(INTERRUPTED)
        print_markdown(table.read_text(encoding="utf-8"))
        for name in WRITTEN:
            print(f"Wrote {out / name}")


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
        "runs/compare_stock.json"
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


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(help="GQA checkpoint: Qwen3-VL, Qwen3 or Llama-style.")],
    out: Annotated[Path, typer.Argument(help="Folder for the converted checkpoint; a new one.")],
    preset: Annotated[
        str, typer.Option(help="half, best, official, prerope, small, mla576 or full.")
    ] = "half",
    cache: Annotated[
        float | None,
        typer.Option(help="Share of the source's cached numbers, e.g. 0.75; else the preset's."),
    ] = None,
    bytes_per_token: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The budget in bytes instead: most that a token takes in the cache of all layers "
            "together, in bfloat16, as `inspect` prints it; in the mean of the calibration set's "
            "tokens where those of videos take fewer (vision_rank_share).",
        ),
    ] = None,
    choices: Annotated[
        str,
        typer.Option(
            metavar="NAME=VALUE,...", help="Single choices in place of the preset's; see above."
        ),
    ] = "",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="A .txt file or a video to calibrate on. Repeatable. Default: shipped."),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="A .txt file to judge on. Default: shipped.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Longest text in tokens.")] = 1024,
    distil_minutes: Annotated[
        float, typer.Option(min=0, help="Minutes of recovery by distillation from the source.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the labels drawn from the source.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="auto (the source's own), float32 or bfloat16.")
    ] = "auto",
    threads: ThreadsOption = 1,
) -> None:
    """Convert a GQA checkpoint to M²LA, and say how close the result is.

    Work is kept in OUT.work layer by layer; an interrupted conversion continues when the same
    command is repeated. OUT appears when it is whole, with conversion.json and conversion.html.

    Presets: `half` (half the cache, exact QK-norm), `best` (also ranks by layer), `official` (the
    authors' released layout, linear norm), `prerope` (closest to the source, but slower to
    decode), `small` (a quarter), `mla576` (the row of public MLA kernels), `full` (no loss).

    Each choice of a preset can be made otherwise by `--choices`:

      rope_slots=INTEGER|auto         pairs that are rotated; auto tries several
      row_form=latent|prerope|released
      norm=exact|linear               QK-norm when keys are written, or a map in its place
      norm_fit=constant|affine        of the linear norm: equation 7, or learned
      mixing=complex|real|mean        of heads within a frequency
      importance=on|off               slots go where the loss misses them most
      gain=on|off                     by position, for what is not rotated
      joint=on|off                    keys and values share latent directions
      metric=fisher|balanced          of the latent's error
      token_weights=on|off            tokens count by their loss gradient
      centred=on|off                  means take no rank
      tempered=on|off                 ranks differ by layer
      vision_rank_share=NUMBER|auto   rank of vision tokens over that of text, above 0 to 1;
                                      what they save goes to text; auto tries several
      adapters=on|off|auto            by modality; auto keeps what helps
      refit_output=on|off             output projection refitted
      token_floor=NUMBER              least weight of a token
      metric_ridge=NUMBER             added to the metric
      refit_ridge=NUMBER              added to the refit

    [bold]Examples[/bold]

      internvideo3 convert scale:base converted

      internvideo3 convert Qwen3-VL-8B-Instruct converted --preset best --calibration talk.mp4

      internvideo3 convert scale:base converted --bytes-per-token 768 --choices tempered=on,gain=off
    """
    with _errors_in_words(out.with_name(out.name + ".work")):
        from internvideo3.harness.calibration import HELD_OUT_TEXT
        from internvideo3.harness.convert import ConvertCommand, convert_checkpoint, lines

        given = ConvertCommand(
            source=source,
            out=out,
            preset=preset,
            cache_share=cache,
            bytes_per_token=bytes_per_token,
            choices=choices,
            calibration=tuple(calibration or ()),
            held_out=held_out or HELD_OUT_TEXT,
            tokens=tokens,
            distil_minutes=distil_minutes,
            seed=seed,
            dtype=dtype,
            threads=threads,
            command=_command(),
        )
        with _bars() as advance:
            report = convert_checkpoint(given, advance)
        for line in lines(report, out):
            print(line)


@app.command("inspect")
def inspect_command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or e.g. scale:m2la.")],
) -> None:
    """Say what a checkpoint is: attention, ranks, parameters, cache bytes per token.

    [bold]Example[/bold]

      internvideo3 inspect scale:m2la
    """
    with _errors_in_words():
        from internvideo3.harness.inspection import describe

        for line in describe(checkpoint):
            print(line)


def _flow_help(*apps: typer.Typer) -> None:
    """Let prose of help texts fill the terminal's lines; typer keeps the source's line breaks."""
    for one in apps:
        for command in one.registered_commands:
            paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
            command.help = "\n\n".join(
                text if text.startswith(" ") else text.replace("\n", " ") for text in paragraphs
            )


_flow_help(app, world_app, trace_app, data_app)


def main() -> None:
    """Entry point of the `internvideo3` command."""
    app()


def _one_of(option: str, given: str, known: tuple[str, ...]) -> Any:
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


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _default_run(model: str, suite: str) -> Path:
    """A run directory named after what is run."""
    name = f"{Path(model).name}-{suite}"
    return Path("runs") / "".join(mark if mark.isalnum() else "-" for mark in name)


@contextmanager
def _errors_in_words(kept: Path | None = None) -> Iterator[None]:
    """Turn an error into one message and an exit status, and Ctrl-C into how to continue.

    Args:
        kept: where the same command would find what is finished; None if it begins anew.
    """
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        told = (
            f" Everything finished so far is kept in {kept}; repeat the same command to continue."
        )
        print(f"\nStopped.{told if kept else ''}", file=sys.stderr)
        _leave(INTERRUPTED)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os._exit(BROKEN_PIPE)
        if os.environ.get("IV3_DEBUG"):
            raise
        print(f"Error: {_worded(error)}", file=sys.stderr)
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


def _nobody_reads() -> bool:
    """Whether it is the standard output that is closed, as by `| head`."""
    output = select.poll()
    output.register(1, 0)
    return bool(output.poll(0))


def _worded(error: ValueError | OSError) -> str:
    """An error's text; a file's own, which the system words, with what it was about first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}. Give another place, or make this one usable."
    return str(error)


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    raise typer.Exit(status)


def _evaluate_with_bars(options: "EvalOptions") -> "EvalSummary":
    from internvideo3.harness.evaluate import evaluate
    from internvideo3.harness.ranks import is_first

    with _bars(shown=is_first()) as advance:
        return evaluate(options, advance)


_SHOWN_ERRORS = 5
_FULL_BARS = 5
"""Most bars of finished work that stay on the screen."""


class _Bars:
    """One progress bar a name, with the time that is left; called with (name, done, total)."""

    def __init__(self, shown: "Progress") -> None:
        self._shown = shown
        self._tasks: dict[str, TaskID] = {}
        self._full: list[str] = []

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            # The bar starts where an earlier command stopped: its samples tell nothing
            # about how fast this command is.
            self._tasks[name] = self._shown.add_task(name, completed=done, total=total, note="")
        self._shown.update(self._tasks[name], completed=done, total=total)
        if done >= total and name not in self._full:
            self._full.append(name)
            if len(self._full) > _FULL_BARS:
                # What moves must stay on the screen, however much there is to do.
                first = self._full[-1 - _FULL_BARS]
                self._shown.update(self._tasks[first], visible=False)

    def watch(self, stage: str, row: Mapping[str, float]) -> None:
        """Show a line of training's metrics behind the stage's bar."""
        name = "reward" if "reward" in row else "loss"
        self._shown.update(self._tasks[stage], note=f"{name} {row[name]:.3f}")


def _metrics_lines(stages: Sequence[Path]) -> list[str]:
    """Where each step's metrics are; a stage without steps has none."""
    files = [folder / "metrics.jsonl" for folder in stages]
    return [f"Metrics: {file}" for file in files if file.is_file()]


@contextmanager
def _bars(*, shown: bool = True, stderr: bool = False) -> Iterator[_Bars]:
    """Bars of what takes long; yields what moves them."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    console = Console(stderr=True) if stderr else None
    with Progress(*columns, console=console, disable=not shown) as bars:
        yield _Bars(bars)


def _print_runs(runs: list[Path]) -> None:
    from internvideo3.reports.terminal import print_report

    print_report(runs)


def _print_suites(root: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from internvideo3.harness.suites import listed
    from internvideo3.tasks.world.build import world_root

    world = world_root()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("suite", "paper", "questions", "metric", "data"):
        right, words = name == "questions", name == "metric"
        table.add_column(name, justify="right" if right else "left", no_wrap=not words)
    for one in listed(root, world):
        count = "drawn" if one.questions is None else f"{one.questions:,}"
        table.add_row(one.name, one.where, count, one.metric, "here" if one.here else "–")
    console = Console()
    console.print(f"Data of benchmarks: {root}; the scale world: {world}", soft_wrap=True)
    console.print(table)


def _check_only(options: "EvalOptions", profile: Path | None) -> None:
    """Print what `--check` finds; exit with 1 if a suite cannot be run."""
    from internvideo3.harness.check import check, read_rates
    from internvideo3.harness.check_lines import lines

    rates = read_rates(profile) if profile else None
    checks = check(options)
    for line in lines(checks, options, rates):
        print(line)
    if not all(one.ready for one in checks):
        _leave(USER_ERROR)


def _device(given: str | None) -> str | None:
    """A device's name, checked for its form before anything is loaded or written."""
    from internvideo3.harness.preflight import PreflightError

    if given is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", given):
        raise PreflightError(f"--device {given!r} is no device; give cpu, cuda or cuda:N.")
    return given


AGENTIC = (
    "policy", "turns", "tool_calls", "tokens", "looks", "captions", "compress_at", "zoom_frames",
    "tools", "verify",
)  # fmt: skip
"""Options of `eval` that only an agent reads."""


def _only_agentic(context: typer.Context) -> None:
    """Refuses what only an agent reads; direct answers would leave it out without a word."""
    from internvideo3.harness.preflight import PreflightError

    sources = {name: context.get_parameter_source(name) for name in AGENTIC}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise PreflightError(
            f"{names}: only --mode agentic has a use for it; add that, or leave it out."
        )


def _tell_run(summary: "EvalSummary", max_errors: int) -> None:
    """Print the tables of a run whose samples are all there, and what failed."""
    if summary.left:
        print(
            f"{summary.computed} samples answered, {summary.left} are left to other shards; "
            "when all are done, repeat the command without --shard to merge."
        )
    elif (summary.run / "parts").exists():
        print("All shards have answered; repeat the command without --shard to merge them.")
    else:
        _print_runs([summary.run])
    _tell_summary(summary, max_errors)
    for file in sorted((summary.run / "submissions").glob("*.json")):
        count = len(json.loads(file.read_text(encoding="utf-8")))
        print(f"Answers for the benchmark's server, to {count} questions: {file}")


def _tell_summary(summary: "EvalSummary", max_errors: int) -> None:
    print(f"{summary.computed} samples answered, {summary.kept} kept from before: {summary.run}")
    if not summary.errors:
        return
    samples: dict[str, list[str]] = {}
    for row in summary.errors:
        error = f"{row['error']['type']}: {row['error']['message']}"
        samples.setdefault(error, []).append(row["id"])
    # A video that cannot be read fails all of its questions.
    shown = "\n".join(
        f"  {ids[0]}{f' and {len(ids) - 1} more' if ids[1:] else ''}: {error}"
        for error, ids in list(samples.items())[:_SHOWN_ERRORS]
    )
    rest = len(samples) - _SHOWN_ERRORS
    shown += f"\n  and {rest} other errors; all are in samples/" if rest > 0 else ""
    print(
        f"{len(summary.errors)} samples failed and count as wrong:\n{shown}\n"
        "Repair the cause and repeat the command with --retry-errors.",
        file=sys.stderr,
    )
    if len(summary.errors) > max_errors:
        _leave(USER_ERROR)


if __name__ == "__main__":
    main()
