"""The gate on skipped tests: it lets gpu tests pass and nothing else.

pytest tests/house/test_skips.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
TESTS = {
    "passes": "def test_runs():\n    assert 1 + 1 == 2\n",
    "gpu": "import pytest\n@pytest.mark.gpu\ndef test_gpu():\n    pytest.skip('none here')\n",
    "hand": "import pytest\n@pytest.mark.skip(reason='later')\ndef test_later():\n    pass\n",
    "xfail": "import pytest\n@pytest.mark.xfail\ndef test_broken():\n    assert False\n",
    "module": "import pytest\npytest.importorskip('no_such_module')\n",
}


@pytest.fixture(scope="module")
def junit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pytest writes about one test of each kind, under the repository's conftest.py."""
    folder = tmp_path_factory.mktemp("suite")
    shutil.copy(HERE.parent / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    for name, text in TESTS.items():
        (folder / f"test_{name}.py").write_text(text)
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--junitxml=junit.xml"],
        cwd=folder,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        check=True,
        timeout=200,
    )
    return folder / "junit.xml"


def gate(junit: Path, folder: Path, kinds: set[str]) -> subprocess.CompletedProcess[str]:
    """Run the gate on the part of the file that is about tests of these kinds."""
    tree = ElementTree.parse(junit)
    for suite in tree.iter("testsuite"):
        for case in suite.findall("testcase"):
            told = f"{case.get('classname')}{case.get('name')}"
            if not any(f"test_{kind}" in told for kind in kinds):
                suite.remove(case)
    tree.write(folder / "part.xml")
    judge = [sys.executable, str(HERE / "skips.py"), str(folder / "part.xml")]
    return subprocess.run(judge, capture_output=True, text=True, timeout=60)


def test_a_gpu_test_may_be_skipped(junit: Path, tmp_path: Path) -> None:
    done = gate(junit, tmp_path, {"passes", "gpu"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("2 tests, 1 skipped for want of a GPU, 0 skipped")


@pytest.mark.parametrize(
    ("kind", "named"),
    [("hand", "test_later: "), ("xfail", "test_broken: "), ("module", "no_such_module")],
)
def test_any_other_skip_fails_and_is_named(
    junit: Path, tmp_path: Path, kind: str, named: str
) -> None:
    done = gate(junit, tmp_path, {"passes", kind})
    assert done.returncode == 1
    assert "1 skipped for other reasons" in done.stdout
    assert named in done.stdout


def test_running_nothing_fails(junit: Path, tmp_path: Path) -> None:
    assert gate(junit, tmp_path, {"gpu"}).returncode == 1
