"""The check of a step at a point's own depth, and the gate of transformers' baselines.

pytest tests/harness/test_profile_depth.py
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from internvideo3.harness.profile import depth, runners
from internvideo3.harness.profile.command import GateError, ProfileOptions, profile
from internvideo3.harness.profile.depth import Depth, DepthError, check_depth
from internvideo3.harness.profile.gate import Form, gate
from internvideo3.harness.profile.measure import run_once, warm_up
from internvideo3.harness.profile.runners import Clock, EngineRunner, random_ids
from internvideo3.harness.profile.subjects import Subject, load
from internvideo3.harness.profile.workload import Point, Workload
from internvideo3.harness.store import read_rows
from internvideo3.model import engine, engine_layers

CPU = torch.device("cpu")
DEEP = 1500
"""Tokens; the gate sees 1141."""


@pytest.fixture(scope="module")
def subjects() -> dict[tuple[str, str], Subject]:
    """Models by attention and number format."""
    return {
        (name, dtype): load(f"random:tiny-{name}", CPU, dtype)
        for name in ("gqa", "m2la")
        for dtype in ("float32", "bfloat16")
    }


def looked(subject: Subject, *, fp8: bool = False, fill: bool = True, batch: int = 2) -> Depth:
    """What the check finds on a cache of `DEEP` tokens."""
    runner = EngineRunner(subject, batch, 512, fp8=fp8)
    found: list[Depth] = []
    runner.before_timing = lambda engine, cache: found.append(check_depth(engine, cache))
    if fill:
        logits_BY = runner.fill(DEEP, 2)
    else:
        logits_BY = runner.prefill(random_ids(subject, batch, DEEP), 2)
    runner.decode(logits_BY, 2, Clock(CPU))
    return found[0]


FORMS = [("gqa", False), ("m2la", False), ("m2la", True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize(("name", "fp8"), FORMS)
def test_a_step_that_is_right_is_green(
    subjects: dict[Any, Subject], name: str, fp8: bool, fill: bool, dtype: str
) -> None:
    found = looked(subjects[name, dtype], fp8=fp8, fill=fill)
    assert found.is_green and found.tokens == DEEP + 1
    assert found.error < found.limit / 3


def hidden(run: Any, kept_B: Any) -> Any:
    return replace(run, lengths_B=kept_B.to(torch.int32))


def without_newest(runs: Any, count: int = 8) -> Any:
    """A step that does not see its last rows, its own token's included."""
    left, found = count, []
    for run in reversed(runs):
        most = int(run.lengths_B.max())
        found.insert(0, hidden(run, (run.lengths_B - left).clamp_min(0)))
        left = max(0, left - most)
    return found


def up_to_1200(runs: Any) -> Any:
    """A step that does not see beyond what the gate has looked at."""
    seen, found = 0, []
    for run in runs:
        found.append(hidden(run, run.lengths_B.clamp_max(max(0, 1200 - seen))))
        seen += int(run.lengths_B.max())
    return found


def last_run_only(runs: Any) -> Any:
    return runs[-1:] if len(runs) > 1 else up_to_1200(runs)


@pytest.mark.parametrize("broken", [without_newest, up_to_1200, last_run_only])
@pytest.mark.parametrize(("name", "fp8"), FORMS)
def test_rows_that_are_not_seen_are_red(
    subjects: dict[Any, Subject], name: str, fp8: bool, broken: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for call in depth.CALLS:
        right = getattr(engine_layers, call)

        def wrong(q: Any, runs: Any, right: Any = right, **options: Any) -> Any:
            return right(q, broken(runs), **options)

        monkeypatch.setattr(engine_layers, call, wrong)
    found = looked(subjects[name, "bfloat16"], fp8=fp8)
    assert not found.is_green and found.error > 10 * found.limit


@pytest.mark.parametrize("name", ["gqa", "m2la"])
def test_a_step_that_leaves_its_own_token_out_is_red(
    subjects: dict[Any, Subject], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the engine itself might, and not its kernels."""
    right = engine.Where
    for shift in (-1, -8):
        monkeypatch.setattr(
            engine,
            "Where",
            lambda slots, visible, cos, sin, shift=shift: right(
                slots, (visible + shift).to(torch.int32), cos, sin
            ),
        )
        assert looked(subjects[name, "bfloat16"]).error > 0.1


def test_what_is_no_number_is_red(
    subjects: dict[Any, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine_layers.gqa_decode

    def wrong(*given: Any, **options: Any) -> Any:
        out, lse = right(*given, **options)
        out[0, 0, 0] = math.nan
        return out, lse

    monkeypatch.setattr(engine_layers, "gqa_decode", wrong)
    assert looked(subjects["gqa", "bfloat16"]).error == math.inf


def test_the_check_leaves_the_engine_as_it_was(subjects: dict[Any, Subject]) -> None:
    subject = subjects["m2la", "float32"]
    said = []
    for looks in (False, True):
        runner = EngineRunner(subject, 2, 512)
        if looks:
            runner.before_timing = check_depth
        first_BY = runner.prefill(random_ids(subject, 2, 90), 6)
        said.append(runner.decode(first_BY, 6, Clock(CPU)))
    assert said[0] == said[1]
    assert engine_layers.latent_decode.__name__ == "decode_runs"


def test_stretches_of_any_length_merge_to_the_same(
    subjects: dict[Any, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth, "SCRATCH_BYTES", 1 << 20)
    found = looked(subjects["m2la", "float32"])
    assert found.is_green and found.error < 1e-5


def one_point(**given: Any) -> Point:
    values = {"models": ("random:tiny-m2la",), "contexts": (DEEP,), "new_tokens": 2, "repeats": 1}
    (point,) = Workload(**(values | {"fill": "random"} | given)).points()
    return point


def test_only_the_first_run_of_a_point_is_looked_at(subjects: dict[Any, Subject]) -> None:
    subject = subjects["m2la", "float32"]
    first = run_once(subject, one_point())
    again = run_once(subject, one_point(), first=False)
    assert first.depth is not None and first.depth.tokens == DEEP + 1
    assert again.depth is None


def test_a_point_that_is_wrong_at_its_depth_has_no_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate over 1141 tokens is green."""
    right = engine_layers.gqa_decode
    monkeypatch.setattr(
        engine_layers, "gqa_decode", lambda q, runs, **rest: right(q, up_to_1200(runs), **rest)
    )
    workload = Workload(
        models=("random:tiny-gqa",), contexts=(64, DEEP), new_tokens=2, repeats=1, fill="random"
    )
    options = ProfileOptions(workload=workload, out=tmp_path)
    told: list[str] = []
    with pytest.raises(GateError, match=rf"/{DEEP}\+2 random: the gate is red"):
        profile(options, told.append)
    assert any("gate green" in line for line in told)
    rows = read_rows(options.runs()[0] / "measurements.jsonl")
    by_context = {row["context_tokens"]: row for row in rows}
    assert by_context[64]["status"] == "ok" and by_context[64]["depth_error"] < 1e-4
    red = by_context[DEEP]
    assert red["status"] == "gate red" and red["kind"] == "none" and "tokens_per_s" not in red
    assert "attention over 1501 tokens is" in red["reason"]


@pytest.mark.parametrize("kind", ["sdpa", "static"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_baselines_pass_their_gates(subjects: dict[Any, Subject], kind: str, dtype: str) -> None:
    for form in (Form(2, "native", kind), Form(1, "native", kind, room=300)):
        found = gate(subjects["gqa", dtype], form)
        assert found.is_green and found.engine > 0
    assert gate(subjects["gqa", dtype], Form(1, "native", kind, room=5)).is_green


@pytest.mark.parametrize("kind", ["sdpa", "static"])
def test_a_baseline_that_is_wrong_is_not_timed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A position too far; the engine's points are none of its business."""
    right = runners.TransformersRunner._step

    def wrong(runner: Any, ids_BT: Any, forward: Any) -> Any:
        runner.length += ids_BT.shape[1] == 1
        return right(runner, ids_BT, forward)

    monkeypatch.setattr(runners.TransformersRunner, "_step", wrong)
    workload = Workload(
        models=("random:tiny-gqa",), contexts=(64,), new_tokens=2, repeats=1,
        runners=("engine", kind),
    )  # fmt: skip
    options = ProfileOptions(workload=workload, out=tmp_path)
    with pytest.raises(GateError, match=rf"tiny-gqa \({kind}, batch 1"):
        profile(options)
    rows = read_rows(options.runs()[0] / "measurements.jsonl")
    found = {row["runner"]: row for row in rows}
    assert found["engine"]["status"] == "ok" and found[kind]["status"] == "gate red"
    assert found[kind]["gate_scope"].startswith(kind)


def test_a_warm_up_takes_the_memory_of_the_whole_point(
    subjects: dict[Any, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    right = runners.make_runner

    def kept(*given: Any, **named: Any) -> Any:
        made.append(right(*given, **named))
        return made[-1]

    from internvideo3.harness.profile import measure

    monkeypatch.setattr(measure, "make_runner", kept)
    point = one_point(fill="prefill", contexts=(1000,), chunks=(128,))
    assert warm_up(subjects["m2la", "float32"], point) == 256
    runner = made[0]
    assert runner.length == 256
    assert runner.cache.segmented(0).tail[0].shape[2] >= 1000 + 2 + 1
    assert warm_up(subjects["m2la", "float32"], one_point()) == 0
    # In fp8 there is no room for all of them in full, and none is taken.
    subject, held = subjects["m2la", "float32"], []

    def watched(*given: Any, **named: Any) -> Any:
        runner = right(*given, **named)
        runner.before_compressing = lambda cache: held.append(cache.allocated_bytes())
        return runner

    monkeypatch.setattr(measure, "make_runner", watched)
    point = one_point(fill="last", contexts=(1000,), chunks=(128,), caches=("fp8",))
    assert warm_up(subject, point) == 128
    assert 128 < held[-1] / subject.bytes_per_token < 256
    # A chunk that is timed has a past, and so has the one that warms up for it.
    monkeypatch.setattr(measure, "make_runner", kept)
    point = one_point(fill="last", contexts=(1000,), chunks=(128,))
    assert warm_up(subject, point) == 128
    assert made[-1].length == 256
    assert made[-1].cache.segmented(0).tail[0].shape[2] >= 1000 + 2 + 1


def test_every_length_is_compiled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would take the second length for a sign that lengths vary."""
    compiled: list[dict[str, Any]] = []
    forgot: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda _, **given: compiled.append(given))
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgot.append(len(compiled)))
    monkeypatch.setattr(runners, "_compiled_for", ())

    class Model:
        forward = None

    model = Model()
    for tokens in (64, 64, 128, 64):
        runners._compiled(model, 1, tokens)
    assert forgot == [0, 2, 3]
    assert all(given == {"mode": "reduce-overhead", "dynamic": False} for given in compiled)


def test_an_error_at_depth_says_what_it_is() -> None:
    assert str(Depth(0.5, 2e-2, 1501)) == (
        "attention over 1501 tokens is 5.0e-01 from float32, at most 2e-02 is right"
    )
    assert issubclass(DepthError, Exception)
