"""How far a command is, in a terminal and in a log.

pytest tests/harness/test_progress.py -q
"""

import io
import os
import pty
import subprocess
import sys

from internvideo3.harness.progress import FULL_BARS, LOG_S, Lines

SUITES = [f"suite_{number:02}" for number in range(20)]
_RUN = """
import sys
from internvideo3.harness.progress import progress
names = sys.argv[1:]
with progress() as advance:
    for name in names:
        advance(name, 0, 300)
    for name in names:
        for done in range(1, 301):
            advance(name, done, 300)
print("over")
"""


def test_a_log_has_a_line_a_suite_and_no_bars() -> None:
    command = [sys.executable, "-c", _RUN, *SUITES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert [line.split(" after ")[0].split() for line in lines] == [
        [name, "300/300"] for name in SUITES
    ]
    assert last == "over" and done.stderr == ""
    assert not set(done.stdout) & set("\r\x1b━")


def test_no_suite_vanishes_from_a_terminal() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, *SUITES],
        stdout=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "24"},
    )
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 1 << 16):
            said += piece
    except OSError:
        pass  # how a terminal says that its other end is closed
    finally:
        os.close(ours)
    assert process.wait() == 0
    # Above the bars, where it scrolls away, and not rewritten.
    above = [f"{name}         300/300" for name in SUITES[:-FULL_BARS]]
    assert [said.decode().count(line) for line in above] == [1] * len(above)


def test_a_log_is_told_now_and_then_and_at_the_end() -> None:
    now = 0.0
    stream = io.StringIO()
    lines = Lines(stream, lambda: now)
    lines("old", 4, 4)  # done by an earlier command
    lines("next", 0, 50)
    for done in range(1, 26):
        now += LOG_S / 10
        lines.watch("next", {"step": done, "loss": 1 / done})
        lines("next", done, 50)
    lines.close()
    assert stream.getvalue().splitlines() == [
        "old              4/4 after 0:00:00",
        "next             10/50 after 0:05:00 loss 0.100",
        "next             20/50 after 0:10:00 loss 0.050",
        "next             25/50 after 0:12:30 loss 0.040",
    ]


def test_nothing_is_told_by_those_who_are_not_to() -> None:
    lines = Lines(None)
    lines("a", 1, 1)
    lines.close()
