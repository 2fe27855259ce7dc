"""The Python examples of the documents run as they are printed.

pytest tests/house/test_examples.py
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from internvideo3.tasks.world.build import build_suite
from internvideo3.tasks.world.suites import SUITES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the video that the examples name."""
    root = tmp_path_factory.mktemp("examples")
    built = build_suite(SUITES["world_short"], root / "world", limit_videos=1)
    (video,) = built.folder.glob("videos/*.mp4")
    video.rename(root / "video.mp4")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "model/README.md"])
def test_an_example_runs(document: str, folder: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.S | re.M)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
