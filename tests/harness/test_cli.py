"""The command line: fast help, light imports, errors in words.

pytest tests/harness/test_cli.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from internvideo3.harness import cli
from internvideo3.tasks.world.build import build_suite

HEAVY = ("torch", "transformers", "lmms_eval", "datasets", "pandas", "matplotlib", "numpy", "scipy")


def internvideo3(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "internvideo3.harness.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"} | env,
    )


def test_help_answers_within_half_a_second() -> None:
    best = float("inf")
    for _ in range(3):
        # Processor time of the child: on an idle machine it is the wall time, and it stays so
        # when other tests share the cores.
        before = os.times()
        done = internvideo3("--help")
        after = os.times()
        used = after.children_user + after.children_system
        best = min(best, used - before.children_user - before.children_system)
        assert done.returncode == 0
        assert "internvideo3 eval --model scale:base" in done.stdout
    assert best <= 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"], ["score", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from internvideo3.harness.cli import main\n"
        f"sys.argv = ['internvideo3', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "world_lnog"], "Unknown suite 'world_lnog'. Did you mean world_long"),
        (["--suite", "world_long", "--control", "blnd"], "Did you mean blind?"),
        (["--suite", "world_long", "--split", "tset"], "Did you mean test"),
        (["--suite", "world_long", "--dtype", "float16"], "--dtype 'float16' is not known"),
        (
            ["--suite", "world_long", "--root", "/nonexistent"],
            "internvideo3 world build world_long",
        ),
    ],
)
def test_a_wrong_name_is_one_message_and_a_status(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = internvideo3("eval", "--model", "scale:base", "--out", str(tmp_path / "r"), *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_score_of_something_else_says_what_to_give(tmp_path: Path) -> None:
    done = internvideo3("score", str(tmp_path))
    assert done.returncode == 1
    assert "is not a run directory: it has no run.json" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    """As `| head -1` does; also where every line is written at once."""
    check = f"{sys.executable} -m internvideo3.harness.cli eval --check --suite paper"
    done = subprocess.run(
        ["bash", "-c", f"{check} --data {tmp_path} | head -1"],
        capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}, timeout=120,
    )  # fmt: skip
    assert done.stdout.startswith("no --model is given") and done.stderr == ""


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "run.json").write_text('{"schema": 1}')
    scored = {"value": 1.0, "parsed": "B", "outcome": "answered"}
    row = {"id": "mlvu/0", "video_id": "v", "answer": "B", "official": scored, "plain": scored}
    (run / "samples/mlvu.jsonl").write_text(json.dumps(row) + "\n")
    done = internvideo3("report", str(run), "--out", "/proc/nowhere")
    assert done.returncode == 1
    assert "Error: /proc/nowhere: No such file or directory. Give another place" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--model", "scale:m2la", "--suite", "world_short"],
        ["train", "scale"],
        ["profile"],
        ["serve-policy", "--model", "scale:m2la"],
    ],
)
def test_a_gpu_that_is_not_there_is_said_in_words(command: list[str], tmp_path: Path) -> None:
    out = [] if command[0] == "serve-policy" else ["--out", str(tmp_path / "out")]
    if command[0] == "eval":
        build_suite("world_short", tmp_path / "world", limit_videos=1)
        out += ["--root", str(tmp_path / "world")]
    done = CliRunner().invoke(cli.app, [*command, *out, "--device", "cuda"])
    told = " ".join(done.output.split())
    assert done.exit_code == 1 and "torch sees 0 GPUs here" in told
    assert "Unforeseen" not in told and not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = internvideo3("--debug", "score", str(tmp_path))
    assert done.returncode != 0
    assert "Traceback" in done.stderr


OPTIONS = {
    "eval": "model suite out check data preset subtitles thinking limit sample-id control split "
    "fps max-frames min-pixels max-pixels max-new-tokens batch device dtype threads shard "
    "processes decode-limit frame-cache frame-cache-gb mode policy turns tool-calls tokens looks "
    "zoom-frames tools verify captions compress-at retry-errors max-errors profile root",
    "ask": "mode model policy out turns tool-calls tokens fps max-frames zoom-frames web captions "
    "compress-at max-new-tokens temperature seed device dtype threads cache",
    "serve": "model folder host port token-variable name upload-mb waiting reasoning policy turns "
    "tool-calls tokens fps max-frames zoom-frames web captions compress-at max-new-tokens device "
    "dtype threads cache",
    "serve-policy": "model host port weights token-variable upload-mb device dtype threads",
    "table6": "other-models out",
    "suites": "data",
    "score": "",
    "judge": "endpoint judge key-variable workers",
    "report": "out title",
    "profile": "model out workload contexts new-tokens batch chunk runner cache fill integrate "
    "warmups repeats dtype device video plan memory layer threads",
    "train": "out plan model gpus device threads",
    "ablate": "out preset seeds suite data limit jobs device threads root",
    "demo": "full videos out root threads",
    "compare-stock": "model videos repeats out root threads",
    "convert": "preset cache bytes-per-token choices calibration held-out tokens distil-minutes "
    "seed dtype threads",
    "inspect": "",
    "world build": "root split videos sound workers",
    "world show": "index sample-id root split out",
    "trace show": "video out",
    "trace replay": "model tools out device dtype threads",
    "data curate": "endpoint model out blind per-video most-failures",
    "data report": "out",
    "data filter": "out count seed",
    "data sample": "out model samples teacher teacher-model fps max-frames min-pixels max-pixels "
    "total-pixels pack-tokens group max-new-tokens most-bad limit seed device dtype threads",
    "data check": "out benchmark-videos benchmark-questions most-bad",
    "data mix": "out total preset seed",
    "data rollouts": "out model turns tool-calls tokens fps max-frames zoom-frames signatures "
    "slips limit seed threads",
    "data verl": "out stage",
}


def test_the_command_line_is_frozen() -> None:
    """A new option is a promise: it is added here on purpose, or not at all."""
    from typer.main import get_command

    from internvideo3.harness.cli import app

    found: dict[str, set[str]] = {}

    def walk(name: str, command: Any) -> None:
        if hasattr(command, "commands"):
            for key, inner in command.commands.items():
                walk(f"{name} {key}".strip(), inner)
            return
        options = [one.opts[0] for one in command.params if one.opts[0].startswith("--")]
        found[name] = {option.removeprefix("--") for option in options} - {"help"}

    walk("", get_command(app))
    assert found == {name: set(options.split()) for name, options in OPTIONS.items()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--policy", "model"], "--policy: only --mode agentic"),
        (["--turns", "3", "--no-verify"], "--turns, --verify: only --mode agentic"),
        (["--turns", "16"], "--turns: only --mode agentic"),
        (["--device", "cud"], "'cud' is no device"),
        (["--max-frames", "-2"], "Invalid value for '--max-frames'"),
        (["--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--fps", "0"], "Invalid value for '--fps'"),
        (["--limit", "-1"], "Invalid value for '--limit'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    given: list[str], said: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["eval", "--model", "scale:m2la", "--suite", "world_short", "--out", str(out)]
    done = CliRunner().invoke(cli.app, [*command, *given])
    assert done.exit_code != 0 and not out.exists()
    assert said in " ".join(done.output.replace("│", " ").split()), done.output


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_ctrl_c_says_where_the_finished_is_if_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvideo3.tasks.brief.build_suites", interrupted)
    monkeypatch.setattr("internvideo3.harness.ask.ask", interrupted)
    building = CliRunner().invoke(cli.app, ["world", "build", "--root", str(tmp_path)])
    asking = CliRunner().invoke(cli.app, ["ask", "film.mp4", "What?"])
    assert building.exit_code == asking.exit_code == cli.INTERRUPTED
    assert f"kept in {tmp_path}; repeat" in building.output
    assert "Stopped." in asking.output and "kept" not in asking.output
