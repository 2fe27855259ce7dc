"""The profiler: its gate, its rows, what it does with what fails; plan, figures and `inspect`.

pytest tests/harness/test_profile.py
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from internvideo3.harness.gpu import figure6, measure
from internvideo3.harness.gpu.measure import Results
from internvideo3.harness.inspection import describe
from internvideo3.harness.profile import command, host, runners
from internvideo3.harness.profile import measure as point_measure
from internvideo3.harness.profile.command import (
    GateError,
    ProfileOptions,
    UnfinishedError,
    is_complete,
    profile,
)
from internvideo3.harness.profile.gate import Form, gate
from internvideo3.harness.profile.layer import layer_rows
from internvideo3.harness.profile.measure import Ceilings, Run, prefill_flops, rows_of
from internvideo3.harness.profile.plan import RUNTIME_BYTES, device_bytes, need_of, plan, table
from internvideo3.harness.profile.runners import Clock, EngineRunner, make_runner, random_ids
from internvideo3.harness.profile.subjects import Subject, class_of, config_of, load
from internvideo3.harness.profile.workload import FIGURE6, Workload, WorkloadError, chosen
from internvideo3.harness.store import StoreError, read_rows
from internvideo3.model import cache, engine_layers
from internvideo3.model.checkpoint import CheckpointError
from internvideo3.model.device import current, use
from internvideo3.reports import efficiency
from internvideo3.reports.efficiency import (
    EfficiencyError,
    decode_figure,
    draw,
    latency_figure,
    ratio_figure,
    read,
)
from internvideo3.tasks.world.media import encode_video

TINY = ("random:tiny-gqa", "random:tiny-m2la")


@pytest.fixture
def options(checkpoint: Path, tmp_path: Path) -> ProfileOptions:
    run = tmp_path / "base"
    run.mkdir()
    return ProfileOptions(
        workload=Workload(
            models=(str(checkpoint), "scale:m2la"), contexts=(64, 256), new_tokens=4, repeats=2
        ),
        out=tmp_path / "out",
        into={str(checkpoint): run},
    )


@pytest.fixture
def tiny(tmp_path: Path) -> ProfileOptions:
    workload = Workload(models=TINY, contexts=(48, 96), new_tokens=3, chunks=(32,), repeats=1)
    return ProfileOptions(workload=workload, out=tmp_path / "out")


def measured(run: Path) -> list[dict[str, Any]]:
    return read_rows(run / "measurements.jsonl")


def test_rows_of_both_models_have_rates_bytes_and_the_gate(options: ProfileOptions) -> None:
    told: list[str] = []
    gqa_run, m2la_run = profile(options, told.append)
    assert gqa_run == options.into[options.workload.models[0]]
    assert len(told) == 1 + 2 + 4
    cache: dict[str, dict[int, int]] = {}
    for run, attention in ((gqa_run, "gqa"), (m2la_run, "m2la")):
        rows = measured(run)
        assert [(row["kind"], row["context_tokens"]) for row in rows] == [
            (kind, context) for context in (64, 256) for kind in ("prefill", "decode", "cache")
        ]
        for row in rows:
            assert row["attention"] == attention and row["threads"] == 1
            assert row["gate_engine_error"] <= 1e-4
            timed = row["kind"] != "cache"
            assert (row["tokens_per_s"] is not None) == timed
            if timed:
                assert row["median_s"] > 0 <= row["iqr_s"]
                share = "flop_share" if row["kind"] == "prefill" else "roofline_share"
                assert row[share] > 0
            else:
                cache.setdefault(attention, {})[row["context_tokens"]] = row["cache_bytes"]
                assert row["peak_resident_bytes"] > 2**26
    assert cache["gqa"][256] > cache["gqa"][64]
    assert cache["gqa"][256] == 2 * cache["m2la"][256]
    described = json.loads((m2la_run / "run.json").read_text())
    assert described["mode"] == "profile" and described["model"]["label"] == "scale"


def test_only_what_is_missing_is_measured(tiny: ProfileOptions) -> None:
    assert not is_complete(tiny)
    (run, _) = profile(tiny)
    assert is_complete(tiny)
    before = measured(run)
    more = replace(tiny, workload=replace(tiny.workload, contexts=(48, 96, 64)))
    assert not is_complete(more)
    with (run / "measurements.jsonl").open("a") as file:
        file.write('{"kind": "decode", "torn')
    told: list[str] = []
    profile(more, told.append)
    assert measured(run)[: len(before)] == before
    assert {row["context_tokens"] for row in measured(run)[len(before) :]} == {64}
    profile(more, told.append)
    assert told[-1] == f"{', '.join(TINY)}: measured before, kept"


def test_wrong_positions_turn_the_gate_red(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = runners.Reply

    def shifted(position: int, *rest: Any) -> Any:
        return right(position + 1, *rest)

    monkeypatch.setattr(runners, "Reply", shifted)
    with pytest.raises(GateError, match="tiny-gqa, random:tiny-m2la: the gate is red"):
        profile(tiny)
    rows = [row for run in tiny.runs() for row in measured(run)]
    assert [row["status"] for row in rows] == ["gate red"] * 4
    assert not any("tokens_per_s" in row for row in rows)


def test_a_red_gate_stops_its_own_model_only(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    green = command.gate

    def red_for_gqa(subject: Subject, *sizes: Any) -> Any:
        found = green(subject, *sizes)
        return replace(found, engine=1.0) if subject.attention == "gqa" else found

    with monkeypatch.context() as patched, pytest.raises(GateError, match="tiny-gqa: the gate"):
        patched.setattr(command, "gate", red_for_gqa)
        profile(tiny)
    gqa, m2la = map(measured, tiny.runs())
    assert {row["status"] for row in gqa} == {"gate red"}
    assert {row["status"] for row in m2la} == {"ok"}
    profile(tiny)
    again, kept = map(measured, tiny.runs())
    assert kept == m2la and {row["status"] for row in again[2:]} == {"ok"}


def test_every_form_that_is_timed_has_a_gate_of_its_own(tiny: ProfileOptions) -> None:
    workload = replace(tiny.workload, batches=(1, 3), caches=("native", "fp8"), contexts=(48,))
    told: list[str] = []
    gqa, m2la = map(measured, profile(replace(tiny, workload=workload), told.append))
    scopes = {(row["batch"], row["cache"]): row["gate_scope"] for row in m2la}
    assert scopes == {
        (batch, cache): f"the engine, batch {batch}, {cache} cache, 1141 tokens"
        for batch in (1, 3)
        for cache in ("native", "fp8")
    }
    assert all(0 < row["gate_engine_error"] <= 1e-4 for row in m2la)
    assert len({row["gate_engine_error"] for row in m2la}) == 4
    assert {row["status"] for row in gqa if row["cache"] == "fp8"} == {"not possible"}
    assert sum("gate green" in line for line in told) == 2 + 4
    assert sum("over the same fp8 rows" in line for line in told) == 2


@pytest.mark.parametrize("broken", ["scales", "places"])
def test_a_fault_of_one_form_is_red_there_only(
    tiny: ProfileOptions, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of fp8 rows, or where the new tokens of a batch are cached."""
    right = engine_layers._rows

    def wrong(*given: Any) -> Any:
        rows = right(*given)
        return replace(rows, scale_bT=rows.scale_bT * 1.05) if rows.scale_bT is not None else rows

    if broken == "scales":
        monkeypatch.setattr(engine_layers, "_rows", wrong)
    else:
        monkeypatch.setattr(engine_layers.RowAttend, "_places", lambda _, where: where.slots_B)
    workload = replace(
        tiny.workload,
        models=("random:tiny-m2la",),
        batches=(1, 2),
        caches=("native", "fp8"),
        contexts=(48,),
    )
    form = r"batch 1, fp8" if broken == "scales" else "batch 2, native"
    with pytest.raises(GateError, match=rf"tiny-m2la \({form} cache\).*: the gate is red"):
        profile(replace(tiny, workload=workload))
    red = {
        (row["batch"], row["cache"])
        for row in measured(tiny.runs()[1])
        if row["status"] == "gate red"
    }
    assert red == ({(1, "fp8"), (2, "fp8")} if broken == "scales" else {(2, "native"), (2, "fp8")})


def test_a_prefill_over_fp8_rows_that_is_wrong_turns_the_gate_red(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that such a prefill makes are compressed as they are: only its logits tell."""
    subject, right = load("random:tiny-m2la", torch.device("cpu"), "float32"), cache._widened
    assert gate(subject, Form(2, "fp8")).is_green

    def blind(latent: Any, *others: Any) -> Any:
        # Of the two runs before the last piece.
        rows = right(latent, *others)
        return rows if latent.shape[2] > 64 else torch.zeros_like(rows)

    def prefill(runner: Any, *given: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(cache, "_widened", blind)
            return whole(runner, *given)

    whole = runners.EngineRunner.prefill
    monkeypatch.setattr(runners.EngineRunner, "prefill", prefill)
    assert not gate(subject, Form(2, "fp8")).is_green


@pytest.mark.parametrize("broken", ["scales", "all rows", "one row", "rotary"])
def test_rows_that_are_compressed_wrongly_turn_the_gate_red(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = load("random:tiny-m2la", torch.device("cpu"), "float32")
    form, right = Form(2, "fp8"), cache._quantized
    assert gate(subject, form).is_green

    def wrong(*given: Any) -> Any:
        latent, rope, scale = right(*given)
        if broken == "scales":
            return latent, rope, 3 * scale
        if broken == "rotary":
            return latent, rope.flip(-1), scale
        zeroed = slice(None) if broken == "all rows" else slice(1)
        latent[0, :, zeroed] = 0
        return latent, rope, scale

    monkeypatch.setattr(cache, "_quantized", wrong)
    assert not gate(subject, form).is_green


def test_a_gate_that_found_no_memory_leaves_the_model_as_it_was(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it in float32 would be timed as bfloat16. The next command tries the gate again."""
    workload = replace(
        tiny.workload, dtypes=("bfloat16",), batches=(1, 2), models=("random:tiny-m2la",)
    )
    options, widen = replace(tiny, workload=workload), torch.Tensor.float
    subject = load("random:tiny-m2la", torch.device("cpu"), "bfloat16")
    weights = [p.detach().clone() for p in subject.model.parameters()]
    monkeypatch.setattr(command, "load", lambda *_: subject)

    def no_memory(x: torch.Tensor) -> torch.Tensor:
        if x.shape == subject.model.lm_head.weight.shape:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return widen(x)

    def found() -> list[tuple[int, str]]:
        return [(row["batch"], row["status"]) for row in measured(options.runs()[0])]

    green = command.gate
    with monkeypatch.context() as patched:

        def only_one(subject: Subject, form: Any) -> Any:
            if form.batch == 1:
                return green(subject, form)
            with patched.context() as inner:
                inner.setattr(torch.Tensor, "float", no_memory)
                return green(subject, form)

        patched.setattr(command, "gate", only_one)
        with pytest.raises(UnfinishedError, match="its gate: CUDA out of memory"):
            profile(options)
    for was, is_now in zip(weights, subject.model.parameters(), strict=True):
        assert is_now.dtype == torch.bfloat16 and torch.equal(is_now, was)
    assert set(found()) == {(1, "ok"), (2, "failed")}
    assert "its gate: CUDA out of memory" in str(measured(options.runs()[0]))
    assert not is_complete(options)
    profile(options)
    assert is_complete(options) and (2, "ok") in found()


def test_bfloat16_forms_pass_their_gates(tiny: ProfileOptions) -> None:
    workload = replace(
        tiny.workload,
        dtypes=("bfloat16",),
        contexts=(48,),
        batches=(1, 2),
        caches=("native", "fp8"),
        models=("random:tiny-m2la",),
    )
    (run,) = profile(replace(tiny, workload=workload))
    assert {row["dtype"] for row in measured(run)} == {"bfloat16"}
    assert {(row["status"], row["gate_engine_error"] < 0.05) for row in measured(run)} == {
        ("ok", True)
    }


class CompilerError(Exception):
    """As Triton's, which have nothing in common with torch's."""


def test_what_a_compiler_comes_up_with_is_one_point_lost(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeat that fails later leaves what was measured before it."""
    run_once, seen = command.run_once, []

    def flaky(subject: Subject, point: Any, **given: Any) -> Any:
        seen.append(point)
        if subject.attention == "gqa" and point.context == 48:
            raise CompilerError("out of resource: shared memory")
        if subject.attention == "m2la" and point.context == 96 and seen.count(point) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        if subject.attention == "m2la" and point.context == 48 and seen.count(point) == 3:
            raise RuntimeError("an illegal memory access")
        return run_once(subject, point, **given)

    monkeypatch.setattr(command, "run_once", flaky)
    told: list[str] = []
    with pytest.raises(UnfinishedError, match="3 points failed; the same command tries") as unwell:
        profile(replace(tiny, workload=replace(tiny.workload, repeats=3)), told.append)
    for key, why in (("48+3", "after 2 repeats: failed: Run"), ("96+3", "after 1 repeats: out of")):
        assert f"{key} prefill: {why}" in str(unwell.value)
        assert any(key in line and why.partition(":")[0] in line for line in told)
    gqa, m2la = map(measured, tiny.runs())
    assert [(row["context_tokens"], row["status"]) for row in gqa if row["kind"] == "none"] == [
        (48, "failed")
    ]
    assert "CompilerError: out of resource" in gqa[0]["reason"]
    ended = [row for row in m2la if row["context_tokens"] == 96]
    assert {row["repeats"] for row in ended} == {1} and {row["status"] for row in ended} == {"ok"}
    assert ended[0]["ended_by"] == "out of memory: CUDA out of memory"
    assert {row["repeats"] for row in m2la if row["context_tokens"] == 48} == {2}


@pytest.mark.parametrize("where", ["load", "gate"])
def test_a_model_that_cannot_be_prepared_is_rows(
    tiny: ProfileOptions, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One too large for the card, or whose kernels do not compile."""
    right = getattr(command, where)

    def wrong(given: Any, *rest: Any) -> Any:
        if "gqa" in (given if isinstance(given, str) else given.name):
            raise (
                torch.OutOfMemoryError("CUDA out of memory. Tried")
                if where == "load"
                else (CompilerError("PassManager::run failed"))
            )
        return right(given, *rest)

    told = "not loaded, .*: while it was loaded: CUDA out of" if where == "load" else "points fail"
    with monkeypatch.context() as patched, pytest.raises(UnfinishedError, match=told):
        patched.setattr(command, where, wrong)
        profile(tiny)
    gqa, m2la = map(measured, tiny.runs())
    assert {row["status"] for row in m2la} == {"ok"}
    assert [row["context_tokens"] for row in gqa] == [48, 96]
    assert {row["status"] for row in gqa} == {"failed"}
    # What was lacking may be there another time.
    profile(tiny)
    assert is_complete(tiny)


def test_another_card_and_more_repeats_are_no_repetition(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "name_of", lambda _: "NVIDIA H200")
    profile(tiny)
    assert is_complete(tiny)
    assert not is_complete(replace(tiny, workload=replace(tiny.workload, repeats=2)))
    monkeypatch.setattr(host, "name_of", lambda _: "NVIDIA H100")
    assert not is_complete(tiny)
    with pytest.raises(StoreError, match="card"):
        profile(tiny)
    other = replace(tiny, out=tiny.out.with_name("h100"))
    runs = [*tiny.runs(), *profile(other)]
    names = {series.name for series in read(runs).series}
    assert {name.partition("(")[2] for name in names} == {"NVIDIA H200)", "NVIDIA H100)"} or {
        name.rpartition(", ")[2] for name in names
    } == {"NVIDIA H200)", "NVIDIA H100)"}


def test_rows_of_known_runs() -> None:
    """Two sequences of 100 tokens, 4 steps: every figure by hand."""
    subject = load("random:tiny-gqa", torch.device("cpu"), "float32")
    (point,) = Workload(
        models=("random:tiny-gqa",), contexts=(100,), batches=(2,), new_tokens=4
    ).points()
    steps = ((0.1, 0.2, 0.3, 0.4), (0.2, 0.2, 0.2, 0.2), (0.5, 0.5, 0.5, 0.5))
    runs = [
        Run(1.0 + i, 100, one, 1000, 5000, 80.0 * (i + 1), {"peak_allocated_bytes": 7}, i + 0.5)
        for i, one in enumerate(steps)
    ]
    prefill, decode, cache = rows_of(subject, point, runs, Ceilings(1e6, 1e9))
    assert prefill["median_s"] == 2.0 and prefill["tokens_per_s"] == 2 * 100 / 2.0
    assert prefill["flop_share"] == pytest.approx(prefill_flops(subject, point) / 2.0 / 1e9)
    # Totals are 1.0, 0.8 and 2.0 seconds for 2 x 4 tokens.
    assert decode["median_s"] == pytest.approx(1.0)
    assert decode["tokens_per_s"] == pytest.approx(8.0)
    assert decode["step_median_s"] == pytest.approx(0.25)
    # The first run is too short to tell what it used.
    assert decode["energy_j_per_token"] == pytest.approx((160.0 + 240.0) / (2 * 8))
    assert decode["energy_window_s"] == 0.5 + 1.5 + 2.5
    # One run of 1.5 s is too short by itself.
    assert rows_of(subject, point, runs[1:2], Ceilings(1e6, 1e9))[1]["energy_j_per_token"] is None
    # A step reads the weights once, and of each sequence 100 tokens and on average 2.5 new ones.
    token = 2 * 2 * 2 * 128 * 4
    assert decode["moved_bytes_per_step"] == 5000 + 2 * 102.5 * token
    assert decode["roofline_share"] == pytest.approx((5000 + 205 * token) / 0.25 / 1e6)
    assert cache["cache_bytes"] == 1000 and cache["cache_bytes_per_token"] == token
    assert cache["peak_allocated_bytes"] == 7


def test_what_cannot_run_is_a_row_and_the_rest_goes_on(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_once = command.run_once

    def small_device(subject: Subject, point: Any, **given: Any) -> Any:
        if point.context == 48 and subject.attention == "gqa":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return run_once(subject, point, **given)

    monkeypatch.setattr(command, "run_once", small_device)
    runs = profile(replace(tiny, workload=replace(tiny.workload, runners=("engine", "flash"))))
    found = {
        (row["attention"], row["runner"], row["context_tokens"]): (row["status"], row.get("reason"))
        for run in runs
        for row in measured(run)
    }
    assert found["gqa", "engine", 48] == ("out of memory", "CUDA out of memory")
    assert found["gqa", "engine", 96] == found["m2la", "engine", 48] == ("ok", None)
    # Others may have had the memory, and the package may be installed: these are tried again.
    retried = {
        (row["attention"], row["runner"], row["context_tokens"]): row.get("retry")
        for run in runs
        for row in measured(run)
    }
    assert retried["gqa", "engine", 48] and retried["gqa", "flash", 96]
    assert not retried["m2la", "flash", 96]
    assert found["gqa", "flash", 96][0] == found["m2la", "flash", 96][0] == "not possible"
    assert "Install flash-attn" in str(found["gqa", "flash", 96][1])
    draw(runs, tiny.out)
    assert "| out of memory |" in (tiny.out / "efficiency.md").read_text()


@pytest.mark.parametrize("kind", ["engine", "sdpa", "static"])
def test_every_runner_prefills_after_what_was_filled_in(kind: str) -> None:
    """The last chunk of a prefill, timed on a synthetic cache."""
    subject = load("random:tiny-gqa", torch.device("cpu"), "float32")
    runner = make_runner(subject, kind, batch=2, chunk=32)
    runner.fill(68, 5 + 32)
    logits_BY = runner.prefill(random_ids(subject, 2, 32), 5)
    assert runner.length == runner.cache.get_seq_length() == 100
    assert len(runner.decode(logits_BY, 5, Clock(runner.device))[0]) == 1 + 5


@pytest.mark.parametrize("kind", ["engine", "sdpa", "static"])
def test_every_runner_says_the_same(kind: str) -> None:
    subject = load("random:tiny-gqa", torch.device("cpu"), "float32")
    ids_BT = random_ids(subject, 2, 70)
    runner = make_runner(subject, kind, batch=2, chunk=32)
    clock = Clock(runner.device)
    said = runner.decode(runner.prefill(ids_BT, 5), 5, clock)
    want = subject.model.generate(
        input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=6,
        do_sample=False, eos_token_id=-1,
    )  # fmt: skip
    assert said == want[:, 70:].tolist()
    assert len(clock.seconds()) == 5


@pytest.mark.parametrize("kind", ["sdpa", "static"])
def test_steps_that_compile_are_not_timed(kind: str) -> None:
    """As on a GPU; the counter is read where the clock starts."""
    subject = load("random:tiny-gqa", torch.device("cpu"), "float32")
    runner = make_runner(subject, kind, batch=1, chunk=32)
    assert isinstance(runner, runners.TransformersRunner)
    runner.untimed = 3
    cached: list[int] = []
    clock = Clock(runner.device, lambda: cached.append(runner.length) or 7.0 * len(cached))
    said = runner.decode(runner.prefill(random_ids(subject, 1, 70), 5), 5, clock)
    assert len(clock.seconds()) == 5 and len(said[0]) == 1 + 5
    assert cached == [70 + 3]
    spent, window_s = clock.counted_in_all()
    assert spent == 7.0 and window_s >= sum(clock.seconds()) and cached[-1] == 70 + 3 + 5


@pytest.mark.parametrize("kind", ["engine", "sdpa", "static"])
def test_every_runner_reads_the_same(kind: str) -> None:
    subject = load("random:tiny-gqa", torch.device("cpu"), "float32")
    runner = make_runner(subject, kind, batch=2, chunk=32)
    runner.decode(runner.prefill(random_ids(subject, 2, 70), 5), 5, Clock(runner.device))
    text = subject.model.config.text_config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    assert runner.cache_bytes() >= 2 * 75 * per_token
    read = runner.step_bytes() / sum(
        p.nbytes for name, p in subject.model.named_parameters() if "visual" not in name
    )
    # All but the embedding table (an eighth) and, for the engine, the norms.
    assert 0.7 < read < 0.9


def test_a_synthetic_cache_is_decoded_only(tiny: ProfileOptions) -> None:
    workload = replace(tiny.workload, fill="random", integrate=100, batches=(2,))
    rows = measured(profile(replace(tiny, workload=workload))[1])
    assert {row["kind"] for row in rows} == {"decode", "cache"}
    decode = rows[0]
    assert decode["depth"] == 48 + 50 and decode["batch"] == 2
    # Of all steps: a reply has its share of slow ones.
    assert decode["integrated"]["seconds"] == pytest.approx(100 * decode["median_s"] / 3)
    assert decode["label"] == "random weights"


def test_the_last_chunk_of_a_prefill_is_timed_on_a_synthetic_cache(
    tiny: ProfileOptions, tmp_path: Path
) -> None:
    workload = replace(tiny.workload, fill="last", contexts=(96, 200), chunks=(64,), models=TINY)
    runs = profile(replace(tiny, workload=workload))
    for run in runs:
        last = [row for row in measured(run) if row["kind"] == "last_chunk"]
        assert [row["context_tokens"] for row in last] == [96, 200]
        for row in last:
            assert row["tokens_per_s"] == pytest.approx(64 / row["median_s"])
            assert row["flop_share"] > 0
        # The same tokens see more of a longer context.
        assert last[0]["flops"] < last[1]["flops"]
        assert not [row for row in measured(run) if row["kind"] == "prefill"]
    draw(runs, tmp_path / "figures")
    assert "its last chunk" in (tmp_path / "figures/efficiency.md").read_text()


def test_an_fp8_cache_is_smaller_and_for_latents_only(tiny: ProfileOptions) -> None:
    workload = replace(tiny.workload, caches=("native", "fp8"), contexts=(96,))
    gqa, m2la = (measured(run) for run in profile(replace(tiny, workload=workload)))
    assert [row["status"] for row in gqa if row["cache"] == "fp8"] == ["not possible"]
    native, fp8 = (r["cache_bytes_per_token"] for r in m2la if r["kind"] == "cache")
    # Two layers of 448 + 64 numbers of 4 bytes; of 448 bytes, a scale, and 64 numbers.
    assert (native, fp8) == (2 * 512 * 4, 2 * (448 + 4 + 64 * 4))


def test_bfloat16_passes_its_gate(tiny: ProfileOptions) -> None:
    workload = replace(tiny.workload, dtypes=("bfloat16",), contexts=(48,))
    for run in profile(replace(tiny, workload=workload)):
        assert {row["dtype"] for row in measured(run)} == {"bfloat16"}


def test_a_video_is_decoded_and_encoded(options: ProfileOptions, tmp_path: Path) -> None:
    video = tmp_path / "moving.mp4"
    frames = torch.randint(0, 255, (24, 64, 64, 3), dtype=torch.uint8).numpy()
    video.write_bytes(encode_video(frames))
    small = replace(options.workload, contexts=(64,), models=("scale:m2la",), repeats=1)
    (run,) = profile(replace(options, workload=small, video=video))
    decoding, encoding = measured(run)[-2:]
    assert decoding["kind"] == "video_decoding" and decoding["frames_per_s"] > 0
    assert encoding["kind"] == "vision_encoding" and encoding["vision_tokens"] > 0
    assert encoding["tokens_per_s"] > 0


def test_a_video_that_cannot_be_read_is_a_row_and_the_rest_goes_on(
    options: ProfileOptions, tmp_path: Path
) -> None:
    video = tmp_path / "torn.mp4"
    video.write_bytes(b"no video")
    workload = replace(
        options.workload,
        contexts=(64,),
        models=("scale:m2la",),
        repeats=1,
        dtypes=("float32", "bfloat16"),
    )
    torn = replace(options, workload=workload, video=video)
    (run,) = profile(torn)
    failed = [row for row in measured(run) if row.get("video")]
    assert "torn.mp4: failed" in draw([run], tmp_path)[0].read_text()
    assert [(row["status"], row["dtype"]) for row in failed] == [
        ("failed", "float32"),
        ("failed", "bfloat16"),
    ]
    assert {row["dtype"] for row in measured(run) if row["status"] == "ok"} == {
        "float32",
        "bfloat16",
    }
    # Another file of this name is another video, and what failed is tried again.
    frames = torch.randint(0, 255, (24, 64, 64, 3), dtype=torch.uint8).numpy()
    video.write_bytes(encode_video(frames))
    profile(torn)
    seen = [row for row in measured(run) if row.get("video") and row["status"] == "ok"]
    assert [row["kind"] for row in seen] == ["video_decoding", "vision_encoding"] * 2
    before = measured(run)
    profile(torn)
    assert measured(run) == before
    # Of two stages, one that is missing is made up for.
    lines = (run / "measurements.jsonl").read_text().splitlines(keepends=True)
    (run / "measurements.jsonl").write_text("".join(lines[:-1]))
    profile(torn)
    assert [row["kind"] for row in measured(run)[-2:]] == ["video_decoding", "vision_encoding"]


@pytest.mark.parametrize("fill", ["prefill", "random", "last"])
@pytest.mark.parametrize("form", ["native", "fp8"])
def test_no_cache_is_larger_than_its_plan(fill: str, form: str) -> None:
    subject = load("random:tiny-m2la", torch.device("cpu"), "bfloat16")
    workload = Workload(
        models=("random:tiny-m2la",), contexts=(500,), dtypes=("bfloat16",), caches=(form,),
        fill=fill, new_tokens=300, batches=(2,), chunks=(128,),
    )  # fmt: skip
    (point,) = workload.points()
    planned = need_of(point, subject.model.config, subject.weight_bytes).cache
    runner = EngineRunner(subject, 2, 128, fp8=form == "fp8")
    held = []
    runner.before_compressing = lambda cache: held.append(cache.allocated_bytes())
    prefilled = point.prefilled(128)
    logits_BY = torch.zeros(2, 512)
    if prefilled < point.depth:
        logits_BY = runner.fill(point.depth - prefilled, point.new_tokens + prefilled)
    if prefilled:
        logits_BY = runner.prefill(random_ids(subject, 2, prefilled), point.new_tokens)
    runner.decode(logits_BY, point.new_tokens, Clock(runner.device))
    held.append(runner.cache_bytes())
    assert 0.7 * planned < max(held) <= planned


def test_plan_of_the_8b_shape() -> None:
    """The issue's limits: 768K and 1.5M tokens in bfloat16 on an H200, 2.5M with fp8 latents."""
    figure = chosen("figure6", {"runners": ["engine"]})
    h200, h100 = device_bytes("h200"), device_bytes("h100")
    by_key = {(p.point.model, p.point.context): p for p in plan(figure, h100)}
    gqa, m2la = by_key["random:8b-gqa", 524288], by_key["random:8b-m2la", 524288]
    assert gqa.refused is not None and "needs" in gqa.refused and gqa.largest_batch == 0
    assert m2la.refused is None and m2la.largest_batch == 1
    # Weights as counted from the published configuration, cache by 147456 and 73728 bytes a token.
    assert gqa.need.weights == pytest.approx(17.5e9, rel=0.01)
    assert gqa.need.cache == pytest.approx((524288 + 16384) * 147456, rel=1e-3)
    assert m2la.need.cache == pytest.approx((524288 + 16384) * 73728, rel=1e-3)
    assert all(p.refused is None for p in plan(figure, h200))
    mega = replace(figure, models=("random:8b-m2la",), contexts=(3 * 2**19,), new_tokens=1)
    assert plan(mega, h200)[0].refused is None
    longer = replace(mega, contexts=(5 * 2**19,), fill="random")
    assert plan(longer, h200)[0].refused is not None
    assert plan(replace(longer, caches=("fp8",)), h200)[0].refused is None
    # A prefill caches in full what is compressed afterwards.
    assert plan(replace(longer, caches=("fp8",), fill="prefill"), h200)[0].refused is not None
    assert plan(replace(longer, caches=("fp8",), fill="last"), h200)[0].refused is None
    # While a synthetic layer is compressed it is there in full as well: 1024 numbers a token.
    compressed = replace(longer, caches=("fp8",))
    tokens = longer.contexts[0]
    scratch = plan(compressed, h200)[0].need.scratch
    assert scratch == 1024 * (2 * tokens + 3 * 4 * 65536)
    assert plan(replace(compressed, contexts=(3_000_000,)), h200)[0].refused is not None
    lines = table(plan(longer, h200), "h200")
    assert lines[-1].endswith("0: does not fit")
    both = replace(figure, runners=("sdpa",), caches=("native", "fp8"), contexts=(32768,))
    told = [line.split(": ", 1)[-1] for line in table(plan(both, h200), "h200")[2:]]
    assert ["transformers has no" in line for line in told] == [True, False, False, False]
    assert ["only the engine" in line for line in told] == [False, False, True, True]
    assert device_bytes("80GB") == 80e9 and device_bytes("79GiB") == 79 * 2**30
    for wrong in ("large", "1.2.3GB", ".", "80", "1e999", "-80GB"):
        with pytest.raises(WorkloadError, match="neither"):
            device_bytes(wrong)


def test_the_plan_is_not_below_what_was_measured_on_an_h200() -> None:
    """Every recorded point: peak of the allocator, and at most a twentieth above it."""
    recorded = Path(efficiency.__file__).parent / "results/efficiency/h200"
    files = sorted(recorded.glob("*/*/measurements.jsonl"))
    rows = [row for file in files for row in read_rows(file) if row["kind"] == "cache"]
    assert len(rows) == 2 * (7 + 2)
    for row in rows:
        integrate = 2 * (row["depth"] - row["context_tokens"])
        values = {"models": row["model"], "runners": "engine", "contexts": row["context_tokens"]}
        values |= {"new_tokens": row["new_tokens"], "fill": row["fill"], "integrate": integrate}
        (planned,) = plan(chosen("figure6", values), device_bytes("h200"))
        share = row["peak_allocated_bytes"] / (planned.need.total - RUNTIME_BYTES)
        assert 0.95 <= share <= 1


def test_the_largest_batch_is_the_largest_that_fits() -> None:
    workload = chosen("figure6", {"runners": "engine", "contexts": 32768, "fill": "random"})
    for one in plan(workload, device_bytes("h100")):
        for batch, fits in ((one.largest_batch, True), (one.largest_batch + 1, False)):
            (more,) = plan(
                replace(workload, models=(one.point.model,), batches=(batch,)),
                device_bytes("h100"),
            )
            assert (more.refused is None) == fits


@pytest.mark.parametrize(
    ("name", "petaflops"), [("random:8b-gqa", 0.46 + 0.32), ("random:8b-m2la", 0.47 + 0.47)]
)
def test_prefill_operations_of_the_8b_shape(name: str, petaflops: float) -> None:
    """At 32K tokens: linear layers and causal attention, by hand from the shape."""
    with torch.device("meta"):
        model = class_of(config_of(name))(config_of(name))
    subject = Subject(name, model, None, "gqa")
    (point,) = Workload(models=(name,), contexts=(32768,), chunks=(32768,)).points()
    assert prefill_flops(subject, point) == pytest.approx(petaflops * 1e15, rel=0.02)


def test_operations_of_a_last_chunk_are_its_own() -> None:
    """It rebuilds all rows once, whether or not the context is a multiple of the chunk."""
    with torch.device("meta"):
        model = class_of(config_of("random:8b-m2la"))(config_of("random:8b-m2la"))
    subject = Subject("random:8b-m2la", model, None, "m2la")

    def point(context: int) -> Any:
        (one,) = Workload(models=("random:8b-m2la",), contexts=(context,), chunks=(64,)).points()
        return one

    whole, first = (prefill_flops(subject, point(n)) for n in (128, 64))
    head = 2.0 * model.lm_head.weight.numel()
    assert prefill_flops(subject, point(128), 64) == pytest.approx(whole - first + head)
    # By 28 rows more that are rebuilt, and queries that see more.
    odd, even = prefill_flops(subject, point(100), 36), prefill_flops(subject, point(128), 64)
    text = model.config.text_config
    rebuilt = 2.0 * 28 * sum(2 * 8 * 128 * text.rank(i) for i in range(36))
    seen = sum(32 * (128 + 128 + 2 * text.slots(i)) for i in range(36))
    more = seen * (128**2 - 64**2 - 100**2 + 36**2)
    assert even - odd == pytest.approx(rebuilt + more, rel=1e-6)


def test_one_layer_three_ways() -> None:
    rows = list(layer_rows(64, torch.bfloat16, torch.device("cpu"), repeats=2))
    assert [row["way"] for row in rows] == ["absorbed M²LA", "sdpa, enable_gqa", "grouped GQA"]
    assert all(len(row["runs_s"]) == 2 and row["median_s"] > 0 for row in rows)


def test_a_torn_last_row_is_left_out_and_another_is_named(tmp_path: Path) -> None:
    row = {"model": "m", "attention": "gqa", "runner": "engine", "batch": 1, "dtype": "bfloat16"}
    row |= {"cache": "native", "context_tokens": 64, "point": "p", "kind": "none"}
    row |= {"device": "NVIDIA H200", "status": "out of memory"}
    file = tmp_path / "measurements.jsonl"
    file.write_text(json.dumps(row) + '\n{"kind": "dec')
    assert read([tmp_path]).series[0].absent == {64: "out of memory"}
    file.write_text('{"kind": "dec\n' + json.dumps(row))
    with pytest.raises(EfficiencyError, match="line 1 is not JSON"):
        read([tmp_path])


def test_the_paper_stands_beside_its_own_size_only(tmp_path: Path) -> None:
    def labels(parameters: int, context: int) -> list[str]:
        row = {"model": "a|b", "attention": "gqa", "runner": "engine", "batch": 1, "chunk": 0}
        row |= {
            "cache": "native",
            "context_tokens": context,
            "point": f"p{context}",
            "kind": "none",
        }
        row |= {"dtype": "bfloat16", "device": "NVIDIA H200", "status": "out of memory"}
        out = tmp_path / f"{parameters}-{context}"
        out.mkdir()
        row["parameters"] = parameters
        (out / "measurements.jsonl").write_text(json.dumps(row) + "\n")
        draw([out], out)
        assert "| a/b | " in (out / "efficiency.md").read_text()
        (axes,) = decode_figure(read([out])).axes
        return [str(line.get_label()) for line in axes.lines]

    assert any("paper, M²LA (H200)" in one for one in labels(8 * 10**9, 524288))
    assert any("paper, GQA: out of memory from 512K" in one for one in labels(8 * 10**9, 524289))
    assert any(one == "a|b: out of memory" for one in labels(8 * 10**9, 524290))
    assert not any("paper" in one for one in labels(10**6, 524288))
    assert not any("paper" in one for one in labels(8 * 10**9, 1024))


def test_figures_and_table(options: ProfileOptions, tmp_path: Path) -> None:
    runs = profile(options)
    files = draw(runs, tmp_path / "figures")
    assert {f.name for f in files} == {"efficiency.md"} | {
        f"{name}.{ending}"
        for name in ("figure6a-decode", "figure6b-latency", "cache-bytes", "m2la-over-gqa")
        for ending in ("svg", "png")
    }
    first = {file: file.read_bytes() for file in files}
    assert draw(runs, tmp_path / "figures") == files
    assert all(file.read_bytes() == first[file] for file in files)
    text = (tmp_path / "figures/efficiency.md").read_text()
    (decode,) = [
        row for row in measured(runs[1]) if row["kind"] == "decode" and row["context_tokens"] == 256
    ]
    assert f"{decode['tokens_per_s']:.1f}" in text and "scale" in text
    assert "paper" not in (tmp_path / "figures/figure6a-decode.svg").read_text()
    with pytest.raises(EfficiencyError, match="no measurements"):
        draw([tmp_path / "nothing"], tmp_path)


def test_the_ratio_pairs_what_was_run_in_the_same_way(tmp_path: Path) -> None:
    """Two engines, and a baseline that has no M²LA beside it."""

    def row(model: str, attention: str, runner: str, rate: float, read: float) -> str:
        about = {"model": model, "attention": attention, "runner": runner, "batch": 1}
        about |= {"dtype": "bfloat16", "cache": "native", "context_tokens": 32768, "point": model}
        about |= {"kind": "decode", "status": "ok", "device": "NVIDIA H200", "median_s": 1.0}
        about |= {"parameters": 8 * 10**9, "new_tokens": 16384}
        return json.dumps(about | {"tokens_per_s": rate, "moved_bytes_per_step": read})

    gqa = row("gqa", "gqa", "engine", 80.0, 300.0), row("gqa", "gqa", "sdpa", 20.0, 300.0)
    for name, rows in (("gqa", gqa), ("m2la", (row("m2la", "m2la", "engine", 120.0, 150.0),))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "measurements.jsonl").write_text("\n".join(rows) + "\n")
    data = read([tmp_path / "gqa", tmp_path / "m2la"])
    figure = ratio_figure(data)
    assert figure is not None
    measured_line, read_line, one, paper = figure.axes[0].lines
    assert list(measured_line.get_xydata()[0]) == [32768, 1.5]
    assert list(read_line.get_xydata()[0]) == [32768, 2.0] and "computed" in read_line.get_label()
    assert one.get_ydata()[0] == 1 and "paper" in paper.get_label()
    assert ratio_figure(read([tmp_path / "gqa"])) is None
    assert not [f for f in draw([tmp_path / "gqa"], tmp_path / "out") if "over" in f.name]
    # Replies are as long as the paper's, so seconds may stand beside its: 16384 / 21.74 tokens/s.
    paper = latency_figure(data).axes[0].lines
    assert [line.get_label().rpartition(", ")[2] for line in paper[:2]] == ["reply alone"] * 2
    assert paper[0].get_xydata().tolist() == [[0, pytest.approx(753.6, abs=0.1)]]
    file = tmp_path / "m2la" / "measurements.jsonl"
    file.write_text(file.read_text().replace("16384", "256"))
    shorter = latency_figure(read([tmp_path / "gqa", tmp_path / "m2la"]))
    assert not shorter.axes[0].lines


def test_the_figures_of_a_folder_are_of_all_its_runs(tiny: ProfileOptions) -> None:
    profile(tiny)
    one = replace(tiny, workload=replace(tiny.workload, models=TINY[1:]))
    assert one.runs() == tiny.runs()[1:]
    assert set(one.drawn()) == set(tiny.runs())


def test_a_model_that_cannot_be_loaded_does_not_stop_the_others(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = command.load

    def wrong(name: str, *rest: Any) -> Subject:
        if name == TINY[0]:
            raise ValueError("Couldn't instantiate the backend tokenizer")
        return right(name, *rest)

    monkeypatch.setattr(command, "load", wrong)
    with pytest.raises(UnfinishedError, match=f"{TINY[0]}: not loaded, .*: ValueError: Couldn't"):
        profile(tiny)
    gqa, m2la = map(measured, tiny.runs())
    assert {row["status"] for row in gqa} == {"failed"} and {r["status"] for r in m2la} == {"ok"}


def test_what_the_machine_has_no_memory_for_is_a_row_and_tried_again(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux kills who takes more than there is, and with it all other models' points."""
    told: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(host, "available_bytes", lambda: 1000)
        profile(tiny, told.append)
    rows = [row for run in tiny.runs() for row in measured(run)]
    assert {row["status"] for row in rows} == {"does not fit"}
    assert "cache and scratch take" in rows[0]["reason"] and " 0.0 GB" not in rows[0]["reason"]
    assert "this machine has 1.0 kB left to give" in rows[0]["reason"]
    with monkeypatch.context() as patched:
        patched.setattr(command, "_weights", lambda *_: 2 * 10**15)
        profile(tiny, told.append)
    assert "its weights take 2000000.0 GB" in measured(tiny.runs()[0])[-1]["reason"]
    assert not is_complete(tiny)
    profile(tiny)
    assert is_complete(tiny)


def test_memory_that_is_left_is_that_of_the_narrowest_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\n")
    groups = tmp_path / "groups"
    for name, limit in (("", "max"), ("job", "300000"), ("job/step", "400000")):
        group = groups / name
        group.mkdir(exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("200000\n")
        (group / "memory.stat").write_text("anon 150000\ninactive_file 50000\n")
    (tmp_path / "self").write_text("0::/job/step\n")
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "GROUPS", groups)
    monkeypatch.setattr(host, "GROUP_OF_SELF", tmp_path / "self")
    assert host.available_bytes() == 150000
    (tmp_path / "self").unlink()
    assert host.available_bytes() == 500 * 1024
    (tmp_path / "meminfo").unlink()
    assert host.available_bytes() is None


def test_models_that_are_none_of_ours_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="holds a 'llama' model. Known are"):
        plan(Workload(models=(str(tmp_path),)), device_bytes("h200"))


@pytest.mark.parametrize("name", ["..", "", "a\nb", "\udcff"])
def test_names_that_name_no_folder_are_refused(tiny: ProfileOptions, name: str) -> None:
    with pytest.raises(WorkloadError, match="cannot name a run directory"):
        profile(replace(tiny, workload=replace(tiny.workload, models=(name,))))
    assert not tiny.out.exists()


def test_sdpa_under_a_mask_takes_more_than_the_engine() -> None:
    """Transformers' mask of 64K queries by 768K tokens, and keys and values of every head."""
    figure = chosen("figure6", {"models": ["random:8b-gqa"], "runners": ["engine", "sdpa"]})
    by_key = {(p.point.runner, p.point.context): p for p in plan(figure, device_bytes("h200"))}
    for context in (32768, 524288):
        mine, theirs = by_key["engine", context].need, by_key["sdpa", context].need
        cached = context + 16384 + 1
        more = 3 * 65536 * cached + 4 * 32 * 128 * cached if context > 65536 else 0
        assert theirs.scratch - mine.scratch == more
    assert by_key["sdpa", 524288].refused is not None


def test_transformers_caches_are_filled_from_a_layers_copy() -> None:
    """Near a card's limit the plan would else let a point begin that ends without memory."""
    chosen_by = {"models": ["random:8b-gqa"], "runners": ["engine", "sdpa"], "fill": "random"}
    figure = chosen("figure6", chosen_by)
    by_key = {(p.point.runner, p.point.context): p for p in plan(figure, device_bytes("h200"))}
    for context in (524288, 786432):
        mine, theirs = by_key["engine", context].need, by_key["sdpa", context].need
        assert theirs.scratch == 2 * 8 * 128 * 2 * context > mine.scratch


def test_a_length_beyond_the_model_is_told(tiny: ProfileOptions, checkpoint: Path) -> None:
    told: list[str] = []
    workload = replace(tiny.workload, models=("scale:base",), contexts=(70000,), fill="random")
    profile(replace(tiny, workload=replace(workload, new_tokens=1)), told.append)
    assert any("made for 65536 positions" in line and "to 70001" in line for line in told)


def test_the_gpu_script_rehearses_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["figure6", "--out", str(tmp_path), "--device", "cpu"])
    figure6.main()
    assert (tmp_path / "figure6b-latency.png").exists()
    assert "integrated" in (tmp_path / "efficiency.md").read_text()
    # A cache filled with random numbers was not prefilled, and the figure must not say so.
    assert "prefill not timed" in (tmp_path / "figure6b-latency.svg").read_text()


def test_a_file_of_another_device_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rehearsal must not cost what a rented card measured."""
    cpu, file = torch.device("cpu"), tmp_path / "kernels.json"
    with monkeypatch.context() as patched:
        patched.setattr(measure, "describe_device", lambda _: {"name": "NVIDIA H200"})
        theirs = Results(file, cpu, 60)
        theirs.point("a", lambda: {"median_s": 1.0})
        theirs.close()
    text = file.read_text()
    ours = Results(file, cpu, 60)
    assert ours.data["points"] == {}
    assert "NVIDIA H200, or of other" in (told := capsys.readouterr().out)
    assert "kept as kernels-1.json" in told
    assert (tmp_path / "kernels-1.json").read_text() == text

    def fail() -> dict[str, Any]:
        raise CompilerError("shared memory")

    found = ours.point("b", fail)
    assert found is not None and found["status"] == "failed" and "shared" in found["error"]
    ours.close()
    again = Results(file, cpu, 60)
    assert again.data["points"]["b"] == found
    again.close()
    # What other code measured, its green checks above all, says nothing of this.
    monkeypatch.setattr(measure.provenance, "code_digest", lambda _: "other")
    assert Results(file, cpu, 60).data["points"] == {}
    assert (tmp_path / "kernels-2.json").exists()


def test_a_rehearsal_of_kernels_says_how_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here, and before the change: whether its kernels are interpreted is settled on import.
    from internvideo3.harness.gpu import kernels as gpu_kernels

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = str(tmp_path / "kernels.json")
    monkeypatch.setattr(sys, "argv", ["kernels", "--out", out, "--device", "cpu"])
    with pytest.raises(SystemExit, match="set TRITON_INTERPRET=1 before"):
        gpu_kernels.main()
    monkeypatch.setattr(
        sys, "argv", ["figure6", "--out", out, "--device", "cpu", "--contexts", "0"]
    )
    with pytest.raises(SystemExit, match="the least that makes sense is 1"):
        figure6.main()


def test_of_several_cards_the_one_that_is_used_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver numbers cards otherwise than torch, and counts those that torch may not see."""
    second = torch.device("cuda", 1)
    fields = len(measure.NVIDIA_FIELDS.split(",")) - 1
    cards = [f"GPU-{name}, NVIDIA {name}" + ", 1" * fields for name in "ab"]

    def answer(lines: list[str]) -> dict[str, Any]:
        done = SimpleNamespace(stdout="\n".join(lines) + "\n")
        monkeypatch.setattr(measure.subprocess, "run", lambda *_, **__: done)
        return measure.device_state(second)

    monkeypatch.setattr(measure.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(measure, "card_of", lambda _: "GPU-b")
    assert answer(cards)["name"] == "NVIDIA b" and len(answer(cards)) == fields + 1
    assert answer(cards[:1])["name"] == "NVIDIA a"
    assert answer([]) == {} == measure.device_state(torch.device("cpu"))

    monkeypatch.setattr(point_measure, "card_of", lambda _: "GPU-b")
    nvml = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=str,
        nvmlDeviceGetHandleByUUID=lambda name: name,
    )
    assert point_measure._nvml_handle(nvml, second) == "GPU-b"
    nvml.nvmlDeviceGetCount = lambda: 1
    assert point_measure._nvml_handle(nvml, second) == "0"


def test_kernels_are_launched_on_the_card_of_their_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    second = torch.device("cuda", 1)
    use(second)
    # Without a number it is the current one, and torch would not take it here.
    use(torch.device("cuda"))
    use(torch.device("cpu"))
    assert chosen == [1]
    inside = current(second)
    assert isinstance(inside, torch.cuda.device) and inside.idx == 1
    assert not isinstance(current(torch.device("cpu")), torch.cuda.device)


def test_the_gpu_scripts_say_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees none"):
        measure.device_given("cuda")
    assert measure.device_given("cpu") == torch.device("cpu")


def test_workloads_are_checked(tmp_path: Path) -> None:
    figure = chosen("figure6", {"contexts": (1024,), "dtypes": "float32", "repeats": None})
    assert figure.contexts == (1024,) and figure.dtypes == ("float32",) and figure.repeats == 10
    for values, said in (
        ({"context": 5}, "Did you mean contexts"),
        ({"runners": ["vllm"]}, "'vllm' is not one of"),
        ({"contexts": "long"}, "should be a whole number"),
        ({"contexts": 10**20}, "no device holds more"),
        ({"repeats": 0}, "the least that makes sense is 1"),
        ({"models": []}, "models is empty"),
        ({"integrate": 5}, "fill: random"),
    ):
        with pytest.raises(WorkloadError, match=said):
            chosen(None, values)
    with pytest.raises(WorkloadError, match="cannot read"):
        chosen(str(tmp_path / "none.yaml"), {})
    with pytest.raises(WorkloadError, match="no shape"):
        config_of("random:9b")
    assert FIGURE6.is_file()


def test_inspect_says_what_a_checkpoint_is(checkpoint: Path) -> None:
    gqa, m2la = "\n".join(describe(str(checkpoint))), "\n".join(describe("scale:m2la"))
    assert "GQA" in gqa and "100% of GQA" in gqa
    assert "M²LA: latent rank" in m2la and "50% of GQA" in m2la and "Triton kernels fit" in m2la
