"""Workload files: what YAML would make of innocent text, and what is no file at all.

pytest tests/harness/test_profile_workload.py
"""

import os
from pathlib import Path

import pytest

from internvideo3.harness.profile.workload import FIGURE6, WorkloadError, read_workload


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("repeats: 3\nrepeats: 4\n", "'repeats' is given twice"),
        ("contexts: 1:30\n", "contexts: '1:30' should be a whole number"),
        ("contexts: [64, 010]\n", "contexts: '010' should be a whole number"),
        ("contexts: 0x10\n", "contexts: '0x10' should be a whole number"),
        ("contexts: 2026-11-28\n", "contexts: '2026-11-28' should be a whole number"),
        ("contexts:\n", "contexts has no value"),
        ("models: ~\n", "models has no value"),
        (f"contexts: {'9' * 5000}\n", "contexts: '9+...9+' should be a whole number"),
        ("contexts: yes\n", "contexts: True should be a whole number"),
        ("contexts: {a: 1, a: 2}\n", "'a' is given twice"),
        ("? [a]\n: 5\n", "is not YAML"),
        ("- 5\n", "must be a mapping"),
        ("context: 5\n", "Did you mean contexts"),
        ('contexts: "\\xff\n', "is not YAML"),
    ],
)
def test_what_makes_no_sense_is_said_with_file_and_name(
    text: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(WorkloadError, match=said) as ended:
        read_workload(file)
    assert str(file) in str(ended.value) and len(str(ended.value)) < 500


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A pipe would be waited for until somebody writes."""
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path, "no file"),
        (tmp_path / "pipe", "no file"),
        (tmp_path / "a", "is none"),
    ):
        with pytest.raises(WorkloadError, match=f"cannot read the workload .*{said}"):
            read_workload(path)


def test_numbers_are_taken_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("contexts: [64, 1_000, +5]\nwarmups: 0\nmodels: scale:base\nfill: random\n")
    found = read_workload(file)
    assert found.contexts == (64, 1000, 5) and found.warmups == 0
    assert found.models == ("scale:base",) and found.fill == "random"
    assert read_workload(FIGURE6).repeats == 10
