"""Scoring ten thousand stored answers again: seconds, little memory, and no torch.

pytest tests/harness/test_rescore.py
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from internvideo3.harness.store import dumps

SAMPLES = 10_000
REPLIES = (
    "B",
    "The answer is B.",
    "(B) a star, since it moves",
    "<think>\nhm\n</think>\n**C**",
    "?",
)
_CODE = """
import json, re, sys, time
from pathlib import Path
from internvideo3.harness.rescore import rescore
started, before = time.perf_counter(), time.process_time()
result = rescore(Path(sys.argv[1]))
used = time.process_time() - before
heavy = sorted({"torch", "transformers", "lmms_eval", "decord", "numpy"} & set(sys.modules))
# Not ru_maxrss: a child starts with what its parent, the test process, had used.
status = Path("/proc/self/status").read_text()
peak = int(re.search(r"VmHWM:[ \\t]*([0-9]+) kB", status).group(1)) * 1024
print(json.dumps({"cpu_s": used, "wall_s": time.perf_counter() - started, "peak_bytes": peak,
                  "heavy": heavy, "n": {name: one["n"] for name, one in result.items()}}))
"""


def write_run(root: Path) -> Path:
    """Ten thousand answers to two benchmarks of different kinds."""
    (root / "samples").mkdir(parents=True)
    options = {f"a{i}": text for i, text in enumerate(["a ring", "a star", "a line", "x", "y"])}
    suites: dict[str, list[dict[str, Any]]] = {"nextqa": [], "timelens_charades": []}
    for number in range(SAMPLES):
        suite = ("nextqa", "timelens_charades")[number % 2]
        doc: dict[str, Any] = {"answer": 1, "type": "CW", **options}
        reply = REPLIES[number // 2 % len(REPLIES)]
        if suite != "nextqa":
            doc = {"span": [[2.0, 9.5]], "duration": 30.0}
            reply = f"The event happens in {number % 9}.5 - {number % 9 + 4}.2 seconds."
        blank = {"value": None, "parsed": None, "outcome": "error"}
        suites[suite].append(
            {
                "id": f"{suite}/{number}", "video_id": f"v{number // 8}", "prediction": reply,
                "benchmark": "nextqa" if suite == "nextqa" else "timelens", "doc": doc,
                "official": blank, "plain": blank, "error": None,
            }
        )  # fmt: skip
    for suite, rows in suites.items():
        text = "".join(dumps(row) + "\n" for row in rows)
        (root / "samples" / f"{suite}.jsonl").write_text(text)
    run = {"schema": 1, "suites": {suite: {"n": SAMPLES // 2} for suite in suites}}
    (root / "run.json").write_text(json.dumps(run))
    return root


def measure(root: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _CODE, str(root)],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def test_ten_thousand_answers_within_ten_seconds_and_300_mb(tmp_path: Path) -> None:
    measured = measure(write_run(tmp_path / "run"))
    assert measured["n"] == {"nextqa": 5000, "timelens_charades": 5000}
    assert measured["heavy"] == []
    # Processor time: on an idle machine it is the wall time, and it stays so on a busy one.
    assert measured["cpu_s"] <= 10
    assert measured["peak_bytes"] < 300e6
