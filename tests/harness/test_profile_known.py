"""What a profile takes as measured before: of this code and device, and often enough.

pytest tests/harness/test_profile_known.py
"""

import fcntl
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from internvideo3.harness.gpu import figure6
from internvideo3.harness.profile import host, known
from internvideo3.harness.profile.command import ProfileOptions, is_complete, profile
from internvideo3.harness.profile.options import _config as options_config
from internvideo3.harness.profile.workload import Workload, why_not
from internvideo3.harness.store import read_rows
from internvideo3.reports.efficiency import read

GQA = "random:tiny-gqa"


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[ProfileOptions]:
    workload = Workload(models=(GQA,), contexts=(48,), new_tokens=3, chunks=(32,), repeats=1)
    yield ProfileOptions(workload=workload, out=tmp_path / "out")
    known.made_by.cache_clear()


def measured(options: ProfileOptions) -> list[dict[str, Any]]:
    return read_rows(options.runs()[0] / "measurements.jsonl")


def change_code(monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    monkeypatch.setattr(known.provenance, "code_digest", lambda _: digest)
    known.made_by.cache_clear()


def test_what_other_code_measured_is_measured_again_and_said(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    change_code(monkeypatch, "a" * 64)
    profile(tiny, told.append)
    first = measured(tiny)
    assert {row["code"] for row in first} == {"a" * 64}
    assert {tuple(row["versions"]) for row in first} == {
        ("flash-attn", "torch", "transformers", "triton")
    }
    assert is_complete(tiny) and not any("other code" in line for line in told)
    change_code(monkeypatch, "b" * 64)
    assert not is_complete(tiny)
    profile(tiny, told.append)
    assert sum("1 of 1 points were measured by other code" in line for line in told) == 1
    second = measured(tiny)
    assert second[: len(first)] == first and len(second) == 2 * len(first)
    # The newest row is what the figures show.
    (series,) = read(tiny.runs()).series
    assert series.decode[48]["code"] == "b" * 64
    # And so the first code's rows do not count any more, should that come back.
    change_code(monkeypatch, "a" * 64)
    assert not is_complete(tiny)


def test_other_versions_of_torch_are_other_code(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile(tiny)
    assert is_complete(tiny)
    monkeypatch.setattr(known, "_version", lambda name: "0.1" if name == "torch" else None)
    known.made_by.cache_clear()
    assert not is_complete(tiny)


def test_fewer_warmups_than_asked_for_are_not_enough(tiny: ProfileOptions) -> None:
    profile(tiny)
    assert {row["warmups"] for row in measured(tiny)} == {0}
    warm = replace(tiny, workload=replace(tiny.workload, warmups=1))
    assert is_complete(tiny) and not is_complete(warm)
    profile(warm)
    assert is_complete(tiny) and is_complete(warm)


def figure(monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    """The script, as it is called."""
    monkeypatch.setattr(sys, "argv", ["figure6", "--device", "cpu", "--new-tokens", "2", *given])
    figure6.main()


def test_a_folder_that_is_not_there_yet_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of `make gpu` on a bare machine."""
    out = tmp_path / "runs/gpu/figure6"
    figure(monkeypatch, "--out", str(out), "--models", GQA, "--contexts", "48")
    assert (out / "random-tiny-gqa/measurements.jsonl").is_file()


def test_another_card_in_the_same_folder_begins_a_run_beside_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--out", str(tmp_path), "--models", GQA, "--contexts", "48")
    # Of a model whose name ends in a number.
    figure(monkeypatch, *small)
    other = tmp_path / "random-tiny-gqa-576"
    (tmp_path / "random-tiny-gqa").rename(other)
    about = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(about | {"id": f"{GQA}-576"}))
    with monkeypatch.context() as patched:
        patched.setattr(host, "name_of", lambda _: "NVIDIA H200")
        figure(monkeypatch, *small)
    run = tmp_path / "random-tiny-gqa"
    theirs = (run / "measurements.jsonl").read_bytes()
    with (run / ".lock").open("w") as lock:
        # Whoever writes there has to be let finish.
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="in use by another process"):
            figure(monkeypatch, *small)
    figure(monkeypatch, *small)
    assert "is of NVIDIA H200; kept as random-tiny-gqa-1" in capsys.readouterr().out
    assert (tmp_path / "random-tiny-gqa-1/measurements.jsonl").read_bytes() == theirs
    assert json.loads((run / "run.json").read_text())["config"]["card"] != "NVIDIA H200"
    # The first card's rows are not measured again when it comes back.
    with monkeypatch.context() as patched:
        patched.setattr(host, "name_of", lambda _: "NVIDIA H200")
        figure(monkeypatch, *small)
    assert (run / "measurements.jsonl").read_bytes() == theirs
    figure(monkeypatch, *small)
    assert json.loads((run / "run.json").read_text())["config"]["card"] != "NVIDIA H200"
    # Both are in the figures, apart.
    assert other.is_dir()
    (beside,) = {*tmp_path.glob("random-tiny-gqa-*")} - {other}
    assert len(set(read([run, beside]).devices)) == 2


def test_what_was_moved_aside_does_not_rule_what_is_newer(tmp_path: Path) -> None:
    """One card, then another, then the first again with other code."""
    for name in ("a", "a-1", "a-2", "a-10", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "measurements.jsonl").touch()
    for model, order in (("a", "a-1 a-2 a-10 b a"), ("b", "a-1 a-2 a-10 a b")):
        options = ProfileOptions(workload=Workload(models=(model,)), out=tmp_path)
        assert [path.name for path in options.drawn()] == order.split()


def test_a_videos_stages_are_of_what_decodes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code and packages; other rows do not depend on them."""
    digest, asked = known.provenance.code_digest, []
    monkeypatch.setattr(
        known.provenance, "code_digest", lambda files: asked.append(files) or digest(files)
    )
    for made in (known.made_by, known.stages_made_by):
        made.cache_clear()
    plain, stages = known.made_by(), known.stages_made_by()
    assert {*asked[1]} - {*asked[0]} == set(known.DECODING)
    assert {*stages["versions"]} - {*plain["versions"]} == {"av"}
    assert plain["code"] != stages["code"] != digest(("tasks/video.py",))
    known.stages_made_by.cache_clear()


def test_a_card_is_the_same_however_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "name_of", lambda _: "NVIDIA H200")
    monkeypatch.setattr("internvideo3.harness.profile.options.device_given", torch.device)
    workload = Workload(models=(GQA,))
    one, other = (
        options_config(ProfileOptions(workload=workload, out=Path("out"), device=name))
        for name in ("cuda", "cuda:0")
    )
    assert one == other


def test_rows_before_rotation_are_timed_only_as_they_can_be() -> None:
    """Told as impossible: tried again at every command, they would fail again."""

    def why(**named: Any) -> Any:
        (point,) = Workload(models=(GQA,), contexts=(48,), **named).points()
        return why_not(point, "prerope")

    assert why(fill="prefill") is None
    assert "no fp8 form" in why(fill="prefill", caches=("fp8",))
    assert "made up" in why(fill="random") and "made up" in why(fill="last")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--models", "nosuch"), "no checkpoint 'nosuch'"),
        (("--out", "/dev/null/x"), "/dev/null/x"),
    ],
)
def test_what_is_amiss_is_one_line(
    given: tuple[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=said) as ended:
        figure(monkeypatch, "--out", str(tmp_path), "--contexts", "48", *given)
    assert "\n" not in str(ended.value.code)
