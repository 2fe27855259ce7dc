"""The memory plan against what is allocated: `pytest tests/training/test_plan.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from internvideo3.harness.train import plan_lines
from internvideo3.model.checkpoint import load_model, read_config, resolve_checkpoint
from internvideo3.model.config import InternVideo3Config
from internvideo3.training import follow as following
from internvideo3.training.follow import Moments, Row, build, follow, text_moments, tower_moments
from internvideo3.training.objectives.linear_cross_entropy import (
    _ChunkedCrossEntropy,
    told_cross_entropy,
)
from internvideo3.training.packing import Pack
from internvideo3.training.plan import (
    FLOAT_BYTES,
    Plan,
    count_weights,
    latent_config,
    plan_step,
    released_config,
)
from internvideo3.training.policy import Policy
from internvideo3.training.processes import Processes

ROW = Row(tokens=1536, recompute=True, bfloat16=False, train_vision=True)
FRAME = (16, 16)
"""Patches of a frame in height and width."""


SMALL = Plan(weights=1, states=1, gathered=1, pixels=1, tower=655, activations=1, start=1,
             host_pixels=1)  # fmt: skip
"""Of no real model."""


def middle_config() -> InternVideo3Config:
    """A tenth of the released widths, and some of its layers."""
    config = released_config().to_dict()
    config["text_config"] |= {
        "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "latent_rank": 112,
        "rope_slots": 16,
    }  # fmt: skip
    config["text_config"]["rope_parameters"] |= {"mrope_section": [12, 10, 10]}
    config["vision_config"] |= {
        "depth": 9, "hidden_size": 128, "intermediate_size": 478, "num_heads": 4,
        "out_hidden_size": 384, "num_position_embeddings": 64, "deepstack_visual_indexes": [2, 5],
    }  # fmt: skip
    config["video_token_id"] = 7
    made: InternVideo3Config = InternVideo3Config.from_dict(config)
    return made


def fullest(config: Any, row: Row) -> Pack:
    """A row of nothing but vision tokens, all of them learnt."""
    ids_T = torch.full((row.tokens,), config.video_token_id)
    zeros_T = torch.zeros_like(ids_T)
    patches = 4 * row.tokens
    return Pack(
        ids_T, torch.arange(row.tokens).expand(3, -1), zeros_T, zeros_T, ids_T, zeros_T,
        torch.randn(patches, 1536), torch.tensor([[patches // (FRAME[0] * FRAME[1]), *FRAME]]),
    )  # fmt: skip


def measured(config: Any, row: Row, group: Processes) -> int:
    """Most bytes that a pass of the policy itself allocates."""
    policy = Policy(build(config).train(), train_vision=row.train_vision,
                    recompute=row.recompute, sharing=group.sharing)  # fmt: skip
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    laid = fullest(config, row)
    weight_T = torch.ones(row.tokens)

    def work() -> None:
        policy(
            laid, lambda hidden, head: told_cross_entropy(hidden, head, laid.labels_T, weight_T)
        ).backward()

    return allocated_peak(work)


def allocated_peak(work: Any) -> int:
    """Most bytes that torch's allocator held at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    held = peak = 0
    events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def of_the_pass(planned: Plan) -> int:
    """What a plan says of a pass, beside all that is held through it."""
    return planned.tower + planned.activations


def varied(**changes: Any) -> Row:
    """`ROW` with some fields changed."""
    return Row(**{**vars(ROW), **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [ROW, varied(recompute=False), varied(train_vision=False), varied(bfloat16=True)],
    ids=["recompute", "all kept", "frozen tower", "bfloat16"],
)
def test_the_plan_is_within_15_percent_of_what_is_allocated(row: Row) -> None:
    """Of the policy's own pass, from the pixels to the gradients."""
    planned = plan_step(middle_config(), row, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=row.bfloat16):
        peak = measured(middle_config(), row, Processes("cpu"))
    assert of_the_pass(planned) == pytest.approx(peak, rel=0.15)
    assert (planned.tower > 0.05 * peak) == row.train_vision


@pytest.mark.slow
def test_the_plan_of_a_shared_row_is_within_15_percent_of_what_each_process_allocates(
    tmp_path: Path,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = f"import runpy; runpy.run_path({__file__!r})['one_of_two']({str(tmp_path)!r})"
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    running = [
        subprocess.Popen([sys.executable, "-c", told], env={**os.environ, **shared, "RANK": rank})
        for rank in "01"
    ]
    planned = of_the_pass(plan_step(middle_config(), varied(parts=2), 1))
    assert [one.wait(timeout=250) for one in running] == [0, 0]
    for rank in range(2):
        assert planned == pytest.approx(int((tmp_path / str(rank)).read_text()), rel=0.15)


def one_of_two(folder: str) -> None:
    """One of two processes that share a row, measured."""
    torch.set_num_threads(1)
    group = Processes("cpu")
    group.divide_rows(2)
    peak = measured(middle_config(), varied(parts=2), group)
    (Path(folder) / str(group.rank)).write_text(str(peak))
    group.leave()


@pytest.mark.parametrize("moments", [text_moments, tower_moments])
def test_two_shallow_models_tell_what_all_layers_need(moments: Any) -> None:
    whole = vars(moments(middle_config(), ROW))
    told = vars(follow(middle_config(), ROW, moments))
    assert whole["kept"] > 1 << 20
    for moment, size in whole.items():
        assert told[moment] == pytest.approx(size, rel=0.03), moment


@pytest.mark.parametrize("parts", [1, 2])
def test_a_few_chunks_of_the_loss_tell_what_all_need(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = middle_config()
    config.text_config.num_hidden_layers = 2
    row = varied(tokens=8192, parts=parts)
    few = text_moments(config, row)
    monkeypatch.setattr(following, "_FirstChunks", _ChunkedCrossEntropy)
    assert few == text_moments(config, row)


def test_equal_rows_are_followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tower, equal parts of rows; another model or another row is followed anew."""
    seen: list[Row] = []

    def tower(config: Any, row: Row) -> Moments:
        seen.append(row)
        return Moments(forward=row.tokens, backward=0, casting=0, kept=0)

    monkeypatch.setattr(following, "tower_moments", tower)
    config = middle_config()
    config.vision_config.depth = 2
    assert follow(config, varied(tokens=64), tower).forward == 64
    assert follow(middle_config(), varied(tokens=128, parts=2), tower).forward == 64
    assert len(seen) == 3, "the deep one from two shallow ones"
    assert follow(config, varied(tokens=128, parts=2), tower).forward == 64
    assert len(seen) == 3
    assert follow(config, varied(tokens=128), tower).forward == 128
    assert len(seen) == 4


@pytest.mark.slow
def test_the_released_shape_is_planned_in_a_minute() -> None:
    """A quarter of 256K tokens, as one of four processes that share a row has them."""
    started = time.process_time()
    row = Row(tokens=262144, parts=4, recompute=True, bfloat16=True, train_vision=True)
    plan = plan_step(released_config(), row, 8)
    assert time.process_time() - started < 90
    assert 7e9 < plan.weights < 9.5e9
    assert plan.states == 16 * plan.weights // 8
    # A layer keeps its input, 65536 x 4096 numbers in float32; 36 of them, and one pass inside.
    assert 36 << 30 < plan.activations < 80 << 30
    # A block keeps 262144 x 1152 numbers in bf16, 27 of them; the four mergers keep more.
    assert 27 * 262144 * 1152 * 2 < plan.tower < 30 << 30
    assert plan.pixels == 4 * 1536 * 4 * 65536
    assert plan.host_pixels == 4 * plan.pixels


def test_other_models_are_parts_of_the_plan() -> None:
    """What GSPO and OPD hold beside the policy, divided as the code divides it."""
    config, other = middle_config(), load_model("scale:base", "cpu", torch.float32)[0].config
    row = varied(tokens=64)
    alone, shared = (
        plan_step(config, row, gpus, frozen={"reference": config, "teacher": other}, sampler=True)
        for gpus in (1, 4)
    )
    ours, theirs = count_weights(config), count_weights(other)
    assert alone.others == {"reference": 4 * ours.total, "teacher": 4 * theirs.total}
    assert shared.others == {
        "reference": FLOAT_BYTES * (ours.total // 4 + ours.root),
        "teacher": FLOAT_BYTES * (theirs.total // 4 + theirs.root),
        "sampler": FLOAT_BYTES * ours.total,
    }
    assert shared.step - sum(shared.others.values()) == plan_step(config, row, 4).step
    # Policy, reference and sampler are loaded whole before any is divided.
    assert shared.start == FLOAT_BYTES * (3 * ours.total + theirs.total)
    for gpus in (1, 4):  # who samples in bf16 has a copy for it
        rounded = plan_step(config, varied(tokens=64, bfloat16=True), gpus, sampler=True)
        assert rounded.others == {"sampler": 2 * ours.total}


def test_weights_are_counted_where_they_are() -> None:
    model, _ = load_model("scale:m2la", "cpu", torch.float32)
    found = count_weights(model.config)
    assert found.total == sum(p.numel() for p in model.parameters())
    blocks = [*model.model.visual.blocks, *model.model.language_model.layers]
    assert found.root == found.total - sum(p.numel() for b in blocks for p in b.parameters())
    frozen = plan_step(model.config, varied(tokens=64, train_vision=False), 2)
    assert frozen.states == (16 * found.total - 12 * found.tower) // 2


def test_a_conversions_shape_is_known_before_it_is_done() -> None:
    """The weights of `scale:m2la` were converted from `scale:base` by the preset `half`."""
    base = load_model("scale:base", "cpu", torch.float32)[0].config
    made = latent_config(base, "half")
    shipped = InternVideo3Config.from_dict(read_config(resolve_checkpoint("scale:m2la")))
    for name in ("latent_rank", "rope_slots", "row_form", "qk_norm", "num_hidden_layers"):
        assert getattr(made.text_config, name) == getattr(shipped.text_config, name), name
    with pytest.raises(ValueError, match="no preset 'hlaf'"):
        latent_config(base, "hlaf")


def test_a_recipes_own_start_is_planned_unless_another_is_named() -> None:
    """The scale recipe begins from a GQA model and converts it; its last stages hold others."""
    first, converts, *stages = plan_lines("scale", None, 2)
    assert "Planned: scale:base, GQA, 4 layers of width 128." in first
    assert converts.startswith("convert: from here on M²LA, 4 layers of width 128, latent rank 32")
    parts = {one.split(":")[0]: one for one in stages}
    assert "reference" in parts["gspo"]
    assert "teacher" in parts["opd"]
    assert all("sampler" in parts[one] for one in ("gspo", "opd"))
    assert "sampler" not in parts["sft_short"]
    assert "sampler" not in plan_lines("scale", None, 1)[-1]


def test_a_recipe_without_a_conversion_is_planned_as_it_starts(tmp_path: Path) -> None:
    """GQA as GQA; a stage that leaves values open as far as they are set."""
    stage = {"kind": "opd", "documents": None, "pack_tokens": 64, "teacher": None, "group": 1,
             "max_new_tokens": None, "optimiser": {"learning_rate": None}}  # fmt: skip
    recipe = {"about": "Open.", "start": "scale:base",
              "stages": {"opd": stage, "more": {**stage, "pack_tokens": None}}}  # fmt: skip
    (tmp_path / "open.yaml").write_text(json.dumps(recipe))
    first, opd, more = plan_lines(str(tmp_path / "open.yaml"), None, 2)
    assert "scale:base, GQA" in first
    assert "teacher" not in opd.removesuffix("no teacher is set")
    assert opd.endswith("no teacher is set")
    assert more == "more: pack_tokens is not set, so there is no plan."
    first, *_ = plan_lines(str(tmp_path / "open.yaml"), "scale:m2la", 1)
    assert "scale:m2la, M²LA" in first


def test_rows_that_cannot_be_divided_are_told_and_not_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the GPUs that there are, and by the heads. A few bytes of a tower are none."""
    monkeypatch.setattr("internvideo3.harness.train.plan_step", lambda *_, **__: SMALL)
    stage = {"kind": "sft", "documents": 8, "pack_tokens": 64, "sequence_parallel": 2,
             "optimiser": {"learning_rate": 1e-3}}  # fmt: skip
    recipe = {"about": "Divided.", "start": "scale:m2la", "stages": {
        "two": stage, "three": {**stage, "sequence_parallel": 3},
        "long": {**stage, "pack_tokens": 66000},
    }}  # fmt: skip
    path = tmp_path / "divided.yaml"
    path.write_text(json.dumps(recipe))
    _, two, three, why, whole = plan_lines(str(path), None, 1)
    assert two == (
        "two: sequence_parallel is 2, which needs a multiple of 2 GPUs; --gpus is 1. So it cannot "
        "run."
    )
    assert "needs a multiple of 3" in three and "--gpus is 1" in why
    assert whole.startswith("long: 66,000 tokens a GPU, 1 GPU: states 0, ")
    assert ", tower 0, activations" in whole
    _, two, three, *longs = plan_lines(str(path), None, 6)
    assert two.startswith("two: 32 tokens a GPU (64 shared by 2), 6 GPUs: ")
    assert "sequence_parallel is 3, which does not divide 2 key/value heads" in three
    assert [one.split(", ")[0] for one in longs] == [
        "long: 66,000 tokens a GPU", "long: 33,000 tokens a GPU (66,000 shared by 2)",
    ]  # fmt: skip


def test_without_a_start_the_released_shape_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every division of a long row that the GPUs allow."""
    planned: list[Row] = []

    def noted(config: Any, row: Row, gpus: int, **_: Any) -> Plan:
        planned.append(row)
        return SMALL

    monkeypatch.setattr("internvideo3.harness.train.plan_step", noted)
    told: list[tuple[str, int, int]] = []
    first, *_ = plan_lines("official", None, 4, lambda *one: told.append(one))
    assert [one for one in told if one[0] == "sft_long"] == [
        ("sft_long", done, 3) for done in (0, 1, 1, 2, 2, 3)
    ]
    assert "Planned: 8b, M²LA, 36 layers of width 4096, latent rank 896" in first
    assert [row.parts for row in planned if row.tokens == 262144] == [1, 2, 4]
    assert all(row.train_vision for row in planned if row.tokens == 262144)
